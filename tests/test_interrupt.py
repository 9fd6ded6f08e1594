"""Ctrl-C during training, sent for real to this process."""

import os
import signal

import pytest
import torch
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from hf_paraphrase_lm import StopOnInterruptCallback


class Regression(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2, 1)

    def forward(self, x, labels):
        return {"loss": (self.linear(x).squeeze(-1) - labels).square().mean()}


class Interrupt(TrainerCallback):
    """Presses Ctrl-C so many times at an event of a step."""

    def __init__(self, event, step, times=1):
        self.step, self.times = step, times
        setattr(self, event, self.press)

    def press(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            for _ in range(self.times):
                os.kill(os.getpid(), signal.SIGINT)


def make_trainer(folder, *callbacks, **settings):
    data = [{"x": torch.randn(2), "labels": torch.randn(())} for _ in range(32)]
    arguments = TrainingArguments(
        folder,
        max_steps=6,
        per_device_train_batch_size=4,
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        **({"save_strategy": "steps", "save_steps": 2} | settings),
    )
    return Trainer(model=Regression(), args=arguments, train_dataset=data, callbacks=list(callbacks))


def test_first_interrupt_saves_and_stops(tmp_path):
    stop, before = StopOnInterruptCallback(), signal.getsignal(signal.SIGINT)
    trainer = make_trainer(tmp_path, Interrupt("on_step_begin", step=2), stop)
    trainer.train()
    assert stop.interrupted and trainer.state.global_step == 3
    assert signal.getsignal(signal.SIGINT) is before
    assert get_last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-3")

    trainer = make_trainer(tmp_path, stop)
    trainer.train(resume_from_checkpoint=True)
    assert not stop.interrupted and trainer.state.global_step == 6


def test_interrupts_during_a_save_do_not_break_it(tmp_path, monkeypatch):
    """Twice, between the weights and the rest of a checkpoint."""
    save = Trainer._save_optimizer_and_scheduler

    def interrupted_save(self, folder):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        save(self, folder)

    monkeypatch.setattr(Trainer, "_save_optimizer_and_scheduler", interrupted_save)
    stop = StopOnInterruptCallback()
    trainer = make_trainer(tmp_path, stop)
    trainer.train()
    assert stop.interrupted and trainer.state.global_step == 2
    monkeypatch.undo()
    trainer = make_trainer(tmp_path, StopOnInterruptCallback())
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 6


def test_second_interrupt_stops_at_once(tmp_path):
    before = signal.getsignal(signal.SIGINT)
    stop = StopOnInterruptCallback()
    with pytest.raises(KeyboardInterrupt):
        make_trainer(tmp_path, Interrupt("on_step_begin", step=2, times=2), stop).train()
    assert signal.getsignal(signal.SIGINT) is before


def test_nothing_is_saved_where_nothing_is_to_be(tmp_path):
    stop = StopOnInterruptCallback()
    trainer = make_trainer(tmp_path, Interrupt("on_step_begin", step=2), stop, save_strategy="no")
    trainer.train()
    assert stop.interrupted and trainer.state.global_step == 3 and get_last_checkpoint(tmp_path) is None


def test_uninterrupted(tmp_path):
    stop = StopOnInterruptCallback()
    trainer = make_trainer(tmp_path, stop)
    trainer.train()
    assert not stop.interrupted and trainer.state.global_step == 6
