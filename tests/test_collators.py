import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch.utils.data import DataLoader
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast, set_seed

from hf_paraphrase_lm import CocoLMTokenizer
from hf_paraphrase_lm.data import DataCollatorForCorrectiveLM, DataCollatorForParaphrasing, train_tokenizer

from .reference import masking

CLS, PAD, SEP, UNK, MASK = range(5)


@pytest.fixture
def tokenizer():
    """As `train_tokenizer` makes it, with words 5 to 99."""
    vocabulary = {token: number for number, token in enumerate(["[CLS]", "[PAD]", "[SEP]", "[UNK]", "[MASK]"])}
    vocabulary |= {str(number): number for number in range(5, 100)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]")),
        cls_token="[CLS]",
        pad_token="[PAD]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        model_max_length=64,
    )


def sequence(length):
    return [CLS, *range(5, 5 + length - 2), SEP][:length]


def group(num_targets=1, num_evidence=1, **others):
    return {"input_ids": [sequence(4)] * num_evidence, "labels": [sequence(3)] * num_targets} | others


def test_groups_of_one_size(tokenizer):
    batch = DataCollatorForParaphrasing(tokenizer)(
        [
            {
                "input_ids": [[0, 10, 2], [0, 11, 12, 2]],
                "labels": [[0, 13, 2], [0, 14, 2]],
                "evidence_mask": [[False, True], [True, True]],
                "target_rows": [1, 2],
                "evidence_rows": [1, 3],
            },
            {
                "input_ids": [[0, 20, 2], [0, 21, 2]],
                "labels": [[0, 22, 23, 24, 2], [0, 25, 2]],
                "evidence_mask": [[True, True], [True, False]],
            },
        ]
    )
    assert {name: tensor.tolist() for name, tensor in batch.items()} == {
        "input_ids": [[[0, 10, 2, 1], [0, 11, 12, 2]], [[0, 20, 2, 1], [0, 21, 2, 1]]],
        "attention_mask": [[[1, 1, 1, 0], [1, 1, 1, 1]], [[1, 1, 1, 0], [1, 1, 1, 0]]],
        "labels": [
            [0, 13, 2, -100, -100],
            [0, 14, 2, -100, -100],
            [0, 22, 23, 24, 2],
            [0, 25, 2, -100, -100],
        ],
        "evidence_mask": [[False, True], [True, True], [True, True], [True, False]],
    }
    assert [batch[name].dtype for name in ("input_ids", "attention_mask", "labels")] == [torch.int64] * 3
    assert batch["evidence_mask"].dtype == torch.bool


def test_groups_of_different_sizes_are_filled_with_what_nobody_sees(tokenizer):
    batch = DataCollatorForParaphrasing(tokenizer, pad_to_multiple_of=4)(
        [
            {"input_ids": [[0, 10, 2]], "labels": [[0, 11, 2], [0, 12, 2]], "evidence_mask": [[True], [False]]},
            {"input_ids": [[0, 13, 2], [0, 14, 15, 16, 2]], "labels": [[0, 17, 2]]},
        ]
    )
    assert batch["input_ids"].tolist() == [
        [[0, 10, 2, 1, 1, 1, 1, 1], [1] * 8],
        [[0, 13, 2, 1, 1, 1, 1, 1], [0, 14, 15, 16, 2, 1, 1, 1]],
    ]
    assert batch["attention_mask"].tolist() == [
        [[1, 1, 1, 0, 0, 0, 0, 0], [0] * 8],
        [[1, 1, 1, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 0, 0, 0]],
    ]
    assert batch["labels"].tolist() == [[0, 11, 2, -100], [0, 12, 2, -100], [0, 17, 2, -100], [-100] * 4]
    assert batch["evidence_mask"].tolist() == [[True, False], [False, False], [True, True], [False, False]]


def test_groups_of_arrays_and_tensors(tokenizer):
    lists = {"input_ids": [[0, 10, 2], [0, 11, 2]], "labels": [[0, 12, 2]], "evidence_mask": [[True, False]]}
    arrays = {
        "input_ids": [np.array(ids, dtype=np.int32) for ids in lists["input_ids"]],
        "labels": torch.tensor(lists["labels"]),
        "evidence_mask": [np.array([True, False])],
    }
    collator = DataCollatorForParaphrasing(tokenizer)
    expected = collator([lists])
    for name, tensor in collator([arrays]).items():
        torch.testing.assert_close(tensor, expected[name])


@pytest.mark.parametrize(
    ("groups", "sentence"),
    [
        ([], "A batch needs at least one group, but got none."),
        (
            [{"input_ids": [[0, 2]], "document": 3}],
            "Group 0 has no labels, but only input_ids, document. A group comes from an EvidenceDataset.",
        ),
        (
            [group(), group(num_evidence=0)],
            "input_ids of group 1 must be at least one document, each a list of at least one token id, "
            "but got 0 of the shapes [].",
        ),
        (
            [{"input_ids": [[0, 2], []], "labels": [[0, 2]]}],
            "input_ids of group 0 must be at least one document, each a list of at least one token id, "
            "but got 2 of the shapes [(0,), (2,)].",
        ),
        (
            [{"input_ids": [[0, 2]], "labels": [0, 2]}],
            "labels of group 0 must be at least one document, each a list of at least one token id, "
            "but got 2 of the shapes [()].",
        ),
        (
            [group(num_targets=2, num_evidence=2, evidence_mask=[[True, True]])],
            "evidence_mask of group 0 must be 2 (targets) lists of 2 (evidence documents) bools, but has lists of [2].",
        ),
        (
            [{"input_ids": [[0, 2]], "labels": [[5] * 65]}],
            "A sequence has 65 tokens, but the tokenizer's model_max_length is 64. "
            "Cut the documents with chunk_documents, or set tokenizer.model_max_length.",
        ),
    ],
)
def test_wrong_groups(tokenizer, groups, sentence):
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}$"):
        DataCollatorForParaphrasing(tokenizer)(groups)


@pytest.mark.parametrize(
    ("collator", "missing", "described"),
    [
        (DataCollatorForParaphrasing, "pad", "pad"),
        (DataCollatorForCorrectiveLM, "pad", "pad"),
        (DataCollatorForCorrectiveLM, "mask", "mask"),
        (DataCollatorForCorrectiveLM, "cls", "cls or bos"),
    ],
)
def test_tokenizer_without_a_token(tokenizer, collator, missing, described):
    setattr(tokenizer, f"{missing}_token", None)
    sentence = (
        f"The tokenizer (TokenizersBackend) has no {described} token. Add one with "
        f"tokenizer.add_special_tokens({{'{missing}_token': '[{missing.upper()}]'}}) "
        "and give the model len(tokenizer) embeddings."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}$"):
        collator(tokenizer)


def test_corrupted_batch(tokenizer, monkeypatch):
    """With given draws: 10 tokens have int(1.5 + u) masks and a crop of 9, 5 have int(0.75 + u) and a crop of 4."""
    draws = torch.tensor(
        [
            # Two masks, on the lowest scores but the first (position 0) and the last two (the next is 4, then 9).
            [0.5, 0.999, 0.0, 0.9, 0.9, 0.9, 0.1, 0.9, 0.9, 0.9, 0.9, 0.2],
            # No mask; the crop starts at 0 and so has [CLS] already. The low scores of padding do not count.
            [0.2, 0.499, 0.3, 0.4, 0.5, 0.6, 0.7, 0.0, 0.0, 0.0, 0.0, 0.0],
            # One mask.
            [0.25, 0.5, 0.3, 0.4, 0.1, 0.6, 0.7, 0.0, 0.0, 0.0, 0.0, 0.0],
        ],
        dtype=torch.float64,
    )
    collator = DataCollatorForCorrectiveLM(tokenizer)
    monkeypatch.setattr(collator, "_draw", lambda sequences, width: draws)
    long, short = {"input_ids": sequence(10), "document": 7}, {"input_ids": sequence(5), "language": "en"}
    batch = collator([long, short, short])
    assert {name: tensor.tolist() for name, tensor in batch.items()} == {
        "input_ids": [
            [CLS, 5, 6, 7, MASK, 9, 10, 11, 12, MASK],
            [CLS, 5, 6, 7, SEP, PAD, PAD, PAD, PAD, PAD],
            [CLS, 5, MASK, 7, SEP, PAD, PAD, PAD, PAD, PAD],
        ],
        "attention_mask": [[1] * 10, [1] * 5 + [0] * 5, [1] * 5 + [0] * 5],
        "labels": [
            [CLS, 5, 6, 7, 8, 9, 10, 11, 12, SEP],
            [CLS, 5, 6, 7, SEP, -100, -100, -100, -100, -100],
            [CLS, 5, 6, 7, SEP, -100, -100, -100, -100, -100],
        ],
        "span_input_ids": [
            [CLS, 5, 6, 7, 8, 9, 10, 11, 12, SEP],
            [CLS, 5, 6, 7, PAD, PAD, PAD, PAD, PAD, PAD],
            [CLS, 5, 6, 7, SEP, PAD, PAD, PAD, PAD, PAD],
        ],
        "span_attention_mask": [[1] * 10, [1] * 4 + [0] * 6, [1] * 5 + [0] * 5],
    }
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}


@pytest.mark.parametrize("mask_probability", [0.0, 0.15, 0.5, 1.0])
@pytest.mark.parametrize("span_ratio", [0.1, 0.9, 1.0])
def test_batch_equals_a_loop_over_sequences(tokenizer, mask_probability, span_ratio):
    collator = DataCollatorForCorrectiveLM(tokenizer, mask_probability, span_ratio, pad_to_multiple_of=8)
    sequences = [sequence(int(length)) for length in torch.randint(1, 65, (200,))]
    set_seed(1)
    batch = collator([{"input_ids": ids} for ids in sequences])
    set_seed(1)
    draws = torch.rand(len(sequences), 2 + batch["input_ids"].shape[1], dtype=torch.float64)
    for row, ids in enumerate(sequences):
        masked, span = masking.corrupt(ids, mask_probability, span_ratio, MASK, CLS, draws[row].tolist())
        for name, expected in (("input_ids", masked), ("span_input_ids", span)):
            mask = batch["attention_mask" if name == "input_ids" else "span_attention_mask"][row]
            assert batch[name][row].tolist() == expected + [PAD] * (len(mask) - len(expected))
            assert mask.tolist() == [1] * len(expected) + [0] * (len(mask) - len(expected))
        assert batch["labels"][row].tolist() == ids + [-100] * (batch["labels"].shape[1] - len(ids))
    assert batch["input_ids"].shape[1] % 8 == batch["span_input_ids"].shape[1] % 8 == 0


@pytest.mark.parametrize("length", [1, 2, 3])
def test_short_sequences(tokenizer, length):
    collator = DataCollatorForCorrectiveLM(tokenizer, mask_probability=1.0)
    batch = collator([{"input_ids": sequence(length)}] * 50)
    assert batch["input_ids"].tolist() == [[CLS] + [MASK] * (length - 1)] * 50
    assert batch["labels"].tolist() == [sequence(length)] * 50
    spans = {
        tuple(ids[mask == 1].tolist())
        for ids, mask in zip(batch["span_input_ids"], batch["span_attention_mask"], strict=True)
    }
    assert spans == {1: {(CLS,)}, 2: {(CLS,), (CLS, SEP)}, 3: {(CLS, 5), (CLS, 5, SEP)}}[length]


def test_rates(tokenizer):
    """The expected number of masks is 0.15 n, each position after the first is as likely, and so is each crop."""
    set_seed(0)
    n, rows = 22, 20_000
    batch = DataCollatorForCorrectiveLM(tokenizer)([{"input_ids": sequence(n)}] * rows)
    masked = batch["input_ids"] == MASK
    assert set(masked.sum(1).tolist()) == {3, 4}
    # Standard deviations: 0.46 / sqrt(rows) for the number of masks, sqrt(0.157 * 0.843 / rows) for a position.
    assert masked.sum(1).double().mean() == pytest.approx(0.15 * n, abs=5 * 0.46 / rows**0.5)
    assert not masked[:, 0].any()
    torch.testing.assert_close(
        masked[:, 1:].double().mean(0), torch.full((n - 1,), 0.15 * n / (n - 1)).double(), atol=0.013, rtol=0
    )
    starts = Counter(batch["span_input_ids"][:, 1].tolist())
    # int(0.9 * 22) = 19 tokens from position 0 (whose second is 5), 1 (5 as well, after [CLS]), 2 or 3.
    assert {start: count / rows for start, count in starts.items()} == pytest.approx(
        {5: 0.5, 6: 0.25, 7: 0.25}, abs=0.02
    )


def test_padding_of_examples_is_left_out(tokenizer):
    collator = DataCollatorForCorrectiveLM(tokenizer, seed=0)
    plain = collator([{"input_ids": sequence(6)}, {"input_ids": sequence(9)}])
    padded = collator(
        [
            {"input_ids": sequence(6) + [PAD] * 3, "attention_mask": [1] * 6 + [0] * 3},
            {"input_ids": [PAD] * 2 + sequence(9), "attention_mask": torch.tensor([0] * 2 + [1] * 9)},
        ]
    )
    for name, tensor in plain.items():
        torch.testing.assert_close(padded[name], tensor)


def test_seed_fixes_the_corruption_of_a_sequence_in_any_batch(tokenizer):
    examples = [{"input_ids": sequence(length)} for length in range(20, 60)]
    collator = DataCollatorForCorrectiveLM(tokenizer, seed=3)
    together = collator(examples)
    state = torch.get_rng_state()
    for row in (0, 17, 39):
        alone = collator([examples[row]])
        for name, tensor in alone.items():
            assert tensor[0].tolist() == together[name][row, : tensor.shape[1]].tolist()
    assert torch.equal(torch.get_rng_state(), state)
    other = DataCollatorForCorrectiveLM(tokenizer, seed=4)(examples)
    assert (other["input_ids"] == together["input_ids"]).all(1).float().mean() < 0.2
    masked = together["input_ids"][:20, :20] == MASK
    assert len({tuple(row) for row in masked.tolist()}) > 15, "sequences of about one length differ in their masks"


# Whole words

SPECIAL_TOKENS = ["[CLS]", "[PAD]", "[SEP]", "[UNK]", "[MASK]"]
TEXT = "the models that are trained to correct a text\nalso contrast two halves of it with the others in a batch"
NEW_TEXT = "the trainers of contrastiveness with it"


def train(model, trainer, pre_tokenizer=None, decoder=None, normalizer=None, **arguments):
    """A fast tokenizer for `TEXT` with the special tokens of `train_tokenizer`."""
    backend = Tokenizer(model)
    if normalizer is not None:
        backend.normalizer = normalizer
    if pre_tokenizer is not None:
        backend.pre_tokenizer = pre_tokenizer
    if decoder is not None:
        backend.decoder = decoder
    backend.train_from_iterator(
        [TEXT, TEXT[::-1], NEW_TEXT[::-1]], trainer(special_tokens=SPECIAL_TOKENS, show_progress=False, **arguments)
    )
    names = ("cls_token", "pad_token", "sep_token", "unk_token", "mask_token")
    special = dict(zip(names, SPECIAL_TOKENS, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False, **special)


def metaspace(mark):
    return pre_tokenizers.Metaspace(mark), decoders.Metaspace(mark)


def byte_level():
    return train_tokenizer([TEXT], vocab_size=270, progress=False)


def byte_level_with_a_first_space():
    parts = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel()])
    return train(models.BPE(), trainers.BpeTrainer, parts, decoders.ByteLevel(), vocab_size=60)


def cocolm():
    return CocoLMTokenizer.from_pretrained(Path(__file__).parent / "fixtures" / "cocolm_tokenizer")


def unigram():
    return train(models.Unigram(), trainers.UnigramTrainer, *metaspace("\u2581"), vocab_size=45, unk_token="[UNK]")


def another_mark():
    return train(models.BPE(), trainers.BpeTrainer, *metaspace("_"), vocab_size=60)


def marks_of_the_normalizer():
    mark = "\u2581"
    tokenizer = train(models.BPE(), trainers.BpeTrainer, *metaspace(mark), vocab_size=60)
    backend = tokenizer.backend_tokenizer
    backend.normalizer = normalizers.Sequence([normalizers.Prepend(mark), normalizers.Replace(Regex(r"\s"), mark)])
    backend.pre_tokenizer = None
    return tokenizer


def word_piece():
    parts = (pre_tokenizers.BertPreTokenizer(), decoders.WordPiece())
    return train(models.WordPiece(unk_token="[UNK]"), trainers.WordPieceTrainer, *parts, vocab_size=60)


def prefixes():
    model, parts = models.BPE(continuing_subword_prefix="@@"), (pre_tokenizers.Whitespace(), decoders.WordPiece("@@"))
    return train(model, trainers.BpeTrainer, *parts, vocab_size=70, continuing_subword_prefix="@@")


def suffixes():
    model, parts = models.BPE(end_of_word_suffix="</w>"), (pre_tokenizers.Whitespace(), decoders.BPEDecoder("</w>"))
    return train(model, trainers.BpeTrainer, *parts, vocab_size=70, end_of_word_suffix="</w>")


def characters():
    parts = (pre_tokenizers.Split("", "isolated"), decoders.Fuse())
    return train(models.BPE(), trainers.BpeTrainer, *parts, vocab_size=40)


# Each with what begins a word, or else ends one.
TOKENIZERS = {
    byte_level: (tuple("\u0109\u010a\u010b\u010c\u010d\u0120"), ()),
    byte_level_with_a_first_space: ("\u0120", ()),
    cocolm: ("\u2581", ()),
    unigram: (("\u2581", "\n"), ()),
    another_mark: (("_", "\n"), ()),
    marks_of_the_normalizer: ("\u2581", ()),
    word_piece: (None, ()),
    prefixes: (None, ()),
    suffixes: ((), ("</w>",)),
    characters: ((" ", "\n"), ()),
}


def naive_words(kind, tokenizer, ids):
    begin, ends = TOKENIZERS[kind]
    continues = {word_piece: "##", prefixes: "@@"}.get(kind)

    def begins(token):
        return token.startswith(begin) if continues is None else not token.startswith(continues)

    return masking.words(tokenizer.convert_ids_to_tokens(ids), begins, SPECIAL_TOKENS, ends)


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_words_of_any_fast_tokenizer(kind):
    """The words that are masked as a whole are those of the text, and more tokens than words are read."""
    tokenizer = kind()
    for text in (TEXT, NEW_TEXT):
        ids = [CLS, *tokenizer(text, add_special_tokens=False)["input_ids"], SEP]
        assert len(ids) - 2 > len(text.split())
        words = naive_words(kind, tokenizer, ids)
        assert [tokenizer.decode([ids[i] for i in word]).strip() for word in words[:-1]] == text.split()
        assert words[-1] == [len(ids) - 1]
        collator = DataCollatorForCorrectiveLM(tokenizer, 0.4, seed=0, whole_word_masking=True)
        for seed in range(30):
            collator.seed = seed
            masked = collator([{"input_ids": ids}])["input_ids"][0] == tokenizer.mask_token_id
            assert [len(set(masked[word].tolist())) for word in words] == [1] * len(words)
            # int(0.4 * w * n / (n - 1) + U[0, 1)) words.
            number = sum(bool(masked[word[0]]) for word in words)
            assert abs(number - 0.4 * len(words) * len(ids) / (len(ids) - 1)) < 1


@pytest.mark.parametrize("mask_probability", [0.0, 0.15, 0.5, 1.0])
@pytest.mark.parametrize("kind", [byte_level, word_piece, suffixes])
def test_batch_of_whole_words_equals_a_loop_over_sequences(kind, mask_probability):
    """Of any token ids: words cut at both ends, several special tokens in a row, and no [CLS] in front."""
    tokenizer = kind()
    collator = DataCollatorForCorrectiveLM(tokenizer, mask_probability, whole_word_masking=True)
    set_seed(1)
    sequences = [torch.randint(len(tokenizer), (int(length),)).tolist() for length in torch.randint(1, 65, (200,))]
    state = torch.get_rng_state()
    batch = collator([{"input_ids": ids} for ids in sequences])
    torch.set_rng_state(state)
    draws = torch.rand(len(sequences), 2 + batch["input_ids"].shape[1], dtype=torch.float64)
    for row, ids in enumerate(sequences):
        words = naive_words(kind, tokenizer, ids)
        masked, span = masking.corrupt(ids, mask_probability, 0.9, MASK, CLS, draws[row].tolist(), words)
        assert batch["input_ids"][row, : len(ids)].tolist() == masked
        assert batch["span_input_ids"][row, : len(span)].tolist() == span
        assert batch["input_ids"][row, len(ids) :].eq(PAD).all()
        assert batch["labels"][row].tolist() == ids + [-100] * (batch["labels"].shape[1] - len(ids))


def test_special_and_added_tokens_are_words():
    tokenizer = byte_level()
    tokenizer.add_tokens("COCO-LM")
    added = len(tokenizer) - 1
    space_t, t, comma = tokenizer.convert_tokens_to_ids(["\u0120t", "t", ","])
    # A chunk that begins within a word: [CLS] t t, COCO-LM t [SEP] [SEP] t [MASK] t [SEP], with " t" between some.
    ids = [CLS, t, t, comma, space_t, t, added, t, SEP, SEP, t, MASK, t, SEP]
    words = [[1, 2, 3], [4, 5], [6], [7], [8], [9], [10], [11], [12], [13]]
    collator = DataCollatorForCorrectiveLM(tokenizer, whole_word_masking=True)
    tokens = torch.tensor([ids, [*ids[:4], *[PAD] * 10]])
    numbers = collator._word_numbers(tokens, torch.tensor([[1] * 14, [1] * 4 + [0] * 10]))
    assert numbers.tolist() == [
        [0, *(number for number, word in enumerate(words, 1) for _ in word)],
        [0, 1, 1, 1, *[0] * 10],
    ]


def test_rates_of_whole_words():
    """The expected number of masks is 0.15 n, and long words are masked as often as short ones."""
    set_seed(0)
    tokenizer, rows = word_piece(), 20_000
    head, tail = tokenizer.convert_tokens_to_ids(["t", "##t"])
    ids = [CLS, *(token for length in (1, 5, 1, 2, 3, 1, 8) for token in [head] + [tail] * (length - 1)), SEP]
    batch = DataCollatorForCorrectiveLM(tokenizer, whole_word_masking=True)([{"input_ids": ids}] * rows)
    masked, n = (batch["input_ids"] == MASK).double(), len(ids)
    assert not masked[:, 0].any()
    # Of 8 words int(1.257 + U[0, 1)) are masked; a deviation of 0.016 is six standard ones.
    torch.testing.assert_close(
        masked[:, 1:].mean(0), torch.full((n - 1,), 0.15 * n / (n - 1)).double(), atol=0.016, rtol=0
    )
    number = masked.sum(1)
    assert number.mean().item() == pytest.approx(0.15 * n, abs=5 * number.std().item() / rows**0.5)
    assert number.min() == 1


@pytest.mark.parametrize("length", [1, 2, 3])
def test_whole_words_of_short_sequences(length):
    tokenizer = byte_level()
    collator = DataCollatorForCorrectiveLM(tokenizer, mask_probability=1.0, whole_word_masking=True)
    batch = collator([{"input_ids": [CLS, *tokenizer.convert_tokens_to_ids(["t", "t"])][:length]}] * 20)
    assert batch["input_ids"].tolist() == [[CLS] + [MASK] * (length - 1)] * 20


def test_whole_words_of_a_vocabulary_of_words(tokenizer):
    """Each token is a word, so that nothing changes."""
    examples = [{"input_ids": sequence(length)} for length in range(1, 60)]
    plain, whole = (DataCollatorForCorrectiveLM(tokenizer, seed=0, whole_word_masking=on)(examples) for on in (0, 1))
    for name, tensor in plain.items():
        torch.testing.assert_close(whole[name], tensor, atol=0, rtol=0)


def test_seed_fixes_the_masked_words_of_a_sequence_in_any_batch():
    tokenizer = byte_level()
    texts = [TEXT[start:] for start in range(0, 90, 3)]
    examples = [{"input_ids": ids} for ids in tokenizer(texts)["input_ids"]]
    collator = DataCollatorForCorrectiveLM(tokenizer, seed=3, whole_word_masking=True)
    together, reversed_batch = collator(examples), collator(examples[::-1])
    for row, example in enumerate(examples):
        alone = collator([example])
        for name, tensor in alone.items():
            expected = tensor[0].tolist()
            assert together[name][row, : len(expected)].tolist() == expected
            assert reversed_batch[name][-1 - row, : len(expected)].tolist() == expected


def test_tokenizers_whose_words_cannot_be_told():
    sentence = (
        "whole_word_masking needs tokens that show where words begin or end, but those of this tokenizer "
        "(TokenizersBackend with a BPE model) have no marks such as '\u0120', '\u2581', '##' or '</w>'. "
        "Make one with train_tokenizer, or leave whole_word_masking off."
    )
    unmarked = train(models.BPE(), trainers.BpeTrainer, pre_tokenizers.Whitespace(), vocab_size=60)
    no_letters = train(
        models.BPE(), trainers.BpeTrainer, None, None, normalizers.Replace(Regex("[^o ]"), ""), vocab_size=60
    )
    for tokenizer in (unmarked, no_letters):
        DataCollatorForCorrectiveLM(tokenizer)
        with pytest.raises(ValueError, match=f"^{re.escape(sentence)}$"):
            DataCollatorForCorrectiveLM(tokenizer, whole_word_masking=True)
    slow = ByT5Tokenizer(cls_token="<cls>", mask_token="<mask>")
    sentence = (
        "whole_word_masking needs a fast tokenizer, which is one of the tokenizers library, "
        "but got a ByT5Tokenizer, which is not."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}$"):
        DataCollatorForCorrectiveLM(slow, whole_word_masking=True)


@pytest.mark.parametrize("foreign", [-1, 270])
def test_words_of_foreign_ids(foreign):
    collator = DataCollatorForCorrectiveLM(byte_level(), whole_word_masking=True)
    sentence = (
        f"input_ids must be ids of the tokenizer, 0 to 269, but go from {min(foreign, 0)} to {max(foreign, 5)}. "
        "Were they made with another tokenizer?"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}$"):
        collator([{"input_ids": [CLS, 5, foreign]}])


# Python 3.12 and later warn when a process with threads, which PyTorch has, is forked.
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_without_seed_pytorch_decides(tokenizer):
    """Trainer's seed and its resuming fix the batches, epochs differ, and workers do not repeat each other."""
    dataset = Dataset.from_dict({"input_ids": [sequence(60)] * 8})
    collator = DataCollatorForCorrectiveLM(tokenizer)

    def epochs(workers):
        set_seed(5)
        loader = DataLoader(dataset, batch_size=2, collate_fn=collator, num_workers=workers)
        return [[batch["input_ids"] for batch in loader] for _ in range(2)]

    for workers in (0, 2):
        first, second = epochs(workers)
        repeated, _ = epochs(workers)
        assert all(torch.equal(*batches) for batches in zip(first, repeated, strict=True))
        rows = torch.cat(first + second).tolist()
        assert len({tuple(row) for row in rows}) == len(rows)


@pytest.mark.parametrize(
    ("examples", "sentence"),
    [
        ([], "A batch needs at least one sequence, but got none."),
        ([{"text": "a", "label": 1}], "Example 0 has no input_ids, but only text, label."),
        (
            [{"input_ids": [0, 2]}, {"input_ids": []}],
            "input_ids of example 1 must be a list of at least one token id, but got the shape (0,).",
        ),
        (
            [{"input_ids": [1, 1], "attention_mask": [0, 0]}],
            "input_ids of example 0 must be a list of at least one token id, but got the shape (0,).",
        ),
        (
            [{"input_ids": [[0, 5, 2]]}],
            "input_ids of example 0 must be a list of at least one token id, but got the shape (1, 3).",
        ),
        (
            [{"input_ids": [5] * 65}],
            "A sequence has 65 tokens, but the tokenizer's model_max_length is 64. "
            "Cut the documents with chunk_documents, or set tokenizer.model_max_length.",
        ),
    ],
)
def test_wrong_sequences(tokenizer, examples, sentence):
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}$"):
        DataCollatorForCorrectiveLM(tokenizer)(examples)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"mask_probability": 1.5}, "mask_probability must be between 0 and 1, but got 1.5."),
        ({"mask_probability": -0.1}, "mask_probability must be between 0 and 1, but got -0.1."),
        ({"span_ratio": 0.0}, "span_ratio must be above 0 and at most 1, but got 0.0."),
        ({"span_ratio": 2}, "span_ratio must be above 0 and at most 1, but got 2."),
    ],
)
def test_wrong_shares(tokenizer, arguments, sentence):
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}$"):
        DataCollatorForCorrectiveLM(tokenizer, **arguments)
