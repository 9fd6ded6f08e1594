"""What the pre-training scripts share."""

import logging

import pytest
import torch
from transformers import HfArgumentParser

from .scripts import import_example


@pytest.fixture
def pretraining(monkeypatch, repository):
    return import_example(monkeypatch, repository, "pretraining")


@pytest.mark.parametrize(("name", "is_faster"), [("avx512_bf16", True), ("amx_bf16", True), ("avx2", False)])
def test_bf16_by_default_where_it_is_faster(pretraining, monkeypatch, tmp_path, name, is_faster):
    """It can be chosen and refused, and other mixed precision counts, too."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {name: True}, raising=False)
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    settings = {"output_dir": str(tmp_path), "use_cpu": True}
    assert pretraining.PretrainingArguments(**settings).bf16 == is_faster
    assert pretraining.LoopArguments(**settings).mixed_precision == ("bf16" if is_faster else "no")
    parser = HfArgumentParser(pretraining.PretrainingArguments)
    for arguments, expected in (([], is_faster), (["--bf16"], True), (["--bf16=False"], False)):
        (chosen,) = parser.parse_args_into_dataclasses([f"--output_dir={tmp_path}", "--use_cpu", *arguments])
        assert chosen.bf16 == expected
    assert not pretraining.PretrainingArguments(**settings, fp16=True).bf16
    assert pretraining.LoopArguments(**settings, mixed_precision="no").mixed_precision == "no"
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    assert pretraining.LoopArguments(**settings).mixed_precision is None


@pytest.mark.parametrize("is_faster", [True, False])
def test_bf16_that_is_slow_is_told(pretraining, monkeypatch, tmp_path, caplog, is_faster):
    monkeypatch.setattr(pretraining, "bf16_is_faster", lambda use_cpu: is_faster)
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    settings = {"output_dir": str(tmp_path), "use_cpu": True}
    with caplog.at_level(logging.WARNING, pretraining.logger.name):
        pretraining.PretrainingArguments(**settings)
        pretraining.LoopArguments(**settings)
        assert not caplog.records
        pretraining.PretrainingArguments(**settings, bf16=True)
        pretraining.LoopArguments(**settings, mixed_precision="bf16")
    sentence = (
        "bfloat16 was asked for, but this CPU has no instructions for it, without which products can take 50 times as "
        "long as in float32. Leave it out: these scripts compute in bfloat16 by themselves where it is faster."
    )
    assert [record.getMessage() for record in caplog.records] == ([] if is_faster else [sentence] * 2)


def test_an_old_torch_cannot_tell(pretraining, monkeypatch):
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert not pretraining.bf16_is_faster(use_cpu=True)
