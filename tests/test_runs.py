"""examples/runs.py: arguments, files of data, checkpoints to go on from, models to start from, and the model card."""

import hashlib
import json
import re
import shlex
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path

import datasets
import pytest
import torch
from datasets import Dataset, DatasetDict
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer, TrainingArguments

from hf_paraphrase_lm import CocoLMConfig, CocoLMModel, CocoLMTokenizer

from .scripts import import_example, make_checkpoint, write_rows

RELEASED = Path(__file__).parent / "fixtures" / "cocolm_tokenizer"
ROWS = [{"text": "one two", "label": 0}, {"text": "three", "label": 1}, {"text": "four", "label": 0}]


@pytest.fixture
def runs(monkeypatch, repository, tmp_path):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return import_example(monkeypatch, repository, "runs")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("checkpoint"), [row["text"] for row in ROWS])


# Arguments


@dataclass
class Arguments(TrainingArguments):
    words: list[str] = field(default_factory=list)
    limit: int | None = None
    rate: float = 0.5


SETTINGS = {
    "output_dir": "out put",
    "learning_rate": 2e-5,
    "rate": 1,
    "limit": -3,
    "do_train": True,
    "bf16": False,
    "use_cpu": True,
    "words": ["one two", "3"],
    "lr_scheduler_type": "cosine_with_min_lr",
    "lr_scheduler_kwargs": {"min_lr": 1e-6},
    "logging_strategy": "no",
    "report_to": "none",
    "run_name": None,
}
COMMAND = (
    "--output_dir 'out put' --learning_rate 2e-5 --rate 1 --limit -3 --do_train --use_cpu --words 'one two' 3 "
    "--lr_scheduler_type cosine_with_min_lr --lr_scheduler_kwargs '{\"min_lr\": 1e-6}' --logging-strategy no "
    "--report_to none"
)
# As a person writes it: to YAML, numbers without a point before the e are words.
YAML = """
output_dir: out put
learning_rate: 2e-5
rate: 1
limit: -3
do_train: true
bf16: no
use_cpu: yes
words: [one two, 3]
lr_scheduler_type: cosine_with_min_lr
lr_scheduler_kwargs: {min_lr: 1.0e-6}
logging_strategy: "no"
report_to: none
run_name:
"""


def parse(runs, monkeypatch, *words, classes=(Arguments,)):
    monkeypatch.setattr(sys, "argv", ["script.py", *map(str, words)])
    return runs.parse_arguments("A script.", *classes)


def test_a_file_equals_the_command_line(runs, monkeypatch, tmp_path):
    (tmp_path / "arguments.json").write_text(json.dumps(SETTINGS))
    (tmp_path / "arguments.yaml").write_text(YAML)
    (tmp_path / "arguments.yml").write_text(YAML)
    (expected,) = parse(runs, monkeypatch, *shlex.split(COMMAND))
    assert (expected.words, expected.limit, expected.rate, expected.learning_rate) == (["one two", "3"], -3, 1.0, 2e-5)
    assert expected.lr_scheduler_kwargs == {"min_lr": 1e-6} and expected.do_train and not expected.bf16
    for name in ("arguments.json", "arguments.yaml", "arguments.yml"):
        (given,) = parse(runs, monkeypatch, tmp_path / name)
        assert given.to_dict() == expected.to_dict() and type(given.rate) is float


def test_several_classes_and_defaults(runs, monkeypatch, tmp_path):
    (tmp_path / "a.json").write_text('{"model_name_or_path": "m", "train_file": "t.csv", "random_weights": true}')
    model, data = parse(runs, monkeypatch, tmp_path / "a.json", classes=(runs.ModelArguments, runs.DataArguments))
    assert model == runs.ModelArguments("m", random_weights=True) and data == runs.DataArguments(train_file="t.csv")


def test_one_process_of_several(runs, monkeypatch):
    for name in ("ACCELERATE_USE_CPU", "MASTER_PORT"):
        monkeypatch.setenv(name, "1")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    message = (
        "`accelerate launch` was to start several processes, but on a CPU it has started this one only. Give it "
        "--multi_gpu as well, which works there too, or use `torchrun --nproc_per_node` in its place."
    )
    with pytest.raises(RuntimeError, match=f"^{re.escape(message)}$"):
        parse(runs, monkeypatch, "--output_dir", "out")
    monkeypatch.setenv("WORLD_SIZE", "1")
    parse(runs, monkeypatch, "--output_dir", "out")


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("a.json", None, "there is no file {file}"),
        ("a.json", "[1]", "{file} must hold names and values, but holds [1]"),
        ("a.yaml", "", "{file} must hold names and values, but holds None"),
        ("a.yaml", "rate: 2", "the following arguments are required: --model_name_or_path/--model-name-or-path"),
    ],
)
def test_a_file_of_arguments_that_does_not_do(runs, monkeypatch, tmp_path, capsys, name, content, sentence):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(SystemExit):
        parse(runs, monkeypatch, tmp_path / name, classes=(runs.ModelArguments,))
    assert capsys.readouterr().err.endswith(f"error: {sentence.format(file=tmp_path / name)}\n")


@pytest.mark.parametrize("name", ["learning", "learning_rates"])
def test_names_that_are_no_arguments(runs, monkeypatch, tmp_path, name):
    """Neither misspelt nor cut short."""
    sentence = f"Some specified arguments are not used by the HfArgumentParser: ['--{name}=1']"
    (tmp_path / "a.json").write_text(json.dumps({name: 1}))
    for word in (tmp_path / "a.json", f"--{name}=1"):
        with pytest.raises(ValueError, match=f"^{re.escape(sentence)}$"):
            parse(runs, monkeypatch, word)


# Data


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "parquet"])
def test_files(runs, tmp_path, kind):
    """Each with columns of its own; only an empty cell is no value."""
    words = [
        {"text": "None", "label": "NA"},
        {"text": '"null, "nan"', "label": "n/a"},
        {"text": 'a" and', "label": "b"},
        {"text": "a", "label": None},
    ]
    train, test = write_rows(tmp_path / f"train.{kind}", words), write_rows(tmp_path / f"test.{kind}", ROWS)
    splits = runs.load_splits(runs.DataArguments(train_file=str(train), test_file=str(test), max_predict_samples=2))
    assert splits["train"].to_list() == words and splits["test"].to_list() == ROWS[:2]
    assert list(splits) == ["train", "test"]


def test_quotation_marks_in_tsv(runs, tmp_path):
    """Each line is a row, as in the files of GLUE: a quotation mark is a part of the text like any other."""
    texts = ['"she said', "fine", 'he left"', '"whole"', '""']
    (tmp_path / "a.tsv").write_text("text\tlabel\n" + "".join(f"{text}\t1\n" for text in texts))
    splits = runs.load_splits(runs.DataArguments(train_file=str(tmp_path / "a.tsv")))
    assert splits["train"]["text"][:] == texts


def test_other_files(runs, tmp_path):
    (tmp_path / "a.txt").write_text("one\ntwo\n")
    (tmp_path / "b.json").write_text(json.dumps(ROWS))
    data = runs.DataArguments(train_file=str(tmp_path / "a.txt"), validation_file=str(tmp_path / "b.json"))
    splits = runs.load_splits(data, "train", "validation")
    assert splits["train"].to_list() == [{"text": "one"}, {"text": "two"}] and splits["validation"].to_list() == ROWS


def test_a_data_set_of_the_hub(runs, monkeypatch):
    names = []

    def load_dataset(*name):
        names.append(name)
        return DatasetDict({split: Dataset.from_list(ROWS) for split in ("train", "validation_matched", "test")})

    monkeypatch.setattr(runs, "load_dataset", load_dataset)
    limits = {"max_train_samples": 2, "max_eval_samples": 1, "max_predict_samples": 10}
    splits = runs.load_splits(runs.DataArguments("some/data", "part", **limits), "train")
    assert names == [("some/data", "part")]
    assert {name: len(split) for name, split in splits.items()} == {"train": 2, "validation_matched": 1, "test": 3}
    sentence = "There is no split 'validation', only train, validation_matched, test."
    with pytest.raises(ValueError, match=f"^{sentence}$"):
        runs.load_splits(runs.DataArguments("some/data", "part"), "train", "validation")


def refused(runs, sentence, error=ValueError, **arguments):
    with pytest.raises(error, match=f"^{re.escape(sentence)}"):
        runs.load_splits(runs.DataArguments(**arguments))


def test_files_that_do_not_do(runs, tmp_path):
    sentence = "Give either --dataset_name or files (--train_file, --validation_file, --test_file)."
    refused(runs, sentence)
    refused(runs, sentence, dataset_name="some/data", train_file="train.csv")
    file = tmp_path / "data.csv"
    refused(runs, f"--test_file: there is no file {file}.", FileNotFoundError, test_file=str(file))
    file = tmp_path / "data.xls"
    kinds = ".csv, .tsv, .json, .jsonl, .parquet, .txt"
    refused(runs, f"--train_file must be one of {kinds}, but got {str(file)!r}.", train_file=str(file))
    contents = {
        "csv": ["", "text,label\n"],
        "jsonl": ["", '{"text":'],
        "json": ["[]"],
        "parquet": ["PAR1"],
        "txt": [""],
    }
    for kind, texts in contents.items():
        for i, text in enumerate(texts):
            file = tmp_path / f"{i}.{kind}"
            file.write_text(text)
            kind = {"jsonl": "json", "txt": "text"}.get(kind, kind)
            refused(runs, f"{file} has no rows or cannot be read as {kind}.", validation_file=str(file))


# Checkpoints to go on from


def test_last_checkpoint(runs, tmp_path):
    """The last by number among those that were written to their end."""
    assert runs.last_checkpoint(tmp_path) is None and runs.last_checkpoint(tmp_path / "none") is None
    for name in ("checkpoint-900", "checkpoint-1000", "checkpoint-2000", "checkpoint-best", "else-3000"):
        (tmp_path / name).mkdir()
        if name != "checkpoint-2000":
            (tmp_path / name / "trainer_state.json").write_text("{}")
    assert runs.last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-1000")


def test_arguments_of_a_run(runs, tmp_path):
    """A run goes on only with the arguments and the training data that it had, but may measure and log otherwise."""
    folder, (train, other) = tmp_path / "out", (tmp_path / name for name in ("train.txt", "other.txt"))
    for file in (train, other):
        file.write_text("one\n")

    def check(goes_on=True, data=None, **settings):
        settings = {"output_dir": str(folder), "use_cpu": True} | settings
        data = {"train_file": str(train)} | (data or {})
        arguments = TrainingArguments(**settings), runs.ModelArguments("m"), runs.DataArguments(**data)
        runs.note_arguments(goes_on, True, *arguments)

    def refuse(changes, **settings):
        end = " Give the same to go on with it, or another --output_dir to start anew."
        sentence = f"The run in {folder} had other arguments: {changes}.{end}"
        with pytest.raises(ValueError, match=f"^{re.escape(sentence)}$"):
            check(**settings)

    check(seed=1, learning_rate=1e-3, hub_token="secret")
    known = json.loads((folder / "arguments.json").read_text())
    assert known["seed"] == 1 and known["model_name_or_path"] == "m" and "secret" not in str(known)
    same = {"seed": 1, "learning_rate": 1e-3}
    check(**same, do_eval=True, save_steps=3, logging_steps=7, data={"validation_file": "v.txt", "max_eval_samples": 4})
    refuse("--seed was 1 and is 2", **same | {"seed": 2})
    changes = "--max_steps was -1 and is 3, --learning_rate was 0.001 and is 0.01"
    refuse(changes, seed=1, learning_rate=0.01, max_steps=3)
    digest = hashlib.sha256(b"one\n").hexdigest()
    changes = f"--train_file was '{train} (SHA-256 {digest})' and is '{other} (SHA-256 {digest})'"
    refuse(changes, **same, data={"train_file": str(other)})
    train.write_text("two\n")
    now = hashlib.sha256(b"two\n").hexdigest()
    refuse(f"--train_file was '{train} (SHA-256 {digest})' and is '{train} (SHA-256 {now})'", **same)
    assert json.loads((folder / "arguments.json").read_text()) == known
    # Without a checkpoint, a new run.
    check(goes_on=False, seed=2)
    assert json.loads((folder / "arguments.json").read_text())["seed"] == 2


# Models to start from


def load(arguments):
    return arguments.load(AutoModelForSequenceClassification, arguments.load_config())


def test_a_checkpoint_in_half_precision_is_trained_in_full(runs, checkpoint, tmp_path):
    AutoModel.from_pretrained(checkpoint).half().save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(checkpoint).save_pretrained(tmp_path)
    for random in (False, True):
        model = load(runs.ModelArguments(str(tmp_path), random_weights=random, attn_implementation="eager"))
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
        assert model.config._attn_implementation == "eager"
        given = load_file(tmp_path / "model.safetensors")["embeddings.word_embeddings.weight"].float()
        assert torch.equal(model.cocolm.embeddings.word_embeddings.weight, given) != random


@pytest.mark.parametrize("family", ["cocolm", "bert"])
def test_other_values_in_the_configuration(runs, tmp_path, family):
    folder = make_checkpoint(tmp_path, ["a b"], family=family)
    config = load(runs.ModelArguments(str(folder), config_overrides="hidden_dropout_prob=0.25, hidden_act=relu")).config
    assert (config.hidden_dropout_prob, config.hidden_act) == (0.25, "relu")
    name = type(config).__name__
    with pytest.raises(ValueError) as caught:
        load(runs.ModelArguments(str(folder), config_overrides="dropout=0.25"))
    assert str(caught.value).startswith(
        f"--config_overrides must be fields of {name} with their values, such as hidden_size=256, but has "
        "'dropout=0.25'. The fields are vocab_size, hidden_size, "
    )


def test_a_released_folder(runs, checkpoint, tmp_path):
    """As it is published: a config.json that does not tell the family, sp.model and dict.txt."""
    for name in ("sp.model", "dict.txt"):
        shutil.copy(RELEASED / name, tmp_path)
    tokenizer = CocoLMTokenizer.from_pretrained(RELEASED)
    model = CocoLMModel(CocoLMConfig(vocab_size=len(tokenizer), hidden_size=8, num_attention_heads=2))
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    fields = ("vocab_size", "hidden_size", "num_attention_heads", "max_rel_pos", "layer_norm_type", "type_vocab_size")
    (tmp_path / "config.json").write_text(json.dumps({name: getattr(model.config, name) for name in fields}))
    arguments = runs.ModelArguments(str(tmp_path))
    assert type(load(arguments)).__name__ == "CocoLMForSequenceClassification"
    assert torch.equal(
        load(arguments).cocolm.state_dict()["embeddings.word_embeddings.weight"],
        model.embeddings.word_embeddings.weight,
    )
    assert arguments.load_tokenizer()("A text.")["input_ids"] == tokenizer("A text.")["input_ids"]
    elsewhere = runs.ModelArguments(str(tmp_path), tokenizer_name=str(checkpoint), model_revision="v1")
    assert len(elsewhere.load_tokenizer()) == len(AutoTokenizer.from_pretrained(checkpoint))


# A full disk


@pytest.mark.parametrize("room", [12_000_000, 11_999_999])
def test_a_full_disk_is_named(runs, tmp_path, monkeypatch, room):
    """Whatever error a library makes of it; others are passed on."""
    model, usage = torch.nn.Linear(1000, 1000, bias=False), shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage._replace(free=room))
    with pytest.raises((RuntimeError, OSError)) as caught, runs.full_disk_explained(tmp_path, model):
        raise RuntimeError("unexpected pos 576 vs 534")
    message = (
        f"The run failed, probably because its disk is full: {tmp_path} has room for 12 MB, but a checkpoint takes "
        "about 12 MB. The checkpoints from before are whole: make room, and the same command goes on from the last one."
    )
    assert str(caught.value) == ("unexpected pos 576 vs 534" if room == 12_000_000 else message)
