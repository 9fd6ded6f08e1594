"""Token ids in NumPy files as documents: a memory map of one padded row a document."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from os import PathLike, stat

import numpy as np
import pyarrow as pa
from datasets import Dataset
from datasets.fingerprint import Hasher

logger = logging.getLogger(__name__)

# Tokens looked at in one step, and in one chunk of the table: lists in Arrow have 32-bit offsets. Our choice.
TOKENS_PER_BLOCK = 1 << 24
LARGEST_ID = 2**31 - 1
TYPES = {"document": pa.int64(), "chunk": pa.int64(), "language": pa.string()}


def load_token_array(
    path: str | PathLike,
    pad_token_id: int,
    length: int | None = None,
    dtype: str | np.dtype | None = None,
    columns: Mapping[str, Sequence] | None = None,
) -> Dataset:
    """A documents dataset over a file of token ids, for corpora that were made for marge-pytorch or by other programs.

    The file is opened read-only and mapped into memory, and the tokens are not copied: a corpus may be larger than the
    memory. It is read once, to find the padding. Processes that are forked share the map; a spawned one, such as a
    DataLoader worker with `multiprocessing_context="spawn"`, gets a copy in memory.

    Args:
        path: a `.npy` file with an integer array `(documents, length)` in C order, or the bare numbers of one, as
            `np.memmap` writes them. Which of the two it is shows in its first bytes.
        pad_token_id: fills the rows, before or behind the tokens. It is no part of `input_ids`. Any number that is no
            token will do, also a negative one.
        length: numbers in a row; needed for bare numbers.
        dtype: type of the numbers; int32 for bare numbers, as in marge-pytorch. A `.npy` file says so itself.
        columns: replace what the columns below hold by default; each has one value a row of the file.

    Returns:
        One row a document, with the columns of `chunk_documents`: `input_ids` (lists of the file's type), `document`
        (int64: the row of the file), `chunk` (0), `shard` (0), `language` ("", unknown). Rows of padding only are left
        out; their number is logged.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is no such array, or does not have the length or type given; a token id is negative or
            above 2**31 - 1; there is padding between tokens; all rows are padding; a column is unknown or too short.
    """
    array = _open(path, length, dtype)
    count, length = array.shape
    values = {"document": range(count), "chunk": [0] * count, "shard": [0] * count, "language": [""] * count}
    for name, column in (columns or {}).items():
        if name not in values or len(column) != count:
            raise ValueError(
                f"columns must be some of {', '.join(values)}, each with {count} values, one a row of the file, but "
                f"got {name} with {len(column)}."
            )
        values[name] = column
    first, last = _find_tokens(array, pad_token_id)
    is_document = last > first
    if not is_document.any():
        raise ValueError(f"All {count} rows of {path} are padding ({pad_token_id}): pad_token_id is not right.")
    if not is_document.all():
        logger.warning("Left out %d of %d rows that are padding only.", count - is_document.sum(), count)
    table = {"input_ids": _lists(array, first, last)}
    for name, column in values.items():
        column = pa.array(list(column), TYPES.get(name))
        table[name] = column.take(pa.array(np.arange(count).repeat(2)))
    made_from = [str(path), stat(path).st_mtime_ns, array.shape, array.dtype.str, pad_token_id, columns]
    dataset = Dataset(pa.table(table), fingerprint=Hasher.hash(made_from))
    return dataset.select((2 * np.flatnonzero(is_document)).tolist())


def _open(path: str | PathLike, length: int | None, dtype: str | np.dtype | None) -> np.ndarray:
    """The array in the file, `(documents, length)` of integers, as a read-only memory map."""
    with open(path, "rb") as file:
        is_npy = file.read(6) == b"\x93NUMPY"
    if is_npy:
        try:
            array = np.load(path, mmap_mode="r")
        except ValueError as error:
            raise ValueError(f"{path} is not a whole .npy file of numbers: {error}") from error
        if array.ndim != 2 or array.size == 0 or not array.flags.c_contiguous:
            raise ValueError(
                f"{path} must hold an array (documents, length) in C order, but holds one of shape {array.shape}"
                f"{' in Fortran order' * (not array.flags.c_contiguous)}."
            )
        for name, wanted, found in (
            ("length", length, array.shape[1]),
            ("dtype", None if dtype is None else np.dtype(dtype), array.dtype),
        ):
            if wanted is not None and wanted != found:
                raise ValueError(f"{name} must be {found}, which is what {path} says, or None, but got {wanted}.")
    else:
        if length is None or length < 1:
            raise ValueError(f"{path} holds bare numbers, so length must say how many a row has, but got {length}.")
        dtype, size = np.dtype(np.int32 if dtype is None else dtype), stat(path).st_size
        if size == 0 or size % (length * dtype.itemsize):
            raise ValueError(
                f"{path} must hold rows of {length} numbers of type {dtype}, {length * dtype.itemsize} bytes each, but "
                f"has {size} bytes, which is no multiple of that: length or dtype is not right, or it is not whole."
            )
        array = np.memmap(path, dtype, mode="r").reshape(-1, length)
    if array.dtype.kind not in "iu" or not array.dtype.isnative:
        raise ValueError(
            f"Token ids must be integers in this machine's byte order, but {path} holds {array.dtype.str}."
        )
    return array


def _find_tokens(array: np.ndarray, pad_token_id: int) -> tuple[np.ndarray, np.ndarray]:
    """Where the tokens of each row begin and end, int64 `(documents,)`; both are 0 where there are none."""
    count, length = array.shape
    first, last = np.zeros((2, count), dtype=np.int64)
    for rows in _blocks(array):
        block = array[rows]
        is_token = block != pad_token_id
        is_bad = is_token & ((block < 0) | (block > LARGEST_ID))
        if is_bad.any():
            row, column = np.argwhere(is_bad)[0]
            raise ValueError(
                f"Token ids must lie between 0 and {LARGEST_ID}, but row {rows.start + row} has "
                f"{block[row, column]}, which is not the padding ({pad_token_id}) either: pad_token_id, dtype or "
                "length is not right."
            )
        first[rows] = is_token.argmax(axis=1)
        last[rows] = np.where(is_token.any(axis=1), length - is_token[:, ::-1].argmax(axis=1), 0)
        between = (last - first)[rows] - is_token.sum(axis=1)
        if between.any():
            raise ValueError(
                f"Padding ({pad_token_id}) must stand before or behind the tokens of a row, but row "
                f"{rows.start + between.argmax()} has {between.max()} between them."
            )
    return first, last


def _lists(array: np.ndarray, first: np.ndarray, last: np.ndarray) -> pa.ChunkedArray:
    """Two lists a row: its tokens, then the padding up to those of the next row, since Arrow's lists leave no gaps."""
    length = array.shape[1]
    chunks = []
    for rows in _blocks(array):
        block = array[rows]
        starts = length * np.arange(len(block))
        bounds = np.stack([starts + first[rows], starts + last[rows]], axis=1).ravel()
        tokens = pa.Array.from_buffers(pa.from_numpy_dtype(block.dtype), block.size, [None, pa.py_buffer(block)])
        chunks.append(pa.ListArray.from_arrays(pa.array(np.append(bounds, block.size), pa.int32()), tokens))
    return pa.chunked_array(chunks)


def _blocks(array: np.ndarray) -> Iterator[slice]:
    rows = max(1, TOKENS_PER_BLOCK // array.shape[1])
    for start in range(0, len(array), rows):
        yield slice(start, start + rows)
