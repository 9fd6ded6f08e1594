"""examples/run_marge_pretraining.py with tiny models: groups, resuming, inputs, ranks, what it writes, its errors."""

import json
import os
import random
import re
import signal
import socket
import subprocess
import sys

import numpy as np
import pytest
import torch
import yaml
from datasets import Dataset
from safetensors.torch import load_file
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, Trainer, set_seed

from hf_paraphrase_lm import (
    DataCollatorForParaphrasing,
    EvidenceDataset,
    LexicalEmbedder,
    MargeConfig,
    MargeForConditionalGeneration,
    chunk_documents,
    train_tokenizer,
)
from hf_paraphrase_lm.retrieval import embed_documents
from hf_paraphrase_lm.training import evidence_losses, recall_at_k

from .scripts import import_example, make_checkpoint, read_json, run_script, write_rows

SIZES = {
    "hidden_size": 16,
    "num_attention_heads": 2,
    "encoder_layers": 2,
    "decoder_base_layers": 1,
    "decoder_layers": 1,
}
SIZES |= {"encoder_intermediate_size": 16, "decoder_base_intermediate_size": 16, "decoder_intermediate_size": 16}
SIZES |= {"retrieval_layers": 1, "max_position_embeddings": 64, "initializer_range": 0.2}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def documents(count, seed):
    """Pairs of documents in two languages that share most of their words; a shard is half of them."""
    words, choose = [f"word{i}" for i in range(40)], random.Random(seed)
    rows = []
    for group in range(count):
        common = choose.sample(words, 6)
        for language in ("a", "b"):
            text = " ".join(choose.sample(common, 6) + choose.sample(words, 2))
            rows.append({"text": text, "lang": language, "part": f"p{group % 2}", "related": f"g{group}"})
    return rows


ROWS, HELD_OUT = documents(10, 0), documents(6, 1)


def overrides(**settings):
    return ",".join(f"{name}={value}" for name, value in (SIZES | settings).items())


def make_marge(folder):
    """A model without dropout, and its tokenizer."""
    set_seed(0)
    texts = [row["text"] for row in ROWS]
    tokenizer = train_tokenizer(texts, vocab_size=300, model_max_length=64, progress=False)
    MargeForConditionalGeneration(MargeConfig(vocab_size=len(tokenizer), **SIZES | NO_DROPOUT)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make_marge(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture
def script(monkeypatch, repository):
    return import_example(monkeypatch, repository, "run_marge_pretraining")


@pytest.fixture
def run(script, monkeypatch, tmp_path, checkpoint):
    """Runs the script on ROWS and, with do_eval, HELD_OUT; returns its --output_dir."""

    def run(**arguments):
        defaults = {"train_file": tmp_path / "train.jsonl", "do_train": True, "learning_rate": 1e-3, "max_steps": 4}
        defaults |= {"model_name_or_path": checkpoint, "max_length": 32, "num_targets": 2, "num_evidence": 2}
        defaults |= {"per_device_train_batch_size": 2, "refresh_steps": 2, "warmup_steps": 0, "logging_steps": 1}
        defaults |= {"language_column": "lang", "bf16": False}
        if arguments.get("do_eval"):
            defaults |= {"validation_file": tmp_path / "held_out.jsonl", "eval_steps": 2, "group_column": "related"}
        write_rows(tmp_path / "train.jsonl", ROWS)
        write_rows(tmp_path / "held_out.jsonl", HELD_OUT)
        arguments = {name: value for name, value in (defaults | arguments).items() if value is not None}
        return run_script(script, monkeypatch, tmp_path, **arguments)

    return run


def history(folder):
    return read_json(folder / "trainer_state.json")["log_history"]


def losses(folder):
    return [log["loss"] for log in history(folder) if "loss" in log]


def weights(folder):
    return load_file(folder / "model.safetensors")


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def measure(folder, **options):
    """What the script is to say about a saved model."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForSeq2SeqLM.from_pretrained(folder)
    texts = chunk_documents(Dataset.from_list(HELD_OUT), tokenizer, 32, language_column="lang")
    groups = EvidenceDataset(texts, 2, 2, seed=42, **options)
    groups.rebuild(model, tokenizer.pad_token_id, progress=False)
    found = evidence_losses(model, groups, DataCollatorForParaphrasing(tokenizer), max_groups=64, progress=False)
    expected = {f"eval_loss_{kind}": loss for kind, loss in found.items()}
    expected["eval_utility"] = found["none"] - found["retrieved"]
    related = [int(row["related"][1:]) for row in HELD_OUT]
    for name, embedder in (("", model), ("lexical_", LexicalEmbedder(texts, progress=False))):
        vectors = embed_documents(texts, embedder, tokenizer.pad_token_id, progress=False)
        expected[f"eval_{name}recall_at_1"] = recall_at_k(vectors, related)
        languages = [row["lang"] for row in HELD_OUT]
        expected[f"eval_{name}cross_language_recall_at_1"] = recall_at_k(vectors, related, languages=languages)
    return expected


def test_from_random_weights(run):
    """Trains a tokenizer and a model, learns, watches retrieval, and leaves all that is needed to go on."""
    settings = {"model_name_or_path": None, "config_overrides": overrides(), "vocab_size": 300, "do_eval": True}
    folder = run(**settings, max_steps=30, refresh_steps=10, save_strategy="steps", save_steps=20, learning_rate=1e-2)
    assert {file.name for file in folder.iterdir()} == {
        *("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"),
        *("train_results.json", "eval_results.json", "all_results.json", "trainer_state.json", "README.md"),
        *("checkpoint-20", "checkpoint-30", "arguments.json", "training_args.bin"),
    }
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForSeq2SeqLM.from_pretrained(folder)
    assert type(model) is MargeForConditionalGeneration and model.config.vocab_size == len(tokenizer) <= 300
    assert {name: getattr(model.config, name) for name in SIZES} == SIZES
    logs = history(folder)
    assert np.mean(losses(folder)[-5:]) < 0.9 * np.mean(losses(folder)[:5])
    # The first groups are held until the first refresh, and none follows the last update.
    assert [log["step"] for log in logs if "refresh/groups" in log] == [10, 20]
    measured = [log for log in logs if "evidence/utility" in log]
    assert [log["step"] for log in measured] == [1, *range(2, 31, 2)]
    names = ("loss_retrieved", "recall_at_1", "cross_language_recall_at_1", "distinct_share", "relevance_weight_1")
    assert all(f"evidence/{name}" in log for log in measured for name in names)
    results, expected = read_json(folder / "all_results.json"), measure(folder)
    assert {name: value for name, value in results.items() if name.startswith("eval_")} == pytest.approx(
        expected, rel=1e-4
    )
    assert results["train_samples"] == 10


@pytest.mark.parametrize("mode", ["blocking", "async"])
def test_an_interrupted_run_goes_on(run, monkeypatch, tmp_path, capsys, mode):
    """Ctrl-C between two refreshes, dropout included: the same command ends with the weights of an unbroken run."""
    settings = {"max_steps": 9, "save_strategy": "steps", "save_steps": 100, "refresh_mode": mode}
    settings |= {"config_overrides": "hidden_dropout_prob=0.1"}
    whole = run(output_dir=tmp_path / "whole", **settings)
    step = Trainer.training_step

    def interrupted_step(self, *args, **kwargs):
        if self.state.global_step == 4:
            os.kill(os.getpid(), signal.SIGINT)
        return step(self, *args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as error:
        patch.setattr(Trainer, "training_step", interrupted_step)
        run(**settings)
    assert error.value.code == "Interrupted at update 5. The same command goes on from there."
    capsys.readouterr()
    # The lexical groups of the beginning are not made again.
    monkeypatch.setattr(EvidenceDataset, "rebuild", None)
    folder = run(**settings)
    assert f"Going on from {folder / 'checkpoint-5'}." in capsys.readouterr().err
    assert same(weights(whole), weights(folder))
    assert "h since it last went on |" in (folder / "README.md").read_text()


def test_a_run_that_is_done_is_not_trained_again(run, monkeypatch, tmp_path):
    """Weights and results stay; other evidence is refused."""
    write_rows(tmp_path / "evidence.jsonl", HELD_OUT)
    settings = {"save_strategy": "steps", "evidence_file": tmp_path / "evidence.jsonl", "do_eval": True}
    folder = run(**settings)
    known, results = weights(folder), read_json(folder / "all_results.json")
    monkeypatch.setattr(Trainer, "train", None)
    run(**settings, eval_steps=7, eval_groups=63)
    assert same(weights(folder), known)
    assert read_json(folder / "all_results.json") == pytest.approx(results, rel=1e-5)
    write_rows(tmp_path / "evidence.jsonl", HELD_OUT[1:])
    with pytest.raises(ValueError, match="had other arguments: --evidence_file was"):
        run(**settings)


def test_continued(run, checkpoint, tmp_path):
    """From a checkpoint, with distillation; the layers that retrieve may be held."""
    folder = run(learning_rate=0, distillation_loss_weight=0.5)
    model = AutoModelForSeq2SeqLM.from_pretrained(folder)
    assert same(weights(folder), weights(checkpoint)) and model.config.distillation_loss_weight == 0.5
    assert all(log["distillation_loss"] >= 0 for log in history(folder) if "loss" in log)
    assert "| from | `" in (folder / "README.md").read_text()
    before, after = weights(checkpoint), weights(run(retrieval_learning_rate_factor=0, output_dir=tmp_path / "held"))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and not any(name.startswith("model.encoder.layers.0.") for name in changed)
    assert {name for name in before if name.startswith("model.encoder.layers.1.mlp")} < changed
    slow, fast = (
        weights(run(retrieval_learning_rate_factor=factor, max_steps=1, output_dir=tmp_path / str(factor)))
        for factor in (0.5, 1)
    )
    name = "model.encoder.layers.0.mlp.fc1.weight"
    # Adam's first update is the learning rate, whatever the gradient; decay is proportional to it as well.
    torch.testing.assert_close(slow[name] - before[name], (fast[name] - before[name]) / 2, rtol=1e-2, atol=1e-6)


@pytest.mark.parametrize("name", ["run_marge_pretraining", "run_marge_pretraining_no_trainer"])
def test_contrast_comes_first(run, checkpoint, repository, tmp_path, name):
    """Alone, it leaves what does not embed documents as it is, in two processes as well; then all of the model learns.

    Two processes contrast a group with those of their own batch only, so they learn something else than one.
    """
    settings = {"reconstruction_loss_weight": 0, "contrastive_loss_weight": 1, "max_steps": 2, "weight_decay": 0.5}
    first = run(**settings, per_device_train_batch_size=4, output_dir=tmp_path / "embedder")
    assert all(log["loss"] == pytest.approx(log["contrastive_loss"], 1e-3) for log in history(first) if "loss" in log)
    arguments = [*sys.argv[1:], f"--output_dir={tmp_path / name}"]
    if name.endswith("no_trainer"):
        arguments = [
            argument for argument in arguments if not argument.startswith(("--save_strategy", "--do_", "--bf16"))
        ]
    launch(repository / "examples" / f"{name}.py", tmp_path, *arguments)
    before = weights(checkpoint)
    for folder in (first, tmp_path / name):
        changed = {weight for weight, value in weights(folder).items() if not torch.equal(value, before[weight])}
        layer = {weight for weight in before if weight.startswith("model.encoder.layers.0.")}
        assert changed == layer | {"model.shared.weight", "model.encoder.embed_positions.weight"}
    then = {"reconstruction_loss_weight": 1, "first_groups": "model", "max_steps": 2}
    after = weights(run(**then, model_name_or_path=first, output_dir=tmp_path / "all"))
    assert all(not torch.equal(value, before[weight]) for weight, value in after.items())


def record_searches(monkeypatch):
    """What embeds at each search for groups of the training, its step of training, and the shards."""
    searches, find_groups = [], EvidenceDataset.find_groups

    def find(self, embedder, pad_token_id, shards=None, batch_size=64, *args, **kwargs):
        searches.append((type(embedder).__name__, shards, batch_size))
        return find_groups(self, embedder, pad_token_id, shards, batch_size, *args, **kwargs)

    monkeypatch.setattr(EvidenceDataset, "find_groups", find)
    return searches


@pytest.mark.parametrize(("first", "embedder"), [("lexical", "LexicalEmbedder"), ("model", "Marge")])
def test_first_groups_and_refreshes(run, monkeypatch, first, embedder):
    """By words in common or by the model; held; then of some shards, with the model."""
    searches = record_searches(monkeypatch)
    folder = run(
        first_groups=first,
        max_steps=7,
        hold_first_groups=3,
        shards_per_refresh=1,
        shard_column="part",
        refresh_batch_size=5,
    )
    assert [name.removesuffix("ForConditionalGeneration") for name, *_ in searches] == [embedder, "Marge", "Marge"]
    assert [len(shards) for _, shards, _ in searches[1:]] == [1, 1]
    assert {size for *_, size in searches} == {5}
    steps = [log["step"] for log in history(folder) if "refresh/groups" in log]
    assert [step for step in steps if step > 1] == [4, 6]


def test_every_option_of_the_groups(run, script, monkeypatch):
    made, make = [], script.EvidenceArguments.make_dataset

    def record(self, *args):
        made.append(make(self, *args))
        return made[-1]

    monkeypatch.setattr(script.EvidenceArguments, "make_dataset", record)
    options = {"num_targets": 3, "num_evidence": 4, "max_tokens": 400, "pairs_per_target": 5}
    options |= {"cross_language_weight": 7.0, "strategy": "pairs", "first_chunks_only": True}
    folder = run(**options, data_seed=8, max_length=10, max_steps=1, do_eval=True)
    assert all(getattr(groups, name) == value for groups in made for name, value in options.items())
    assert [groups.seed for groups in made] == [8, 8]
    assert "| targets a step, evidence a group | 6, 4 |" in (folder / "README.md").read_text()
    made.clear()
    run(strategy="neighbors", num_targets=None, max_steps=1)
    assert (made[0].strategy, made[0].num_targets) == ("neighbors", 1)


def test_separate_evidence(run, script, monkeypatch, tmp_path):
    """Targets come from one corpus and evidence from another, in training and on held-out documents."""
    items, call = [], DataCollatorForParaphrasing.__call__

    def record(self, examples):
        items.extend(examples)
        return call(self, examples)

    monkeypatch.setattr(DataCollatorForParaphrasing, "__call__", record)
    rows = [{"text": f"other words {i}", "lang": "c"} for i in range(5)]
    folder = run(evidence_file=write_rows(tmp_path / "evidence.parquet", rows), do_eval=True, group_column=None)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for item in items:
        assert all("other words" in tokenizer.decode(ids) for ids in item["input_ids"])
        assert not any("other words" in tokenizer.decode(ids) for ids in item["labels"])
    assert len(items) > 10
    assert "eval_recall_at_1" not in read_json(folder / "all_results.json")


@pytest.mark.parametrize("kind", ["npy", "dat"])
def test_token_arrays(run, checkpoint, tmp_path, kind):
    """Rows of token ids give the same losses as their texts; their padding may be any number."""
    tokenizer, files = AutoTokenizer.from_pretrained(checkpoint), {}
    for name, rows in (("train", ROWS), ("validation", HELD_OUT)):
        ids = [tokenizer(row["text"])["input_ids"] for row in rows]
        array = np.full((len(ids), 40), -7, dtype=np.int32)
        for row, tokens in zip(array, ids, strict=True):
            row[: len(tokens)] = tokens
        files[f"{name}_file"] = tmp_path / f"{name}.{kind}"
        if kind == "npy":
            np.save(files[f"{name}_file"], array)
        else:
            array.tofile(files[f"{name}_file"])
    settings = {"max_length": 40, "language_column": None, "do_eval": True, "group_column": None}
    texts = run(**settings)
    arrays = run(**settings | files, array_padding=-7, output_dir=tmp_path / "arrays")
    assert losses(arrays) == losses(texts)
    results = [read_json(folder / "eval_results.json") for folder in (texts, arrays)]
    assert results[0] == results[1]


def test_other_files_and_limits(run, tmp_path):
    """Text in lines, CSV, so many rows of them, and the arguments in a file."""
    (tmp_path / "lines.txt").write_text("\n".join(row["text"] for row in ROWS))
    folder = run(train_file=tmp_path / "lines.txt", language_column=None, max_train_samples=7, max_steps=1)
    assert read_json(folder / "all_results.json")["train_samples"] == 4
    folder = run(train_file=write_rows(tmp_path / "rows.csv", ROWS), max_steps=1, output_dir=tmp_path / "csv")
    assert read_json(folder / "all_results.json")["train_samples"] == 10


def test_arguments_of_a_file(run, script, monkeypatch, tmp_path):
    folder = run(max_steps=2)
    settings = dict(argument.removeprefix("--").split("=", 1) for argument in sys.argv[1:])
    for name, write in (("a.json", json.dumps), ("a.yaml", yaml.safe_dump)):
        (tmp_path / name).write_text(write(settings | {"output_dir": str(tmp_path / f"{name}-out")}))
        monkeypatch.setattr(sys, "argv", ["run_marge_pretraining.py", str(tmp_path / name)])
        script.main()
        assert losses(tmp_path / f"{name}-out") == losses(folder)


def test_the_card(run, tmp_path):
    folder = run(do_eval=True, gradient_accumulation_steps=2)
    card, results = (folder / "README.md").read_text(), read_json(folder / "all_results.json")
    values = {name: f"{value:.4f}" for name, value in results.items() if name.startswith("eval_")}
    others = f"{values['eval_loss_random']} with random, {values['eval_loss_none']} with no evidence"
    assert f"| eval_loss_retrieved | {values['eval_loss_retrieved']} | {others} |" in card
    words = f"{values['eval_lexical_recall_at_1']} by words in common (TF-IDF)"
    assert f"| eval_recall_at_1 | {values['eval_recall_at_1']} | {words} |" in card
    rows = {"text": f"`{tmp_path / 'train.jsonl'}`", "steps": 4, "targets a step, evidence a group": "8, 2"}
    for name, value in (rows | {"index refreshed every": "2 steps"}).items():
        assert f"| {name} | {value} |" in card
    assert f"python run_marge_pretraining.py --output_dir={folder}" in card and not re.search(r"[{}]", card)
    # The code in it runs.
    names = {}
    exec(re.search(r"```python\n(.*?)```", card, re.DOTALL)[1].replace('"out"', repr(str(folder))), names)
    assert type(names["model"]) is MargeForConditionalGeneration
    unmeasured = (run(output_dir=tmp_path / "unmeasured") / "README.md").read_text()
    assert "Nothing was measured. Fine-tune it" in unmeasured and "| eval_" not in unmeasured


def test_evaluation_alone(run, tmp_path):
    folder = run(do_eval=True)
    alone = run(do_eval=True, do_train=False, model_name_or_path=folder, output_dir=tmp_path / "alone")
    assert {file.name for file in alone.iterdir()} == {"eval_results.json", "all_results.json"}
    expected = read_json(folder / "eval_results.json")
    assert read_json(alone / "eval_results.json") == pytest.approx(expected, rel=1e-5)


def launch(script, folder, *arguments):
    """Runs a script in two processes on a CPU, with arguments as on the command line."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={port}", script]
    environment = os.environ | {"PYTHONPATH": str(script.parent.parent), "HF_HOME": str(folder / "home")}
    done = subprocess.run([*command, *arguments], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stderr


def test_two_processes_are_one(run, repository, tmp_path):
    """They share the shards, and have the groups, losses and results of one process with the same global batch."""
    settings = {"shard_column": "part", "gradient_accumulation_steps": 2, "do_eval": True, "refresh_mode": "async"}
    one, two = run(**settings, max_steps=6), tmp_path / "two"
    arguments = [*sys.argv[1:], f"--output_dir={two}", "--per_device_train_batch_size=1"]
    launch(repository / "examples" / "run_marge_pretraining.py", tmp_path, *arguments)
    compared = ("loss", "refresh/relevance_mean", "refresh/groups", "refresh/distinct_evidence", "evidence/utility")
    logs = [[{n: log[n] for n in compared if n in log} for log in history(folder)] for folder in (one, two)]
    for ours, theirs in zip(*logs, strict=True):
        assert theirs == pytest.approx(ours, rel=1e-5, abs=1e-5)
    results = [read_json(folder / "eval_results.json") for folder in (one, two)]
    assert results[1] == pytest.approx(results[0], rel=1e-4, abs=1e-4)
    assert "| targets a step, evidence a group | 8, 2 |" in (two / "README.md").read_text()


def test_help(script, monkeypatch, capsys):
    """It begins with what the script does, and says of every own argument what it is."""
    monkeypatch.setattr(sys, "argv", ["run_marge_pretraining.py", "--help"])
    with pytest.raises(SystemExit):
        script.main()
    text = capsys.readouterr().out
    assert f"\n\n{script.__doc__.splitlines()[0]}\n\noptions:" in text
    for word in ("--first_groups {lexical,model}", "--refresh_mode {blocking,async}", "--group_column GROUP_COLUMN"):
        assert word in text


def test_settings_that_do_not_do(run, monkeypatch, tmp_path, checkpoint, script):
    """Each is refused before tokens are counted, in a whole sentence."""

    def refused(sentence, error=ValueError, **arguments):
        with pytest.raises(error, match=f"^{re.escape(sentence)}$"):
            run(**arguments)

    for name in ("num_evidence", "refresh_steps", "refresh_batch_size", "eval_groups"):
        refused(f"--{name} must be at least 1, but got 0.", **{name: 0})
    refused("--pairs_per_target must be positive, but got 0.0.", pairs_per_target=0)
    refused("--num_targets must be 1 with --strategy neighbors, but got 2.", strategy="neighbors")
    refused("--retrieval_learning_rate_factor must not be negative, but got -1.0.", retrieval_learning_rate_factor=-1)
    refused(
        "--eval_strategy must be no, but got steps. Held-out groups are measured every --eval_steps updates in any "
        "case, where there is a --validation_file.",
        eval_strategy="steps",
    )
    refused("There is nothing to do. Give --do_train, --do_eval or --do_predict, or several of them.", do_train=False)
    refused("There is no split 'validation', only train.", do_eval=True, validation_file=None)
    refused(f"--train_file: there is no file {tmp_path / 'no.csv'}.", FileNotFoundError, train_file=tmp_path / "no.csv")
    columns = "text, lang, part, related"
    refused(f"text_column 'body' is not in the dataset. Its columns are: {columns}.", text_column="body")
    refused(f"shard_column 'day' is not in the dataset. Its columns are: {columns}.", shard_column="day")
    refused(
        f"--group_column must be one of the validation data, {columns.split(', ')}, but got 'topic'.",
        do_eval=True,
        group_column="topic",
    )
    refused(
        "--group_column 'text' must have a value that two documents share, for recall, but has none.",
        do_eval=True,
        group_column="text",
    )
    np.save(tmp_path / "tokens.npy", np.full((4, 5), 700))
    refused(
        "There are no training texts for a tokenizer. Give --model_name_or_path or --tokenizer_name.",
        train_file=tmp_path / "tokens.npy",
        model_name_or_path=None,
    )
    refused(
        "The train documents have chunks of up to 5 tokens with ids up to 700, but there must be at most 32 tokens "
        "(--max_length, the tokenizer's model_max_length) with ids below "
        f"{AutoModelForSeq2SeqLM.from_pretrained(checkpoint).config.vocab_size} (the model's vocab_size). Were they "
        "made with another tokenizer?",
        train_file=tmp_path / "tokens.npy",
        language_column=None,
    )
    refused(
        "--max_length must be at most the model's max_position_embeddings (32), but got 33. Give a smaller one or, for "
        "random weights, --config_overrides max_position_embeddings=...",
        model_name_or_path=None,
        max_length=33,
        vocab_size=300,
        config_overrides=overrides(max_position_embeddings=32),
    )
    other = make_checkpoint(tmp_path / "other", [row["text"] for row in ROWS])
    refused("--model_name_or_path must be a MARGE checkpoint, but is of the family 'cocolm'.", model_name_or_path=other)
    refused(
        "num_evidence=2 needs a corpus of at least 3 documents (a target is never its own evidence), but it has 2. "
        "Give more documents or lower num_evidence.",
        max_train_samples=2,
    )
    refused(
        "shards_per_refresh must be between 1 and 1, the number of shards of the dataset, but got 2.",
        shards_per_refresh=2,
    )
    monkeypatch.setattr(script.MargeTrainingArguments, "n_gpu", 2)
    refused(
        "Every GPU needs a process, but this one has 2. Start the script with `accelerate launch --num_processes 2`, "
        "or show it one GPU with CUDA_VISIBLE_DEVICES=0.",
    )
