"""Masks and crops are other ones in each epoch, and those of a resumed run are those of an unbroken one."""

import pytest
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_paraphrase_lm import CocoLMForPretraining, DataCollatorForCorrectiveLM, NewMasksCallback, train_tokenizer

from .test_modeling_cocolm import tiny_config

TEXTS = ["The last train to the coast leaves at nine.", "Boil the eggs for ten minutes.", "Every key has one value."]


class Seen(TrainerCallback):
    """Keeps what the model reads."""

    def __init__(self, model):
        self.batches = []
        model.register_forward_pre_hook(
            lambda module, arguments, batch: self.batches.append(batch["input_ids"].tolist()), with_kwargs=True
        )


def train(folder, resume=None, **options):
    torch.manual_seed(0)
    tokenizer = train_tokenizer(TEXTS, vocab_size=270, progress=False)
    rows = [{"input_ids": tokenizer(text)["input_ids"]} for text in TEXTS for _ in range(2)]
    model = CocoLMForPretraining(tiny_config(vocab_size=len(tokenizer), max_position_embeddings=64))
    seen = Seen(model)
    collator = DataCollatorForCorrectiveLM(tokenizer)
    defaults = {"num_train_epochs": 2, "per_device_train_batch_size": 2, "save_steps": 1, "report_to": "none"}
    defaults |= {"use_cpu": True, "disable_tqdm": True, "remove_unused_columns": False}
    arguments = TrainingArguments(folder, **defaults | options)
    trainer = Trainer(model, arguments, collator, rows, callbacks=[NewMasksCallback(collator)])
    trainer.train(resume_from_checkpoint=resume)
    return seen.batches, model.state_dict()


@pytest.mark.parametrize("step", [1, 3, 4])
def test_resumed_and_unbroken_runs_are_one(tmp_path, step):
    batches, weights = train(tmp_path)
    assert len(batches) == 6
    resumed, resumed_weights = train(tmp_path / "resumed", resume=str(tmp_path / f"checkpoint-{step}"))
    assert resumed == batches[step:]
    assert all(torch.equal(weight, weights[name]) for name, weight in resumed_weights.items())


def test_epochs_have_other_masks_and_seeds_too(tmp_path):
    batches, _ = train(tmp_path, save_strategy="no")
    first, second = (sorted(row for batch in half for row in batch) for half in (batches[:3], batches[3:]))
    assert first != second
    other, _ = train(tmp_path, save_strategy="no", data_seed=7)
    assert sorted(row for batch in other[:3] for row in batch) != first


def test_persistent_workers_are_refused(tmp_path):
    with pytest.raises(ValueError) as caught:
        train(tmp_path, dataloader_num_workers=1, dataloader_persistent_workers=True)
    assert str(caught.value) == (
        "dataloader_persistent_workers must be False, because workers that live on never see the masks of a new epoch. "
        "Leave it out: starting workers once an epoch costs little."
    )
