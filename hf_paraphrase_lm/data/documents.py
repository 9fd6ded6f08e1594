"""Documents cut into chunks of token ids: what is learned from, retrieved and rebuilt."""

import copy
import logging

import pyarrow.compute
from datasets import ClassLabel, Dataset, Features, IterableDataset, List, Value
from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


def chunk_documents(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int = 512,
    text_column: str = "text",
    shard_column: str | None = None,
    language_column: str | None = None,
    batch_size: int = 1000,
    num_proc: int | None = None,
) -> Dataset:
    """Tokenizes documents and cuts them into chunks, each a complete input of a model: `[CLS] ... [SEP]`.

    Every token of a document is in exactly one chunk, in its order; nothing is truncated. MARGE cuts documents into
    chunks of 512 tokens (Lewis et al. 2020). Where the cuts lie is our choice: a document becomes as few chunks as
    `max_length` allows, of equal length but for one token, since with full chunks and a remainder the remainders of a
    few tokens would be targets with nothing to rebuild that resemble one another more than paraphrases do. Also our
    choice: special tokens written in a text are ordinary text.

    Args:
        dataset: one row a document, from `load_dataset("text")`, `"json"`, `"parquet"`, the Hub or anything else that
            has a column of texts.
        tokenizer: with a cls (or bos), a sep (or eos) and a pad token.
        max_length: length of the longest chunk in tokens, [CLS] and [SEP] included.
        text_column: the column of texts. Documents that are None, empty or white space are dropped; their number is
            logged.
        shard_column: the column with the part of the corpus that a document belongs to, such as a date; documents are
            compared within their shard only. None: the corpus is one shard.
        language_column: the column with a document's language, as strings or class labels. None: unknown.
        batch_size: number of documents tokenized at once. Reduce it if they are very long.
        num_proc: number of processes. Fast tokenizers use all cores within one.

    Returns:
        One row a chunk, in the order of the documents, with the columns `input_ids` (list of int32), `document` (int64:
        row of `dataset`), `chunk` (int64: 0, 1, ... within the document), `shard` (the value of `shard_column`; int64 0
        without one) and `language` (string, "" if unknown). It is cached as `Dataset.map` does: next to a dataset on
        disk, and kept in memory for one in memory.

    Raises:
        TypeError: `dataset` is not a `datasets.Dataset`.
        ValueError: a column is missing or of the wrong type, a document has no shard, the tokenizer lacks a special
            token, `max_length` is below 3 or above the tokenizer's `model_max_length`, or no document has text.
    """
    if isinstance(dataset, IterableDataset):
        raise TypeError(
            "dataset must be a datasets.Dataset, but got an IterableDataset, whose rows cannot be looked up. "
            "Load it without streaming=True, or collect a part: Dataset.from_list(list(dataset.take(10_000)))."
        )
    check_columns(dataset, text_column, shard_column, language_column)
    special_token_id(tokenizer, "pad")
    if max_length < 3:
        raise ValueError(
            f"max_length must be at least 3, two special tokens and one of the text, but got {max_length}."
        )
    if max_length > tokenizer.model_max_length:
        raise ValueError(
            f"max_length must be at most the tokenizer's model_max_length ({tokenizer.model_max_length}), "
            f"but got {max_length}. Pass a smaller one, or set tokenizer.model_max_length to what the model takes."
        )
    if not len(dataset):
        raise ValueError("The dataset has no documents: it has 0 rows.")
    columns = list(dict.fromkeys(filter(None, (text_column, shard_column, language_column))))
    features = Features(
        {
            "input_ids": List(Value("int32")),
            "document": Value("int64"),
            "chunk": Value("int64"),
            "shard": dataset.features[shard_column] if shard_column else Value("int64"),
            "language": Value("string"),
        }
    )
    chunks = (
        dataset.with_format(None)
        .select_columns(columns)
        .map(
            chunk_batch,
            batched=True,
            batch_size=batch_size,
            with_indices=True,
            remove_columns=columns,
            features=features,
            num_proc=num_proc,
            desc="Tokenizing documents",
            fn_kwargs={
                # A call changes a tokenizer and so the fingerprint that the cache goes by; the copy is always the same.
                "tokenizer": unpadded_copy(tokenizer),
                "start": special_token_id(tokenizer, "cls", "bos"),
                "end": special_token_id(tokenizer, "sep", "eos"),
                "max_length": max_length,
                "text_column": text_column,
                "shard_column": shard_column,
                "language_column": language_column,
                "language_feature": dataset.features[language_column] if language_column else None,
            },
        )
    )
    kept = pyarrow.compute.sum(pyarrow.compute.equal(chunks.data["chunk"], 0)).as_py() or 0
    if not kept:
        raise ValueError(f"None of the {len(dataset)} documents in column '{text_column}' has any text.")
    if kept < len(dataset):
        logger.warning("Dropped %d of %d documents that have no text.", len(dataset) - kept, len(dataset))
    return chunks


def chunk_batch(
    batch, rows, tokenizer, start, end, max_length, text_column, shard_column, language_column, language_feature
):
    """The chunks of a batch of documents, as columns."""
    texts = [text or "" for text in batch[text_column]]
    shards = batch[shard_column] if shard_column else [0] * len(texts)
    if None in shards:
        raise ValueError(
            f"Every document needs a shard, but column '{shard_column}' is empty in row {rows[shards.index(None)]}. "
            "Fill it in or drop the row with dataset.filter."
        )
    languages = batch[language_column] if language_column else [None] * len(texts)
    if isinstance(language_feature, ClassLabel):
        # Datasets writes an unknown label as None or -1.
        languages = [None if label in (None, -1) else language_feature.int2str(label) for label in languages]
    encodings = tokenizer(
        texts,
        add_special_tokens=False,
        padding=False,
        truncation=False,
        split_special_tokens=True,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )
    chunks = {name: [] for name in ("input_ids", "document", "chunk", "shard", "language")}
    for text, ids, row, shard, language in zip(texts, encodings["input_ids"], rows, shards, languages, strict=True):
        if not text.strip():
            continue
        count = -(-len(ids) // (max_length - 2))
        for chunk in range(count):
            piece = ids[chunk * len(ids) // count : (chunk + 1) * len(ids) // count]
            chunks["input_ids"].append([start, *piece, end])
            chunks["document"].append(row)
            chunks["chunk"].append(chunk)
            chunks["shard"].append(shard)
            chunks["language"].append(language or "")
    return chunks


def special_token_id(tokenizer: PreTrainedTokenizerBase, name: str, substitute: str | None = None) -> int:
    """The id of the tokenizer's `name` token (cls, sep, pad or mask), else of its `substitute` token.

    Raises:
        ValueError: the tokenizer has neither.
    """
    for candidate in filter(None, (name, substitute)):
        token_id = getattr(tokenizer, f"{candidate}_token_id")
        if token_id is not None:
            return token_id
    raise ValueError(
        f"The tokenizer ({type(tokenizer).__name__}) has no {f'{name} or {substitute}' if substitute else name} token. "
        f"Add one with tokenizer.add_special_tokens({{'{name}_token': '[{name.upper()}]'}}) "
        "and give the model len(tokenizer) embeddings."
    )


def unpadded_copy(tokenizer):
    """A copy of the tokenizer as it is after a call without padding and truncation."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer("", padding=False, truncation=False, split_special_tokens=True)
    return tokenizer


def check_columns(
    dataset, text_column: str, shard_column: str | None = None, language_column: str | None = None
) -> None:
    """Raises an error unless `dataset` is one dataset with these columns, and texts and languages are strings."""
    if isinstance(dataset, dict):
        raise TypeError(
            f"dataset must be a single dataset, but got a {type(dataset).__name__} of {', '.join(map(repr, dataset))}. "
            f"Choose one of them, for example dataset[{next(iter(dataset), 'train')!r}]."
        )
    if not isinstance(dataset, Dataset | IterableDataset):
        raise TypeError(
            f"dataset must be a datasets.Dataset, but got a {type(dataset).__name__}. "
            "Make one, for example with Dataset.from_dict({'text': texts})."
        )
    # What a stream holds is not always known before it is read.
    features = dataset.features
    columns = {"text_column": text_column, "shard_column": shard_column, "language_column": language_column}
    for argument, column in columns.items():
        if column is None or features is None:
            continue
        if column not in features:
            raise ValueError(f"{argument} '{column}' is not in the dataset. Its columns are: {', '.join(features)}.")
        is_text = getattr(features[column], "dtype", None) in ("string", "large_string", "string_view", "null")
        is_label = argument == "language_column" and isinstance(features[column], ClassLabel)
        if argument != "shard_column" and not is_text and not is_label:
            raise ValueError(f"{argument} '{column}' must hold strings, but holds {features[column]}.")
