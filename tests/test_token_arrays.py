import logging
import pickle
import re

import numpy as np
import pyarrow as pa
import pytest
from datasets import List, Value

from hf_paraphrase_lm.data import load_token_array, token_arrays
from hf_paraphrase_lm.retrieval import EvidenceDataset, LexicalEmbedder, corpus_fingerprint

from .reference.evidence import make_documents

PAD = 0
LENGTH = 8
TEXTS = [np.random.default_rng(row).integers(1, 50, 1 + row % LENGTH).tolist() for row in range(40)]


def padded(texts, pad=PAD, dtype=np.int32, left=False):
    array = np.full((len(texts), LENGTH), pad, dtype=dtype)
    for row, ids in zip(array, texts, strict=True):
        row[slice(LENGTH - len(ids), None) if left else slice(len(ids))] = ids
    return array


def write(folder, array, kind="raw"):
    file = folder / f"tokens.{kind}"
    if kind == "npy":
        np.save(file, array)
        return file.with_suffix(".npy")
    array.tofile(file)
    return file


@pytest.fixture(params=["one block", "several blocks"])
def blocks(request, monkeypatch):
    if request.param == "several blocks":
        # Seven rows each, five in the last one.
        monkeypatch.setattr(token_arrays, "TOKENS_PER_BLOCK", 7 * LENGTH + 3)


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.int64])
@pytest.mark.parametrize("kind", ["raw", "npy"])
def test_the_rows_without_their_padding(tmp_path, kind, dtype, left, blocks):
    file = write(tmp_path, padded(TEXTS, dtype=dtype, left=left), kind)
    arguments = {"length": LENGTH, "dtype": dtype} if kind == "raw" else {}
    documents = load_token_array(file, PAD, **arguments)
    assert documents["input_ids"][:] == TEXTS
    assert documents.column_names == ["input_ids", "document", "chunk", "shard", "language"]
    assert documents.features["input_ids"] == List(Value(np.dtype(dtype).name))
    assert documents["document"][:] == list(range(40))
    assert documents["chunk"][:] == documents["shard"][:] == [0] * 40
    assert documents["language"][:] == [""] * 40
    expected = make_documents(TEXTS)
    assert {name: documents.features[name] for name in documents.column_names[1:]} == {
        name: expected.features[name] for name in documents.column_names[1:]
    }
    assert corpus_fingerprint(documents) == corpus_fingerprint(expected)


def test_rows_without_padding_and_other_pads(tmp_path):
    full = np.random.default_rng(0).integers(0, 9, (5, LENGTH))
    assert load_token_array(write(tmp_path, full, "npy"), -100)["input_ids"][:] == full.tolist()
    array = padded(TEXTS, pad=-1)
    assert load_token_array(write(tmp_path, array), -1, LENGTH)["input_ids"][:] == TEXTS


def test_rows_of_padding_are_left_out_with_one_warning(tmp_path, caplog, blocks):
    texts = [[], *TEXTS[:10], [], [], *TEXTS[10:], []]
    with caplog.at_level(logging.WARNING):
        documents = load_token_array(write(tmp_path, padded(texts)), PAD, LENGTH, columns={"shard": range(44)})
    assert documents["input_ids"][:] == TEXTS
    rows = [row for row in range(44) if texts[row]]
    assert documents["document"][:] == documents["shard"][:] == rows
    assert [record.getMessage() for record in caplog.records] == ["Left out 4 of 44 rows that are padding only."]


def test_columns(tmp_path):
    columns = {
        "document": np.arange(40) // 2,
        "chunk": [row % 2 for row in range(40)],
        "shard": [f"2020-01-{row % 3}" for row in range(40)],
        "language": ["de", None] * 20,
    }
    documents = load_token_array(write(tmp_path, padded(TEXTS)), PAD, LENGTH, columns=columns)
    for name, values in columns.items():
        assert documents[name][:] == list(values)
    assert documents.features["document"] == documents.features["chunk"] == Value("int64")
    assert documents.features["shard"] == documents.features["language"] == Value("string")


@pytest.mark.parametrize("kind", ["raw", "npy"])
def test_the_file_is_not_written(tmp_path, kind, monkeypatch):
    file = write(tmp_path, padded(TEXTS), kind)
    file.chmod(0o444)
    modes = []
    memmap = np.memmap.__new__

    def record(cls, filename, dtype=np.uint8, mode="r+", *arguments, **options):
        modes.append(mode)
        return memmap(cls, filename, dtype, mode, *arguments, **options)

    monkeypatch.setattr(np.memmap, "__new__", record)
    before = file.read_bytes()
    documents = load_token_array(file, PAD, LENGTH if kind == "raw" else None)
    monkeypatch.undo()
    assert modes == ["r"]
    values = documents.data["input_ids"].chunk(0).values
    assert not values.buffers()[1].is_mutable
    assert file.read_bytes() == before


def test_tokens_are_not_copied(tmp_path):
    """Of a file of 200 MB only the columns beside the tokens are in memory."""
    array = np.lib.format.open_memmap(tmp_path / "tokens.npy", "w+", np.int32, (100_000, 512))
    array[:, :-3] = 7
    array.flush()
    del array
    documents = load_token_array(tmp_path / "tokens.npy", PAD)
    before = pa.total_allocated_bytes()
    assert before < 40e6
    assert documents[99_999]["input_ids"] == [7] * 509
    assert len(documents[500:600]["input_ids"]) == 100
    assert pa.total_allocated_bytes() < 41e6


def test_groups_are_those_of_the_same_lists(tmp_path):
    documents, expected = load_token_array(write(tmp_path, padded(TEXTS)), PAD, LENGTH), make_documents(TEXTS)
    datasets = [
        EvidenceDataset(corpus, num_targets=3, num_evidence=3, max_tokens=40) for corpus in (documents, expected)
    ]
    for dataset in datasets:
        dataset.rebuild(LexicalEmbedder(expected, dim=64, progress=False), PAD, progress=False)
    assert list(datasets[0]) == list(datasets[1])
    # One corpus of both kinds: the targets are not their own evidence.
    assert EvidenceDataset(documents, evidence=expected).evidence is documents
    assert pickle.loads(pickle.dumps(documents))["input_ids"][:] == TEXTS


def test_the_fingerprint_is_that_of_file_and_arguments(tmp_path):
    file = write(tmp_path, padded(TEXTS))
    first, same = (load_token_array(file, PAD, LENGTH)._fingerprint for _ in range(2))
    other = load_token_array(file, PAD, LENGTH, columns={"shard": range(40)})._fingerprint
    write(tmp_path, padded(TEXTS[::-1]))
    assert first == same
    assert len({first, other, load_token_array(file, PAD, LENGTH)._fingerprint}) == 3


def with_value(row, column, value, dtype=np.int32):
    array = padded(TEXTS, dtype=dtype)
    array[row, column] = value
    return array


NPY = {
    "three": (
        np.ones((2, 3, 4), int),
        {},
        "{file} must hold an array (documents, length) in C order, but holds one of shape (2, 3, 4).",
    ),
    "one": (
        np.ones(12, int),
        {},
        "{file} must hold an array (documents, length) in C order, but holds one of shape (12,).",
    ),
    "none": (
        np.ones((0, 12), int),
        {},
        "{file} must hold an array (documents, length) in C order, but holds one of shape (0, 12).",
    ),
    "fortran": (
        np.asfortranarray(padded(TEXTS)),
        {},
        "{file} must hold an array (documents, length) in C order, but holds one of shape (40, 8) in Fortran order.",
    ),
    "length": (padded(TEXTS), {"length": 4}, "length must be 8, which is what {file} says, or None, but got 4."),
    "dtype": (
        padded(TEXTS),
        {"dtype": "int64"},
        "dtype must be int32, which is what {file} says, or None, but got int64.",
    ),
    "float": (
        padded(TEXTS, dtype=np.float32),
        {},
        "Token ids must be integers in this machine's byte order, but {file} holds <f4.",
    ),
    "bytes": (
        padded(TEXTS, dtype=">i4"),
        {},
        "Token ids must be integers in this machine's byte order, but {file} holds >i4.",
    ),
    "object": (
        np.array([[1, 2], [3, None]]),
        {},
        "{file} is not a whole .npy file of numbers: Array can't be memory-mapped: Python objects in dtype.",
    ),
    "negative": (
        with_value(30, 1, -7),
        {},
        "Token ids must lie between 0 and 2147483647, but row 30 has -7, which is not the padding (0) "
        "either: pad_token_id, dtype or length is not right.",
    ),
    "large": (
        with_value(30, 1, 2**40, np.int64),
        {},
        "Token ids must lie between 0 and 2147483647, but row 30 has 1099511627776, which is not the padding (0) "
        "either: pad_token_id, dtype or length is not right.",
    ),
    "between": (
        with_value(39, 3, PAD),
        {},
        "Padding (0) must stand before or behind the tokens of a row, but row 39 has 1 between them.",
    ),
    "padding": (padded([[]] * 3), {}, "All 3 rows of {file} are padding (0): pad_token_id is not right."),
    "columns": (
        padded(TEXTS),
        {"columns": {"shard": [1, 2]}},
        "columns must be some of document, chunk, shard, language, each with 40 values, one a row of the file, but got "
        "shard with 2.",
    ),
    "unknown": (
        padded(TEXTS),
        {"columns": {"day": [1] * 40}},
        "columns must be some of document, chunk, shard, language, each with 40 values, one a row of the file, but got "
        "day with 40.",
    ),
}
RAW = {
    "length": (padded(TEXTS), {}, "{file} holds bare numbers, so length must say how many a row has, but got None."),
    "zero": (
        padded(TEXTS),
        {"length": 0},
        "{file} holds bare numbers, so length must say how many a row has, but got 0.",
    ),
    "part": (
        padded(TEXTS),
        {"length": 7},
        "{file} must hold rows of 7 numbers of type int32, 28 bytes each, but has 1280 bytes, which is no multiple of "
        "that: length or dtype is not right, or it is not whole.",
    ),
    "empty": (
        np.ones(0),
        {"length": 8},
        "{file} must hold rows of 8 numbers of type int32, 32 bytes each, but has 0 bytes, which is no multiple of "
        "that: length or dtype is not right, or it is not whole.",
    ),
    "float": (
        padded(TEXTS),
        {"length": 8, "dtype": "float32"},
        "Token ids must be integers in this machine's byte order, but {file} holds <f4.",
    ),
}


@pytest.mark.parametrize(
    ("kind", "case"), [*(("npy", case) for case in NPY), *(("raw", case) for case in RAW)], ids="-".join
)
def test_bad_files_are_refused(tmp_path, kind, case, blocks):
    array, arguments, message = (NPY if kind == "npy" else RAW)[case]
    file = write(tmp_path, array, kind)
    with pytest.raises(ValueError, match=f"^{re.escape(message.format(file=file))}$"):
        load_token_array(file, PAD, **arguments)


def test_a_truncated_or_missing_file(tmp_path):
    file = write(tmp_path, padded(TEXTS), "npy")
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(ValueError, match=f"^{re.escape(str(file))} is not a whole .npy file of numbers: "):
        load_token_array(file, PAD)
    with pytest.raises(FileNotFoundError):
        load_token_array(tmp_path / "missing.npy", PAD)
