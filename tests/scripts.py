"""Runs the scripts of `examples/` in this process, with tiny checkpoints."""

import csv
import importlib
import json
import sys

import datasets
from datasets import Dataset
from transformers import BertConfig, BertModel, BertTokenizer

from hf_paraphrase_lm import CocoLMConfig, CocoLMModel, train_tokenizer

ROOM = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
ROOM |= {"max_position_embeddings": 64, "initializer_range": 0.2}


def import_example(monkeypatch, repository, name):
    """A module of the folder `examples`."""
    monkeypatch.syspath_prepend(repository / "examples")
    return importlib.import_module(name)


def make_checkpoint(folder, texts, family="cocolm", **settings):
    """A tiny encoder and its tokenizer, which knows the words of the texts."""
    if family == "bert":
        words = sorted({word for text in texts for word in text.lower().split()})
        special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
        tokenizer = BertTokenizer(vocab={word: i for i, word in enumerate(special + words)}, model_max_length=64)
        model = BertModel(BertConfig(vocab_size=len(tokenizer), **ROOM | settings))
    else:
        tokenizer = train_tokenizer(texts * 2, vocab_size=400, model_max_length=64, progress=False)
        model = CocoLMModel(CocoLMConfig(vocab_size=len(tokenizer), **ROOM | settings))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_rows(file, rows):
    """Writes rows as a Parquet, JSON lines, CSV or TSV file."""
    if isinstance(rows, list):
        rows = Dataset.from_list(rows)
    if file.suffix == ".parquet":
        rows.to_parquet(file)
    elif file.suffix == ".jsonl":
        rows.to_json(file)
    elif file.suffix == ".tsv":
        rows.to_csv(file, sep="\t", quoting=csv.QUOTE_NONE)
    else:
        rows.to_csv(file)
    return file


def run_script(script, monkeypatch, folder, **arguments):
    """Runs a script with arguments as on the command line. Returns its --output_dir, folder/out."""
    defaults = {"output_dir": folder / "out", "use_cpu": True, "disable_tqdm": True, "report_to": "none"}
    defaults |= {"save_strategy": "no", "learning_rate": 1e-2, "per_device_train_batch_size": 8}
    command = [f"{script.__name__}.py", *(f"--{name}={value}" for name, value in (defaults | arguments).items())]
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
    monkeypatch.setattr(sys, "argv", command)
    script.main()
    return (defaults | arguments)["output_dir"]


def read_json(file):
    return json.loads(file.read_text(encoding="utf-8"))
