"""The parts of the loss in Trainer's logs, with a tiny COCO-LM and with models made for one case each."""

import re
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.utils import ModelOutput

from hf_paraphrase_lm import LogComponentLossesCallback
from hf_paraphrase_lm.models.cocolm import CocoLMConfig, CocoLMForPretraining

LOSSES = ["mlm_loss", "copy_loss", "corrective_lm_loss", "contrastive_loss"]
MASK, VOCAB_SIZE, LENGTH = 4, 20, 8


class Recorder(TrainerCallback):
    """Keeps every `logs` that comes to callbacks after the one under test."""

    def __init__(self):
        self.logs = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append(dict(logs))


def collate(rows):
    labels = torch.tensor([row["input_ids"] for row in rows])
    input_ids = labels.clone()
    input_ids[:, [2, 5]] = MASK
    return {"input_ids": input_ids, "labels": labels, "span_input_ids": labels[:, :-1]}


@pytest.fixture
def model():
    config = CocoLMConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=LENGTH,
        rel_pos_bins=8,
        max_rel_pos=8,
        auxiliary_layers=1,
        initializer_range=0.3,
    )
    return CocoLMForPretraining(config)


@pytest.fixture
def train(tmp_path):
    """Trains on 13 texts and returns the Trainer; `arguments` go to TrainingArguments."""
    rows = [{"input_ids": torch.randint(5, VOCAB_SIZE, (LENGTH,)).tolist()} for _ in range(13)]

    def run(model, *callbacks, collator=collate, trained=True, **arguments):
        defaults = {"per_device_train_batch_size": 2, "logging_steps": 2, "max_steps": 7, "learning_rate": 1e-2}
        defaults |= {"save_strategy": "no", "report_to": "none", "disable_tqdm": True, "use_cpu": True}
        arguments = TrainingArguments(str(tmp_path), **defaults | arguments)
        trainer = Trainer(model, arguments, collator, rows, rows[:5], callbacks=list(callbacks))
        if trained:
            trainer.train()
        return trainer

    return run


def watch(model):
    """A list that every forward pass in training mode adds its output's losses to."""
    seen = []

    def remember(module, arguments, output):
        if module.training:
            seen.append({name: output[name].item() for name in ["loss", *LOSSES]})

    model.register_forward_hook(remember)
    return seen


def means(batches):
    return {name: sum(batch[name] for batch in batches) / len(batches) for name in LOSSES}


def component_logs(trainer):
    """Step -> what was logged of the components; each step is logged once at most."""
    found = {}
    for entry in trainer.state.log_history:
        if not entry.keys().isdisjoint(LOSSES):
            assert entry["step"] not in found and "loss" in entry
            found[entry["step"]] = {name: entry[name] for name in LOSSES}
    return found


@pytest.mark.parametrize("accumulation", [1, 3])
def test_means_since_the_last_log(model, train, accumulation):
    seen, recorder = watch(model), Recorder()
    trainer = train(model, LogComponentLossesCallback(), recorder, gradient_accumulation_steps=accumulation)
    # An epoch is 7 batches: with accumulation, its third update has one batch only, and counts as much as the others.
    sizes = [1] * 7 if accumulation == 1 else [3, 3, 1, 3, 3, 1, 3]
    assert len(seen) == sum(sizes)
    updates = []
    for size in sizes:
        updates.append(means(seen[:size]))
        del seen[:size]
    logged = component_logs(trainer)
    assert list(logged) == [2, 4, 6]
    for step, losses in logged.items():
        assert losses == pytest.approx(means(updates[step - 2 : step]), rel=1e-5)
    for entry in trainer.state.log_history[:3]:
        assert entry["loss"] == pytest.approx(
            entry["mlm_loss"] + 50 * entry["copy_loss"] + entry["corrective_lm_loss"] + entry["contrastive_loss"], 1e-5
        )
    # Later callbacks get the same numbers as the history; the summary of the run has none.
    assert [{**entry, "step": step} for entry, step in zip(recorder.logs, (2, 4, 6), strict=False)] == (
        trainer.state.log_history[:3]
    )
    assert recorder.logs[3].keys().isdisjoint(LOSSES) and len(recorder.logs) == 4


def test_evaluation_does_not_disturb(model, train):
    with_evaluation = train(
        model, LogComponentLossesCallback(), eval_strategy="steps", eval_steps=1, logging_steps=3, max_steps=6
    )
    history = with_evaluation.state.log_history
    assert list(component_logs(with_evaluation)) == [3, 6]
    assert all(entry.keys().isdisjoint(LOSSES) for entry in history if "eval_loss" in entry)
    assert sum("eval_loss" in entry for entry in history) == 6


def test_evaluation_leaves_the_numbers(model, train):
    def evaluate_like(module, arguments, output):
        # What an evaluation between two steps does, without its draws from the random generator.
        output["mlm_loss"] = output["mlm_loss"] * (1 if module.training else 1000)

    seen = watch(model)
    model.register_forward_hook(evaluate_like)
    trainer = train(model, LogComponentLossesCallback(), eval_strategy="steps", eval_steps=1)
    logged = component_logs(trainer)
    assert [logged[step] for step in (2, 4, 6)] == [
        pytest.approx(means(seen[step - 2 : step]), rel=1e-5) for step in (2, 4, 6)
    ]


def test_two_runs_with_one_callback(model, train):
    callback, seen = LogComponentLossesCallback(), watch(model)
    hooks = len(model._forward_hooks)
    trainer = train(model, callback)
    assert len(model._forward_hooks) == hooks
    del seen[:]
    # The seventh update of the first run was not logged; it must not count in the second.
    trainer.train()
    assert len(model._forward_hooks) == hooks
    logged = component_logs(trainer)
    assert list(logged) == [2, 4, 6]
    assert all(losses == pytest.approx(means(seen[step - 2 : step]), rel=1e-5) for step, losses in logged.items())


def test_run_after_an_interrupted_one(model, train):
    class Interrupt(TrainerCallback):
        armed = True

        def on_substep_end(self, args, state, control, **kwargs):
            if self.armed and state.global_step == 1:
                raise KeyboardInterrupt

    interrupt, hooks = Interrupt(), len(model._forward_hooks)
    trainer = train(
        model, LogComponentLossesCallback(), interrupt, trained=False, gradient_accumulation_steps=3, max_steps=2
    )
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    interrupt.armed, seen = False, watch(model)
    trainer.train()
    assert len(model._forward_hooks) == hooks + 1
    (losses,) = component_logs(trainer).values()
    assert losses == pytest.approx(means(seen), rel=1e-5)


class Losses(nn.Module):
    """Returns fields as they are given, with a loss to train on."""

    def __init__(self, **fields):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.fields = fields

    def forward(self, labels):
        return ModelOutput(loss=self.weight * 2, **self.fields)


def only_labels(rows):
    return {"labels": torch.ones(len(rows), LENGTH)}


def test_which_fields_are_logged(train):
    fields = {
        "distillation_loss": torch.tensor(3.0, dtype=torch.bfloat16),
        "token_loss": torch.ones(2),
        "text_loss": 5.0,
        "gap": torch.tensor(4.0),
        "lossy": torch.tensor(1.0),
    }
    for names, expected in ((None, {"distillation_loss": 3.0}), (["gap", "lossy"], {"gap": 4.0, "lossy": 1.0})):
        trainer = train(Losses(**fields), LogComponentLossesCallback(names), collator=only_labels, max_steps=2)
        logged = {name: value for name, value in trainer.state.log_history[0].items() if name in fields}
        assert logged == expected


def test_no_component_is_no_error(train):
    trainer = train(Losses(), LogComponentLossesCallback(), collator=only_labels, max_steps=2)
    assert trainer.state.log_history[0]["loss"] == pytest.approx(2, abs=0.1)


def test_missing_field_is_refused(train):
    model = Losses(copy_loss=torch.tensor(1.0), rows=torch.ones(2))
    message = (
        "LogComponentLossesCallback is to log rows, but the output of Losses has no scalar tensor of this name, only "
        "loss, copy_loss."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        train(model, LogComponentLossesCallback(["copy_loss", "rows"]), collator=only_labels)


def test_mean_over_ranks(monkeypatch):
    """Two processes, this one with a loss of 1 and, by a stand-in for the reduction, another one with 3."""

    def all_reduce(tensor):
        tensor += 3

    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    callback, model = LogComponentLossesCallback(), Losses(copy_loss=torch.tensor(1.0))
    args, state, logs = SimpleNamespace(device="cpu"), SimpleNamespace(log_history=[{}]), {"loss": 2.0}
    callback.on_train_begin(args, state, None, model=model)
    model(torch.ones(1))
    callback.on_step_end(args, state, None)
    callback.on_log(args, state, None, logs=logs)
    assert logs == {"loss": 2.0, "copy_loss": 2.0} and state.log_history == [{"copy_loss": 2.0}]
