import re
import types

import pytest
import torch
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_paraphrase_lm.retrieval import EvidenceDataset, LexicalEmbedder, embed_documents
from hf_paraphrase_lm.training import RefreshIndexCallback

from .reference.evidence import row_documents

PAD = 0
N = 48
TOKENIZER = types.SimpleNamespace(pad_token_id=PAD)


class Model(nn.Module):
    """Predicts the labels of a target from the mean of the evidence it may see; with dropout."""

    def __init__(self):
        super().__init__()
        self.tokens = nn.Embedding(N + 2, 8)
        self.dropout = nn.Dropout(0.3)

    def states(self, input_ids, attention_mask):
        states = self.dropout(self.tokens(input_ids)) * attention_mask[..., None]
        return states.sum(dim=-2) / attention_mask.sum(dim=-1, keepdim=True)

    def embed(self, input_ids, attention_mask):
        assert not self.training
        return nn.functional.normalize(self.states(input_ids, attention_mask), dim=-1)

    def forward(self, input_ids, attention_mask, labels, evidence_mask):
        assert self.training
        weights = evidence_mask.float() / evidence_mask.sum(dim=1, keepdim=True)
        target = weights @ self.states(input_ids, attention_mask)
        logits = (target @ self.tokens.weight.T)[:, None].expand(-1, labels.shape[1], -1)
        return {"loss": nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())}


def collate(groups):
    (group,) = groups
    evidence, labels = (
        nn.utils.rnn.pad_sequence([torch.tensor(ids) for ids in group[key]], True, fill)
        for key, fill in (("input_ids", PAD), ("labels", -100))
    )
    mask = torch.tensor(group["evidence_mask"])
    return {"input_ids": evidence, "attention_mask": (evidence != PAD).long(), "labels": labels, "evidence_mask": mask}


@pytest.fixture
def dataset():
    documents = row_documents(N, shard=[row % 4 for row in range(N)])
    documents = documents.map(lambda row: {"input_ids": [token + 1 for token in row["input_ids"]]})
    return EvidenceDataset(documents, num_targets=4, num_evidence=4, pairs_per_target=3)


@pytest.fixture
def model():
    return Model()


class Recording(RefreshIndexCallback):
    """Notes when the groups were rebuilt, from which shards and which weights."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, progress=False, **options)
        self.rebuilds = []

    def _refresh(self, step, model, processing_class):
        assert model.training or step == 0
        super()._refresh(step, model, processing_class)
        shards = {int(row) % 4 for item in self.dataset for row in item["target_rows"]}
        self.rebuilds.append((step, shards, model.tokens.weight.detach().clone()))


@pytest.fixture
def train(dataset, model, tmp_path):
    def train(*callbacks, max_steps=10, processing_class=TOKENIZER, **options):
        torch.manual_seed(0)
        options = {"logging_steps": 1, "save_strategy": "no", "disable_tqdm": True, "report_to": "none"} | options
        arguments = TrainingArguments(
            str(tmp_path),
            max_steps=max_steps,
            per_device_train_batch_size=1,
            learning_rate=1e-2,
            remove_unused_columns=False,
            use_cpu=True,
            **options,
        )
        trainer = Trainer(
            model,
            arguments,
            data_collator=collate,
            train_dataset=dataset,
            processing_class=processing_class,
            callbacks=list(callbacks),
        )
        trainer.train()
        return trainer

    return train


def test_refreshes_at_the_start_and_every_so_many_steps(dataset, model, train):
    callback = Recording(dataset, refresh_steps=3)
    train(callback, max_steps=9)
    # None after the last step: nothing would train on it.
    assert [step for step, *_ in callback.rebuilds] == [0, 3, 6]
    assert all(shards == {0, 1, 2, 3} for _, shards, _ in callback.rebuilds)
    weights = [weight for *_, weight in callback.rebuilds]
    assert not torch.equal(weights[0], weights[1]) and not torch.equal(weights[1], weights[2])


def test_the_groups_are_those_of_the_current_weights(dataset, model, train):
    embedded = []

    class Watching(Recording):
        def _refresh(self, step, model, processing_class):
            super()._refresh(step, model, processing_class)
            other = EvidenceDataset(dataset.documents, num_targets=4, num_evidence=4, pairs_per_target=3)
            other._state[0] = dataset._state[0] - 1
            other.rebuild(model, PAD, progress=False)
            embedded.append((list(dataset), list(other)))

    train(Watching(dataset, refresh_steps=4))
    assert len(embedded) == 3
    assert all(groups == expected for groups, expected in embedded)
    assert embedded[0][0] != embedded[1][0]


def test_groups_that_are_there_are_held(dataset, train):
    dataset.rebuild(LexicalEmbedder(dataset.documents, progress=False), PAD, progress=False)
    callback = Recording(dataset, refresh_steps=4)
    train(callback)
    assert [step for step, *_ in callback.rebuilds] == [4, 8]


def test_training_goes_on_as_if_nothing_had_happened(dataset, model, train, monkeypatch):
    """A refresh that changes no group changes no loss: gradients, modes, dropout and sampling are untouched."""
    start = {name: value.clone() for name, value in model.state_dict().items()}
    dataset.rebuild(model, PAD, progress=False)
    plain = train(max_steps=8).state.log_history
    model.load_state_dict(start)
    monkeypatch.setattr(dataset, "_install", lambda groups: None)
    callback = Recording(dataset, refresh_steps=2)
    refreshed = train(callback, max_steps=8).state.log_history
    assert len(callback.rebuilds) == 3
    assert [log["loss"] for log in plain[:-1]] == [log["loss"] for log in refreshed[:-1]]


def test_sampled_shards(dataset, model, train):
    start = {name: value.clone() for name, value in model.state_dict().items()}
    callback = Recording(dataset, refresh_steps=1, shards_per_refresh=2)
    train(callback, max_steps=6)
    sampled = [shards for _, shards, _ in callback.rebuilds]
    assert all(len(shards) == 2 for shards in sampled)
    assert len(set(map(frozenset, sampled))) > 1
    # They follow from the seed and the step.
    model.load_state_dict(start)
    again = EvidenceDataset(dataset.documents, num_targets=4, num_evidence=4)
    callback = Recording(again, refresh_steps=1, shards_per_refresh=2)
    train(callback, max_steps=6)
    assert [shards for _, shards, _ in callback.rebuilds] == sampled


class Integration(TrainerCallback):
    def __init__(self):
        self.logged = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logged.append((state.global_step, dict(logs)))


def test_statistics_are_logged(dataset, train):
    integration = Integration()
    trainer = train(Recording(dataset, refresh_steps=4), integration, max_steps=10, logging_steps=100)
    logs = [log for log in trainer.state.log_history if "refresh/groups" in log]
    # The refresh before the first step is logged with it, the others with their own step.
    assert [log["step"] for log in logs] == [1, 4, 8]
    names = {"groups", "targets", "resting_targets", "pairs", "distinct_evidence", "seconds", "cross_language_share"}
    names |= {"relevance_mean", "relevance_std", "pair_relevance_mean"}
    for log in logs:
        assert {name for name in log if name.startswith("refresh/")} == {f"refresh/{name}" for name in names}
        assert "loss" in log
    assert [step for step, log in integration.logged if "refresh/groups" in log] == [1, 4, 8]


def test_no_logging_is_no_logging(dataset, train):
    history = train(Recording(dataset, refresh_steps=4), logging_strategy="no").state.log_history
    # What Trainer logs at the end.
    assert len(history) == 1 and "refresh/groups" in history[0]


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:This DataLoader will create 2 worker processes:UserWarning")
def test_with_workers(dataset, train):
    callback = Recording(dataset, refresh_steps=10)
    train(callback, max_steps=20, dataloader_num_workers=2, dataloader_persistent_workers=True)
    assert [step for step, *_ in callback.rebuilds] == [0, 10]


def test_gradient_accumulation(dataset, train):
    callback = Recording(dataset, refresh_steps=2)
    train(callback, max_steps=5, gradient_accumulation_steps=3)
    assert [step for step, *_ in callback.rebuilds] == [0, 2, 4]


def test_an_interrupted_refresh_leaves_groups_and_mode(dataset, model, train, monkeypatch):
    class Interrupted(Recording):
        def _refresh(self, step, model, processing_class):
            if step:
                self.before = list(dataset)
                monkeypatch.setattr(model, "embed", interrupt)
            super()._refresh(step, model, processing_class)

    def interrupt(*arguments):
        raise KeyboardInterrupt

    callback = Interrupted(dataset, refresh_steps=3)
    with pytest.raises(KeyboardInterrupt):
        train(callback)
    assert list(dataset) == callback.before
    assert all(module.training for module in model.modules())
    monkeypatch.undo()
    embed_documents(dataset.documents, model, PAD, progress=False)


def test_the_padding_token_may_come_from_the_config(dataset, model, train):
    callback = Recording(dataset, refresh_steps=5)
    message = (
        "RefreshIndexCallback must know the padding token to embed documents in batches, but neither Trainer's "
        "processing_class nor model.config has a pad_token_id. Give Trainer the tokenizer as processing_class."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        train(callback, processing_class=None)
    callback._refresh(0, model.train(), types.SimpleNamespace(pad_token_id=PAD))
    model.config = types.SimpleNamespace(pad_token_id=PAD)
    callback._refresh(0, model, None)
    callback._refresh(0, model, types.SimpleNamespace(pad_token_id=None))
    assert len(callback.rebuilds) == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"refresh_steps": 0}, "refresh_steps must be at least 1, but got 0."),
        (
            {"refresh_steps": 1, "shards_per_refresh": 5},
            "shards_per_refresh must be between 1 and 4, the number of shards of the dataset, but got 5.",
        ),
        (
            {"refresh_steps": 1, "shards_per_refresh": 0},
            "shards_per_refresh must be between 1 and 4, the number of shards of the dataset, but got 0.",
        ),
    ],
)
def test_bad_options_are_refused(dataset, options, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        RefreshIndexCallback(dataset, **options)
