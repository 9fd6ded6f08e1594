"""Which texts and which weights vectors were made from: content hashes that are the same in every process."""

import numpy as np
import pyarrow.compute as pc
import torch
import xxhash
from datasets import Dataset
from torch import nn


def corpus_fingerprint(documents: Dataset) -> str:
    """Hash of `input_ids` row by row: other texts or another order give another one, how they are stored does not."""
    lengths, tokens = xxhash.xxh3_128(), xxhash.xxh3_128()
    for batch in documents.select_columns("input_ids").with_format("arrow").iter(1000):
        for chunk in batch.column("input_ids").chunks:
            lengths.update(np.ascontiguousarray(pc.list_value_length(chunk).to_numpy(), dtype=np.int64))
            tokens.update(np.ascontiguousarray(pc.list_flatten(chunk).to_numpy(), dtype=np.int32))
    return xxhash.xxh3_128(lengths.digest() + tokens.digest()).hexdigest()


def embedder_fingerprint(embedder) -> str | None:
    """Hash of the names, shapes, dtypes and values of an `nn.Module`'s weights (its configuration is not part of it).

    Of any other embedder its attribute `fingerprint`, a string that changes with its vectors; None if it has none.
    """
    if not isinstance(embedder, nn.Module):
        return getattr(embedder, "fingerprint", None)
    content = xxhash.xxh3_128()
    for name, tensor in sorted(embedder.state_dict().items()):
        content.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        content.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return content.hexdigest()
