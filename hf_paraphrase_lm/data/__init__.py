"""Texts to chunks with token ids, tokenizers, and the batches of both objectives."""

from .collators import DataCollatorForCorrectiveLM, DataCollatorForParaphrasing
from .documents import chunk_documents
from .python_docs import load_python_docs
from .token_arrays import load_token_array
from .tokenizer import train_tokenizer

__all__ = [
    "DataCollatorForCorrectiveLM",
    "DataCollatorForParaphrasing",
    "chunk_documents",
    "load_python_docs",
    "load_token_array",
    "train_tokenizer",
]
