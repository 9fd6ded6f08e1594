"""examples/run_marge_pretraining_no_trainer.py with tiny models: results, going on after any end, ranks, errors."""

import random
import re
import signal
import sys
from itertools import count

import datasets
import pytest
import torch
from accelerate import Accelerator

from hf_paraphrase_lm import DataCollatorForParaphrasing, EvidenceDataset

from .scripts import import_example, read_json, run_script, write_rows
from .test_run_cocolm_pretraining_no_trainer import forget_accelerator, names, read_log
from .test_run_marge_pretraining import (
    HELD_OUT,
    ROWS,
    history,
    launch,
    make_marge,
    measure,
    overrides,
    record_searches,
    same,
    weights,
)

# How long something took, and when.
TIMES = ("refresh/seconds", "refresh/background_seconds")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make_marge(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture
def loop(monkeypatch, repository):
    yield import_example(monkeypatch, repository, "run_marge_pretraining_no_trainer")
    forget_accelerator()


@pytest.fixture
def run_loop(loop, monkeypatch, tmp_path, checkpoint):
    """Runs the script on ROWS and, with `held_out`, HELD_OUT. Returns its --output_dir."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")

    def run(held_out=False, **arguments):
        file = write_rows(tmp_path / "train.jsonl", ROWS)
        defaults = {"train_file": file, "model_name_or_path": checkpoint, "output_dir": tmp_path / "loop"}
        defaults |= {"learning_rate": 1e-3, "max_steps": 4, "max_length": 32, "num_targets": 2, "num_evidence": 2}
        defaults |= {"per_device_train_batch_size": 2, "refresh_steps": 2, "warmup_steps": 0, "logging_steps": 1}
        defaults |= {"language_column": "lang", "use_cpu": True, "disable_tqdm": True, "mixed_precision": "no"}
        if held_out:
            file = write_rows(tmp_path / "held_out.jsonl", HELD_OUT)
            defaults |= {"validation_file": file, "eval_steps": 2, "group_column": "related"}
        arguments = {name: value for name, value in (defaults | arguments).items() if value is not None}
        monkeypatch.setattr(sys, "argv", ["script.py", *(f"--{name}={value}" for name, value in arguments.items())])
        forget_accelerator()
        loop.main()
        return arguments["output_dir"]

    return run


def untimed(folder):
    return [{name: value for name, value in line.items() if name not in TIMES} for line in read_log(folder)]


def test_learns_and_writes_everything(run_loop):
    """From random weights, with a tokenizer of its own; logs at intervals, at measurements and at checkpoints."""
    folder = run_loop(
        held_out=True,
        model_name_or_path=None,
        config_overrides=overrides(),
        vocab_size=300,
        max_steps=None,
        num_train_epochs=5.1,
        learning_rate=1e-2,
        refresh_steps=10,
        logging_steps=5,
        eval_steps=6,
        checkpointing_steps=14,
        disable_tqdm=False,
    )
    assert names(folder) == {
        *("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"),
        *("all_results.json", "arguments.json", "log.jsonl", "README.md", "step_14", "step_26"),
    }
    log = read_log(folder)
    assert [line["step"] for line in log] == [1, 5, 6, 10, 11, 12, 14, 15, 18, 20, 21, 24, 25, 26]
    assert [line["epoch"] for line in log] == [pytest.approx(line["step"] / 5) for line in log]
    assert log[-1]["loss"] < 0.9 * log[0]["loss"] and log[-1]["learning_rate"] == 0 < log[1]["learning_rate"] < 1e-2
    # A refresh is logged with the first update that has its groups.
    assert [line["step"] for line in log if "refresh/groups" in line] == [11, 21]
    measured = [line for line in log if "evidence/utility" in line]
    assert [line["step"] for line in measured] == [1, 6, 12, 18, 24, 26]
    assert all("evidence/recall_at_1" in line and "evidence/collapsed" in line for line in measured)
    results = read_json(folder / "all_results.json")
    assert {name: value for name, value in results.items() if name.startswith("eval_")} == pytest.approx(
        measure(folder), rel=1e-4
    )
    card = (folder / "README.md").read_text()
    assert f"| eval_utility | {results['eval_utility']:.4f} |" in card and "| steps | 26 |" in card


def test_a_data_set_of_the_hub(run_loop, monkeypatch):
    """Its splits are trained on, measured, and evidence alone; others are left."""
    import runs

    rows = {"train": ROWS, "validation": HELD_OUT, "evidence": ROWS[:6], "other": [{"number": 1}]}
    splits = datasets.DatasetDict({split: datasets.Dataset.from_list(rows[split]) for split in rows})
    monkeypatch.setattr(runs, "load_dataset", lambda name, config: splits)
    folder = run_loop(dataset_name="some/data", train_file=None, max_steps=1, group_column="related")
    assert read_json(folder / "all_results.json")["eval_recall_at_1"] >= 0
    assert "\ndatasets: some/data\n" in (folder / "README.md").read_text()


def test_is_the_trainer(run_loop, monkeypatch, repository, tmp_path, checkpoint):
    """The same first groups, order, losses and weights, however the update is cut; both clip, decay and slow down."""
    settings = {"refresh_steps": 100, "max_steps": 6, "max_grad_norm": 0.5, "weight_decay": 0.5, "warmup_steps": 0.4}
    settings |= {"retrieval_learning_rate_factor": 0.1, "distillation_loss_weight": 0.3, "num_evidence": 3}
    folder = run_loop(**settings, gradient_accumulation_steps=2)
    forget_accelerator()
    settings |= {"train_file": tmp_path / "train.jsonl", "model_name_or_path": checkpoint, "max_length": 32}
    settings |= {"num_targets": 2, "language_column": "lang", "logging_steps": 1, "per_device_train_batch_size": 4}
    settings |= {"bf16": False}
    script = import_example(monkeypatch, repository, "run_marge_pretraining")
    expected = run_script(script, monkeypatch, tmp_path, **settings, do_train=True, learning_rate=1e-3)
    for ours, theirs in zip(read_log(folder), history(expected), strict=False):
        assert ours["step"] == theirs["step"] and ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
    for name, weight in weights(expected).items():
        torch.testing.assert_close(weights(folder)[name], weight, rtol=1e-4, atol=1e-5, msg=name)


def test_refreshes(run_loop, monkeypatch):
    """First groups by the model, held; then of some shards; every update has the groups of the last refresh."""
    searches = record_searches(monkeypatch)
    installed, read = [], []
    install, call = EvidenceDataset.install, DataCollatorForParaphrasing.__call__

    def record_install(self, groups, *args):
        install(self, groups, *args)
        installed.append({tuple(row[row >= 0].tolist()) for row in groups[0]})
        read.append([])

    def record_read(self, examples):
        read[-1].extend(tuple(example["target_rows"]) for example in examples)
        return call(self, examples)

    monkeypatch.setattr(EvidenceDataset, "install", record_install)
    monkeypatch.setattr(DataCollatorForParaphrasing, "__call__", record_read)
    options = {"first_groups": "model", "shards_per_refresh": 1, "shard_column": "part", "refresh_batch_size": 5}
    folder = run_loop(max_steps=8, hold_first_groups=3, refresh_steps=2, **options)
    assert [name for name, *_ in searches] == ["MargeForConditionalGeneration"] * 3
    assert [shards and len(shards) for _, shards, _ in searches] == [None, 1, 1]
    assert [line["step"] for line in read_log(folder) if "refresh/groups" in line] == [5, 7]
    assert len(installed) == 3 and all(set(rows) <= groups for rows, groups in zip(read, installed, strict=True))


@pytest.mark.parametrize(("workers", "mode"), [(0, "blocking"), (0, "async"), (2, "async")])
def test_goes_on_as_if_unbroken(run_loop, loop, tmp_path, monkeypatch, workers, mode):
    """After Ctrl-C, a crash while a checkpoint is written and one between two: the same bits, and the same log."""
    settings = {"num_train_epochs": 2, "max_steps": None, "checkpointing_steps": 3, "refresh_mode": mode}
    settings |= {"dataloader_num_workers": workers, "config_overrides": "hidden_dropout_prob=0.1"}
    unbroken = run_loop(output_dir=tmp_path / "unbroken", **settings)
    assert [line["refresh/staleness"] for line in read_log(unbroken) if "refresh/groups" in line] == [
        *([2, 2, 2] if mode == "async" else [0, 0, 0, 0])
    ]
    train_step, save_state = loop.train_step, Accelerator.save_state

    def broken_run(error, updates, act):
        """The script acts after so many updates of its own, and ends with the error."""
        numbers = count(1)

        def breaking_step(*arguments):
            losses = train_step(*arguments)
            if next(numbers) == updates:
                act()
            return losses

        with monkeypatch.context() as patch, pytest.raises(error) as raised:
            patch.setattr(loop, "train_step", breaking_step)
            run_loop(**settings)
        return raised.value

    def crash():
        raise OSError("power cut")

    def half_save(accelerator, folder):
        save_state(accelerator, folder)
        (folder / "model.safetensors").write_bytes(b"half")
        crash()

    stop = random.Random(workers).randint(1, 2)
    ended = broken_run(SystemExit, stop, lambda: signal.raise_signal(signal.SIGINT))
    assert ended.code == f"Interrupted at update {stop}. The same command goes on from there."
    broken_run(OSError, 1, lambda: monkeypatch.setattr(Accelerator, "save_state", half_save))
    monkeypatch.setattr(Accelerator, "save_state", save_state)
    broken_run(OSError, 7 - stop, crash)
    # The first groups are not made again.
    monkeypatch.setattr(EvidenceDataset, "rebuild", None)
    broken = run_loop(**settings)
    assert names(broken) == names(unbroken) >= {"step_9", "step_10"}
    assert same(weights(broken), weights(unbroken)) and untimed(broken) == untimed(unbroken)
    # What is done is not done again.
    monkeypatch.setattr(loop, "train_step", None)
    results = read_json(broken / "all_results.json")
    run_loop(**settings)
    assert untimed(broken) == untimed(unbroken) and read_json(broken / "all_results.json") == results
    with pytest.raises(ValueError, match="had other arguments: --refresh_steps was "):
        run_loop(**settings, refresh_steps=3)


def test_a_damaged_checkpoint_is_refused(run_loop):
    """The groups of another corpus, or none."""
    folder = run_loop(max_steps=2)
    (state,) = (folder / "step_2").glob("custom_checkpoint_1.pkl")
    content = torch.load(state)
    content["dataset"]["targets"] = content["dataset"]["targets"].flip(0)
    torch.save(content, state)
    with pytest.raises(ValueError, match="with other content"):
        run_loop(max_steps=2)


@pytest.mark.parametrize("mode", ["blocking", "async"])
def test_two_processes_are_one(run_loop, repository, tmp_path, mode):
    """They share the shards and make the updates of one process with the whole batch."""
    settings = {"shard_column": "part", "gradient_accumulation_steps": 2, "held_out": True, "max_steps": 6}
    one, two = run_loop(**settings, refresh_mode=mode), tmp_path / "two"
    arguments = [*sys.argv[1:], f"--output_dir={two}", "--per_device_train_batch_size=1"]
    launch(repository / "examples" / "run_marge_pretraining_no_trainer.py", tmp_path, *arguments)
    for ours, theirs in zip(untimed(one), untimed(two), strict=True):
        assert theirs == pytest.approx(ours, rel=1e-5, abs=1e-5)
    before, after = read_json(one / "all_results.json"), read_json(two / "all_results.json")
    expected = {name: value for name, value in before.items() if name.startswith("eval_")}
    assert {name: after[name] for name in expected} == pytest.approx(expected, rel=1e-4, abs=1e-4)
    for name, weight in weights(one).items():
        torch.testing.assert_close(weights(two)[name], weight, rtol=1e-4, atol=1e-4, msg=name)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"checkpointing_steps": 0}, "--checkpointing_steps must be at least 1, but got 0."),
        ({"num_train_epochs": 0, "max_steps": -1}, "--num_train_epochs must be above 0, but got 0.0."),
        ({"num_evidence": 0}, "--num_evidence must be at least 1, but got 0."),
        ({"eval_steps": 0}, "eval_steps must be at least 1, but got 0."),
        (
            {"text_column": "body"},
            "text_column 'body' is not in the dataset. Its columns are: text, lang, part, related.",
        ),
    ],
)
def test_errors(run_loop, arguments, sentence):
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}$"):
        run_loop(**arguments)
