"""A run that is broken off anywhere and resumed ends with the weights of the unbroken run, bit by bit.

By hand, with more kills than in the suite (each starts a process):

    RESUME_KILLS=20 python -m pytest -s -k killed tests/test_resume.py
"""

import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import socket
import time
from contextlib import suppress

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed
from transformers.trainer_utils import get_last_checkpoint

from hf_paraphrase_lm import (
    DataCollatorForParaphrasing,
    EvidenceDataset,
    MargeConfig,
    MargeForConditionalGeneration,
    RefreshIndexCallback,
)
from hf_paraphrase_lm.training import last_checkpoint, set_aside_half_checkpoints

from .reference.evidence import make_documents
from .test_modeling_marge import make_tokenizer

STATE = "trainer_state.json"
NAME = "RefreshIndexCallback"
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:This DataLoader will create 2 worker processes:UserWarning"),
]


def make_dataset(n=40, seed=0, **options):
    numbers = random.Random(seed)
    documents = [[0, *(numbers.randrange(5, 60) for _ in range(numbers.randrange(2, 8))), 2] for _ in range(n)]
    shard, language = [row % 4 for row in range(n)], [("de", "en")[row // 4 % 2] for row in range(n)]
    options = {"num_targets": 2, "num_evidence": 2, "pairs_per_target": 3} | options
    return EvidenceDataset(make_documents(documents, shard=shard, language=language), **options)


class Events(TrainerCallback):
    """Writes down what begins, for whoever kills this process."""

    def __init__(self, file):
        self.file = file

    def note(self, event, step):
        with open(self.file, "a") as file:
            file.write(f"{event} {step}\n")

    def on_train_begin(self, args, state, control, **kwargs):
        self.note("begin", state.global_step)

    def on_step_begin(self, args, state, control, **kwargs):
        self.note("step", state.global_step + 1)

    def on_optimizer_step(self, args, state, control, **kwargs):
        # Callbacks given to Trainer come before this one.
        self.note("refresh" if (state.global_step + 1) % 3 == 0 else "end of step", state.global_step + 1)

    def on_step_end(self, args, state, control, **kwargs):
        if control.should_save:
            self.note("save", state.global_step)


def make_trainer(
    folder, mode="blocking", max_steps=13, refresh=None, dataset=None, eval_dataset=None, dropout=0.1, **options
):
    """An epoch has ten updates; groups are refreshed at the updates 3, 6, 9 and 12."""
    set_seed(0)
    sizes = {f"{part}_intermediate_size": 16 for part in ("encoder", "decoder_base", "decoder")}
    sizes |= {f"{part}_layers": 1 for part in ("encoder", "decoder_base", "decoder", "retrieval")}
    sizes |= {"vocab_size": 60, "hidden_size": 8, "num_attention_heads": 2, "max_position_embeddings": 16}
    config = MargeConfig(hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout, **sizes)
    dataset = dataset or make_dataset()
    options = {"save_steps": 1, "logging_steps": 1, "per_device_train_batch_size": 2} | options
    arguments = TrainingArguments(
        str(folder),
        max_steps=max_steps,
        learning_rate=1e-2,
        remove_unused_columns=False,
        use_cpu=True,
        disable_tqdm=True,
        report_to="none",
        **options,
    )
    refresh = {"refresh_steps": 3, "shards_per_refresh": 3} | (refresh or {})
    return Trainer(
        MargeForConditionalGeneration(config),
        arguments,
        data_collator=DataCollatorForParaphrasing(make_tokenizer()),
        train_dataset=dataset,
        eval_dataset=eval_dataset,
        callbacks=[RefreshIndexCallback(dataset, progress=False, mode=mode, **refresh)],
    )


def losses(trainer):
    return [log["loss"] for log in trainer.state.log_history if "loss" in log]


def assert_same_run(trainer, unbroken):
    assert losses(trainer) == losses(unbroken)
    weights = unbroken.model.state_dict()
    assert all(torch.equal(weight, weights[name]) for name, weight in trainer.model.state_dict().items())
    refreshed = [
        [log["step"] for log in run.state.log_history if "refresh/groups" in log] for run in (trainer, unbroken)
    ]
    assert refreshed[0] == refreshed[1]


@pytest.mark.parametrize("mode", ["blocking", "async"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        # An epoch has seven updates, the last of two batches.
        {"gradient_accumulation_steps": 3, "per_device_train_batch_size": 1},
        {"dataloader_num_workers": 2, "dataloader_persistent_workers": True},
        {"dataloader_num_workers": 2, "refresh": {"refresh_steps": 1}},
    ],
    ids=["plain", "accumulation", "workers", "refresh at every step"],
)
def test_resumed_at_any_step(mode, options, tmp_path):
    unbroken = make_trainer(tmp_path / "unbroken", mode, **options)
    unbroken.train()
    # Workers take their time to start. There is a refresh at 3, at 10 the end of an epoch.
    for step in (3, 8, 10) if "dataloader_num_workers" in options else range(1, 13):
        trainer = make_trainer(tmp_path / str(step), mode, save_strategy="no", **options)
        trainer.train(resume_from_checkpoint=str(tmp_path / f"unbroken/checkpoint-{step}"))
        assert_same_run(trainer, unbroken)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """The folder of a run with a checkpoint at every update; it is copied, not written to."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    make_trainer(folder, max_steps=8).train()
    return folder


def edited(checkpoints, folder, edit=lambda record: None, step=5):
    """A copy of a checkpoint, somewhere else, with another record of the callback."""
    checkpoint = folder / "copy"
    shutil.copytree(checkpoints / f"checkpoint-{step}", checkpoint)
    state = json.loads((checkpoint / STATE).read_text())
    edit(state["stateful_callbacks"])
    (checkpoint / STATE).write_text(json.dumps(state))
    return str(checkpoint)


def test_from_the_newest_and_from_a_copy_elsewhere(checkpoints, tmp_path):
    unbroken = make_trainer(tmp_path / "unbroken", max_steps=8, save_strategy="no")
    unbroken.train()
    for step in (6, 7, 8):
        shutil.copytree(checkpoints / f"checkpoint-{step - 1}", tmp_path / f"run/checkpoint-{step - 1}")
        trainer = make_trainer(tmp_path / "run", max_steps=8, save_strategy="no")
        trainer.train(resume_from_checkpoint=True)
        assert trainer._initial_global_step == step - 1
        assert_same_run(trainer, unbroken)
    trainer = make_trainer(tmp_path / "other", max_steps=8, save_strategy="no")
    trainer.train(resume_from_checkpoint=edited(checkpoints, tmp_path))
    assert_same_run(trainer, unbroken)


def test_the_same_trainer_goes_on(tmp_path):
    """As after Ctrl-C in a notebook: groups of the interrupted run are there, and not those of the checkpoint."""
    unbroken = make_trainer(tmp_path / "unbroken", "async", max_steps=8, save_strategy="no")
    unbroken.train()

    class Interrupting(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 7:
                trainer.remove_callback(self)
                raise KeyboardInterrupt

    trainer = make_trainer(tmp_path / "run", "async", max_steps=8)
    trainer.add_callback(Interrupting())
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer.train(resume_from_checkpoint=str(tmp_path / "run/checkpoint-5"))
    assert_same_run(trainer, unbroken)


def test_training_data_may_be_evaluated(tmp_path):
    """It is read by this process as the batches of the training are, which are counted."""

    def train(folder, checkpoint=None):
        dataset = make_dataset()
        options = {"eval_strategy": "steps", "eval_steps": 2, "prediction_loss_only": True}
        trainer = make_trainer(folder, dataset=dataset, max_steps=12, eval_dataset=dataset, **options)
        trainer.train(resume_from_checkpoint=checkpoint)
        return trainer

    unbroken = train(tmp_path / "unbroken")
    for step in (2, 3, 6, 10):
        assert_same_run(train(tmp_path / "run", str(tmp_path / f"unbroken/checkpoint-{step}")), unbroken)


def test_another_number_of_workers(tmp_path):
    """The batches that were to hold the old groups still do: those that two workers had read ahead."""
    rows = []

    class Remembering(DataCollatorForParaphrasing):
        def __call__(self, groups):
            rows.append([group["target_rows"] for group in groups])
            return super().__call__(groups)

    workers = {"dataloader_num_workers": 2, "refresh": {"refresh_steps": 2}, "max_steps": 9}
    unbroken = make_trainer(tmp_path / "unbroken", **workers)
    unbroken.train()
    trainer = make_trainer(tmp_path / "run", **(workers | {"dataloader_num_workers": 0}))
    trainer.data_collator = Remembering(make_tokenizer())
    trainer.train(resume_from_checkpoint=str(tmp_path / "unbroken/checkpoint-4"))
    # Updates 5 to 9 were all read ahead, or hold groups of a refresh before 4.
    assert losses(trainer)[:7] == losses(unbroken)[:7]
    assert len(rows) == 6


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            lambda record: record.pop(NAME),
            "The checkpoint of step 5 has no groups of evidence, so it was saved without a RefreshIndexCallback, and "
            "the run would go on with other data. Resume from a checkpoint that was saved with it, or load only its "
            "weights, with from_pretrained, and start anew.",
        ),
        (
            lambda record: record[NAME]["attributes"].clear(),
            "The checkpoint of step 5 has no groups of evidence, so it was saved without a RefreshIndexCallback, and "
            "the run would go on with other data. Resume from a checkpoint that was saved with it, or load only its "
            "weights, with from_pretrained, and start anew.",
        ),
        (
            lambda record: record[NAME]["attributes"].update(groups=record[NAME]["attributes"]["groups"][:-8]),
            "The groups of evidence in the checkpoint of step 5 are damaged (Error -5 while decompressing data: "
            "incomplete or truncated stream). Resume from another checkpoint.",
        ),
        (
            lambda record: record[NAME]["attributes"].update(groups=record[NAME]["attributes"]["groups"][:-1]),
            "The groups of evidence in the checkpoint of step 5 are damaged (Incorrect padding). Resume from another "
            "checkpoint.",
        ),
        (
            lambda record: record[NAME]["attributes"].update(groups=""),
            "The groups of evidence in the checkpoint of step 5 are damaged (Error -5 while decompressing data: "
            "incomplete or truncated stream). Resume from another checkpoint.",
        ),
        (
            lambda record: record[NAME]["args"].update(refresh_steps=4, mode="async"),
            "The checkpoint of step 5 was saved by a RefreshIndexCallback with other options: refresh_steps was 4 and "
            "is 3, mode was 'async' and is 'blocking'. Give the same to go on with its run.",
        ),
    ],
    ids=["none", "nothing", "truncated", "cut", "empty", "options"],
)
def test_checkpoints_that_do_not_fit_are_refused(checkpoints, tmp_path, edit, message):
    trainer = make_trainer(tmp_path / "run", max_steps=8)
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        trainer.train(resume_from_checkpoint=edited(checkpoints, tmp_path, edit))
    assert trainer.train_dataset.num_groups == 0


@pytest.mark.parametrize("options", [{"seed": 1}, {"num_evidence": 3}, {"n": 44}])
def test_checkpoints_of_other_data_are_refused(checkpoints, tmp_path, options):
    trainer = make_trainer(tmp_path, dataset=make_dataset(**options), max_steps=8)
    with pytest.raises(ValueError, match=r"^The state is of another EvidenceDataset: .*Groups fit only the corpora"):
        trainer.train(resume_from_checkpoint=str(checkpoints / "checkpoint-5"))
    assert trainer.train_dataset.num_groups == 0


def test_a_checkpoint_of_plain_trainer_is_refused(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=4)
    trainer.train_dataset.rebuild(trainer.model, 1, progress=False)
    callback = trainer.pop_callback(RefreshIndexCallback)
    trainer.train()
    trainer.add_callback(callback)
    with pytest.raises(ValueError, match=r"^The checkpoint of step 3 has no groups of evidence, so it was saved wi"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))


def test_callbacks_made_anew_are_refused(tmp_path):
    message = (
        "restore_callback_states_from_checkpoint must be False, because with it Trainer makes its callbacks anew, and "
        "it cannot make the dataset of RefreshIndexCallback. Its state is restored anyway."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        make_trainer(tmp_path, restore_callback_states_from_checkpoint=True)


def test_half_of_a_checkpoint_is_passed_over(checkpoints, tmp_path, monkeypatch):
    assert last_checkpoint(tmp_path / "none") is None and last_checkpoint(tmp_path) is None
    run = tmp_path / "run"
    shutil.copytree(checkpoints, run)
    (run / "checkpoint-best").mkdir()
    assert last_checkpoint(run) == str(run / "checkpoint-8") == get_last_checkpoint(run)
    # Killed while it was writing the last file, before it, before anything; and that of another process.
    text = (run / "checkpoint-8" / STATE).read_text()
    (run / "checkpoint-8" / STATE).write_text(text[: len(text) // 2])
    (run / "checkpoint-7" / STATE).unlink()
    (run / "checkpoint-10").mkdir()
    state = (run / "checkpoint-6/rng_state.pth").read_bytes()
    (run / "checkpoint-6/rng_state_1.pth").write_bytes(state[:-100])
    # Not newer than the last whole one.
    (run / "checkpoint-4" / STATE).unlink()
    assert last_checkpoint(run) == str(run / "checkpoint-5") != get_last_checkpoint(run)

    # Two are still being written, one of them to its end.
    def write(seconds):
        assert seconds == 2
        (run / "checkpoint-10/config.json").touch()
        (run / "checkpoint-8" / STATE).write_text(text)

    monkeypatch.setattr("time.sleep", write)
    set_aside_half_checkpoints(run)
    left = {"checkpoint-best", *(f"checkpoint-{step}" for step in (1, 2, 3, 4, 5, 8, 10))}
    assert {path.name for path in run.iterdir()} == left | {"unfinished-checkpoint-6", "unfinished-checkpoint-7"}
    shutil.rmtree(run / "checkpoint-8")
    (run / "unfinished-checkpoint-10").mkdir()
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    trainer = make_trainer(run, max_steps=8)
    assert (run / "unfinished-checkpoint-10/config.json").exists()
    trainer.train(resume_from_checkpoint=True)
    assert trainer._initial_global_step == 5
    assert last_checkpoint(run) == str(run / "checkpoint-8") == get_last_checkpoint(run)
    set_aside_half_checkpoints(run)
    assert (run / "checkpoint-4").exists()


def run(folder, options):
    """What a training script does: it goes on if there is a checkpoint."""
    # For whoever ends the workers that outlive it.
    os.setsid()
    # Of workers; else they would be started as this process was.
    multiprocessing.set_start_method("fork", force=True)
    trainer = make_trainer(folder, max_steps=40, save_steps=2, save_total_limit=2, logging_strategy="no", **options)
    trainer.add_callback(Events(folder / "events.txt"))
    trainer.train(resume_from_checkpoint=get_last_checkpoint(folder) is not None)
    save_file({name: weight.clone() for name, weight in trainer.model.state_dict().items()}, folder / "final")


@pytest.fixture
def processes(repository, monkeypatch):
    """Starts processes; one that has imported all already forks itself for each."""
    monkeypatch.chdir(repository)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])

    def start(function, *arguments):
        process = context.Process(target=function, args=arguments)
        process.start()
        return process

    return start


# With its small epsilon, Adam takes full steps in the direction of rounding errors where a gradient is nothing else, as
# that of the bias of keys, and how processors round would show in the losses.
COMPARABLE = {"dropout": 0.0, "adam_epsilon": 1e-4}


def run_rank(folder, rank, port, mode, resume):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    os.environ["MASTER_PORT"] = str(port)
    options = {"per_device_train_batch_size": 1, "ddp_backend": "gloo", **COMPARABLE}
    trainer = make_trainer(folder, mode, **options)
    trainer.train(resume_from_checkpoint=resume)
    torch.save((losses(trainer), trainer.train_dataset.groups, trainer.model.state_dict()), folder / f"rank{rank}.pt")


@pytest.mark.parametrize("mode", ["blocking", "async"])
def test_two_processes_are_one(mode, tmp_path, processes):
    """The same groups and losses, and a run of two is resumable, too."""

    def two(name, resume=None):
        with socket.socket() as server:
            server.bind(("127.0.0.1", 0))
            port = server.getsockname()[1]
        ranks = [processes(run_rank, tmp_path / name, rank, port, mode, resume) for rank in range(2)]
        for rank in ranks:
            rank.join(120)
        assert [rank.exitcode for rank in ranks] == [0, 0]
        first, second = (torch.load(tmp_path / name / f"rank{rank}.pt") for rank in range(2))
        assert first[0] == second[0]
        assert all(torch.equal(*pair) for pair in zip(first[1], second[1], strict=True))
        return first

    one = make_trainer(tmp_path / "one", mode, save_strategy="no", **COMPARABLE)
    one.train()
    both = two("both")
    assert both[0] == pytest.approx(losses(one), rel=1e-5)
    assert all(torch.equal(*pair) for pair in zip(both[1], one.train_dataset.groups, strict=True))
    resumed = two("resumed", str(tmp_path / "both/checkpoint-7"))
    assert resumed[0] == both[0]
    assert all(torch.equal(weight, both[2][name]) for name, weight in resumed[2].items())


@pytest.mark.parametrize(
    "options",
    [{}, {"mode": "async"}, {"mode": "async", "dataloader_num_workers": 2}],
    ids=["blocking", "async", "async with workers"],
)
def test_killed_at_any_moment(options, tmp_path, processes):
    """SIGKILL in a step, a refresh or a save, again and again."""

    def start(folder):
        folder.mkdir(exist_ok=True)
        (folder / "events.txt").write_text("")
        process = processes(run, folder, options)
        while process.is_alive() and not (folder / "events.txt").read_text():
            time.sleep(0.01)
        return process, time.perf_counter()

    unbroken, killed = tmp_path / "unbroken", tmp_path / "killed"
    process, began = start(unbroken)
    process.join()
    seconds = time.perf_counter() - began
    moments, events = random.Random(0), []
    while len(events) < int(os.environ.get("RESUME_KILLS", 7)):
        process, _ = start(killed)
        process.join(moments.uniform(0, seconds / 3))
        process.kill()
        process.join()
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        if process.exitcode == 0:
            # It was done before; once more from the beginning.
            shutil.rmtree(killed)
            continue
        assert process.exitcode == -signal.SIGKILL
        is_half = last_checkpoint(killed) != get_last_checkpoint(killed)
        events.append((killed / "events.txt").read_text().splitlines()[-1] + ", half a checkpoint" * is_half)
    print(f"\nkilled after: {'; '.join(events)}")
    process, _ = start(killed)
    process.join()
    assert process.exitcode == 0
    weights, expected = load_file(killed / "final"), load_file(unbroken / "final")
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
