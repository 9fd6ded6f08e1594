import json
import logging
import re

import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, List, Value, load_dataset, load_from_disk
from transformers import AutoTokenizer, CanineTokenizer

from hf_paraphrase_lm.data import chunk_documents, train_tokenizer

CLS, PAD, SEP, UNK, MASK = range(5)
WORDS = "the quick brown fox jumps over the lazy dog and runs away".split()  # noqa: SIM905


def text_of(length, start=0):
    """A text of `length` words from the cycle of WORDS."""
    return " ".join(WORDS[(start + position) % len(WORDS)] for position in range(length))


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([text_of(100)] * 5 + WORDS * 5, vocab_size=330, model_max_length=64, progress=False)


def dataset_of(*texts, **columns):
    return Dataset.from_dict({"text": list(texts), **columns})


def test_columns(tokenizer):
    dataset = dataset_of("the fox", text_of(10), title=["a", "b"])
    chunks = chunk_documents(dataset, tokenizer, max_length=6)
    assert chunks.features == Features(
        {
            "input_ids": List(Value("int32")),
            "document": Value("int64"),
            "chunk": Value("int64"),
            "shard": Value("int64"),
            "language": Value("string"),
        }
    )
    assert chunks.column_names == ["input_ids", "document", "chunk", "shard", "language"]
    assert chunks["document"][:] == [0, 1, 1, 1]
    assert chunks["chunk"][:] == [0, 0, 1, 2]
    assert chunks["shard"][:] == [0, 0, 0, 0]
    assert chunks["language"][:] == ["", "", "", ""]
    assert chunks[0]["input_ids"] == tokenizer("the fox")["input_ids"]


@pytest.mark.parametrize("max_length", [3, 4, 7, 10, 63, 64])
def test_every_token_is_in_exactly_one_chunk(tokenizer, max_length):
    texts = [text_of(length, start=length) for length in range(1, 140)]
    chunks = chunk_documents(dataset_of(*texts), tokenizer, max_length=max_length)
    rejoined = {row: [] for row in range(len(texts))}
    lengths = {row: [] for row in range(len(texts))}
    for chunk in chunks:
        first, *piece, last = chunk["input_ids"]
        assert (first, last) == (CLS, SEP)
        assert chunk["chunk"] == len(lengths[chunk["document"]])
        rejoined[chunk["document"]] += piece
        lengths[chunk["document"]].append(len(piece))
    assert chunks["document"][:] == sorted(chunks["document"])
    for row, text in enumerate(texts):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert rejoined[row] == ids
        # As few as possible, none longer than the others by more than a token, so no stub at the end.
        assert len(lengths[row]) == -(-len(ids) // (max_length - 2))
        assert 0 < max(lengths[row]) <= max_length - 2 and max(lengths[row]) - min(lengths[row]) <= 1


def test_documents_without_text_are_dropped_with_one_warning(tokenizer, caplog):
    texts = ["", "the fox", None, " \n\t ", "the dog"]
    with caplog.at_level(logging.WARNING):
        chunks = chunk_documents(dataset_of(*texts), tokenizer, max_length=8, batch_size=2)
    assert chunks["document"][:] == [1, 4]
    assert [record.getMessage() for record in caplog.records] == ["Dropped 3 of 5 documents that have no text."]


def test_no_warning_where_nothing_is_dropped(tokenizer, caplog, capfd):
    chunk_documents(dataset_of("the fox", text_of(1000)), tokenizer, max_length=8)
    assert not caplog.records
    assert "longer than" not in "".join(capfd.readouterr())


def test_shards_and_languages(tokenizer):
    dataset = dataset_of("the fox", text_of(9), "dog", day=["monday", "tuesday", "monday"], lang=["en", "de", None])
    chunks = chunk_documents(dataset, tokenizer, max_length=8, shard_column="day", language_column="lang")
    assert chunks["shard"][:] == ["monday", "tuesday", "tuesday", "monday"]
    assert chunks["language"][:] == ["en", "de", "de", ""]
    assert chunks.features["shard"] == Value("string")


def test_class_labels_as_language_and_shard(tokenizer):
    labels = ClassLabel(names=["en", "de"])
    dataset = dataset_of("the fox", "dog", "and", lang=[1, 0, -1]).cast_column("lang", labels)
    chunks = chunk_documents(dataset, tokenizer, max_length=8, shard_column="lang", language_column="lang")
    assert chunks["language"][:] == ["de", "en", ""]
    assert chunks["shard"][:] == [1, 0, -1] and chunks.features["shard"] == labels


def test_document_is_the_row_of_a_shuffled_and_formatted_dataset(tokenizer):
    dataset = dataset_of(*(text_of(length) for length in range(1, 30))).shuffle(seed=1).with_format("torch")
    chunks = chunk_documents(dataset, tokenizer, max_length=64)
    assert chunks["document"][:] == list(range(29))
    for row, ids in enumerate(chunks["input_ids"]):
        assert ids == tokenizer(dataset[row]["text"])["input_ids"]


def test_special_tokens_in_a_text_are_text(tokenizer):
    texts = ["the [MASK] fox [SEP] and [CLS]", "[PAD]"]
    chunks = chunk_documents(dataset_of(*texts), tokenizer, max_length=64)
    for ids, text in zip(chunks["input_ids"], texts, strict=True):
        assert not {CLS, PAD, SEP, UNK, MASK} & set(ids[1:-1])
        assert tokenizer.decode(ids[1:-1]) == text


def test_the_tokenizer_is_left_as_it_was(tokenizer):
    tokenizer("the fox", padding="max_length", truncation=True, max_length=5)
    before = tokenizer.backend_tokenizer.to_str()
    chunk_documents(dataset_of("the fox", text_of(50)), tokenizer, max_length=8)
    assert tokenizer.backend_tokenizer.to_str() == before
    assert tokenizer("the [MASK]", add_special_tokens=False)["input_ids"][-1] == MASK


def test_a_slow_tokenizer():
    """Any tokenizer of transformers works; Canine's is written in Python and has one token a character."""
    tokenizer = CanineTokenizer(model_max_length=64)
    chunks = chunk_documents(dataset_of("abcdef", " "), tokenizer, max_length=5)
    assert chunks["input_ids"][:] == [[57344, *map(ord, letters), 57345] for letters in ("abc", "def")]


@pytest.mark.parametrize("kind", ["text", "json", "parquet"])
def test_files(tokenizer, tmp_path, kind):
    texts = [text_of(4), text_of(9)]
    file = tmp_path / f"corpus.{kind}"
    if kind == "text":
        file.write_text("\n".join(texts))
    elif kind == "json":
        file.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    else:
        dataset_of(*texts).to_parquet(file)
    dataset = load_dataset(kind, data_files=str(file), split="train", cache_dir=str(tmp_path / "cache"))
    chunks = chunk_documents(dataset, tokenizer, max_length=64)
    assert chunks["input_ids"][:] == tokenizer(texts)["input_ids"]
    # The second call finds the first one's file, whatever the tokenizer did in between.
    tokenizer("the fox", padding="max_length", truncation=True, max_length=5)
    again = chunk_documents(dataset, tokenizer, max_length=64)
    assert chunks.cache_files and again.cache_files == chunks.cache_files and again._fingerprint == chunks._fingerprint
    assert chunk_documents(dataset, tokenizer, max_length=32)._fingerprint != chunks._fingerprint


def test_another_process_finds_the_cached_chunks(tokenizer, tmp_path, run_python, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tokenizer.save_pretrained("tokenizer")
    dataset_of("the fox", text_of(20)).save_to_disk("corpus")
    chunks = chunk_documents(load_from_disk("corpus"), AutoTokenizer.from_pretrained("tokenizer"), max_length=8)
    code = """
from datasets import load_from_disk
from transformers import AutoTokenizer
from hf_paraphrase_lm.data import chunk_documents
chunks = chunk_documents(load_from_disk("corpus"), AutoTokenizer.from_pretrained("tokenizer"), max_length=8)
print(chunks._fingerprint)
"""
    assert run_python(code).strip() == chunks._fingerprint
    assert len(list((tmp_path / "corpus").glob("cache-*.arrow"))) == 1


def test_memory_holds_the_chunks_of_a_dataset_in_memory(tokenizer):
    assert chunk_documents(dataset_of("the fox"), tokenizer, max_length=8).cache_files == []


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_several_processes(tokenizer):
    dataset = dataset_of(*(text_of(length) for length in range(1, 21)), None)
    expected = chunk_documents(dataset, tokenizer, max_length=8)
    assert chunk_documents(dataset, tokenizer, max_length=8, num_proc=2).to_list() == expected.to_list()


STREAM = (
    "dataset must be a datasets.Dataset, but got an IterableDataset, whose rows cannot be looked up. "
    "Load it without streaming=True, or collect a part: Dataset.from_list(list(dataset.take(10_000)))."
)
SPLITS = (
    "dataset must be a single dataset, but got a DatasetDict of 'train', 'test'. "
    "Choose one of them, for example dataset['train']."
)
LIST = (
    "dataset must be a datasets.Dataset, but got a list. Make one, for example with Dataset.from_dict({'text': texts})."
)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: dataset_of("a").to_iterable_dataset(), STREAM),
        (lambda: DatasetDict(train=dataset_of("a"), test=dataset_of("b")), SPLITS),
        (lambda: ["a", "b"], LIST),
    ],
)
def test_not_a_dataset(tokenizer, make, sentence):
    with pytest.raises(TypeError, match=f"^{re.escape(sentence)}$"):
        chunk_documents(make(), tokenizer)


@pytest.mark.parametrize(
    ("dataset", "arguments", "sentence"),
    [
        (dataset_of(), {}, "The dataset has no documents: it has 0 rows."),
        (dataset_of("", None, "  "), {}, "None of the 3 documents in column 'text' has any text."),
        (dataset_of(None, None), {}, "None of the 2 documents in column 'text' has any text."),
        (
            dataset_of("a", title=["b"]),
            {"text_column": "body"},
            "text_column 'body' is not in the dataset. Its columns are: text, title.",
        ),
        (
            dataset_of("a"),
            {"shard_column": "day"},
            "shard_column 'day' is not in the dataset. Its columns are: text.",
        ),
        (
            dataset_of("a"),
            {"language_column": "lang"},
            "language_column 'lang' is not in the dataset. Its columns are: text.",
        ),
        (
            dataset_of("a", number=[3]),
            {"text_column": "number"},
            "text_column 'number' must hold strings, but holds Value('int64').",
        ),
        (
            dataset_of("a", number=[3]),
            {"language_column": "number"},
            "language_column 'number' must hold strings, but holds Value('int64').",
        ),
        (
            dataset_of("a", "b", day=["monday", None]),
            {"shard_column": "day"},
            "Every document needs a shard, but column 'day' is empty in row 1. "
            "Fill it in or drop the row with dataset.filter.",
        ),
        (
            dataset_of("a"),
            {"max_length": 2},
            "max_length must be at least 3, two special tokens and one of the text, but got 2.",
        ),
        (
            dataset_of("a"),
            {"max_length": 65},
            "max_length must be at most the tokenizer's model_max_length (64), but got 65. "
            "Pass a smaller one, or set tokenizer.model_max_length to what the model takes.",
        ),
    ],
)
def test_wrong_input(tokenizer, dataset, arguments, sentence):
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}$"):
        chunk_documents(dataset, tokenizer, **{"max_length": 8, **arguments})


@pytest.mark.parametrize(
    ("missing", "described"), [(("cls", "bos"), "cls or bos"), (("sep", "eos"), "sep or eos"), (("pad",), "pad")]
)
def test_tokenizer_without_a_token(missing, described):
    tokenizer = train_tokenizer(["a b"], vocab_size=261, progress=False)
    for name in missing[:-1]:
        setattr(tokenizer, f"{name}_token", None)
    # The other of the two is enough.
    if len(missing) == 2:
        assert chunk_documents(dataset_of("a"), tokenizer)[0]["input_ids"] == tokenizer("a")["input_ids"]
    setattr(tokenizer, f"{missing[-1]}_token", None)
    sentence = (
        f"The tokenizer (TokenizersBackend) has no {described} token. Add one with "
        f"tokenizer.add_special_tokens({{'{missing[0]}_token': '[{missing[0].upper()}]'}}) "
        "and give the model len(tokenizer) embeddings."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}$"):
        chunk_documents(dataset_of("a"), tokenizer)
