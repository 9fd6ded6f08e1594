import re

import numpy as np
import pytest
import torch
from torch import nn

from hf_paraphrase_lm.retrieval import EvidenceDataset
from hf_paraphrase_lm.training import evidence_losses, recall_at_k

from .reference import evidence as naive
from .reference.evidence import RowEmbedder, row_documents

PAD = 99
N = 40


@pytest.mark.parametrize("k", [1, 3, 49])
@pytest.mark.parametrize("block", [7, 1024])
def test_recall_against_a_loop(k, block, monkeypatch):
    monkeypatch.setattr("hf_paraphrase_lm.training.metrics.QUERIES_PER_BLOCK", block)
    rng = np.random.default_rng(0)
    embeddings = rng.normal(size=(50, 4)).astype(np.float32)
    groups = rng.integers(-1, 12, 50)
    groups[7] = 100  # alone in its group
    expected = naive.recall_at_k(embeddings, groups, k)
    assert recall_at_k(embeddings, groups, k) == pytest.approx(expected)
    assert recall_at_k(torch.from_numpy(embeddings).double().requires_grad_(), groups.tolist(), k) == pytest.approx(
        expected
    )
    if k == 49:
        assert expected == 1


def test_recall_of_known_neighbors():
    # 0 and 1 are near, 2 is nearest to the distractor 3.
    embeddings = np.array([[1.0, 0.0], [0.99, 0.1], [0.0, 1.0], [0.1, 0.99]])
    assert recall_at_k(embeddings, np.array([5, 5, 5, -1])) == pytest.approx(2 / 3)
    assert recall_at_k(embeddings, np.array([5, 5, 5, -1]), k=2) == 1
    assert recall_at_k(embeddings, np.array([5, 5, 6, -1])) == 1


@pytest.mark.parametrize(
    ("embeddings", "groups", "k", "message"),
    [
        (
            np.ones((3, 2)),
            [0, 0],
            1,
            "embeddings must have the shape (n, dim) and groups (n,), but got (3, 2) and (2,).",
        ),
        (np.ones(3), [0, 0, 1], 1, "embeddings must have the shape (n, dim) and groups (n,), but got (3,) and (3,)."),
        (
            np.ones((3, 2)),
            [0, 0, 1],
            3,
            "k must be between 1 and 2, the number of other documents, but got 3.",
        ),
        (np.full((3, 2), np.nan), [0, 0, 1], 1, "embeddings must be finite, but have NaN or infinite values."),
        (
            np.ones((4, 2)),
            [0, 1, -1, -1],
            1,
            "groups must hold two documents of one group at least, but there is nothing to find.",
        ),
    ],
)
def test_bad_input_of_recall_is_refused(embeddings, groups, k, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        recall_at_k(embeddings, groups, k)


class Model(nn.Module):
    """Its loss is the mean over labels of a function of each label and the evidence that its target may see."""

    def __init__(self):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(()))
        self.calls = []

    def forward(self, input_ids, labels, evidence_mask):
        assert not self.training and not torch.is_grad_enabled()
        self.calls.append((input_ids, labels, evidence_mask))
        seen = (input_ids[:, 0] * evidence_mask).sum(dim=1, keepdim=True).float()
        counted = labels != -100
        losses = (labels + 0.01 * seen) * counted
        return type("Output", (), {"loss": self.bias + losses.sum() / counted.sum()})()


def collate(groups):
    """One group: evidence (num_evidence, 1), the first token only; labels padded with -100; keys of the model only."""
    (group,) = groups
    longest = max(map(len, group["labels"]))
    return {
        "input_ids": torch.tensor([ids[:1] for ids in group["input_ids"]]),
        "labels": torch.tensor([ids + [-100] * (longest - len(ids)) for ids in group["labels"]]),
        "evidence_mask": torch.tensor(group["evidence_mask"]),
    }


@pytest.fixture
def dataset():
    documents = row_documents(N, document=[row // 2 for row in range(N)])
    dataset = EvidenceDataset(documents, num_targets=3, num_evidence=4)
    dataset.rebuild(RowEmbedder(torch.randn(N, 5)), PAD, progress=False)
    return dataset


def test_losses_are_means_over_tokens(dataset):
    losses = evidence_losses(Model(), dataset, collate, progress=False)
    totals, tokens = {"retrieved": 0.0, "none": 0.0}, 0
    for i in range(dataset.num_groups):
        item = dataset[i]
        for label, allowed in zip(item["labels"], item["evidence_mask"], strict=True):
            seen = sum(row for row, a in zip(item["evidence_rows"], allowed, strict=True) if a)
            tokens += len(label)
            totals["none"] += sum(label)
            totals["retrieved"] += sum(token + 0.01 * seen for token in label)
    assert set(losses) == {"retrieved", "random", "none"}
    assert losses["none"] == pytest.approx(totals["none"] / tokens)
    assert losses["retrieved"] == pytest.approx(totals["retrieved"] / tokens)
    assert losses["random"] > losses["none"]


def test_random_evidence_is_of_other_documents(dataset):
    model = Model().train()
    evidence_losses(model, dataset, collate, progress=False)
    assert model.training
    seen = set()
    for i, (retrieved, random, none) in enumerate(zip(*[iter(model.calls)] * 3, strict=True)):
        item = dataset[i]
        assert all(torch.equal(call[1], retrieved[1]) for call in (random, none))
        assert torch.equal(none[0], retrieved[0]) and not none[2].any()
        assert random[2].all() and random[2].shape == retrieved[2].shape
        drawn = random[0][:, 0].tolist()
        assert len(set(drawn)) == len(drawn) == len(item["evidence_rows"])
        assert not {row // 2 for row in drawn} & {row // 2 for row in item["target_rows"]}
        seen.update(drawn)
    assert len(seen) > N / 2


def test_random_evidence_follows_the_seed(dataset):
    before = torch.get_rng_state()
    first, same, other = (evidence_losses(Model(), dataset, collate, seed=s, progress=False) for s in (0, 0, 1))
    assert first == same and first["random"] != other["random"] and first["retrieved"] == other["retrieved"]
    assert torch.equal(before, torch.get_rng_state())


def test_items_and_max_groups(dataset):
    held_out = [dataset[i] for i in range(4)]
    expected = evidence_losses(Model(), dataset, collate, max_groups=4, progress=False)
    assert evidence_losses(Model(), held_out, collate, dataset.documents, progress=False) == expected
    assert (
        evidence_losses(Model(), [*held_out, None], collate, dataset.documents, max_groups=4, progress=False)
        == expected
    )


def test_bad_groups_are_refused(dataset):
    message = "evidence_losses draws random evidence: give the `documents` that the rows of the items index."
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        evidence_losses(Model(), [dataset[0]], collate)
    message = "evidence_losses needs one group at least, but got none."
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        evidence_losses(Model(), [], collate, dataset.documents)
    item = dataset[0] | {"target_rows": [0, 2, 4]}
    message = (
        "There is no random evidence for the targets [0, 2, 4]: every row of the corpus is a chunk of one of their "
        "documents. Give more documents."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        evidence_losses(Model(), [item], collate, dataset.documents.select(range(6)), progress=False)
    with pytest.raises(RuntimeError, match=r"^EvidenceDataset has no groups yet\."):
        evidence_losses(Model(), EvidenceDataset(dataset.documents), collate, progress=False)


def test_progress_bar(dataset, capfd):
    evidence_losses(Model(), dataset, collate)
    assert "evidence losses: 100%" in capfd.readouterr().err
