"""Documents as arrays of numbers, those of a shard together: one side of the graph of targets and evidence."""

from functools import cached_property

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xxhash
from datasets import Dataset

from .fingerprint import corpus_fingerprint

# Rows read at a time. Our choice.
ROWS_PER_BATCH = 10_000


class Corpus:
    """The rows of a documents dataset that may be targets, or those that may be evidence.

    Attributes:
        texts: the column `input_ids`, as lists.
        document_ids: int64 `(rows,)`, the same number for chunks of one document, from 0.
        language_ids: int64 `(rows,)`, the number that `languages` has for each.
        by_shard: int64, the rows that are not left out, sorted by shard.

    Args:
        documents: dataset with the columns that `chunk_documents` makes.
        shards, languages: the number of each value; values that they lack are added. Two corpora that share them have
            one number for one value.
        first_chunks_only: leave out all rows but those with chunk 0.
    """

    def __init__(self, documents: Dataset, shards: dict, languages: dict, first_chunks_only: bool = False):
        self.documents = documents
        self.texts = documents.select_columns("input_ids").with_format(None)
        columns = ["document", "language", "shard", *(["chunk"] if first_chunks_only else [])]
        table = pa.concat_tables(documents.select_columns(columns).with_format("arrow").iter(ROWS_PER_BATCH))
        self.document_ids = _encode(table.column("document"), {})
        self.language_ids = _encode(table.column("language"), languages)
        shard_ids = _encode(table.column("shard"), shards)
        by_shard = np.argsort(shard_ids, kind="stable")
        if first_chunks_only:
            by_shard = by_shard[table.column("chunk").to_numpy()[by_shard] == 0]
        self.by_shard = by_shard
        self._bounds = np.searchsorted(shard_ids[by_shard], np.arange(len(shards) + 1))

    def __len__(self) -> int:
        return len(self.by_shard)

    def rows(self, shard: int) -> np.ndarray:
        """The rows of one shard, int64, ascending."""
        return self.by_shard[self._bounds[shard] : self._bounds[shard + 1]]

    @cached_property
    def lengths(self) -> np.ndarray:
        """Tokens of each row, int64 `(rows,)`."""
        batches = self.documents.select_columns("input_ids").with_format("arrow").iter(ROWS_PER_BATCH)
        chunks = [chunk for batch in batches for chunk in batch.column("input_ids").chunks]
        return np.concatenate([pc.list_value_length(chunk).to_numpy() for chunk in chunks]).astype(np.int64)

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the texts, of which documents, languages and shards they are, and of the rows left out."""
        content = xxhash.xxh3_128(corpus_fingerprint(self.documents).encode())
        for numbers in (self.document_ids, self.language_ids, self.by_shard, self._bounds):
            content.update(np.ascontiguousarray(numbers))
        return content.hexdigest()


def _encode(column: pa.ChunkedArray, numbers: dict) -> np.ndarray:
    """A column of any type as int64 numbers `(rows,)`; a value that `numbers` lacks gets the next one."""
    encoded = pc.dictionary_encode(column.combine_chunks(), null_encoding="encode")
    distinct = [numbers.setdefault(value, len(numbers)) for value in encoded.dictionary.to_pylist()]
    return np.array(distinct, dtype=np.int64)[encoded.indices.to_numpy()]
