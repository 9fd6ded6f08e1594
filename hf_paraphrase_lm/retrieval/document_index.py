"""A searchable corpus: documents beside a FAISS index of their embeddings, on disk as one folder."""

import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path

import faiss
import numpy as np
import torch
from datasets import Dataset, load_from_disk
from huggingface_hub import CommitInfo, HfApi
from tqdm.auto import tqdm

from .embedding import BATCHES_PER_BLOCK, embed_documents
from .fingerprint import corpus_fingerprint, embedder_fingerprint
from .folder_claim import FolderClaim
from .index_files import (
    DATA_FOLDER,
    FORMAT_VERSION,
    check_files,
    check_target,
    flush_to_disk,
    hash_of,
    read_description,
)

# Documents that an approximate index is trained on: a random sample, our choice.
TRAINING_SAMPLE = 100_000
# Slack for rounding where equal scores count as equal, our choice.
SCORE_TOLERANCE = 1e-5
# Written to a repository that has none; a later push replaces the data folder, so its name is left open.
CARD = """---
tags:
- document-index
- faiss
configs:
- config_name: default
  data_files: index-data-*/documents/*.arrow
---

# {name}

{rows} documents with embeddings of length {dim} in a FAISS index `{factory}` (inner product), made with
`hf-paraphrase-lm`. `load_dataset("{name}")` gives the documents alone.

```python
from hf_paraphrase_lm import DocumentIndex

index = DocumentIndex.from_hub("{name}", memory_map=True)
```
"""


class DocumentIndex:
    """Finds the documents whose embeddings have the largest inner product with a query.

    Made by `build`, `load` or `from_hub`.

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
            batch_size: documents that are embedded at once.
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
            # Otherwise a block more would be in memory to the end.
            del first
            for start in range(block_size, len(documents), block_size):
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
        queries, exclude = self._check_queries(embeddings, k, exclude)
        scores, indices = self._nearest(queries, k, exclude, batch_size, progress)
        if (indices < 0).any():
            query = int(np.argmax((indices < 0).any(axis=1)))
            raise ValueError(
                f"The index {self.factory!r} found only {(indices[query] >= 0).sum()} documents for query {query}, "
                f"but {k} were asked for. Let it look at more of them, for example: index.faiss_index.nprobe = 32."
            )
        return scores, indices

    def recall(
        self,
        embeddings: np.ndarray | torch.Tensor,
        k: int = 10,
        exclude: np.ndarray | None = None,
        embedder=None,
        pad_token_id: int | None = None,
        batch_size: int = 64,
        progress: bool = True,
    ) -> float:
        """Share of the k nearest documents of an exact search that `search` finds, mean over the queries.

        Every query is compared with all documents, a block at a time. A document found counts if its exact score is
        among the k largest, so of equal documents any will do.

        Args:
            embeddings: queries, as for `search`.
            k: how many documents a query.
            exclude: as for `search`.
            embedder: of the documents, embeds all of them once more: exact for any index. None compares with the
                vectors in the index, which leaves out what an index that compresses them (SQ, PQ, PCA) has lost.
            pad_token_id: of the documents' tokenizer, with `embedder`.
            batch_size: documents that are embedded at once.
            progress: show a bar.

        Returns:
            Between 0 and 1; 1 for the factory "Flat".

        Raises:
            ValueError: no queries; FAISS cannot give the vectors back, so `embedder` is needed; what `search` raises
                about its arguments (documents that are not found are missed, no error); what `embed_documents` raises.
        """
        queries, exclude = self._check_queries(embeddings, k, exclude)
        if len(queries) == 0:
            raise ValueError("Recall is a mean over queries, but there are none.")
        _, found = self._nearest(queries, k, exclude, batch_size=1024, progress=False)
        found_scores = np.full(found.shape, -np.inf, dtype=np.float32)
        best = np.full((len(queries), k), -np.inf, dtype=np.float32)
        start = 0
        with tqdm(total=len(self), desc="exact search", disable=not progress) as bar:
            for vectors in self._vectors(embedder, pad_token_id, batch_size, bar):
                scores = queries @ vectors.T
                query, place = np.nonzero((exclude >= start) & (exclude < start + len(vectors)))
                scores[query, exclude[query, place] - start] = -np.inf
                query, place = np.nonzero((found >= start) & (found < start + len(vectors)))
                found_scores[query, place] = scores[query, found[query, place] - start]
                best = np.partition(np.concatenate([best, scores], axis=1), -k, axis=1)[:, -k:]
                start += len(vectors)
        return float((found_scores >= best.min(axis=1, keepdims=True) - SCORE_TOLERANCE).mean())

    def _vectors(self, embedder, pad_token_id: int | None, batch_size: int, bar: tqdm) -> Iterator[np.ndarray]:
        """Blocks of the documents' vectors, float32 of shape `(n, dim)`: embedded again, or those in the index."""
        size = batch_size * BATCHES_PER_BLOCK
        for start in range(0, len(self), size):
            if embedder is not None:
                rows = np.arange(start, min(start + size, len(self)))
                yield embed_documents(self.documents, embedder, pad_token_id, batch_size, rows, progress=bar)
                continue
            try:
                # In FAISS 1.15 the process dies where fast-scan indices in inverted lists are asked for their vectors.
                if "fs" in self.factory:
                    raise RuntimeError("fast-scan codes")
                vectors = self.faiss_index.reconstruct_n(start, min(size, len(self) - start))
            except RuntimeError as error:
                raise ValueError(
                    f"The index {self.factory!r} cannot give its vectors back ({error}). "
                    "Pass embedder and pad_token_id, so that the documents are embedded again."
                ) from error
            yield vectors
            bar.update(len(vectors))

    def _check_queries(self, embeddings, k: int, exclude) -> tuple[np.ndarray, np.ndarray]:
        """The queries as float32 `(queries, dim)` and what they exclude as `(queries, n)`, or an error."""
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
        if exclude is None:
            exclude = np.empty((len(queries), 0), dtype=np.int64)
        else:
            exclude = np.asarray(exclude).reshape(len(queries), -1)
        if not 1 <= k <= len(self) - exclude.shape[1]:
            raise ValueError(
                f"k must be between 1 and {len(self) - exclude.shape[1]}, but got {k}: the index has {len(self)} "
                f"documents, and {exclude.shape[1]} are excluded a query."
            )
        return queries, exclude

    def _nearest(self, queries, k: int, exclude, batch_size: int, progress: bool) -> tuple[np.ndarray, np.ndarray]:
        """Scores and rows, both `(queries, k)`; -inf and -1 where the index visited too few documents."""
        scores = np.empty((len(queries), k), dtype=np.float32)
        indices = np.empty((len(queries), k), dtype=np.int64)
        starts = range(0, len(queries), batch_size)
        for start in tqdm(starts, desc="search", disable=not progress or len(starts) < 2):
            part = slice(start, start + batch_size)
            found_scores, found = self.faiss_index.search(queries[part], k + exclude.shape[1])
            allowed = (found >= 0) & ~(found[:, :, None] == exclude[part, None, :]).any(axis=-1)
            best = np.argsort(~allowed, axis=1, kind="stable")[:, :k]
            scores[part] = np.take_along_axis(np.where(allowed, found_scores, -np.inf), best, axis=1)
            indices[part] = np.take_along_axis(np.where(allowed, found, -1), best, axis=1)
        return scores, indices

    def save(self, folder: str | os.PathLike) -> None:
        """Writes documents, vectors and fingerprints; if interrupted, the folder holds all of the old index or the new.

        Raises:
            FileExistsError: `folder` is a file, or a folder with something else than an index in it.
            RuntimeError: another process is saving to it.
        """
        folder = Path(folder)
        check_target(folder)
        folder.mkdir(parents=True, exist_ok=True)
        with FolderClaim(folder):
            self._write(folder)

    def _write(self, folder: Path) -> None:
        data = folder / f"index-data-{uuid.uuid4().hex}"
        try:
            data.mkdir()
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
                    path.relative_to(data).as_posix(): {"bytes": path.stat().st_size, "xxh3_128": hash_of(path)}
                    for path in files
                },
            }
            new_description = data / "index.json"
            new_description.write_text(json.dumps(description, indent=2) + "\n")
            for path in [*files, new_description, data / "documents", data]:
                flush_to_disk(path)
            os.replace(new_description, folder / "index.json")
        except BaseException:
            # Ctrl-C may come just after the new index has taken its place.
            if not (folder / "index.json").is_file() or read_description(folder)["data"] != data.name:
                shutil.rmtree(data, ignore_errors=True)
            raise
        flush_to_disk(folder)
        # What the documents of this object are memory-mapped from stays, so that they can still go to other processes.
        in_use = {Path(file["filename"]).resolve().parent.parent for file in self.documents.cache_files}
        for entry in folder.iterdir():
            if DATA_FOLDER.fullmatch(entry.name) and entry != data and entry.resolve() not in in_use:
                shutil.rmtree(entry, ignore_errors=True)

    @classmethod
    def load(
        cls,
        folder: str | os.PathLike,
        documents: Dataset | None = None,
        embedder=None,
        memory_map: bool = False,
        verify: bool = True,
    ) -> "DocumentIndex":
        """Opens a saved index; the documents are memory-mapped.

        Args:
            folder: where `save` wrote it.
            documents: the corpus that it must belong to, used in place of the saved copy.
            embedder: the model that it must belong to.
            memory_map: leave the vectors on the disk, too, whatever the factory: opened at once, read as they are
                searched, shared by the processes that open them. Every search of a factory without inverted lists
                ("Flat", "SQ8", ...) reads all of them; "IVF...,..." only the lists that it visits. Nothing can be added
                to such a `faiss_index`: FAISS ends the process.
            verify: read every file to compare its hash. False compares the sizes only; for an index that is larger than
                the memory, where reading it takes long.

        Raises:
            FileNotFoundError: no index there.
            ValueError: another format version; a missing, truncated or changed file; another corpus; another model.
        """
        folder = Path(folder)
        description = read_description(folder)
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
        try:
            check_files(data, description["files"], verify)
            index = faiss.read_index(str(data / "vectors.faiss"), faiss.IO_FLAG_MMAP_IFC if memory_map else 0)
            saved = load_from_disk(data / "documents") if documents is None else documents
        except (OSError, RuntimeError, ValueError):
            if read_description(folder)["data"] == data.name:
                raise
            # Another process has replaced it meanwhile.
            return cls.load(folder, documents, embedder, memory_map, verify)
        fingerprints = description["corpus_fingerprint"], description["embedder_fingerprint"]
        return cls(saved, index, description["factory"], *fingerprints)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        revision: str | None = None,
        commit_message: str = "Upload document index",
        token: str | None = None,
    ) -> CommitInfo:
        """Uploads what `save` writes to a dataset repository, in one commit that replaces an index pushed before.

        A card is written where there is none; it lets `load_dataset(repo_id)` find the documents. Other files stay.

        Args:
            repo_id: `"user/name"`, or `"name"` in the namespace of the token; made if needed.
            private: whether a repository made here is private; the account's default if None.
            revision: the branch to commit to, made if needed; the main branch if None.
            commit_message: first line of the commit.
            token: access token; the one stored by `hf auth login` if None.

        Returns:
            The commit, with its `commit_url` and `oid`.

        Raises:
            huggingface_hub.errors.HfHubHTTPError: the Hub refuses.
        """
        hub = HfApi(token=token)
        with tempfile.TemporaryDirectory() as folder:
            self.save(folder)
            repo_id = hub.create_repo(repo_id, repo_type="dataset", private=private, exist_ok=True).repo_id
            if revision is not None:
                hub.create_branch(repo_id, repo_type="dataset", branch=revision, exist_ok=True)
            if not hub.file_exists(repo_id, "README.md", repo_type="dataset", revision=revision):
                card = CARD.format(name=repo_id, rows=len(self), dim=self.dim, factory=self.factory)
                (Path(folder) / "README.md").write_text(card, encoding="utf-8")
            return hub.upload_folder(
                repo_id=repo_id,
                repo_type="dataset",
                folder_path=folder,
                revision=revision,
                commit_message=commit_message,
                delete_patterns="index-data-*",
            )

    @classmethod
    def from_hub(
        cls, repo_id: str, *, revision: str | None = None, token: str | None = None, **arguments
    ) -> "DocumentIndex":
        """Opens an index that `push_to_hub` uploaded; it is downloaded once, and found in the cache when offline.

        Args:
            repo_id: the dataset repository, `"user/name"`.
            revision: branch, tag or commit; the main branch if None.
            token: access token; the one stored by `hf auth login` if None.
            arguments: `documents`, `embedder`, `memory_map` and `verify` of `load`.

        Raises:
            FileNotFoundError: no index in the repository.
            huggingface_hub.errors.HfHubHTTPError: no such repository or revision, or no access to it.
            ValueError: what `load` raises.
        """
        folder = HfApi(token=token).snapshot_download(
            repo_id, repo_type="dataset", revision=revision, allow_patterns=["index.json", "index-data-*"]
        )
        if not (Path(folder) / "index.json").is_file():
            raise FileNotFoundError(
                f"The dataset repository {repo_id} has no index.json at {revision or 'its main branch'}, so it holds "
                "no DocumentIndex. Upload one there with push_to_hub."
            )
        return cls.load(folder, **arguments)


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
