"""The COCO-LM tokenizer against the authors' code and against its rules, restated on whole strings with sentencepiece.

`fixtures/cocolm_tokenizer`: a small model in the released form, and what the authors' code made of some texts with it.
"""

import itertools
import json
import logging
import pickle
import random
import re
import shutil
import unicodedata
from pathlib import Path

import pytest
import sentencepiece
import torch
from tokenizers import AddedToken, normalizers
from transformers import AutoTokenizer

from hf_paraphrase_lm import CocoLMConfig, CocoLMModel, CocoLMTokenizer, hub, train_tokenizer
from hf_paraphrase_lm.models.cocolm import tokenization_cocolm

from .reference import tokenization_cocolm as reference

RELEASED = Path(__file__).parent / "fixtures" / "cocolm_tokenizer"
EXPECTED = json.loads((RELEASED / "expected.json").read_text(encoding="utf-8"))
SECOND_TEXT = "Hello world!"
TEXTS = [
    *EXPECTED["encode"],
    "they 'LL-go , don' t' re 've\u2019d (a' s-b) ''' `` ``' '' x''",
    "\u201cWait\u201d \u2014 she said\u2026 \u2018no\u2019 \u00b4s 3\u20134",
    "\uff01\uff1f \uff22 \ufb01 \u00bd \u200b(a) b\u200b",
    "-------- ===== .....'' !?!?\"' ).,\"( \u2581 \u2581x\u2581( x\u2581",
    "caf\u00e9 cafe\u0301 a\u0323\u0327 \u00ea\u0300 \u1112\u1161\u11ab \u304b\u3099 \u0643\u0651\u0650 \u6f22\u3002",
    "tab\there\x1cand\x85there\u00a0and\u3000\u2028so",
]
WORDS = ["we", "They", "isn't", "U.S.A", "3.50", "ll", "s", "re", "LL", "VE", "T", "na\u00efve", "e\u0301", "\u6f22"]
MARKS = "'\"-().,!?:;_=\u2026\u2014*+/>[]{}`\u2019\u201d$%^"


def random_texts(number):
    """Words between punctuation and spaces: seeded, hence the same every time."""
    chance = random.Random(0)

    def marks():
        return "".join(chance.choice(MARKS) for _ in range(chance.choice([0, 0, 0, 1, 1, 2, 4])))

    def space():
        return chance.choice(["", " ", " ", "  "])

    return [
        "".join(marks() + space() + chance.choice(WORDS) + marks() + space() for _ in range(chance.randint(1, 6)))
        for _ in range(number)
    ]


def read_reference(folder):
    processor = sentencepiece.SentencePieceProcessor(model_file=str(folder / "sp.model"))
    with open(folder / "dict.txt", encoding="utf-8") as file:
        return processor, reference.dictionary(file)


def ids(tokenizer, texts):
    return tokenizer(texts, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]


@pytest.fixture(scope="module")
def tokenizer():
    return CocoLMTokenizer.from_pretrained(RELEASED)


# The authors' outputs


@pytest.mark.parametrize("text", EXPECTED["encode"])
def test_equal_to_the_authors_code(tokenizer, text):
    normalizer = normalizers.Sequence(tokenization_cocolm.word_rules())
    assert normalizer.normalize_str(text).split() == reference.words(text) == EXPECTED["pre"][text]
    assert tokenizer.tokenize(text) == EXPECTED["tokens"][text]
    assert tokenizer.encode(text, add_special_tokens=False) == EXPECTED["encode"][text]
    assert tokenizer.convert_tokens_to_ids(tokenizer.tokenize(text)) == EXPECTED["encode"][text]
    assert tokenizer(text)["input_ids"] == EXPECTED["encode_plus_single"][text]
    assert tokenizer(text, SECOND_TEXT)["input_ids"] == EXPECTED["encode_plus_pair"][text]


def test_special_tokens(tokenizer):
    assert EXPECTED["ids"] == {
        "cls": tokenizer.cls_token_id,
        "pad": tokenizer.pad_token_id,
        "sep": tokenizer.sep_token_id,
        "unk": tokenizer.unk_token_id,
        "mask": tokenizer.mask_token_id,
        "size": len(tokenizer),
    }
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (tokenizer.cls_token_id, tokenizer.sep_token_id)
    assert tokenizer.vocab_size == len(tokenizer)
    assert tokenizer.get_vocab() == read_reference(RELEASED)[1]


# The rules


def test_equal_to_the_rules(tokenizer):
    processor, vocabulary = read_reference(RELEASED)
    texts = TEXTS + random_texts(2000)
    assert ids(tokenizer, texts) == [reference.ids(text, processor, vocabulary) for text in texts]


def test_words_are_split_alike_at_every_character():
    normalizer = normalizers.Sequence(tokenization_cocolm.word_rules())
    # Both know characters up to some version of Unicode, so those that Python does not know are left out.
    codes = itertools.chain(range(0x3400), range(0xF900, 0x10000), range(0x1F000, 0x1FB00))
    for char in (chr(code) for code in codes if unicodedata.category(chr(code)) != "Cn"):
        text = f"a{char} {char}b 's{char} ' ll{char}x 'LL{char}y ({char}d"
        assert [word for word in normalizer.normalize_str(text).split(" ") if word] == reference.words(text), ascii(
            char
        )


@pytest.fixture(scope="module")
def make_released(tmp_path_factory):
    """Trains a sentencepiece model and writes it in the released form, with a dictionary in another order."""

    def make(**options):
        folder = tmp_path_factory.mktemp("released")
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(random_texts(1500)),
            model_prefix=str(folder / "sp"),
            num_threads=1,
            minloglevel=2,
            hard_vocab_limit=False,
            **options,
        )
        processor = sentencepiece.SentencePieceProcessor(model_file=str(folder / "sp.model"))
        pieces = [
            processor.id_to_piece(i)
            for i in range(len(processor))
            if not processor.is_control(i) and not processor.is_unknown(i)
        ]
        random.Random(0).shuffle(pieces)
        write_dictionary(folder, pieces)
        return folder

    return make


def write_dictionary(folder, tokens):
    lines = (f"{token} {count}\n" for count, token in enumerate(tokens, start=1))
    (folder / "dict.txt").write_text("".join(lines), encoding="utf-8")


@pytest.mark.parametrize(
    "options",
    [
        {"model_type": "bpe", "vocab_size": 400},
        {"model_type": "bpe", "vocab_size": 250, "split_by_unicode_script": False, "split_by_number": False},
        {"model_type": "bpe", "vocab_size": 500, "normalization_rule_name": "identity", "byte_fallback": True},
        {"model_type": "bpe", "vocab_size": 300, "user_defined_symbols": ["na\u00ef", "[MASK]"]},
        {"model_type": "char", "vocab_size": 100},
    ],
    ids=lambda options: " ".join(map(str, options.values())),
)
def test_equal_to_the_rules_with_bpe_and_character_models(make_released, options):
    folder = make_released(**options)
    tokenizer, (processor, vocabulary) = CocoLMTokenizer.from_pretrained(folder), read_reference(folder)
    assert tokenizer.get_vocab() == vocabulary
    texts = TEXTS + random_texts(1000)
    assert ids(tokenizer, texts) == [reference.ids(text, processor, vocabulary) for text in texts]


@pytest.mark.parametrize(
    "options",
    [
        {"vocab_size": 300},
        {"vocab_size": 150, "split_by_unicode_script": False, "normalization_rule_name": "nmt_nfkc_cf"},
        {"vocab_size": 400, "byte_fallback": True, "normalization_rule_name": "nfkc"},
        {"vocab_size": 150, "user_defined_symbols": ["na\u00ef", "[MASK]"]},
    ],
    ids=lambda options: " ".join(map(str, options.values())),
)
def test_equal_to_the_rules_with_unigram_models(make_released, options):
    folder = make_released(model_type="unigram", **options)
    tokenizer, (processor, vocabulary) = CocoLMTokenizer.from_pretrained(folder), read_reference(folder)
    texts = TEXTS + random_texts(1000)
    differing = 0
    for text, found in zip(texts, ids(tokenizer, texts), strict=True):
        expected = reference.ids(text, processor, vocabulary)
        # sentencepiece adds up in float32: what is the same pieces in another order may then differ in score.
        assert sorted(found) == sorted(expected), text
        differing += found != expected
    assert differing <= len(texts) // 100


def test_dictionaries_that_do_not_match_the_model_in_full(make_released, caplog):
    folder = make_released(model_type="bpe", vocab_size=300)
    processor, vocabulary = read_reference(folder)
    pieces = [piece for piece in vocabulary if piece not in tokenization_cocolm.SPECIAL_TOKENS.values()]
    # fairseq pads its dictionaries, and one that already has the mask keeps it where it is.
    write_dictionary(folder, [*pieces[:9], "<mask>", *pieces[9:], "madeupword0000", "</s>"])
    tokenizer, (_, vocabulary) = CocoLMTokenizer.from_pretrained(folder), read_reference(folder)
    assert tokenizer.mask_token_id == 13 and len(tokenizer) == len(pieces) + 6
    texts = [*TEXTS, "madeupword0000"]
    assert ids(tokenizer, texts) == [reference.ids(text, processor, vocabulary) for text in texts]
    assert not caplog.records

    long = next(piece for piece in pieces if len(piece) > 2)
    write_dictionary(folder, [piece for piece in pieces if piece != long])
    tokenization_cocolm.logger.addHandler(caplog.handler)
    with caplog.at_level(logging.WARNING):
        tokenizer = CocoLMTokenizer.from_pretrained(folder)
    tokenization_cocolm.logger.removeHandler(caplog.handler)
    assert f"1 of {len(pieces)} pieces of {folder / 'sp.model'} are not in {folder / 'dict.txt'}" in caplog.text
    assert "".join(tokenizer.tokenize(long.replace("\u2581", "")))


def test_a_special_token_in_a_text_stands_for_itself(tokenizer):
    assert tokenizer.tokenize("he [MASK] said [UNK] \u201cx\u201d") == [
        *["\u2581", "he", "[MASK]", "\u2581", "s", "a", "i", "d", "[UNK]", '"', "\u2581", "x", '"'],
    ]
    mask, unk = tokenizer.mask_token_id, tokenizer.unk_token_id
    assert tokenizer("[MASK]", add_special_tokens=False)["input_ids"] == [mask]
    # The authors' code does not know them in a text.
    processor, vocabulary = read_reference(RELEASED)
    assert ids(tokenizer, ["a [MASK] b"]) == [reference.ids("a [MASK] b", processor, vocabulary)]
    assert unk in ids(tokenizer, ["[MASK]"])[0] and mask not in ids(tokenizer, ["[MASK]"])[0]


# What people do with a tokenizer


def test_batches_of_pairs_are_padded_and_truncated(tokenizer):
    batch = tokenizer(["Hello world!", "a"], ["b c", "(a)"], padding=True, return_tensors="pt")
    assert set(batch) == {"input_ids", "attention_mask"}
    first, second = (tokenizer(*pair)["input_ids"] for pair in [("Hello world!", "b c"), ("a", "(a)")])
    padding = [1] * (len(first) - len(second))
    assert batch["input_ids"].tolist() == [first, second + padding]
    assert batch["attention_mask"].tolist() == [[1] * len(first), [1] * len(second) + [0] * len(padding)]
    assert tokenizer.padding_side == "right"
    assert tokenizer.num_special_tokens_to_add() == 2 and tokenizer.num_special_tokens_to_add(pair=True) == 4


def test_an_empty_second_text_makes_a_pair(tokenizer):
    encoded = tokenizer("a", "", return_offsets_mapping=True)
    assert encoded["input_ids"] == [0, 34, 40, 2, 2, 2] == tokenizer.encode("a", "")
    assert encoded["attention_mask"] == [1] * 6 and encoded["offset_mapping"][:3] == [(0, 0), (0, 1), (0, 1)]
    assert encoded.sequence_ids() == [None, 0, 0, None, None, None]
    assert tokenizer(["a"], [""])["input_ids"] == [encoded["input_ids"]]
    assert tokenizer("a", "", return_tensors="pt")["input_ids"].tolist() == [encoded["input_ids"]]
    assert tokenizer("", "")["input_ids"] == [0, 2, 2, 2] and tokenizer("")["input_ids"] == [0, 2]


def test_texts_are_truncated_to_512_tokens(tokenizer):
    words = tokenizer.encode("he " * 600, add_special_tokens=False, verbose=False)
    single = tokenizer("he " * 600, truncation=True)["input_ids"]
    assert single == [0, *words[:510], 2]
    pair = tokenizer("he " * 600, "he " * 600, truncation=True)["input_ids"]
    assert pair == [0, *words[:254], 2, 2, *words[:254], 2]
    short = tokenizer("he " * 600, "a", truncation="only_first")["input_ids"]
    assert len(short) == 512 and short[-4:] == [2, *tokenizer.encode("a", add_special_tokens=False), 2]
    windows = tokenizer("he " * 600, truncation=True, stride=100, return_overflowing_tokens=True)["input_ids"]
    assert windows[0] == single and windows[1][1:-1] == words[410 : 408 + len(windows[1])]


def test_offsets_refer_to_the_text_as_it_was_given(tokenizer):
    text = "``It's''  (the)\tend \u2014 \u201cdon\u2019t\u201d\u2026 we 'll caf\u00e9 \uff21"
    encoding = tokenizer(text, return_offsets_mapping=True, add_special_tokens=False)
    spans = [text[start:end] for start, end in encoding["offset_mapping"]]
    assert list(zip(encoding.tokens(), spans, strict=True)) == [
        *[("[UNK]", "`"), ("\u2581I", "I"), ("t", "t"), ("'", "'"), ("s", "s"), ("[UNK]", "'")],
        *[("\u2581(", "("), ("\u2581", "t"), ("the", "the"), (")", ")"), ("\u2581", "e"), ("e", "e"), ("n", "n")],
        *[("d", "d"), ("\u2581-", "\u2014"), ("[UNK]", "\u201c"), ("\u2581", "d"), ("d", "d"), ("o", "o"), ("n", "n")],
        *[("'", "\u2019"), ("t", "t"), ("[UNK]", "\u201d"), ("...", "\u2026"), ("\u2581w", "w"), ("e", "e")],
        *[
            ("'", "'"),
            ("ll", "ll"),
            ("\u2581c", "c"),
            ("a", "a"),
            ("f", "f"),
            ("[UNK]", "\u00e9"),
            ("\u2581", "\uff21"),
        ],
        ("A", "\uff21"),
    ]


def test_offsets_of_plain_text_cut_out_the_tokens(tokenizer):
    texts = [text for text in random_texts(300) if text.isascii() and "''" not in text and "``" not in text]
    encodings = tokenizer(texts, return_offsets_mapping=True, add_special_tokens=False, verbose=False)
    for text, tokens, offsets in zip(texts, encodings["input_ids"], encodings["offset_mapping"], strict=True):
        for token, (start, end) in zip(tokenizer.convert_ids_to_tokens(tokens), offsets, strict=True):
            if token == "\u2581":
                # It stands on the first character of its word.
                assert end == start + 1 and not text[start].isspace()
            elif token != "[UNK]":
                assert re.sub(r"\s", "", text[start:end]) == token.removeprefix("\u2581")
    assert len(texts) > 50


def test_decode_gives_readable_text(tokenizer):
    text = "He said : we'll end (or more)... isn't it?"
    encoded = tokenizer(text)["input_ids"]
    # As in the authors' code a mark before a word is a space, so closing punctuation joins what is before it.
    assert tokenizer.decode(encoded, skip_special_tokens=True) == "He said: we'll end ( or more)... isn't it?"
    assert tokenizer.decode(encoded) == "[CLS] He said: we'll end ( or more)... isn't it?[SEP]"
    assert tokenizer.batch_decode([[0, 2], []], skip_special_tokens=True) == ["", ""]


def same_as(tokenizer, other):
    texts = TEXTS + random_texts(100) + ["he [MASK] said [UNK] x"]
    options = {"return_offsets_mapping": True, "verbose": False}
    same = tokenizer(texts, texts[::-1], **options) == other(texts, texts[::-1], **options)
    return (
        same and tokenizer.get_vocab() == other.get_vocab() and tokenizer.special_tokens_map == other.special_tokens_map
    )


def test_save_and_load(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["tokenizer.json", "tokenizer_config.json"]
    loaded = CocoLMTokenizer.from_pretrained(tmp_path)
    assert same_as(tokenizer, loaded) and loaded.model_max_length == 512
    assert [loaded.tokenize(text) for text in TEXTS] == [tokenizer.tokenize(text) for text in TEXTS]
    assert type(AutoTokenizer.from_pretrained(tmp_path)) is CocoLMTokenizer
    assert same_as(tokenizer, pickle.loads(pickle.dumps(tokenizer)))
    (tmp_path / "again").mkdir()
    loaded.save_pretrained(tmp_path / "again")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "again" / name).read_text() == (tmp_path / name).read_text()
    # Without a configuration of the tokenizer the model's says which it is.
    (tmp_path / "tokenizer_config.json").unlink()
    CocoLMConfig().save_pretrained(tmp_path)
    assert type(AutoTokenizer.from_pretrained(tmp_path)) is CocoLMTokenizer
    assert same_as(tokenizer, AutoTokenizer.from_pretrained(tmp_path))


def test_added_tokens_survive_saving(tmp_path):
    tokenizer = CocoLMTokenizer.from_pretrained(RELEASED)
    assert tokenizer.add_tokens([AddedToken("<new>", normalized=False)]) == 1
    tokenizer.save_pretrained(tmp_path)
    assert same_as(tokenizer, CocoLMTokenizer.from_pretrained(tmp_path))
    assert tokenizer.tokenize("a <new> b") == ["\u2581", "a", "<new>", "\u2581", "b"]


def test_added_tokens_stand_as_they_are_written(tmp_path):
    tokenizer = CocoLMTokenizer.from_pretrained(RELEASED)
    assert tokenizer.add_tokens(["<new>", "(x)"]) == 2
    tokenizer.add_special_tokens({"additional_special_tokens": ["<s1>"]})
    assert tokenizer.convert_ids_to_tokens([92, 93, 94]) == ["<new>", "(x)", "<s1>"]
    assert tokenizer.tokenize("a<new>t (x) <s1>") == ["\u2581", "a", "<new>", "\u2581", "t", "(x)", "<s1>"]
    tokenizer.save_pretrained(tmp_path)
    assert same_as(tokenizer, CocoLMTokenizer.from_pretrained(tmp_path))
    # On demand they are looked for in the normalised text, where this one stands in no word.
    tokenizer.add_tokens([AddedToken("<old>")])
    assert tokenizer.tokenize("k<old>")[-4:] == ["o", "l", "d", "[UNK]"]


def test_tokenizer_json_needs_neither_this_package_nor_sentencepiece(tokenizer, tmp_path, run_python):
    tokenizer.save_pretrained(tmp_path)
    code = """
import json, sys
sys.modules["sentencepiece"] = None
from transformers import AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
print(json.dumps(tokenizer(json.loads(sys.argv[2]), verbose=False)["input_ids"]))
"""
    printed = run_python(code, tmp_path, json.dumps(TEXTS), package=False)
    assert json.loads(printed) == tokenizer(TEXTS, verbose=False)["input_ids"]


def test_the_code_travels_with_a_checkpoint(tokenizer, tmp_path, run_python):
    config = CocoLMConfig(vocab_size=92, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    hub.save_with_code(CocoLMModel(config), tmp_path, tokenizer)
    code = """
import json, sys
from transformers import AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=True)
print(type(tokenizer).__name__, json.dumps([tokenizer.tokenize(text) for text in json.loads(sys.argv[2])]))
"""
    printed = run_python(code, tmp_path, json.dumps(TEXTS), package=False)
    assert printed == f"CocoLMTokenizer {json.dumps([tokenizer.tokenize(text) for text in TEXTS])}\n"


@pytest.mark.parametrize("saved_class", ["TokenizersBackend", "PreTrainedTokenizerFast"])
def test_another_tokenizer_beside_a_cocolm_model_stays_what_it_is(tmp_path, saved_class):
    trained = train_tokenizer(random_texts(100), vocab_size=300, progress=False)
    trained.save_pretrained(tmp_path)
    CocoLMConfig(vocab_size=len(trained)).save_pretrained(tmp_path)
    file = tmp_path / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"tokenizer_class": saved_class}))
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert not isinstance(loaded, CocoLMTokenizer)
    assert same_as(trained, loaded)


def test_a_model_reads_what_the_tokenizer_makes(tokenizer):
    config = CocoLMConfig(
        vocab_size=len(tokenizer), hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8
    )
    batch = tokenizer(TEXTS[:4], TEXTS[4:8], padding=True, truncation=True, return_tensors="pt")
    states = CocoLMModel(config)(**batch).last_hidden_state
    assert states.shape == (*batch["input_ids"].shape, 8) and torch.isfinite(states).all()


# Files that are not as they should be


@pytest.fixture
def folder(tmp_path):
    for name in ("sp.model", "dict.txt"):
        shutil.copyfile(RELEASED / name, tmp_path / name)
    return tmp_path


def refuses(folder, message):
    with pytest.raises(ValueError, match=re.escape(message) + "$"):
        CocoLMTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("missing", ["sp.model", "dict.txt"])
def test_a_missing_file(folder, missing):
    (folder / missing).unlink()
    found = {name: None if name == missing else str(folder / name) for name in ("sp.model", "dict.txt")}
    refuses(
        folder,
        "A COCO-LM tokenizer is made of tokenizer.json, or of both sp.model and dict.txt, but got "
        f"vocab_file={found['sp.model']!r} and dict_file={found['dict.txt']!r}. Put what is missing into the folder.",
    )


@pytest.mark.parametrize(
    "content",
    [
        b"",
        (RELEASED / "sp.model").read_bytes()[:-1],
        (RELEASED / "sp.model").read_bytes()[:100_000],
        (RELEASED / "sp.model").read_bytes()[:1000],
        (RELEASED / "sp.model").read_bytes()[:1],
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
        bytes(range(256)),
    ],
    ids=["empty", "without its last byte", "half", "pieces only", "one byte", "Git LFS", "foreign"],
)
def test_a_damaged_model(folder, content):
    (folder / "sp.model").write_bytes(content)
    refuses(
        folder,
        f"{folder / 'sp.model'} is no sentencepiece model, or only a part of one. Copy it again, as a whole: where "
        "files are kept with Git LFS, a copy may be a few lines of text that only name the file.",
    )


def test_models_of_another_kind(make_released):
    folder = make_released(model_type="word", vocab_size=100)
    refuses(
        folder, f"{folder / 'sp.model'} must be a unigram, BPE or character model (type 1, 2 or 4), but is of type 3."
    )
    folder = make_released(model_type="bpe", vocab_size=200, add_dummy_prefix=False)
    refuses(
        folder, f"add_dummy_prefix of {folder / 'sp.model'} must be True, as in every sentencepiece model of COCO-LM."
    )


@pytest.mark.parametrize(
    ("line", "text"),
    [("he", "he"), ("he many", "he many"), ("", ""), (" 3", " 3")],
    ids=["no count", "count is no number", "blank", "no token"],
)
def test_a_damaged_dictionary(folder, line, text):
    lines = (folder / "dict.txt").read_text(encoding="utf-8").split("\n")
    (folder / "dict.txt").write_text("\n".join([*lines[:2], line, *lines[2:]]), encoding="utf-8")
    refuses(folder, f"Line 3 of {folder / 'dict.txt'} must be a token, a space and its count, but is {text!r}.")


def test_a_dictionary_of_another_encoding_or_model(folder):
    (folder / "dict.txt").write_bytes("caf\u00e9 1\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"dict\.txt cannot be read as the dictionary of a COCO-LM tokenizer: 'utf-8'"):
        CocoLMTokenizer.from_pretrained(folder)
    (folder / "dict.txt").write_text("qwertz 2\nasdf 1\n")
    refuses(
        folder,
        f"{folder / 'dict.txt'} has none of the pieces of {folder / 'sp.model'}, so they are not of one model.",
    )
