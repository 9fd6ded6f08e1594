"""The losses and gradients of an update do not depend on how its batch is cut into batches and ranks."""

import dataclasses
import socket

import pytest
import torch
from accelerate import Accelerator
from transformers import Trainer, TrainingArguments

from hf_paraphrase_lm import CocoLMForPretraining, CorrectiveLMTrainer, LogComponentLossesCallback
from hf_paraphrase_lm.training import global_batch

from .test_modeling_cocolm import checkpoint_activations, pretraining_batch, tiny_config, without_dropout

LOSSES = ("loss", "mlm_loss", "copy_loss", "corrective_lm_loss", "contrastive_loss")
# Texts of very different lengths, and one batch without a mask: means of means would be far off.
LENGTHS = (12, 3, 9, 5, 4, 6, 2, 12)


def rows(lengths=LENGTHS):
    """One dictionary of unpadded tensors a text; the longer a text, the more masks."""
    batch = pretraining_batch(lengths)
    unmasked = torch.arange(batch["labels"].shape[1]) >= torch.tensor(lengths)[:, None] // 2
    for name in ("input_ids", "corrupted_input_ids"):
        batch[name] = torch.where(unmasked & (batch["labels"] != -100), batch["labels"], batch[name])
    return [{name: tensor[row] for name, tensor in batch.items()} for row in range(len(lengths))]


def collate(items):
    return {name: torch.stack([item[name] for item in items]) for name in items[0]}


def update(model, batches):
    """Losses and gradients of an update, as a training loop adds them up."""
    totals = dict.fromkeys(LOSSES, 0.0)
    accelerator = Accelerator(cpu=True)
    for batch in global_batch(model, batches, accelerator):
        output = model(**batch)
        (output.loss / len(batches)).backward()
        for name in LOSSES:
            totals[name] = totals[name] + output[name].detach() / len(batches)
    return totals, {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}


def assert_same_update(first, second):
    for name in LOSSES:
        torch.testing.assert_close(first[0][name], second[0][name], rtol=1e-5, atol=1e-5)
    assert first[1].keys() == second[1].keys()
    for name, gradient in first[1].items():
        torch.testing.assert_close(gradient, second[1][name], rtol=1e-5, atol=1e-5, msg=name)


@pytest.mark.parametrize("sizes", [(4, 4), (2, 2, 2, 2), (1, 7), (5, 3)])
@pytest.mark.parametrize("form", ["released", "paper"])
def test_accumulated_batches_are_one(sizes, form):
    model = CocoLMForPretraining(without_dropout(corrective_lm_form=form, contrastive_temperature=0.3))
    items = rows()
    whole = update(model, [collate(items)])
    plain = model(**collate(items))
    for name in LOSSES:
        torch.testing.assert_close(whole[0][name], plain[name].detach())
    model.zero_grad()
    parts = [collate(part) for part in torch.utils.data.random_split(items, sizes, torch.Generator().manual_seed(0))]
    assert_same_update(whole, update(model, parts))


@pytest.mark.parametrize("objective", ["replaced_token_detection", "masked_lm"])
@pytest.mark.parametrize("weight", [0, 2])
def test_other_objectives(objective, weight):
    config = without_dropout(discriminator_objective=objective, contrastive_loss_weight=weight)
    model = CocoLMForPretraining(config)
    items = rows()
    whole = update(model, [collate(items)])
    model.zero_grad()
    assert_same_update(whole, update(model, [collate(items[:4]), collate(items[4:])]))


def test_rows_of_padding_and_no_masks_at_all():
    model = CocoLMForPretraining(without_dropout())
    items = rows()
    nothing = items[3]
    items[3] = {name: torch.full_like(tensor, 0 if name.endswith("mask") else 1) for name, tensor in nothing.items()}
    items[3]["labels"] = torch.full_like(nothing["labels"], -100)
    whole = update(model, [collate(items)])
    model.zero_grad()
    assert_same_update(whole, update(model, [collate(items[:4]), collate(items[4:])]))
    for item in items:
        item["input_ids"] = torch.where(item["labels"] == -100, item["input_ids"], item["labels"])
    losses, gradients = update(model, [collate(items[:4]), collate(items[4:])])
    assert losses["mlm_loss"] == losses["corrective_lm_loss"] == 0
    assert all(gradient.isfinite().all() for gradient in gradients.values())


def test_texts_are_encoded_twice_with_the_same_random_numbers():
    """Both passes have the same dropout and samples, and random numbers go on as if there had been only one."""
    model = CocoLMForPretraining(tiny_config())
    items = rows()
    for item in items:
        del item["corrupted_input_ids"]
    batches = [collate(items[:4]), collate(items[4:])]
    outputs = []
    model.register_forward_hook(lambda module, arguments, output: outputs.append(output))
    torch.manual_seed(3)
    for batch in global_batch(model, batches, Accelerator(cpu=True)):
        model(**batch, output_logits=True)
    after = torch.rand(())
    for first, second in ((0, 2), (1, 3)):
        assert torch.equal(outputs[first].corrupted_input_ids, outputs[second].corrupted_input_ids)
        assert torch.equal(outputs[first].contrastive_embeddings, outputs[second].contrastive_embeddings)
        assert torch.equal(outputs[first].span_embeddings, outputs[second].span_embeddings)
    torch.manual_seed(3)
    for batch in batches:
        model(**batch)
    assert torch.equal(torch.rand(()), after)


@dataclasses.dataclass
class Run:
    trainer: Trainer
    losses: dict


def train(
    folder, trainer_class=CorrectiveLMTrainer, config=None, items=None, resume=None, recompute=False, **arguments
):
    torch.manual_seed(0)
    model = CocoLMForPretraining(config or without_dropout(contrastive_temperature=0.3))
    if recompute:
        checkpoint_activations(model, use_reentrant=False)
    defaults = {"max_steps": 2, "logging_steps": 1, "remove_unused_columns": False, "learning_rate": 1e-2}
    defaults |= {"use_cpu": True, "disable_tqdm": True, "save_strategy": "no", "max_grad_norm": 0.0}
    arguments = TrainingArguments(folder, **defaults | arguments)
    items = items or rows()
    callbacks = [LogComponentLossesCallback()]
    trainer = trainer_class(model, arguments, collate, train_dataset=items, callbacks=callbacks)
    trainer.train(resume_from_checkpoint=resume)
    return Run(trainer, {name: trainer.state.log_history[0][name] for name in LOSSES})


def test_trainer_accumulates_exactly(tmp_path):
    options = {"optim": "sgd", "learning_rate": 1e-3}
    whole = train(tmp_path, per_device_train_batch_size=8, **options)
    parts = train(tmp_path, per_device_train_batch_size=4, gradient_accumulation_steps=2, **options)
    plain = train(tmp_path, Trainer, per_device_train_batch_size=4, gradient_accumulation_steps=2, **options)
    for name in LOSSES:
        assert parts.losses[name] == pytest.approx(whole.losses[name], abs=1e-5, rel=1e-5), name
    assert plain.losses["contrastive_loss"] != pytest.approx(whole.losses["contrastive_loss"], rel=1e-2)
    for name, weight in parts.trainer.model.named_parameters():
        torch.testing.assert_close(weight, whole.trainer.model.get_parameter(name), rtol=1e-5, atol=1e-5)


def test_accumulation_in_bf16_with_gradient_checkpointing(tmp_path):
    """To the precision of bfloat16, of which every sum over 8 texts has another rounding than two over 4."""
    options = {"optim": "sgd", "learning_rate": 1e-3, "bf16": True, "recompute": True}
    whole = train(tmp_path, per_device_train_batch_size=8, **options)
    parts = train(tmp_path, per_device_train_batch_size=4, gradient_accumulation_steps=2, **options)
    assert parts.losses == pytest.approx(whole.losses, rel=2**-8)


def test_one_batch_a_step_is_plain_trainer(tmp_path):
    config = tiny_config()
    ours, plain = (train(tmp_path, c, config, per_device_train_batch_size=8) for c in (CorrectiveLMTrainer, Trainer))
    assert ours.losses == pytest.approx(plain.losses, rel=1e-6)


def test_one_process_with_several_gpus_is_refused(tmp_path):
    arguments = TrainingArguments(tmp_path, use_cpu=True)
    arguments._n_gpu = 2
    with pytest.raises(ValueError) as caught:
        CorrectiveLMTrainer(CocoLMForPretraining(tiny_config()), arguments)
    assert str(caught.value) == (
        "CorrectiveLMTrainer needs a process for each GPU, but this one has 2. Start the script with `accelerate "
        "launch --num_processes 2`, or show it one GPU with CUDA_VISIBLE_DEVICES=0."
    )


def test_a_resumed_run_is_the_unbroken_one(tmp_path):
    arguments = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 4}
    arguments |= {"config": tiny_config(), "save_strategy": "steps", "save_steps": 2}
    unbroken = train(tmp_path / "unbroken", **arguments).trainer.model
    checkpoint = tmp_path / "unbroken" / "checkpoint-2"
    resumed = train(tmp_path / "resumed", resume=str(checkpoint), **arguments).trainer.model
    for name, weight in resumed.named_parameters():
        assert torch.equal(weight, unbroken.get_parameter(name)), name


RANKS = """
import multiprocessing
import os
import sys

import torch

from hf_paraphrase_lm import CocoLMForPretraining
from tests.test_corrective_lm_trainer import LOSSES, rows, train

folder, size, steps = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])


def run(rank):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    os.environ["MASTER_PORT"] = sys.argv[4]
    items = torch.load(f"{folder}/items.pt")
    run = train(
        f"{folder}/{rank}",
        items=items,
        ddp_backend="gloo",
        optim="sgd",
        learning_rate=1e-3,
        per_device_train_batch_size=size,
        gradient_accumulation_steps=steps,
    )
    torch.save((run.losses, dict(run.trainer.model.named_parameters())), f"{folder}/rank{rank}.pt")


ranks = [multiprocessing.get_context("fork").Process(target=run, args=(rank,)) for rank in range(2)]
for rank in ranks:
    rank.start()
for rank in ranks:
    rank.join()
assert [rank.exitcode for rank in ranks] == [0, 0]
"""


@pytest.fixture
def free_port():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


@pytest.mark.parametrize(("size", "steps"), [(4, 1), (2, 2)])
def test_ranks_are_one(tmp_path, run_python, free_port, size, steps):
    items = rows()
    torch.save(items, tmp_path / "items.pt")
    whole = train(tmp_path, items=items, per_device_train_batch_size=8, optim="sgd", learning_rate=1e-3)
    run_python(RANKS, tmp_path, size, steps, free_port)
    for rank in range(2):
        losses, weights = torch.load(tmp_path / f"rank{rank}.pt", weights_only=False)
        for name in LOSSES:
            assert losses[name] == pytest.approx(whole.losses[name], abs=1e-5, rel=1e-5), name
        for name, weight in weights.items():
            torch.testing.assert_close(weight, whole.trainer.model.get_parameter(name), rtol=1e-5, atol=1e-5)
