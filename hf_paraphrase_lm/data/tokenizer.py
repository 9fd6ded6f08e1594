"""Training of a tokenizer on the user's own texts."""

import logging
from collections.abc import Iterable, Iterator
from itertools import chain, islice

from datasets import Dataset, IterableDataset
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from .documents import check_columns

logger = logging.getLogger(__name__)

# In the order of their ids, 0 to 4. The first four are those of the released COCO-LM vocabularies.
SPECIAL_TOKENS = ("[CLS]", "[PAD]", "[SEP]", "[UNK]", "[MASK]")
BATCH_SIZE = 1000


def train_tokenizer(
    texts: Dataset | IterableDataset | Iterable[str],
    vocab_size: int = 32_768,
    text_column: str = "text",
    lowercase: bool = False,
    min_frequency: int = 2,
    model_max_length: int = 512,
    progress: bool = True,
) -> PreTrainedTokenizerFast:
    """Trains a byte-level BPE tokenizer; `save_pretrained` writes a tokenizer.json that `AutoTokenizer` loads anywhere.

    Byte-level BPE is our choice for text of any language: every byte is in the vocabulary, so no character is unknown
    and decoding gives back the text exactly (in lower case with `lowercase=True`), and training is quick: it merges
    pairs in the table of distinct words.

    A text becomes `[CLS] A [SEP]` and a pair `[CLS] A [SEP] [SEP] B [SEP]`; [CLS] is also the bos token and [SEP] the
    eos token. The ids are [CLS] 0, [PAD] 1, [SEP] 2, [UNK] 3 (never produced) and [MASK] 4. A [MASK] written in a text
    takes in the space before it, as the token that it stands for would.

    Args:
        texts: a dataset, streamed or not, with a column of texts, or any iterable of strings. It is read in batches;
            only its distinct words and their counts are kept in memory. Texts that are None are skipped.
        vocab_size: number of tokens including the special ones, at least 261. A small corpus may yield fewer, which is
            logged, so give a model `vocab_size=len(tokenizer)`. The default is that of COCO-LM base.
        text_column: the column of texts where `texts` is a dataset.
        lowercase: turn texts into lower case first (COCO-LM base is uncased, base++ and large++ are cased).
        min_frequency: how often a pair of tokens must occur to be merged into a new token (our choice: 2).
        model_max_length: length of the longest sequence, in tokens, that the model will take.
        progress: show progress bars.

    Raises:
        ValueError: there is no text, the column is missing or not of strings, or `vocab_size` is below 261.
        TypeError: `texts` is a single string or a dataset of several splits, or a text is not a string.
    """
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    smallest = len(SPECIAL_TOKENS) + len(alphabet)
    if vocab_size < smallest:
        raise ValueError(
            f"vocab_size must be at least {smallest} ({len(SPECIAL_TOKENS)} special tokens and {len(alphabet)} bytes), "
            f"but got {vocab_size}."
        )
    cls, pad, sep, unk, mask = SPECIAL_TOKENS
    mask = AddedToken(mask, lstrip=True, normalized=False, special=True)
    backend = Tokenizer(models.BPE())
    if lowercase:
        backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=min_frequency,
        special_tokens=[cls, pad, sep, unk, mask],
        initial_alphabet=sorted(alphabet),
        show_progress=progress,
    )
    batches = text_batches(texts, text_column)
    first = next(batches, None)
    if first is None:
        raise ValueError("There is no text to train a tokenizer on: the corpus or every text in it is empty.")
    length = len(texts) if isinstance(texts, Dataset | list | tuple) else None
    backend.train_from_iterator(chain([first], batches), trainer, length=length)
    template = processors.TemplateProcessing(
        single=f"{cls} $A {sep}",
        pair=f"{cls} $A {sep} {sep} $B {sep}",
        special_tokens=[(cls, backend.token_to_id(cls)), (sep, backend.token_to_id(sep))],
    )
    # Offsets without the space that a token begins with: answers and entities are cut out of the text with them.
    backend.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=True), template])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=cls,
        eos_token=sep,
        cls_token=cls,
        sep_token=sep,
        pad_token=pad,
        unk_token=unk,
        mask_token=mask,
        model_max_length=model_max_length,
        model_input_names=["input_ids", "attention_mask"],
        padding_side="right",
        clean_up_tokenization_spaces=False,
    )
    if len(tokenizer) < vocab_size:
        logger.warning(
            "The corpus yields a vocabulary of %d tokens, fewer than the %d asked for. Give the model vocab_size=%d.",
            len(tokenizer),
            vocab_size,
            len(tokenizer),
        )
    return tokenizer


def text_batches(texts, text_column: str) -> Iterator[list[str]]:
    """The texts that are not empty, in lists of at most `BATCH_SIZE`."""
    if isinstance(texts, str):
        raise TypeError(
            "texts must be a dataset or an iterable of strings, but got a single string. Put it into a list."
        )
    if isinstance(texts, Dataset | IterableDataset | dict):
        check_columns(texts, text_column)
        batches = (batch[text_column] for batch in texts.with_format(None).iter(batch_size=BATCH_SIZE))
    else:
        iterator = iter(texts)
        batches = iter(lambda: list(islice(iterator, BATCH_SIZE)), [])
    for batch in batches:
        for text in batch:
            if text is not None and not isinstance(text, str):
                raise TypeError(
                    f"texts must be strings, but one of them is of type {type(text).__name__}: {text!r:.100}."
                )
        if batch := [text for text in batch if text]:
            yield batch
