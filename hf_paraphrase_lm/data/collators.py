"""Batches for the two objectives: groups of targets with their evidence, and corrupted sequences with their crops."""

import string
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import compress

import torch
from tokenizers import Tokenizer, models
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from .documents import special_token_id

# The label that cross entropy leaves out.
IGNORED = -100


@dataclass
class DataCollatorForParaphrasing:
    """Makes a batch of groups: targets to rebuild and the evidence documents that they share (MARGE, section 2).

    An example is a group, as `EvidenceDataset` gives it: `input_ids`, the token ids of each evidence document;
    `labels`, those of each target; `evidence_mask`, for each target one bool an evidence document, False where the
    target must not see it (left out: it sees all). Other keys are dropped. Groups may differ in size: missing evidence
    is padding that no target sees, missing targets are labels of -100.

    Args:
        tokenizer: with a pad token.
        pad_to_multiple_of: round the lengths of evidence and of targets up to a multiple of this.

    Returns:
        `input_ids` and `attention_mask`: (groups, num_evidence, length) int64. `labels`: (groups * num_targets,
        target_length) int64, -100 where padded. `evidence_mask`: (groups * num_targets, num_evidence) bool. Group i has
        the rows i * num_targets and following.

    Raises:
        ValueError: the tokenizer has no pad token; there is no group; a group lacks a key or has no evidence, no
            target or an empty document; a document is longer than the tokenizer's `model_max_length`; an evidence mask
            has not one bool a target and evidence document.
    """

    tokenizer: PreTrainedTokenizerBase
    pad_to_multiple_of: int | None = None

    def __post_init__(self):
        special_token_id(self.tokenizer, "pad")

    def __call__(self, examples: Sequence[Mapping]) -> dict[str, Tensor]:
        if not examples:
            raise ValueError("A batch needs at least one group, but got none.")
        evidence = [self._documents(group, "input_ids", number) for number, group in enumerate(examples)]
        targets = [self._documents(group, "labels", number) for number, group in enumerate(examples)]
        num_evidence, num_targets = max(map(len, evidence)), max(map(len, targets))
        evidence_mask = torch.zeros(len(examples), num_targets, num_evidence, dtype=torch.bool)
        for number, group in enumerate(examples):
            rows, columns = len(targets[number]), len(evidence[number])
            visible = group.get("evidence_mask")
            if visible is not None and [len(row) for row in visible] != [columns] * rows:
                raise ValueError(
                    f"evidence_mask of group {number} must be {rows} (targets) lists of {columns} (evidence documents) "
                    f"bools, but has lists of {[len(row) for row in visible]}."
                )
            if visible is None:
                visible = [[True] * columns] * rows
            visible = torch.stack([torch.as_tensor(row, dtype=torch.bool) for row in visible])
            evidence_mask[number, :rows, :columns] = visible
        input_ids, attention_mask = self._pad_documents(evidence, num_evidence)
        labels, is_label = self._pad_documents(targets, num_targets)
        return {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "labels": labels.masked_fill(is_label == 0, IGNORED).flatten(0, 1),
            "evidence_mask": evidence_mask.flatten(0, 1),
        }

    def _documents(self, group, key, number):
        if key not in group:
            raise ValueError(
                f"Group {number} has no {key}, but only {', '.join(group)}. A group comes from an EvidenceDataset."
            )
        documents = [torch.as_tensor(ids, dtype=torch.int64) for ids in group[key]]
        shapes = [tuple(ids.shape) for ids in documents]
        if not shapes or any(len(shape) != 1 or shape == (0,) for shape in shapes):
            raise ValueError(
                f"{key} of group {number} must be at least one document, each a list of at least one token id, "
                f"but got {len(shapes)} of the shapes {sorted(set(shapes))}."
            )
        return documents

    def _pad_documents(self, groups, size):
        nothing = torch.empty(0, dtype=torch.int64)
        flat = [ids for group in groups for ids in group + [nothing] * (size - len(group))]
        return (tensor.unflatten(0, (-1, size)) for tensor in pad_batch(flat, self.tokenizer, self.pad_to_multiple_of))


@dataclass
class DataCollatorForCorrectiveLM:
    """Corrupts and crops sequences for COCO-LM (Meng et al. 2021, section 3; numbers as in the authors' code).

    Of a sequence of n tokens, special ones included, int(mask_probability * n + U[0, 1)) become [MASK], drawn without
    replacement from positions 1 to n - 1: never the first, never padding, perhaps [SEP]. (The authors draw from all
    positions and then take back the first, so that it is sometimes one mask fewer; to leave it out is our choice.)

    With `whole_word_masking` either all tokens of a word are masked or none. Of the w words after the first token,
    int(mask_probability * n * w / (n - 1) + U[0, 1)) are drawn without replacement. As in fairseq, which the authors'
    code builds on, this fixes the number of words, not that of tokens, so that long words are as likely as short ones
    and each token is as likely as without the option: mask_probability * n masks are expected. (n / (n - 1) makes up
    for the first token; our choice.) What a word is, the marks of the tokens tell (see `word_edges`): mostly what white
    space separates, punctuation included. A special or added token is a word, [SEP] too, and ends the one before; a
    document cut within a word leaves two. Text without spaces, such as Chinese, has long words by this rule, so leave
    the option off there.

    The crop is int(span_ratio * n) consecutive tokens of the uncorrupted sequence, at least one, from a uniform start,
    with [CLS] in front: once, also where the crop begins with it (the authors' code can double it).

    Args:
        tokenizer: with a mask, a pad and a cls (or bos) token.
        mask_probability: share of the tokens that are masked.
        span_ratio: length of the crop over the length of the sequence.
        pad_to_multiple_of: round the lengths of sequences and of crops up to a multiple of this.
        seed: None draws from PyTorch's global generator, which `Trainer` seeds and a `DataLoader` seeds anew in each
            worker. Data is read ahead, so a run resumed within an epoch has other masks than an unbroken one. A number
            makes masks and crop a function of it and of the sequence alone: the same in each epoch, whatever the batch
            size, the order and the number of workers, as evaluation wants it. For training that resumes to the bit,
            [`NewMasksCallback`] gives it a number for each epoch.
        whole_word_masking: mask whole words (off in the authors' code). It takes a fast tokenizer whose tokens show
            where words begin or end, such as those of `train_tokenizer`, sentencepiece and WordPiece.

    Returns:
        `input_ids` (batch, length) int64 with masks, `attention_mask` of that shape, `labels` (batch, length) the whole
        sequence without masks, -100 on padding, `span_input_ids` and `span_attention_mask` (batch, span_length).
        Padding is on the right. Of an example only `input_ids`, and `attention_mask` if it has one, are read; tokens
        whose attention mask is 0 are left out.

    Raises:
        ValueError: the tokenizer lacks a token, a share is not in its range, the batch or a sequence is empty, or a
            sequence is longer than the tokenizer's `model_max_length`. With `whole_word_masking` also: the tokenizer is
            not a fast one, its tokens do not show words, or a token id is not one of the tokenizer's.
    """

    tokenizer: PreTrainedTokenizerBase
    mask_probability: float = 0.15
    span_ratio: float = 0.9
    pad_to_multiple_of: int | None = None
    seed: int | None = None
    whole_word_masking: bool = False

    def __post_init__(self):
        special_token_id(self.tokenizer, "pad")
        self.mask_token_id = special_token_id(self.tokenizer, "mask")
        self.cls_token_id = special_token_id(self.tokenizer, "cls", "bos")
        if not 0 <= self.mask_probability <= 1:
            raise ValueError(f"mask_probability must be between 0 and 1, but got {self.mask_probability}.")
        if not 0 < self.span_ratio <= 1:
            raise ValueError(f"span_ratio must be above 0 and at most 1, but got {self.span_ratio}.")
        if self.whole_word_masking:
            self.begins_word, self.ends_word = word_edges(self.tokenizer)

    def __call__(self, examples: Sequence[Mapping]) -> dict[str, Tensor]:
        sequences = [self._tokens(example, number) for number, example in enumerate(examples)]
        if not sequences:
            raise ValueError("A batch needs at least one sequence, but got none.")
        tokens, attention_mask = pad_batch(sequences, self.tokenizer, self.pad_to_multiple_of)
        lengths = attention_mask.sum(1)
        draws = self._draw(sequences, tokens.shape[1])
        words = self._word_numbers(tokens, attention_mask)
        masked = self._masked_positions(words, lengths, draws[:, 0], draws[:, 2:])
        span_input_ids, span_attention_mask = pad_batch(
            self._spans(sequences, lengths, draws[:, 1]), self.tokenizer, self.pad_to_multiple_of
        )
        return {
            "input_ids": tokens.masked_fill(masked, self.mask_token_id),
            "attention_mask": attention_mask,
            "labels": tokens.masked_fill(attention_mask == 0, IGNORED),
            "span_input_ids": span_input_ids,
            "span_attention_mask": span_attention_mask,
        }

    def _tokens(self, example, number):
        if "input_ids" not in example:
            raise ValueError(f"Example {number} has no input_ids, but only {', '.join(example)}.")
        ids = example["input_ids"]
        if example.get("attention_mask") is not None:
            ids = list(compress(ids, example["attention_mask"]))
        ids = torch.as_tensor(ids, dtype=torch.int64)
        if ids.dim() != 1 or not len(ids):
            raise ValueError(
                f"input_ids of example {number} must be a list of at least one token id, "
                f"but got the shape {tuple(ids.shape)}."
            )
        return ids

    def _draw(self, sequences, width):
        """(batch, 2 + width) float64 in [0, 1): round the number of masks, place the crop, rank the words."""
        if self.seed is None:
            return torch.rand(len(sequences), 2 + width, dtype=torch.float64)
        rows = []
        for ids in sequences:
            # PyTorch's CPU generator takes 32 bits of seed.
            generator = torch.Generator().manual_seed(zlib.crc32(ids.numpy().tobytes(), self.seed % 2**32))
            row = torch.rand(2 + len(ids), dtype=torch.float64, generator=generator)
            rows.append(pad(row, (0, width - len(ids))))
        return torch.stack(rows)

    def _word_numbers(self, tokens, attention_mask):
        """(batch, width) int64: 1, 2, ... for the words after the first token; 0 for that token and for padding."""
        if not self.whole_word_masking:
            return torch.arange(tokens.shape[1]) * attention_mask
        if tokens.min() < 0 or tokens.max() >= len(self.begins_word):
            raise ValueError(
                f"input_ids must be ids of the tokenizer, 0 to {len(self.begins_word) - 1}, but go from {tokens.min()} "
                f"to {tokens.max()}. Were they made with another tokenizer?"
            )
        begins = self.begins_word[tokens]
        begins[:, 1:] |= self.ends_word[tokens[:, :-1]]
        # The first token is no part of a word that can be masked.
        begins[:, 0], begins[:, 1:2] = False, True
        return begins.cumsum(1) * attention_mask

    def _masked_positions(self, words, lengths, draw, scores):
        """(batch, width) bool: the words with the lowest scores, as many as are to be masked."""
        num_words = words.amax(1)
        words_per_token = num_words.double() / (lengths - 1).clamp(min=1)
        count = (self.mask_probability * lengths.double() * words_per_token + draw).long().minimum(num_words)
        number = torch.arange(scores.shape[1])
        eligible = (number > 0) & (number <= num_words[:, None])
        rank = scores.masked_fill(~eligible, 2.0).argsort(1).argsort(1)
        return (rank < count[:, None]).gather(1, words)

    def _spans(self, sequences, lengths, draw):
        span_lengths = (self.span_ratio * lengths.double()).long().clamp(min=1)
        starts = (draw * (lengths - span_lengths + 1)).long()
        cls = torch.tensor([self.cls_token_id])
        for ids, start, length in zip(sequences, starts.tolist(), span_lengths.tolist(), strict=True):
            span = ids[start : start + length]
            yield span if span[0] == self.cls_token_id else torch.cat([cls, span])


def pad_batch(sequences, tokenizer, multiple):
    """`sequences` of token ids, padded on the right, and their attention mask, both (batch, length) int64."""
    sequences = list(sequences)
    lengths = torch.tensor([len(ids) for ids in sequences])
    # A number of Python: the limit of a tokenizer without one is too large for a tensor.
    if (longest := lengths.max().item()) > tokenizer.model_max_length:
        raise ValueError(
            f"A sequence has {longest} tokens, but the tokenizer's model_max_length is "
            f"{tokenizer.model_max_length}. Cut the documents with chunk_documents, or set tokenizer.model_max_length."
        )
    ids = pad_sequence(sequences, batch_first=True, padding_value=tokenizer.pad_token_id)
    if multiple:
        ids = pad(ids, (0, -ids.shape[1] % multiple), value=tokenizer.pad_token_id)
    return ids, (torch.arange(ids.shape[1]) < lengths[:, None]).long()


def word_edges(tokenizer: PreTrainedTokenizerBase) -> tuple[Tensor, Tensor]:
    """Which tokens begin a word, and which end one, each (largest token id + 1,) bool.

    A token that continues a word may have a prefix (WordPiece: "##"), one that ends a word a suffix (BPE: "</w>"), or
    the space before a word may be part of its first token, as itself or as another character (sentencepiece: "▁",
    byte-level: "Ġ"). White space belongs to the word behind it. Of a model that knows whole words only, each token is
    a word. Special and added tokens, which a tokenizer cuts out of a text before all else, are words by themselves.

    Raises:
        ValueError: it is not a fast tokenizer, or its tokens have none of these marks.
    """
    if not tokenizer.is_fast:
        raise ValueError(
            f"whole_word_masking needs a fast tokenizer, which is one of the tokenizers library, but got a "
            f"{type(tokenizer).__name__}, which is not."
        )
    model = tokenizer.backend_tokenizer.model
    prefix = model.continuing_subword_prefix if isinstance(model, models.BPE | models.WordPiece) else None
    suffix = model.end_of_word_suffix if isinstance(model, models.BPE) else None
    marks = tuple(space_marks(tokenizer.backend_tokenizer))
    added = tokenizer.added_tokens_decoder
    vocabulary = {token: number for token, number in tokenizer.get_vocab().items() if number not in added}
    size = max([*vocabulary.values(), *added]) + 1
    if prefix:
        begin, end = [number for token, number in vocabulary.items() if not token.startswith(prefix)], []
    elif suffix:
        begin, end = [], [number for token, number in vocabulary.items() if token.endswith(suffix)]
    else:
        begin, end = [number for token, number in vocabulary.items() if token.startswith(marks)], []
        if not begin and isinstance(model, models.WordLevel):
            begin = list(vocabulary.values())
    if not begin and not end:
        raise ValueError(
            f"whole_word_masking needs tokens that show where words begin or end, but those of this tokenizer "
            f"({type(tokenizer).__name__} with a {type(model).__name__} model) have no marks such as 'Ġ', '▁', '##' or "
            "'</w>'. Make one with train_tokenizer, or leave whole_word_masking off."
        )
    edges = torch.zeros(2, size, dtype=torch.bool)
    edges[0, begin] = edges[1, end] = edges[:, list(added)] = True
    return edges[0], edges[1]


def space_marks(backend: Tokenizer) -> set[str]:
    """The characters that stand for white space before a word in what the model of a tokenizer gets to cut."""
    marks = set()
    for space in string.whitespace:
        text = f"a{space}a"
        if backend.normalizer is not None:
            text = backend.normalizer.normalize_str(text)
        if backend.pre_tokenizer is not None:
            text = "".join(piece for piece, _ in backend.pre_tokenizer.pre_tokenize_str(text))
        # Where white space is dropped, the letters stand side by side.
        if text[-2:-1] not in ("", text[-1:]):
            marks.add(text[-2])
    return marks
