import json
import logging
import re

import pytest
from datasets import Dataset, DatasetDict, load_dataset
from transformers import AutoTokenizer

from hf_paraphrase_lm.data import train_tokenizer

SENTENCES = [
    "The quick brown fox jumps over the lazy dog.",
    "Der schnelle braune Fuchs springt über den faulen Hund.",
    "素早い茶色の狐がのろまな犬を飛び越える。",
    "Быстрая коричневая лиса прыгает через ленивую собаку.",
    "الثعلب البني السريع يقفز فوق الكلب الكسول",
] * 20
# Not in the training texts: other scripts, emoji of several code points, white space, controls, combining marks.
UNSEEN = [
    "สวัสดีชาวโลก नमस्ते ሰላም",
    "👩‍👩‍👧 🏳️‍🌈 \U0001f9ff",
    "  two  spaces\tand\r\nlines\n\n",
    "\x00\x07\u200b\ufeff\u00a0",
    "e\u0301 \u00e9 \ufb01 \u1e9e",
    "don't  CAN'T 1234567890 x**2!=y||z",
    "[CLS] is written here, and <s>, [MASK]",
]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(SENTENCES, vocab_size=400, model_max_length=128, progress=False)


def test_special_tokens(tokenizer):
    assert tokenizer.convert_tokens_to_ids(["[CLS]", "[PAD]", "[SEP]", "[UNK]", "[MASK]"]) == [0, 1, 2, 3, 4]
    assert (tokenizer.cls_token_id, tokenizer.bos_token_id) == (0, 0)
    assert (tokenizer.sep_token_id, tokenizer.eos_token_id) == (2, 2)
    assert (tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.mask_token_id) == (1, 3, 4)
    assert tokenizer.model_max_length == 128
    assert len(tokenizer) == tokenizer.vocab_size == 400


def test_single_and_pair(tokenizer):
    def ids(text):
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    encoding = tokenizer("the fox", "the dog")
    assert encoding["input_ids"] == [0, *ids("the fox"), 2, 2, *ids("the dog"), 2]
    assert tokenizer("the fox") == {
        "input_ids": [0, *ids("the fox"), 2],
        "attention_mask": [1] * (len(ids("the fox")) + 2),
    }
    assert set(encoding) == {"input_ids", "attention_mask"}
    assert tokenizer("")["input_ids"] == [0, 2]
    assert tokenizer.num_special_tokens_to_add() == 2 and tokenizer.num_special_tokens_to_add(pair=True) == 4


def test_batches_are_padded_and_truncated(tokenizer):
    batch = tokenizer(["the", "the fox"], padding=True, truncation=True, max_length=4, return_tensors="pt")
    assert batch["input_ids"].shape == (2, 4)
    assert batch["input_ids"][0, -1] == 1 and batch["input_ids"][1, -1] == 2
    assert batch["attention_mask"][0, -1] == 0


@pytest.mark.parametrize("text", [*SENTENCES[:5], *UNSEEN])
def test_decoding_gives_back_any_text(tokenizer, text):
    ids = tokenizer(text, split_special_tokens=True)["input_ids"]
    assert 3 not in ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_mask_takes_in_the_space_before_it(tokenizer):
    def ids(text):
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    assert ids("the [MASK] dog") == [*ids("the"), 4, *ids(" dog")]


def test_offsets_leave_out_the_space_before_a_word(tokenizer):
    text = "the fox über"
    encoding = tokenizer(text, return_offsets_mapping=True)
    covered = "".join(text[start:end] for start, end in encoding["offset_mapping"] if end > start)
    assert not covered.startswith(" ") and " " not in covered


def test_lower_case():
    tokenizer = train_tokenizer(SENTENCES, vocab_size=300, lowercase=True, progress=False)
    assert tokenizer("The FOX Über")["input_ids"] == tokenizer("the fox über")["input_ids"]
    assert tokenizer.decode(tokenizer("The FOX")["input_ids"], skip_special_tokens=True) == "the fox"


def test_frequent_words_are_one_token():
    texts = ["internationalization of the internationalization"] * 3 + ["rare"]
    tokenizer = train_tokenizer(texts, vocab_size=400, progress=False)
    assert "Ġinternationalization" in tokenizer.get_vocab() and "rare" not in tokenizer.get_vocab()
    assert "rare" in train_tokenizer(texts, vocab_size=400, min_frequency=1, progress=False).get_vocab()


def test_loads_with_auto_tokenizer_in_a_process_without_the_package(tokenizer, tmp_path, run_python):
    texts = [*SENTENCES[:5], *UNSEEN, "the [MASK] dog"]
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    assert (tmp_path / "tokenizer" / "tokenizer.json").is_file()
    (tmp_path / "texts.json").write_text(json.dumps(texts))
    printed = run_python(
        """
import json
from transformers import AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained("tokenizer")
texts = json.load(open("texts.json"))
ids = [tokenizer(text)["input_ids"] for text in texts] + tokenizer(texts, texts[::-1])["input_ids"]
decoded = tokenizer.batch_decode(ids)
print(json.dumps([ids, decoded, tokenizer.special_tokens_map, tokenizer.model_max_length, tokenizer.model_input_names]))
""",
        package=False,
    )
    ids = [tokenizer(text)["input_ids"] for text in texts] + tokenizer(texts, texts[::-1])["input_ids"]
    expected = [ids, tokenizer.batch_decode(ids), tokenizer.special_tokens_map, 128, tokenizer.model_input_names]
    assert json.loads(printed) == expected
    again = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    assert again.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()


def test_all_sources_of_texts_give_one_tokenizer(tokenizer, tmp_path):
    dataset = Dataset.from_dict({"body": [*SENTENCES, None, ""], "number": range(len(SENTENCES) + 2)})
    dataset.to_parquet(tmp_path / "texts.parquet")
    stream = load_dataset(
        "parquet",
        data_files=str(tmp_path / "texts.parquet"),
        split="train",
        streaming=True,
        cache_dir=str(tmp_path / "cache"),
    )
    for texts in (dataset, dataset.with_format("numpy"), stream, iter(SENTENCES), tuple(SENTENCES), [*SENTENCES, None]):
        other = train_tokenizer(texts, vocab_size=400, text_column="body", model_max_length=128, progress=False)
        assert other.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()


def test_texts_are_read_in_batches():
    """So a corpus need not fit into memory: at any time no more than two batches of its texts are alive."""
    alive, most = 0, 0

    class Text(str):
        def __new__(cls, text):
            nonlocal alive, most
            alive += 1
            most = max(most, alive)
            return super().__new__(cls, text)

        def __del__(self):
            nonlocal alive
            alive -= 1

    train_tokenizer((Text(f"text number {number}") for number in range(10_000)), vocab_size=300, progress=False)
    assert alive == 0 and most <= 3000


def test_small_corpus_is_logged(caplog):
    with caplog.at_level(logging.WARNING):
        tokenizer = train_tokenizer(["ab ab"], vocab_size=1000, progress=False)
    assert len(tokenizer) == 262
    assert [record.getMessage() for record in caplog.records] == [
        "The corpus yields a vocabulary of 262 tokens, fewer than the 1000 asked for. Give the model vocab_size=262."
    ]


@pytest.mark.parametrize(
    ("texts", "arguments", "error", "sentence"),
    [
        (
            ["a"],
            {"vocab_size": 260},
            ValueError,
            "vocab_size must be at least 261 (5 special tokens and 256 bytes), but got 260.",
        ),
        (
            [],
            {},
            ValueError,
            "There is no text to train a tokenizer on: the corpus or every text in it is empty.",
        ),
        (
            Dataset.from_dict({"text": ["", None]}),
            {},
            ValueError,
            "There is no text to train a tokenizer on: the corpus or every text in it is empty.",
        ),
        (
            Dataset.from_dict({"body": ["a"]}),
            {},
            ValueError,
            "text_column 'text' is not in the dataset. Its columns are: body.",
        ),
        (
            Dataset.from_dict({"text": [1]}),
            {},
            ValueError,
            "text_column 'text' must hold strings, but holds Value('int64').",
        ),
        (
            DatasetDict(train=Dataset.from_dict({"text": ["a"]})),
            {},
            TypeError,
            "dataset must be a single dataset, but got a DatasetDict of 'train'. "
            "Choose one of them, for example dataset['train'].",
        ),
        (
            "a text",
            {},
            TypeError,
            "texts must be a dataset or an iterable of strings, but got a single string. Put it into a list.",
        ),
        (
            ["a", 3],
            {},
            TypeError,
            "texts must be strings, but one of them is of type int: 3.",
        ),
    ],
)
def test_wrong_input(texts, arguments, error, sentence):
    with pytest.raises(error, match=f"^{re.escape(sentence)}$"):
        train_tokenizer(texts, **{"vocab_size": 300, "progress": False, **arguments})
