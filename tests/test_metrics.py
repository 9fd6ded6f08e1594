import re

import numpy as np
import pytest
import torch
from torch import nn
from transformers.utils import ModelOutput

from hf_paraphrase_lm.data import DataCollatorForCorrectiveLM, train_tokenizer
from hf_paraphrase_lm.models.cocolm import CocoLMConfig, CocoLMForPretraining
from hf_paraphrase_lm.retrieval import EvidenceDataset
from hf_paraphrase_lm.training import corrective_lm_metrics, evidence_losses, recall_at_k

from .reference import cocolm as naive_cocolm
from .reference import evidence as naive
from .reference.evidence import RowEmbedder, make_documents, row_documents

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


@pytest.mark.parametrize("k", [1, 3, 49])
def test_recall_of_translations_against_a_loop(k, monkeypatch):
    monkeypatch.setattr("hf_paraphrase_lm.training.metrics.QUERIES_PER_BLOCK", 7)
    rng = np.random.default_rng(0)
    embeddings = rng.normal(size=(50, 4)).astype(np.float32)
    groups, languages = rng.integers(-1, 12, 50), [["de", "en", "fr", "", None][i] for i in rng.integers(0, 5, 50)]
    found = []
    for query in range(50):
        others = [other for other in range(50) if languages[other] and languages[other] != languages[query]]
        if not languages[query] or groups[query] == -1 or all(groups[other] != groups[query] for other in others):
            continue
        others.sort(key=lambda other: -embeddings[query] @ embeddings[other])
        found.append(any(groups[other] == groups[query] for other in others[:k]))
    assert 5 < len(found) < 30 and recall_at_k(embeddings, groups, k, languages) == pytest.approx(np.mean(found))
    assert recall_at_k(embeddings, groups, k, np.array([name or "" for name in languages])) == np.mean(found)
    # Where every document is of another language, it is the recall of paraphrases.
    names = [str(i) for i in range(50)]
    assert recall_at_k(embeddings, groups, k, names) == recall_at_k(embeddings, groups, k)


def test_recall_of_translations_needs_some():
    embeddings = np.eye(4)
    for languages in (["de"] * 4, ["de", "", "en", "en"], [None] * 4):
        message = "groups must hold two documents of one group in two languages at least, but there is nothing to find."
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            recall_at_k(embeddings, [0, 0, 1, 1], languages=languages)
    with pytest.raises(ValueError, match=r"^languages must be one a document, but got 3 for 4 documents\.$"):
        recall_at_k(embeddings, [0, 0, 1, 1], languages=["de"] * 3)


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


def test_random_evidence_comes_from_where_evidence_comes_from():
    # All evidence has the document number of the first target, which there means another document.
    evidence = make_documents([[1000 + row] for row in range(12)], document=[0] * 12)
    dataset = EvidenceDataset(row_documents(N, document=range(N)), num_targets=3, num_evidence=4, evidence=evidence)

    class Embedder:
        def embed(self, input_ids, attention_mask):
            return torch.nn.functional.normalize(torch.randn(len(input_ids), 5), dim=-1)

    dataset.rebuild(Embedder(), PAD, progress=False)
    model = Model()
    evidence_losses(model, dataset, collate, dataset.documents, progress=False)
    drawn = torch.cat([call[0].flatten() for call in model.calls[1::3]])
    assert set(drawn.tolist()) <= set(range(1000, 1012)) and len(set(drawn.tolist())) > 6


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


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["a text"], vocab_size=261, progress=False)


@pytest.fixture
def texts(tokenizer):
    """11 texts of 4 to 19 tokens."""
    words = [torch.randint(5, 261, (2 + 5 * i % 16,)).tolist() for i in range(11)]
    return [{"input_ids": [tokenizer.cls_token_id, *ids, tokenizer.sep_token_id]} for ids in words]


@pytest.fixture
def cocolm():
    # The weights are wide enough for different losses in every batch and for tokens of both signs.
    config = CocoLMConfig(
        vocab_size=261,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=24,
        rel_pos_bins=8,
        max_rel_pos=8,
        auxiliary_layers=1,
        initializer_range=0.5,
    )
    return CocoLMForPretraining(config)


def test_corrective_lm_metrics_against_a_loop(cocolm, texts, tokenizer):
    outputs = []

    def remember(module, arguments, batch, output):
        with torch.no_grad():
            logits = module.forward(**batch, corrupted_input_ids=output.corrupted_input_ids, output_logits=True)
        outputs.append((batch, output.corrupted_input_ids, logits))

    cocolm.register_forward_hook(remember, with_kwargs=True)
    metrics = corrective_lm_metrics(cocolm, texts, DataCollatorForCorrectiveLM(tokenizer), 4, progress=False)

    assert sorted(len(corrupted) for _, corrupted, _ in outputs) == [3, 4, 4]
    read = sorted(row[row != -100].tolist() for batch, _, _ in outputs for row in batch["labels"])
    assert read == sorted(row["input_ids"] for row in texts)
    masked, tokens, contrastive = [], [], 0.0
    for batch, corrupted, output in outputs:
        row_of_mask = 0
        for i in range(len(corrupted)):
            for j in range(corrupted.shape[1]):
                label, copy_logit = int(batch["labels"][i, j]), output.copy_logits[i, j]
                if label == -100:
                    continue
                tokens.append((copy_logit, int(corrupted[i, j]) == label))
                if int(batch["input_ids"][i, j]) != label:
                    lm = output.auxiliary_logits[row_of_mask], output.corrective_lm_logits[row_of_mask]
                    masked.append((*lm, copy_logit, label, int(corrupted[i, j])))
                    row_of_mask += 1
        views = output.contrastive_embeddings, output.span_embeddings
        contrastive += naive_cocolm.contrastive_loss(*views, 1.0) * len(corrupted)
    auxiliary_logits, corrective_logits, copy_logits, labels, sampled = zip(*masked, strict=True)
    all_copy_logits, is_original = zip(*tokens, strict=True)
    assert metrics == pytest.approx(
        {
            "mlm_loss": float(naive_cocolm.masked_lm_loss(auxiliary_logits, labels)),
            "copy_loss": naive_cocolm.copy_loss(torch.stack(all_copy_logits), torch.tensor(is_original)),
            "corrective_lm_loss": float(
                naive_cocolm.corrective_lm_loss(corrective_logits, copy_logits, labels, sampled, "released")
            ),
            "contrastive_loss": contrastive / len(texts),
            **naive_detection(torch.stack(all_copy_logits).tolist(), is_original),
        },
        rel=1e-4,
    )


def test_objectives_with_and_without_detection(cocolm, texts, tokenizer):
    """Of the losses, those that are not part of the objective are 0."""
    losses = ["mlm_loss", "copy_loss", "corrective_lm_loss", "contrastive_loss"]
    collator = DataCollatorForCorrectiveLM(tokenizer)
    cocolm.config.discriminator_objective = "replaced_token_detection"
    metrics = corrective_lm_metrics(cocolm, texts, collator, 4, progress=False)
    assert [metrics[name] > 0 for name in losses] == [True, True, False, True]
    assert len(metrics) == 9 and 0 < metrics["detection_accuracy"] < 1
    cocolm.config.discriminator_objective = "masked_lm"
    # One batch: nothing is sampled, so its losses are those of a forward pass.
    metrics = corrective_lm_metrics(cocolm, texts, collator, progress=False)
    output = cocolm.eval()(**DataCollatorForCorrectiveLM(tokenizer, seed=0)(texts))
    expected = {name: output[name].item() for name in losses}
    assert metrics == pytest.approx(expected, rel=1e-5)
    assert [metrics[name] > 0 for name in losses] == [True, False, False, True]


def naive_detection(copy_logits, is_original):
    right = found = flagged = replaced = 0
    for logit, original in zip(copy_logits, is_original, strict=True):
        says_original = logit >= 0
        right += says_original == original
        flagged += not says_original
        replaced += not original
        found += not says_original and not original
    precision, recall = found / flagged, found / replaced
    return {
        "detection_accuracy": right / len(is_original),
        "majority_rate": sum(is_original) / len(is_original),
        "detection_precision": precision,
        "detection_recall": recall,
        "detection_f1": 2 * precision * recall / (precision + recall),
    }


class Detector(nn.Module):
    """Replaces every masked token by the same other one and scores it `logit`, the original ones `original_logit`."""

    def __init__(self, logit, original_logit=1.0):
        super().__init__()
        self.logits = logit, original_logit
        self.batches = []

    def forward(self, input_ids, labels, **inputs):
        self.batches.append((input_ids, labels, inputs))
        replaced = (labels != -100) & (labels != input_ids)
        loss = torch.tensor(1.0)
        return ModelOutput(
            mlm_loss=loss,
            copy_loss=loss,
            corrective_lm_loss=loss,
            contrastive_loss=loss,
            copy_logits=torch.where(replaced, *self.logits),
            # Padding is neither original nor replaced, whatever is read and said there.
            corrupted_input_ids=torch.where(replaced, (labels + 1) % 261, input_ids),
        )


@pytest.mark.parametrize(
    ("logits", "expected"),
    [
        ((-0.1, 0.1), {"accuracy": 1, "precision": 1, "recall": 1, "f1": 1}),
        # Undecided is "original", so nothing is found.
        ((0.0, 0.0), {"accuracy": None, "precision": 0, "recall": 0, "f1": 0}),
        ((0.1, -0.1), {"accuracy": 0, "precision": 0, "recall": 0, "f1": 0}),
    ],
)
def test_detection_of_known_tokens(texts, tokenizer, logits, expected):
    collator = DataCollatorForCorrectiveLM(tokenizer)
    metrics = corrective_lm_metrics(Detector(*logits), texts, collator, 3, progress=False)
    if expected["accuracy"] is None:
        expected = expected | {"accuracy": metrics["majority_rate"]}
    assert {name: metrics[f"detection_{name}"] for name in expected} == pytest.approx(expected)
    assert 0.75 < metrics["majority_rate"] < 0.95


def test_masks_follow_the_seed_alone(cocolm, texts, tokenizer):
    def masks(seed, batch_size, collator_seed=None):
        model = Detector(1.0)
        collator = DataCollatorForCorrectiveLM(tokenizer, seed=collator_seed)
        corrective_lm_metrics(model, texts, collator, batch_size, seed, progress=False)
        return sorted(
            (text[text != -100].tolist(), ids[text != -100].tolist())
            for input_ids, labels, _ in model.batches
            for ids, text in zip(input_ids, labels, strict=True)
        )

    torch.manual_seed(1)
    before = torch.get_rng_state()
    assert masks(0, 4) == masks(0, 11) == masks(0, 1, collator_seed=5) != masks(1, 4)
    collator = DataCollatorForCorrectiveLM(tokenizer)
    cocolm.train()
    first, same, other = (corrective_lm_metrics(cocolm, texts, collator, seed=s, progress=False) for s in (0, 0, 1))
    assert first == same != other
    assert torch.equal(before, torch.get_rng_state()) and cocolm.training and collator.seed is None


def test_no_mask_and_a_single_text(cocolm, texts, tokenizer):
    collator = DataCollatorForCorrectiveLM(tokenizer, mask_probability=0.0)
    metrics = corrective_lm_metrics(cocolm, texts[:1], collator, progress=False)
    zero = ("mlm_loss", "corrective_lm_loss", "contrastive_loss", "detection_precision", "detection_recall")
    assert [metrics[name] for name in zero] == [0] * 5 and metrics["majority_rate"] == 1


def test_bad_input_of_corrective_lm_metrics_is_refused(cocolm, texts, tokenizer):
    collator = DataCollatorForCorrectiveLM(tokenizer)
    with pytest.raises(ValueError, match=r"^corrective_lm_metrics needs one text at least, but got none\.$"):
        corrective_lm_metrics(cocolm, [], collator)
    with pytest.raises(ValueError, match=r"^batch_size must be at least 1, but got 0\.$"):
        corrective_lm_metrics(cocolm, texts, collator, batch_size=0)


def test_progress_bar_of_corrective_lm_metrics(texts, tokenizer, capfd):
    corrective_lm_metrics(Detector(1.0), texts, DataCollatorForCorrectiveLM(tokenizer))
    assert "corrective LM metrics: 100%" in capfd.readouterr().err
