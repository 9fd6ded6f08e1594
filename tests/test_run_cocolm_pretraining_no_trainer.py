"""examples/run_cocolm_pretraining_no_trainer.py with tiny models: results, going on after any end, ranks, errors."""

import json
import random
import re
import signal
import socket
import sys
from itertools import count

import datasets
import pytest
import torch
import yaml
from accelerate import Accelerator, tracking
from accelerate.state import AcceleratorState, GradientState
from safetensors.torch import load_file
from transformers import AutoModel, AutoTokenizer, TrainerCallback, TrainingArguments

from hf_paraphrase_lm import (
    CocoLMConfig,
    CocoLMForPretraining,
    CorrectiveLMTrainer,
    DataCollatorForCorrectiveLM,
    LogComponentLossesCallback,
    chunk_documents,
    train_tokenizer,
)
from hf_paraphrase_lm.models.cocolm import modeling_cocolm
from hf_paraphrase_lm.training import corrective_lm_metrics

from .scripts import ROOM, import_example, read_json, write_rows

LOSSES = ("loss", "mlm_loss", "copy_loss", "corrective_lm_loss", "contrastive_loss")
# Texts of very different lengths: three batches of four an epoch.
WORDS = ("big", "bird", "house", "mat", "on", "ran", "sat", "the")
TEXTS = [" ".join(random.Random(i).choices(WORDS, k=2 + 2 * i)) for i in range(12)]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS * 2, vocab_size=300, model_max_length=64, progress=False)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, tokenizer):
    """A model with dropout."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("checkpoint")
    CocoLMForPretraining(CocoLMConfig(vocab_size=len(tokenizer), auxiliary_layers=1, **ROOM)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def script(monkeypatch, repository):
    yield import_example(monkeypatch, repository, "run_cocolm_pretraining_no_trainer")
    forget_accelerator()


@pytest.fixture
def run(script, monkeypatch, tmp_path, checkpoint):
    """Runs the script on TEXTS, with arguments as on the command line. Returns its --output_dir."""
    file = write_rows(tmp_path / "texts.parquet", [{"text": text} for text in TEXTS])
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")

    def run(**arguments):
        defaults = {"train_file": file, "model_name_or_path": checkpoint, "output_dir": tmp_path / "out"}
        defaults |= {"use_cpu": True, "disable_tqdm": True, "logging_steps": 1, "per_device_train_batch_size": 4}
        defaults |= {"mixed_precision": "no"}
        arguments = {name: value for name, value in (defaults | arguments).items() if value is not None}
        monkeypatch.setattr(sys, "argv", ["script.py", *(f"--{name}={value}" for name, value in arguments.items())])
        forget_accelerator()
        script.main()
        return arguments["output_dir"]

    return run


def forget_accelerator():
    """Accelerate keeps what the first Accelerator of a process was told."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def read_log(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def names(folder):
    return {file.name for file in folder.iterdir()}


def assert_close_weights(weights, expected):
    assert weights.keys() == expected.keys()
    for name, weight in expected.items():
        # The gradient of a key's bias is rounding errors only, which Adam makes updates of.
        if not name.endswith("in_proj.bias"):
            torch.testing.assert_close(weights[name], weight, rtol=1e-5, atol=1e-5, msg=name)


def most_likely(probabilities):
    """In place of `_draw`: replacements that do not depend on random numbers."""
    return probabilities.argmax(-1)


def test_learns_and_writes_everything(run, tmp_path):
    """From random weights, with a tokenizer of its own; logs at intervals and at checkpoints."""
    rows = write_rows(tmp_path / "held_back.jsonl", [{"text": text} for text in TEXTS[:5]])
    folder = run(
        model_name_or_path=None,
        validation_file=rows,
        config_overrides="hidden_size=32,num_attention_heads=2,num_hidden_layers=1,auxiliary_layers=1,"
        "intermediate_size=32,max_position_embeddings=64,initializer_range=0.2",
        max_length=64,
        vocab_size=300,
        num_train_epochs=20.2,
        learning_rate=1e-2,
        logging_steps=10,
        checkpointing_steps=25,
        disable_tqdm=False,
    )
    assert names(folder) == {
        *("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "README.md"),
        *("all_results.json", "arguments.json", "log.jsonl", "step_50", "step_61"),
    }
    log = read_log(folder)
    assert [line["step"] for line in log] == [10, 20, 25, 30, 40, 50, 60, 61]
    assert [line["epoch"] for line in log] == [pytest.approx(line["step"] / 3) for line in log]
    assert all(log[-2][name] < 0.8 * log[0][name] for name in ("loss", "mlm_loss"))
    assert log[-1]["learning_rate"] == 0 < log[1]["learning_rate"] < 1e-2
    for line in log:
        parts = line["mlm_loss"] + 50 * line["copy_loss"] + line["corrective_lm_loss"] + line["contrastive_loss"]
        assert line["loss"] == pytest.approx(parts, rel=1e-4)
    tokenizer, model = AutoTokenizer.from_pretrained(folder), CocoLMForPretraining.from_pretrained(folder)
    texts = [{"input_ids": tokenizer(text)["input_ids"]} for text in TEXTS[:5]]
    expected = corrective_lm_metrics(model, texts, DataCollatorForCorrectiveLM(tokenizer), progress=False)
    results = read_json(folder / "all_results.json")
    assert {name: value for name, value in results.items() if name.startswith("eval_")} == {
        f"eval_{name}": pytest.approx(value, rel=1e-4) for name, value in expected.items()
    }
    assert results["train_samples"] == 12
    assert AutoModel.from_pretrained(folder).config.hidden_size == 32
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert "| sequences a step | 4 |" in card and f"{results['eval_detection_f1']:.4f}" in card


def test_each_epoch_has_all_texts_with_new_masks_in_a_new_order(run, script, monkeypatch, tokenizer):
    epochs = []

    def record(accelerator, model, optimizer, batches, max_grad_norm):
        epochs.append([row for batch in batches for row in zip(batch["labels"], batch["input_ids"], strict=True)])
        optimizer.step()
        return torch.zeros(5)

    monkeypatch.setattr(script, "train_step", record)
    run(gradient_accumulation_steps=3, num_train_epochs=2)
    orders = [[tokenizer.decode(labels[labels != -100], skip_special_tokens=True) for labels, _ in e] for e in epochs]
    assert sorted(orders[0]) == sorted(orders[1]) == sorted(TEXTS) and orders[0] != orders[1]
    masks = [
        {bytes(ids.numpy()) for labels, ids in epoch if (ids == tokenizer.mask_token_id).any()} for epoch in epochs
    ]
    assert min(map(len, masks)) > 5 and len(masks[0] & masks[1]) < 3


def test_is_the_trainer(run, tmp_path, tokenizer, checkpoint, monkeypatch):
    """Three epochs of one update each end with CorrectiveLMTrainer's losses and weights, however the update is cut."""
    monkeypatch.setattr(modeling_cocolm, "_draw", most_likely)
    # Only the second update is clipped, so that the scale of the gradients shows.
    settings = {"learning_rate": 1e-3, "weight_decay": 0.5, "warmup_steps": 0.4, "max_grad_norm": 75, "max_steps": 3}
    settings |= {"per_device_train_batch_size": 5, "gradient_accumulation_steps": 3, "logging_steps": 1}
    config = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    exact = tmp_path / "exact"
    CocoLMForPretraining.from_pretrained(checkpoint, **config).save_pretrained(exact)
    tokenizer.save_pretrained(exact)
    with monkeypatch.context() as patch:
        # Set by `accelerate launch`, and not to divide the losses once more.
        patch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
        folder = run(model_name_or_path=exact, seed=5, **settings)

    forget_accelerator()
    collator = DataCollatorForCorrectiveLM(tokenizer)

    class NewMasks(TrainerCallback):
        def on_epoch_begin(self, args, state, control, **kwargs):
            collator.seed = 5 + int(state.epoch)

    arguments = {"adam_beta2": 0.98, "adam_epsilon": 1e-6, "optim": "adamw_torch", "lr_scheduler_type": "linear"}
    arguments |= {"use_cpu": True, "save_strategy": "no", "disable_tqdm": True, "remove_unused_columns": False}
    trainer = CorrectiveLMTrainer(
        CocoLMForPretraining.from_pretrained(exact),
        TrainingArguments(tmp_path, **arguments | settings),
        collator,
        chunk_documents(datasets.Dataset.from_list([{"text": text} for text in TEXTS]), tokenizer, 64),
        callbacks=[LogComponentLossesCallback(), NewMasks()],
    )
    trainer.train()
    for ours, theirs in zip(read_log(folder), trainer.state.log_history[:3], strict=True):
        assert ours["step"] == theirs["step"]
        assert [ours[name] for name in LOSSES] == pytest.approx([theirs[name] for name in LOSSES], rel=1e-4)
    before, after = CocoLMForPretraining.from_pretrained(exact), CocoLMForPretraining.from_pretrained(folder)
    assert_close_weights(after.state_dict(), trainer.model.state_dict())
    assert (after.copy_head.weight - before.copy_head.weight).abs().max() > 1e-3


@pytest.mark.parametrize("workers", [0, 2])
def test_goes_on_as_if_unbroken(run, script, tmp_path, monkeypatch, workers):
    """After Ctrl-C, a crash while a checkpoint is written and one between two: the same bits, and the same log."""
    # Epochs of an update of two batches and one of a single batch.
    settings = {"gradient_accumulation_steps": 2, "num_train_epochs": 4, "checkpointing_steps": 3}
    settings["dataloader_num_workers"] = workers
    unbroken = run(output_dir=tmp_path / "unbroken", **settings)
    assert [line["epoch"] for line in read_log(unbroken)] == [step / 2 for step in range(1, 9)]
    train_step, save_state = script.train_step, Accelerator.save_state

    def broken_run(error, updates, act):
        """The script acts after so many updates of its own, and ends with the error."""
        numbers = count(1)

        def breaking_step(*arguments):
            losses = train_step(*arguments)
            if next(numbers) == updates:
                act()
            return losses

        with monkeypatch.context() as patch, pytest.raises(error) as raised:
            patch.setattr(script, "train_step", breaking_step)
            run(**settings)
        return raised.value

    def crash():
        raise OSError("power cut")

    def half_save(accelerator, folder):
        save_state(accelerator, folder)
        (folder / "model.safetensors").write_bytes(b"half")
        (folder / "optimizer.bin").unlink()
        crash()

    stop = random.Random(workers).randint(1, 2)
    ended = broken_run(SystemExit, stop, lambda: signal.raise_signal(signal.SIGINT))
    assert ended.code == f"Interrupted at update {stop}. The same command goes on from there."
    assert f"step_{stop}" in names(tmp_path / "out") and "all_results.json" not in names(tmp_path / "out")
    broken_run(OSError, 1, lambda: monkeypatch.setattr(Accelerator, "save_state", half_save))
    assert names(tmp_path / "out") == {f"step_{stop}", "unfinished", "arguments.json", "log.jsonl"}
    monkeypatch.setattr(Accelerator, "save_state", save_state)
    broken_run(OSError, 6 - stop, crash)
    assert names(tmp_path / "out") == {f"step_{stop}", "step_3", "arguments.json", "log.jsonl"}

    broken = run(**settings)
    assert (
        names(broken)
        == names(unbroken)
        == {
            *("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "README.md"),
            *("all_results.json", "arguments.json", "log.jsonl", "step_6", "step_8"),
        }
    )
    expected, weights = load_file(unbroken / "model.safetensors"), load_file(broken / "model.safetensors")
    assert expected.keys() == weights.keys()
    assert all(torch.equal(weights[name], weight) for name, weight in expected.items())
    assert read_log(broken) == read_log(unbroken)
    # What is done is not done again.
    monkeypatch.setattr(script, "train_step", None)
    results = read_json(broken / "all_results.json")
    assert "since it last went on" in (run(**settings) / "README.md").read_text(encoding="utf-8")
    assert read_log(broken) == read_log(unbroken) and read_json(broken / "all_results.json") == results
    run(**settings | {"output_dir": unbroken})
    assert "since it last went on" not in (unbroken / "README.md").read_text(encoding="utf-8")
    with pytest.raises(ValueError, match="had other arguments: --learning_rate was "):
        run(**settings, learning_rate=0.1)


def test_second_interrupt_stops_at_once(run, script, monkeypatch, capsys):
    def hanging_step(*arguments):
        signal.raise_signal(signal.SIGINT)
        assert "Ctrl-C: stopping after this update. Press it again to stop at once." in capsys.readouterr().err
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(script, "train_step", hanging_step)
    # A shell starts what runs in its background with this signal ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            run()
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


class Memory(tracking.GeneralTracker):
    """A tracker that remembers what it is given."""

    name, requires_logging_directory, tracker, logged = "memory", False, None, []

    def __init__(self, run_name):
        super().__init__()

    def store_init_configuration(self, values):
        self.logged[:] = [values]

    def log(self, values, step):
        self.logged.append({"step": step} | values)


def test_half_precision_another_objective_a_tracker_and_a_file(run, script, monkeypatch, tmp_path):
    arguments = {"discriminator_objective": "masked_lm", "num_train_epochs": 1, "learning_rate": 1e-3}
    full = read_log(run(**arguments))
    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "memory", Memory)
    settings = dict(argument.removeprefix("--").split("=") for argument in sys.argv[1:])
    settings |= {"mixed_precision": "bf16", "report_to": "memory", "validation_file": settings["train_file"]}
    settings["output_dir"] = str(tmp_path / "half")
    (tmp_path / "arguments.yaml").write_text(yaml.safe_dump(settings))
    monkeypatch.setattr(sys, "argv", ["script.py", str(tmp_path / "arguments.yaml")])
    forget_accelerator()
    script.main()
    half = read_log(tmp_path / "half")
    assert Memory.logged[0]["mixed_precision"] == "bf16" and Memory.logged[0]["learning_rate"] == 1e-3
    assert Memory.logged[1:-1] == half
    last = Memory.logged[-1]
    assert last["step"] == 3 and last["eval_mlm_loss"] > 0 and "eval_copy_loss" not in last
    assert half[0]["copy_loss"] == half[0]["corrective_lm_loss"] == 0 < half[0]["contrastive_loss"]
    assert half[0]["mlm_loss"] != full[0]["mlm_loss"] == pytest.approx(half[0]["mlm_loss"], rel=0.05)
    assert load_file(tmp_path / "half" / "model.safetensors")["copy_head.weight"].dtype == torch.float32


RANKS = """
import json
import multiprocessing
import os
import signal
import sys

from hf_paraphrase_lm.models.cocolm import modeling_cocolm
from tests.test_run_cocolm_pretraining_no_trainer import most_likely

folder, examples, port, *command = sys.argv[1:]
sys.path.insert(0, examples)
sys.argv = ["script.py", *command]
modeling_cocolm._draw = most_likely


def run(rank, stops):
    import run_cocolm_pretraining_no_trainer as script

    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    os.environ["MASTER_PORT"] = port
    train_step, steps = script.train_step, []

    def one_rank_interrupted(*arguments):
        losses = train_step(*arguments)
        steps.append(losses)
        if rank == 1 and len(steps) == 2:
            signal.raise_signal(signal.SIGINT)
        return losses

    if stops:
        script.train_step = one_rank_interrupted
    script.main()


for stops in (True, False):
    ranks = [multiprocessing.get_context("fork").Process(target=run, args=(rank, stops)) for rank in range(2)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    assert [rank.exitcode for rank in ranks] == [int(stops)] * 2
"""


def test_ranks_are_one(run, run_python, script, monkeypatch, repository, tmp_path, tokenizer, checkpoint):
    """Two processes, with Ctrl-C for one of them, make the updates of one; the folder is theirs from then on."""
    monkeypatch.setattr(modeling_cocolm, "_draw", most_likely)
    exact = tmp_path / "exact"
    config = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    CocoLMForPretraining.from_pretrained(checkpoint, **config).save_pretrained(exact)
    tokenizer.save_pretrained(exact)
    settings = {"model_name_or_path": exact, "gradient_accumulation_steps": 2, "num_train_epochs": 2}
    settings |= {"output_dir": tmp_path / "one", "learning_rate": 1e-3}
    one = run(**settings)
    two = tmp_path / "two"
    command = [*sys.argv[1:], f"--output_dir={two}", "--per_device_train_batch_size=2"]
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
    run_python(RANKS, tmp_path, repository / "examples", port, *command)
    assert "step_2" in names(two) and "| sequences a step | 8 |" in (two / "README.md").read_text(encoding="utf-8")
    for ours, theirs in zip(read_log(one), read_log(two), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)
    assert_close_weights(load_file(one / "model.safetensors"), load_file(two / "model.safetensors"))
    sentence = (
        f"{two / 'step_4'} is of a run with 2 processes, but there are 1. Start 2, or give another --output_dir to "
        "start anew."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}$"):
        run(**settings | {"output_dir": two, "per_device_train_batch_size": 2})
    assert len(read_log(two)) == 4


def test_other_folders_are_no_checkpoints(script, tmp_path):
    for name in ("step_9", "step_10", "step_", "step_x", "step_11.part", "unfinished"):
        (tmp_path / name).mkdir()
    assert script.find_checkpoints(tmp_path) == [tmp_path / "step_9", tmp_path / "step_10"]
    assert script.find_checkpoints(tmp_path / "nothing") == []


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"checkpointing_steps": 0}, "--checkpointing_steps must be at least 1, but got 0."),
        ({"logging_steps": -1}, "--logging_steps must be at least 1, but got -1."),
        ({"per_device_train_batch_size": 0}, "--per_device_train_batch_size must be at least 1, but got 0."),
        ({"gradient_accumulation_steps": 0}, "--gradient_accumulation_steps must be at least 1, but got 0."),
        ({"num_train_epochs": 0}, "--num_train_epochs must be above 0, but got 0.0."),
        (
            {"train_file": None},
            "Give either --dataset_name or files (--train_file, --validation_file, --test_file).",
        ),
    ],
)
def test_errors(run, arguments, sentence):
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}$"):
        run(**arguments)
