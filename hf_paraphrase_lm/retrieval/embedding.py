"""Documents to vectors: with any embedder, or by the words they have in common.

An embedder is any object with `embed(input_ids, attention_mask)`: `LongTensor`s of shape `(n, length)` in, a
`FloatTensor` of shape `(n, dim)` out, rows L2-normalised, so that the inner product of two rows is the relevance
f(x, z) = cosine(g(x), g(z)) of MARGE (Lewis et al. 2020, section 2). If it is an `nn.Module` on a CPU and has the
attribute `is_thread_safe = True`, as MARGE does, several threads call `embed` at once, which is faster.
"""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import chain

import numpy as np
import torch
import torch.nn.functional as F
from datasets import Dataset
from torch import nn
from tqdm.auto import tqdm

# Rows are sorted by length within blocks of this many batches: memory does not grow with the corpus. Our choice.
BATCHES_PER_BLOCK = 64
# On a CPU, threads share a batch down to so many documents each. Our choice: fewer keep a core less busy.
LEAST_DOCUMENTS_PER_THREAD = 8
# Slack for embeddings that were normalised in bfloat16 (8 bits).
NORM_TOLERANCE = 0.02


@contextmanager
def evaluation_mode(model) -> Iterator[torch.device]:
    """Without gradients and, for an `nn.Module`, in eval mode; every submodule's mode is restored, also after an error.

    Yields the device of the model: of its first parameter or buffer, else its attribute `device`, else the CPU.
    """
    if not isinstance(model, nn.Module):
        with torch.no_grad():
            yield torch.device(getattr(model, "device", "cpu"))
        return
    in_training = [module for module in model.modules() if module.training]
    try:
        model.eval()
        with torch.no_grad():
            yield next(chain(model.parameters(), model.buffers()), torch.empty(0)).device
    finally:
        for module in in_training:
            module.training = True


@contextmanager
def map_in_threads(threads: int) -> Iterator[Callable]:
    """Yields a `map` whose calls run in threads that share the CPU's cores, without gradients, under the same autocast.

    Two cores are busier with two small batches than with one that both work on, where the one waits for the other after
    each operation, and both for Python.
    """
    if threads == 1:
        yield map
        return
    cores, dtype, caches = torch.get_num_threads(), torch.get_autocast_dtype("cpu"), torch.is_autocast_cache_enabled()
    has_autocast = torch.is_autocast_enabled("cpu")
    begun = threading.Barrier(threads + 1)

    def begin():
        # All this is a thread's own and ends with it. One that has never asked for its number would later set it anew.
        torch.get_num_threads()
        torch.set_num_threads(cores // threads)
        torch.set_grad_enabled(False)
        if has_autocast:
            torch.autocast("cpu", dtype, cache_enabled=caches).__enter__()
        begun.wait()

    with ThreadPoolExecutor(threads, thread_name_prefix="embed", initializer=begin) as pool:
        try:
            for _ in range(threads):
                pool.submit(int)
            begun.wait()
        except BaseException:
            begun.abort()
            raise
        finally:
            # Others that begin later take the number that was set last.
            torch.set_num_threads(cores)
        yield pool.map


def can_use_threads(embedder, device: torch.device) -> bool:
    """Whether several threads may call `embed` at once, and gain by it: on a CPU, without hooks, which may keep state.

    Hooks also move weights to the CPU and away again, where they do not fit into it.
    """
    hooks = "_forward_hooks", "_forward_pre_hooks"
    return (
        isinstance(embedder, nn.Module)
        and device.type == "cpu"
        and getattr(embedder, "is_thread_safe", False)
        and not any("forward" in vars(m) or any(getattr(m, name) for name in hooks) for m in embedder.modules())
    )


def pad_documents(documents: list[list[int]], pad_token_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns `input_ids` and `attention_mask`, both int64 of shape `(n, longest)`, padded on the right."""
    lengths = torch.tensor([len(ids) for ids in documents])
    attention_mask = torch.arange(int(lengths.max())) < lengths[:, None]
    input_ids = torch.full(attention_mask.shape, pad_token_id)
    input_ids[attention_mask] = torch.tensor(list(chain.from_iterable(documents)))
    return input_ids, attention_mask.long()


def embed_documents(
    documents: Dataset,
    embedder,
    pad_token_id: int,
    batch_size: int = 64,
    rows: np.ndarray | None = None,
    progress: bool | tqdm = True,
) -> np.ndarray:
    """Embeds documents in eval mode, without gradients, in batches of similar length; no random number is drawn here.

    Args:
        documents: dataset with the column `input_ids`.
        embedder: see the top of this file; an `nn.Module` keeps its modes. Threads that call it at once have each
            their share of the batch and of `torch.get_num_threads()`.
        pad_token_id: fills the shorter documents of a batch, masked out.
        batch_size: documents that are embedded at once.
        rows: int64 of shape `(n,)`, which documents, in which order; all if None.
        progress: show a bar, or a bar to advance by one a document.

    Returns:
        float32 of shape `(n, dim)`, in the order of `rows`.

    Raises:
        ValueError: a document without tokens; embeddings of a wrong shape, not finite, or not of length 1
            (all-zero is allowed: related to nothing).
    """
    rows = np.arange(len(documents)) if rows is None else np.asarray(rows)
    if len(rows) == 0:
        raise ValueError("There is nothing to embed: the corpus has no documents, or no rows were asked for.")
    texts = documents.select_columns("input_ids").with_format(None)
    embeddings = None
    bar = progress if isinstance(progress, tqdm) else tqdm(total=len(rows), desc="embed", disable=not progress)

    def embed(batch: list[list[int]]) -> np.ndarray:
        input_ids, attention_mask = pad_documents(batch, pad_token_id)
        vectors = embedder.embed(input_ids.to(device), attention_mask.to(device))
        return vectors.detach().to("cpu", torch.float32).numpy()

    try:
        with evaluation_mode(embedder) as device:
            cores, most = torch.get_num_threads(), min(batch_size, len(rows))
            threads = min(cores, most // LEAST_DOCUMENTS_PER_THREAD) if can_use_threads(embedder, device) else 1
            # All threads get the same number of cores, and no core is left over.
            threads = next(number for number in range(max(1, threads), 0, -1) if cores % number == 0)
            size = most // threads
            with map_in_threads(threads) as map_batches:
                for start in range(0, len(rows), batch_size * BATCHES_PER_BLOCK):
                    block = rows[start : start + batch_size * BATCHES_PER_BLOCK]
                    ids = texts[block.tolist()]["input_ids"]
                    by_length = sorted(range(len(block)), key=lambda i: -len(ids[i]))
                    if not ids[by_length[-1]]:
                        raise ValueError(
                            f"Row {block[by_length[-1]]} of the documents has no tokens, so it has no embedding. "
                            "Drop empty documents, as chunk_documents does."
                        )
                    batches = [by_length[first : first + size] for first in range(0, len(block), size)]
                    batches_of_ids = [[ids[i] for i in batch] for batch in batches]
                    for batch, vectors in zip(batches, map_batches(embed, batches_of_ids), strict=True):
                        _check(vectors, block[batch])
                        if embeddings is None:
                            embeddings = np.empty((len(rows), vectors.shape[1]), dtype=np.float32)
                        embeddings[start + np.array(batch)] = vectors
                        bar.update(len(batch))
    finally:
        if bar is not progress:
            bar.close()
    return embeddings


def _check(vectors: np.ndarray, rows: np.ndarray) -> None:
    if vectors.ndim != 2 or len(vectors) != len(rows):
        raise ValueError(
            f"embed() must return one vector a document, shape ({len(rows)}, dim), but it returned {vectors.shape}."
        )
    norms = np.linalg.norm(vectors, axis=1)
    # A comparison with NaN is False, so the check is written for what is right.
    right = (np.abs(norms - 1) <= NORM_TOLERANCE) | (norms == 0)
    if not right.all():
        worst = int(np.argmin(right))
        raise ValueError(
            f"embed() must return vectors of length 1, but that of row {rows[worst]} has length {norms[worst]:.4g}. "
            "The inner product would be no cosine: normalise the rows, or if they are not finite, look at the weights."
        )


class LexicalEmbedder(nn.Module):
    """TF-IDF vectors of token ids, randomly projected: what two documents share in rare tokens, before any training.

    `embed` gives the L2-normalised sum over the distinct tokens of a document of `(1 + log tf) * idf * r`, where tf
    counts the token in the document, idf = log(documents / documents with the token), and r is the token's fixed
    Gaussian vector of `dim` numbers. So tokens of every document ([CLS], [SEP]) count nothing, tokens that the corpus
    does not have neither, and a document of nothing else is the zero vector. The inner product estimates the TF-IDF
    cosine with an error of about 1 / sqrt(dim). The paper starts from the model's own embeddings; first groups from
    shared words, all of this and dim = 1024 are our choice. It takes `4 * dim * (largest token id)` bytes.

    Args:
        documents: dataset with the column `input_ids`; gives the document frequencies.
        dim: length of the vectors.
        seed: of the projection.
        progress: show a bar while the tokens are counted.
    """

    is_thread_safe = True

    def __init__(self, documents: Dataset, dim: int = 1024, seed: int = 0, progress: bool = True):
        super().__init__()
        if len(documents) == 0:
            raise ValueError("LexicalEmbedder needs documents to count tokens in, but the corpus is empty.")
        frequency = np.zeros(0, dtype=np.int64)
        with tqdm(total=len(documents), desc="count tokens", disable=not progress) as bar:
            for batch in documents.select_columns("input_ids").with_format("numpy").iter(1000):
                distinct = np.concatenate([np.unique(ids) for ids in batch["input_ids"]]).astype(np.int64)
                counts = np.bincount(distinct, minlength=len(frequency))
                counts[: len(frequency)] += frequency
                frequency = counts
                bar.update(len(batch["input_ids"]))
        idf = torch.from_numpy(np.log(len(documents) / np.maximum(frequency, 1))).float()
        idf[torch.from_numpy(frequency == 0)] = 0.0
        projection = torch.randn(len(idf), dim, generator=torch.Generator().manual_seed(seed))
        self.register_buffer("weighted_projection", projection.mul_(idf[:, None]))

    def embed(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """`input_ids`, `attention_mask` int64 `(n, length)` -> float32 `(n, dim)`, rows of length 1 (or 0)."""
        vocabulary = len(self.weighted_projection)
        counted = attention_mask.bool() & (input_ids < vocabulary)
        document, _ = counted.nonzero(as_tuple=True)
        keys, tf = torch.unique(document * vocabulary + input_ids[counted], return_counts=True)
        sizes = torch.bincount(keys // vocabulary, minlength=len(input_ids))
        vectors = F.embedding_bag(
            keys % vocabulary,
            self.weighted_projection,
            offsets=sizes.cumsum(0) - sizes,
            mode="sum",
            per_sample_weights=1 + tf.to(self.weighted_projection.dtype).log(),
        )
        return F.normalize(vectors.float(), dim=-1)
