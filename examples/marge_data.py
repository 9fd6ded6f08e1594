"""What the scripts that pre-train MARGE share: documents of any kind in chunks, and how groups are made of them.

Documents are texts, one a row of any file or data set that `runs.py` reads, or token ids in NumPy files, one padded row
a document: `.npy`, or `.dat` with the bare int32 numbers of a memory map in rows of --max_length, as marge-pytorch has
them. What token ids mean, only --tokenizer_name or --model_name_or_path can tell.
"""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow.compute as pc
from datasets import Dataset

from hf_paraphrase_lm import EvidenceDataset, chunk_documents
from hf_paraphrase_lm.data import load_token_array
from hf_paraphrase_lm.data.documents import check_columns
from pretraining import check_length
from runs import DataArguments, load_splits

ARRAYS = (".npy", ".dat")


@dataclass
class CorpusArguments(DataArguments):
    """The documents, and what is known about them."""

    train_file: str | None = field(
        default=None, metadata={"help": "documents: .csv, .tsv, .json, .jsonl, .parquet, .txt; token ids: .npy, .dat"}
    )
    evidence_file: str | None = field(
        default=None,
        metadata={"help": "documents that alone are evidence (or the split 'evidence' of --dataset_name)"},
    )
    text_column: str = field(default="text", metadata={"help": "the column of texts, one document a row"})
    shard_column: str | None = field(
        default=None, metadata={"help": "part of the corpus, such as a date: evidence is of a target's own shard"}
    )
    language_column: str | None = field(default=None, metadata={"help": "evidence in other languages is preferred"})
    group_column: str | None = field(
        default=None,
        metadata={"help": "of the validation data: the same for documents known to be related, for recall"},
    )
    max_length: int = field(default=512, metadata={"help": "longest chunk of a document, in tokens"})
    vocab_size: int = field(default=32_768, metadata={"help": "size of a tokenizer trained on the corpus"})
    lowercase: bool = field(default=False, metadata={"help": "whether a tokenizer trained on the corpus is uncased"})
    array_padding: int | None = field(
        default=None, metadata={"help": "what fills the rows of token arrays, if not the tokenizer's padding"}
    )


@dataclass
class EvidenceArguments:
    """How groups are made, and how the layers that make them learn."""

    strategy: Literal["pairs", "neighbors"] = field(
        default="pairs", metadata={"help": "groups with shared evidence (the paper's), or each target with its own"}
    )
    num_targets: int | None = field(
        default=None, metadata={"help": "targets of a group, at the most; by default 8, or 1 with neighbors"}
    )
    num_evidence: int = field(default=8, metadata={"help": "evidence documents of a group, at the most"})
    max_tokens: int | None = field(
        default=None, metadata={"help": "tokens of a group, targets and evidence together; by default any number"}
    )
    pairs_per_target: float = field(
        default=8, metadata={"help": "most relevant pairs that are kept, for each target; below 1 only the best"}
    )
    cross_language_weight: float = field(default=100.0, metadata={"help": "of a pair in two languages; others have 1"})
    center_languages: bool = field(
        default=False, metadata={"help": "compare documents less the mean of their language: finds more translations"}
    )
    other_languages_only: bool = field(default=False, metadata={"help": "evidence is never of its target's language"})
    first_chunks_only: bool = field(default=False, metadata={"help": "only the beginnings of documents are targets"})
    first_groups: Literal["lexical", "model"] = field(
        default="lexical", metadata={"help": "by rare words in common, or by the model's embeddings (the paper)"}
    )
    hold_first_groups: int = field(default=0, metadata={"help": "no refresh before so many updates"})
    refresh_steps: int = field(default=1000, metadata={"help": "updates from one refresh to the next (paper: 10,000)"})
    refresh_mode: Literal["blocking", "async"] = field(
        default="blocking", metadata={"help": "training waits for new groups, or goes on while they are made"}
    )
    shards_per_refresh: int | None = field(default=None, metadata={"help": "sampled at each refresh; by default all"})
    refresh_batch_size: int = field(default=64, metadata={"help": "documents that are embedded at once"})
    retrieval_learning_rate_factor: float = field(
        default=1.0, metadata={"help": "of the layers that embed documents; small corpora: 0.02"}
    )
    eval_groups: int = field(default=64, metadata={"help": "held-out losses are measured on so many groups"})

    def __post_init__(self):
        if self.num_targets is None:
            self.num_targets = 1 if self.strategy == "neighbors" else 8
        if self.pairs_per_target <= 0:
            raise ValueError(f"--pairs_per_target must be positive, but got {self.pairs_per_target}.")
        sizes = ("num_targets", "num_evidence", "refresh_steps", "refresh_batch_size")
        for name in (*sizes, "eval_groups"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} must be at least 1, but got {getattr(self, name)}.")
        if self.strategy == "neighbors" and self.num_targets != 1:
            raise ValueError(f"--num_targets must be 1 with --strategy neighbors, but got {self.num_targets}.")
        if self.retrieval_learning_rate_factor < 0:
            raise ValueError(
                f"--retrieval_learning_rate_factor must not be negative, but got {self.retrieval_learning_rate_factor}."
            )

    def make_dataset(self, documents: Dataset, evidence: Dataset | None, seed: int) -> EvidenceDataset:
        names = ("num_targets", "num_evidence", "strategy", "pairs_per_target", "cross_language_weight")
        names += ("first_chunks_only", "max_tokens", "center_languages", "other_languages_only")
        options = {name: getattr(self, name) for name in names}
        return EvidenceDataset(documents, evidence=evidence, seed=seed, **options)


def load_documents(
    corpus: CorpusArguments, *needed: str, optional: tuple[str, ...] = ("evidence",)
) -> dict[str, Dataset | Path]:
    """The texts of each split, or the file of its token ids; of the optional ones, those that there are.

    Raises:
        ValueError: a column or a split is missing; what `load_splits` raises.
        FileNotFoundError: there is no such file.
    """
    files = {split: getattr(corpus, f"{split}_file") for split in (*needed, *optional)}
    arrays = {split: Path(file) for split, file in files.items() if file and Path(file).suffix in ARRAYS}
    texts = replace(corpus, **{f"{split}_file": None for split in arrays})
    splits = {}
    if any(split not in arrays and (split in needed or file) for split, file in files.items()):
        splits = load_splits(texts, *(split for split in needed if split not in arrays))
        splits = {split: splits[split] for split in files if split in splits}
    for documents in splits.values():
        check_columns(documents, corpus.text_column, corpus.shard_column, corpus.language_column)
    columns = getattr(splits.get("validation"), "column_names", [])
    if corpus.group_column and "validation" in splits | arrays and corpus.group_column not in columns:
        raise ValueError(
            f"--group_column must be one of the validation data, {columns}, but got {corpus.group_column!r}."
        )
    return splits | arrays


def make_chunks(documents: dict[str, Dataset | Path], corpus: CorpusArguments, tokenizer, model) -> dict[str, Dataset]:
    """The documents in chunks, as `chunk_documents` makes them.

    Raises:
        ValueError: chunks are longer than the model takes, or have tokens that it does not know.
    """
    length = min(corpus.max_length, tokenizer.model_max_length)
    check_length(length, model.config.max_position_embeddings)
    chunks = {}
    for split, source in documents.items():
        if isinstance(source, Path):
            padding = tokenizer.pad_token_id if corpus.array_padding is None else corpus.array_padding
            chunks[split] = load_token_array(source, padding, None if source.suffix == ".npy" else corpus.max_length)
            if limit := corpus.max_samples(split):
                chunks[split] = chunks[split].select(range(min(limit, len(chunks[split]))))
        else:
            columns = corpus.text_column, corpus.shard_column, corpus.language_column
            chunks[split] = chunk_documents(source, tokenizer, length, *columns)
        for batch in chunks[split].select_columns("input_ids").with_format("arrow").iter(10_000):
            ids = batch["input_ids"]
            longest, largest = pc.max(pc.list_value_length(ids)).as_py(), pc.max(pc.list_flatten(ids)).as_py()
            if longest > length or largest >= model.config.vocab_size:
                raise ValueError(
                    f"The {split} documents have chunks of up to {longest} tokens with ids up to {largest}, but there "
                    f"must be at most {length} tokens (--max_length, the tokenizer's model_max_length) with ids below "
                    f"{model.config.vocab_size} (the model's vocab_size). Were they made with another tokenizer?"
                )
    return chunks


def known_documents(texts: Dataset, chunks: Dataset, column: str) -> tuple[Dataset, np.ndarray]:
    """First chunks, and the number of each one's group of related documents, int64 `(documents,)`; -1: of none.

    Raises:
        ValueError: no two documents are of one group.
    """
    first = chunks.select(np.flatnonzero(np.array(chunks["chunk"]) == 0))
    numbers = {None: -1, "": -1, -1: -1}
    groups = np.array([numbers.setdefault(value, len(numbers)) for value in texts[column]])
    groups = groups[np.array(first["document"])]
    if len(np.unique(groups[groups >= 0])) == (groups >= 0).sum():
        raise ValueError(
            f"--group_column {column!r} must have a value that two documents share, for recall, but has none."
        )
    return first, groups
