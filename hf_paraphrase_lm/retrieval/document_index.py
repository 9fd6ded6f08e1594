"""A searchable corpus: documents beside a FAISS index of their embeddings, on disk as one folder."""

import json
import os
import re
import shutil
import uuid
from pathlib import Path

import faiss
import numpy as np
import torch
import xxhash
from datasets import Dataset, load_from_disk
from tqdm.auto import tqdm

from .embedding import BATCHES_PER_BLOCK, embed_documents
from .fingerprint import corpus_fingerprint, embedder_fingerprint

FORMAT_VERSION = 1
# Documents that an approximate index is trained on: a random sample, our choice.
TRAINING_SAMPLE = 100_000
# `index.json` names one data folder. A save writes a new one beside it and then replaces `index.json`, one atomic step.
_DATA_FOLDER = re.compile(r"index-data-[0-9a-f]{32}")


class DocumentIndex:
    """Finds the documents whose embeddings have the largest inner product with a query; made by `build` or `load`.

    Attributes:
        documents (`datasets.Dataset`): the corpus; a row found is an index into it.
        faiss_index (`faiss.Index`): the vectors, in the order of the rows; its settings (`nprobe`, ...) may be changed.
        corpus_fingerprint (`str`), embedder_fingerprint (`str` or None): what the vectors were made from.
    """

    def __init__(
        self,
        documents: Dataset,
        faiss_index: faiss.Index,
        factory: str,
        corpus_fingerprint: str,
        embedder_fingerprint: str | None,
    ):
        self.documents = documents
        self.faiss_index = faiss_index
        self.factory = factory
        self.corpus_fingerprint = corpus_fingerprint
        self.embedder_fingerprint = embedder_fingerprint

    def __len__(self) -> int:
        return self.faiss_index.ntotal

    @property
    def dim(self) -> int:
        return self.faiss_index.d

    @classmethod
    def build(
        cls,
        documents: Dataset,
        embedder,
        pad_token_id: int,
        factory: str = "Flat",
        batch_size: int = 64,
        seed: int = 0,
        progress: bool = True,
    ) -> "DocumentIndex":
        """Embeds the documents and adds them to a new FAISS index with inner product.

        Args:
            documents: dataset with the column `input_ids`, as `chunk_documents` makes it.
            embedder: any object with `embed(input_ids, attention_mask)`, see `embed_documents`.
            pad_token_id: of the documents' tokenizer.
            factory: string for `faiss.index_factory`; "Flat" searches exactly. Others are trained on a random sample.
            batch_size: documents in one call of `embed`.
            seed: of that sample.
            progress: show a bar.

        Raises:
            ValueError: no documents; a factory that FAISS does not know or cannot train on so few documents; what
                `embed_documents` raises.
        """
        if len(documents) == 0:
            raise ValueError("An index needs documents, but the corpus is empty.")
        arguments = {"embedder": embedder, "pad_token_id": pad_token_id, "batch_size": batch_size}
        block_size = batch_size * BATCHES_PER_BLOCK
        with tqdm(total=len(documents), desc="build index", disable=not progress) as bar:
            first = embed_documents(
                documents, rows=np.arange(min(block_size, len(documents))), progress=bar, **arguments
            )
            try:
                index = faiss.index_factory(first.shape[1], factory, faiss.METRIC_INNER_PRODUCT)
                if not index.is_trained:
                    size = min(len(documents), TRAINING_SAMPLE)
                    sample = np.random.default_rng(seed).choice(len(documents), size, replace=False)
                    index.train(embed_documents(documents, rows=sample, progress=False, **arguments))
            except RuntimeError as error:
                raise ValueError(
                    f"FAISS cannot make an index {factory!r} for {len(documents)} vectors of length {first.shape[1]}. "
                    f"Use 'Flat' or another faiss.index_factory string. FAISS says: {error}"
                ) from error
            index.add(first)
            for start in range(len(first), len(documents), block_size):
                rows = np.arange(start, min(start + block_size, len(documents)))
                index.add(embed_documents(documents, rows=rows, progress=bar, **arguments))
        return cls(documents, index, factory, corpus_fingerprint(documents), embedder_fingerprint(embedder))

    def search(
        self,
        embeddings: np.ndarray | torch.Tensor,
        k: int,
        exclude: np.ndarray | None = None,
        batch_size: int = 1024,
        progress: bool = True,
    ) -> tuple[np.ndarray, np.ndarray]:
        """The k documents with the largest inner product, best first.

        Args:
            embeddings: float of any precision, shape `(queries, dim)`, NumPy or torch; compared in float32.
            k: how many documents a query.
            exclude: int, shape `(queries,)` or `(queries, n)`: rows that a query must not find, such as its own; -1 is
                no row.
            batch_size: queries searched at a time.
            progress: show a bar if there is more than one batch.

        Returns:
            `scores` float32 and `indices` int64 (rows of `documents`), both of shape `(queries, k)`.

        Raises:
            ValueError: a wrong shape; not finite; k beyond the corpus; fewer than k found (an approximate index).
        """
        if isinstance(embeddings, torch.Tensor):
            embeddings = embeddings.detach().to("cpu", torch.float32).numpy()
        queries = np.ascontiguousarray(embeddings, dtype=np.float32)
        if queries.ndim != 2 or queries.shape[1] != self.dim:
            raise ValueError(
                f"embeddings must have the shape (queries, {self.dim}), but got {queries.shape}. "
                "Was this index built with another model?"
            )
        if not np.isfinite(queries).all():
            row = int(np.argmin(np.isfinite(queries).all(axis=1)))
            raise ValueError(f"Query {row} has values that are not finite (NaN or infinity): nothing is nearest to it.")
        exclude = np.empty((len(queries), 0)) if exclude is None else np.asarray(exclude).reshape(len(queries), -1)
        if not 1 <= k <= len(self) - exclude.shape[1]:
            raise ValueError(
                f"k must be between 1 and {len(self) - exclude.shape[1]}, but got {k}: the index has {len(self)} "
                f"documents, and {exclude.shape[1]} are excluded a query."
            )
        scores = np.empty((len(queries), k), dtype=np.float32)
        indices = np.empty((len(queries), k), dtype=np.int64)
        starts = range(0, len(queries), batch_size)
        for start in tqdm(starts, desc="search", disable=not progress or len(starts) < 2):
            part = slice(start, start + batch_size)
            found_scores, found = self.faiss_index.search(queries[part], k + exclude.shape[1])
            # FAISS fills up with -1 where it visited fewer documents.
            allowed = (found >= 0) & ~(found[:, :, None] == exclude[part, None, :]).any(axis=-1)
            if (allowed.sum(axis=1) < k).any():
                query = int(np.argmax(allowed.sum(axis=1) < k))
                raise ValueError(
                    f"The index {self.factory!r} found only {allowed[query].sum()} documents for query "
                    f"{start + query}, but {k} were asked for. Let it look at more of them, for example: "
                    "index.faiss_index.nprobe = 32."
                )
            best = np.argsort(~allowed, axis=1, kind="stable")[:, :k]
            scores[part] = np.take_along_axis(found_scores, best, axis=1)
            indices[part] = np.take_along_axis(found, best, axis=1)
        return scores, indices

    def save(self, folder: str | os.PathLike) -> None:
        """Writes documents, vectors and fingerprints; if interrupted, the folder holds all of the old index or the new.

        Raises:
            FileExistsError: `folder` is a file, or a folder with something else than an index in it.
        """
        folder = Path(folder)
        _check_target(folder)
        data = folder / f"index-data-{uuid.uuid4().hex}"
        try:
            data.mkdir(parents=True)
            self.documents.with_format(None).save_to_disk(data / "documents")
            faiss.write_index(self.faiss_index, str(data / "vectors.faiss"))
            files = sorted(path for path in data.rglob("*") if path.is_file())
            description = {
                "kind": "DocumentIndex",
                "format_version": FORMAT_VERSION,
                "data": data.name,
                "rows": len(self),
                "dim": self.dim,
                "factory": self.factory,
                "corpus_fingerprint": self.corpus_fingerprint,
                "embedder_fingerprint": self.embedder_fingerprint,
                "files": {
                    path.relative_to(data).as_posix(): {"bytes": path.stat().st_size, "xxh3_128": _hash(path)}
                    for path in files
                },
            }
            new_description = data / "index.json"
            new_description.write_text(json.dumps(description, indent=2) + "\n")
            for path in [*files, new_description, data / "documents", data]:
                _flush_to_disk(path)
            os.replace(new_description, folder / "index.json")
        except BaseException:
            # Ctrl-C may come just after the new index has taken its place.
            if not (folder / "index.json").is_file() or _read_description(folder)["data"] != data.name:
                shutil.rmtree(data, ignore_errors=True)
            raise
        _flush_to_disk(folder)
        # What the documents of this object are memory-mapped from stays, so that they can still go to other processes.
        in_use = {Path(file["filename"]).resolve().parent.parent for file in self.documents.cache_files}
        for entry in folder.iterdir():
            if _DATA_FOLDER.fullmatch(entry.name) and entry != data and entry.resolve() not in in_use:
                shutil.rmtree(entry, ignore_errors=True)

    @classmethod
    def load(cls, folder: str | os.PathLike, documents: Dataset | None = None, embedder=None) -> "DocumentIndex":
        """Opens a saved index; the documents are memory-mapped.

        Args:
            folder: where `save` wrote it.
            documents: the corpus that it must belong to, used in place of the saved copy.
            embedder: the model that it must belong to.

        Raises:
            FileNotFoundError: no index there.
            ValueError: another format version; a missing, truncated or changed file; another corpus; another model.
        """
        folder = Path(folder)
        description = _read_description(folder)
        if description["format_version"] > FORMAT_VERSION:
            raise ValueError(
                f"The index in {folder} has format version {description['format_version']}, but this version of "
                f"hf_paraphrase_lm reads up to {FORMAT_VERSION}. Update the package, or build the index again."
            )
        if documents is not None and corpus_fingerprint(documents) != description["corpus_fingerprint"]:
            raise ValueError(
                f"The index in {folder} was built from other documents than the {len(documents)} given: their tokens "
                "or their order differ. Load it without `documents` to use the saved ones, or build it again."
            )
        if embedder is not None:
            _check_embedder(folder, embedder, description["embedder_fingerprint"])
        data = folder / description["data"]
        for name, file in description["files"].items():
            path = data / name
            size = path.stat().st_size if path.is_file() else None
            if size != file["bytes"] or _hash(path) != file["xxh3_128"]:
                state = "is missing" if size is None else f"has {size} bytes and not the content saved"
                raise ValueError(
                    f"The index in {folder} is damaged: {data.name}/{name} {state} (expected {file['bytes']} bytes). "
                    "Copy it again from where it is whole, or build it again."
                )
        index = faiss.read_index(str(data / "vectors.faiss"))
        documents = load_from_disk(data / "documents") if documents is None else documents
        fingerprints = description["corpus_fingerprint"], description["embedder_fingerprint"]
        return cls(documents, index, description["factory"], *fingerprints)


def _read_description(folder: Path) -> dict:
    path = folder / "index.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"There is no index in {folder}: it has no index.json. Either the path is wrong or the first save into it "
            "was interrupted; build the index again."
        )
    try:
        description = json.loads(path.read_text())
        if description["kind"] != "DocumentIndex":
            raise KeyError("kind")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged or describes no DocumentIndex; build the index again.") from error
    return description


def _check_target(folder: Path) -> None:
    if folder.is_dir():
        try:
            _read_description(folder)
            return
        except FileNotFoundError:
            # A first save that was killed leaves a data folder only.
            if all(_DATA_FOLDER.fullmatch(entry.name) for entry in folder.iterdir()):
                return
        except ValueError:
            pass
    elif not folder.exists():
        return
    raise FileExistsError(
        f"{folder} exists and is not a DocumentIndex, so nothing was written. Give an empty or a new folder."
    )


def _check_embedder(folder: Path, embedder, expected: str | None) -> None:
    given = embedder_fingerprint(embedder)
    if given is None or expected is None:
        raise ValueError(
            f"It cannot be checked that the vectors in {folder} are from this embedder: an embedder that is no "
            "nn.Module needs an attribute `fingerprint` (a string), when the index is built and when it is loaded."
        )
    if given != expected:
        raise ValueError(
            f"The index in {folder} was built with another model than the {type(embedder).__name__} given, or with "
            "other weights of it, so their vectors do not compare. Load that model or build the index again."
        )


def _hash(path: Path) -> str:
    content = xxhash.xxh3_128()
    with open(path, "rb") as file:
        while block := file.read(1 << 24):
            content.update(block)
    return content.hexdigest()


def _flush_to_disk(path: Path) -> None:
    # Windows cannot open a folder as a file.
    if path.is_dir() and os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
