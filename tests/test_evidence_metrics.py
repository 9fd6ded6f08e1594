"""How varied evidence is against naive loops, the alarm with forced collapses and sound retrieval, and the logs."""

import collections
import itertools
import logging
import math
import re
import socket
import types

import numpy as np
import pytest
import torch
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.utils import ModelOutput

from hf_paraphrase_lm import LogEvidenceCallback, RefreshIndexCallback
from hf_paraphrase_lm.retrieval import EvidenceDataset, embed_documents
from hf_paraphrase_lm.training import evidence_losses, evidence_use, recall_at_k

from .reference.evidence import RowEmbedder, row_documents

PAD = 0
N = 200
TOKENIZER = types.SimpleNamespace(pad_token_id=PAD, save_pretrained=lambda folder: None)
USE = {"distinct_share", "largest_share", "evenness", "target_share", "cross_language_share"}


def documents_of(n, **columns):
    """Documents whose first token is their row + 1, so that no token is padding."""
    documents = row_documents(n, **columns)
    return documents.map(lambda row: {"input_ids": [token + 1 for token in row["input_ids"]]})


def install(dataset, groups):
    """Groups as lists of target rows and of evidence rows."""
    widths = dataset.num_targets, dataset.num_evidence
    sides = ([group[side] + [-1] * (widths[side] - len(group[side])) for group in groups] for side in range(2))
    dataset.install(tuple(map(torch.tensor, sides)))
    return dataset


def rebuilt(vectors, num_targets=4, num_evidence=4, strategy="pairs", evidence=None, **columns):
    """The groups that vectors for the rows give."""
    n = len(vectors)
    dataset = EvidenceDataset(row_documents(n, **columns), num_targets, num_evidence, strategy, evidence=evidence)
    dataset.rebuild(RowEmbedder(vectors), PAD, progress=False)
    return dataset


def half(counts):
    for number in itertools.count(1):
        if sum(sorted(counts, reverse=True)[:number]) >= sum(counts) / 2:
            return number


def test_use_against_loops():
    rng = np.random.default_rng(0)
    n = 60
    shard, language = rng.integers(0, 3, n), rng.choice(["de", "en", ""], n)
    document = rng.integers(0, 40, n)
    documents = row_documents(n, shard=shard, language=language, document=document)
    dataset = EvidenceDataset(documents, num_targets=4, num_evidence=5)
    groups = []
    # None in the third shard: its documents are not counted as available.
    for i in range(14):
        rows = rng.permutation(np.flatnonzero(shard == i % 2)).tolist()
        groups.append((rows[: rng.integers(1, 5)], rows[4 : 4 + rng.integers(1, 6)]))
    values, _ = evidence_use(install(dataset, groups))

    use = collections.Counter(row for _, evidence in groups for row in evidence)
    available = 0
    for number in (0, 1):
        places = sum(count for row, count in use.items() if shard[row] == number)
        available += min(places, sum(shard == number))
    assert values["distinct_share"] == pytest.approx(len(use) / available)
    most = [count for _, count in use.most_common(math.ceil(available / 100))]
    assert values["largest_share"] == pytest.approx(sum(most) / sum(use.values()))
    assert values["target_share"] == pytest.approx(sum(len(targets) for targets, _ in groups) / sum(shard < 2))
    pairs = [pair for group in groups for pair in itertools.product(*group) if document[pair[0]] != document[pair[1]]]
    crossing = [language[t] != language[z] and language[t] != "" and language[z] != "" for t, z in pairs]
    assert values["cross_language_share"] == pytest.approx(sum(crossing) / len(pairs))
    assert set(values) == USE


@pytest.mark.parametrize("num_groups", [3, 40])
def test_evenness_against_a_loop(num_groups):
    """Of one shard and language; the draws are other ones, of which the mean is compared."""
    rng = np.random.default_rng(1)
    dataset = EvidenceDataset(row_documents(N), num_targets=4, num_evidence=4)
    groups = [([i], rng.choice(N // 4, 4, replace=False).tolist()) for i in range(num_groups)]
    values, _ = evidence_use(install(dataset, groups))
    even = []
    for _ in range(200):
        draws = [row for _ in range(num_groups) for row in rng.choice(N, 4, replace=False)]
        even.append(half(np.bincount(draws, minlength=N)))
    counts = np.bincount([row for _, evidence in groups for row in evidence], minlength=N)
    # The same four documents for all: two of them fill half of the places.
    assert values["evenness"] == pytest.approx((half(counts) - 2) / (np.mean(even) - 2), abs=0.05)


def test_evidence_that_is_shared_is_no_collapse():
    """Eight targets of a group read one document each: it serves eight, but every document does."""
    for num_targets, num_evidence in ((8, 1), (8, 4), (1, 4)):
        dataset = EvidenceDataset(row_documents(N), num_targets, num_evidence)
        rows = np.random.default_rng(0).permutation(N)
        groups = [
            (rows[i : i + num_targets].tolist(), np.roll(rows, i - N // 2)[:num_evidence].tolist())
            for i in range(0, N, num_targets)
        ]
        values, findings = evidence_use(install(dataset, groups))
        assert not findings and values["evenness"] > 0.8 and values["largest_share"] < 0.05, (num_targets, values)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.6, 0.8, 1.0])
def test_drift_to_hubs(share):
    """So much of the evidence is one of eight documents, the rest is spread over all others."""
    rng = np.random.default_rng(0)
    dataset = EvidenceDataset(row_documents(800), num_targets=8, num_evidence=8)
    groups = []
    for i in range(100):
        is_hub = rng.random(8) < share
        evidence = np.where(is_hub, np.arange(8), rng.choice(np.arange(8, 800), 8, replace=False))
        groups.append((list(range(8 * i, 8 * i + 8)), evidence.tolist()))
    values, findings = evidence_use(install(dataset, groups))
    if share < 0.5:
        assert not findings and values["evenness"] > 0.4
        return
    number = half(np.bincount(np.concatenate([evidence for _, evidence in groups])))
    sentence = (
        rf"few documents serve most targets \({number} fill half of the 800 places for evidence, where even use takes "
        r"1\d\d\), so targets are rebuilt from the same texts whatever they say"
    )
    assert findings.keys() == {"documents"} and re.fullmatch(sentence, findings["documents"])
    assert values["evenness"] < 0.05 and values["largest_share"] == pytest.approx(share, abs=0.1)


def test_hubs_in_each_shard():
    """No document serves much of the whole, but in each of 25 shards the same four serve all."""
    shard = [row // 20 for row in range(500)]
    dataset = EvidenceDataset(row_documents(500, shard=shard), num_targets=4, num_evidence=4)
    spread = [(list(range(i, i + 4)), list(range(i // 20 * 20, i // 20 * 20 + 4))) for i in range(0, 500, 4)]
    values, findings = evidence_use(install(dataset, spread))
    assert findings.keys() == {"documents"} and values["evenness"] == 0 and values["largest_share"] < 0.1
    even = [(rows, [(row + 4) % 20 + row // 20 * 20 for row in rows]) for rows, _ in spread]
    values, findings = evidence_use(install(dataset, even))
    assert not findings and values["evenness"] > 1


def near_one_vector(n, hubs, noise):
    """Vectors around one direction; the first rows are nearer to it, so that all others are nearest to them."""
    vectors = torch.randn(n, 128) * noise / 128**0.5
    vectors[:hubs] *= 0.1
    return vectors + torch.eye(128)[0]


@pytest.mark.parametrize("sizes", [(4, 4, "pairs"), (8, 2, "pairs"), (1, 4, "neighbors")])
@pytest.mark.parametrize("noise", [1e-3, 0.1, 0.5])
def test_an_embedder_with_hubs_is_found(sizes, noise):
    values, findings = evidence_use(rebuilt(near_one_vector(N, 5, noise), *sizes))
    assert findings.keys() == {"documents"}, values


@pytest.mark.parametrize("sizes", [(4, 4, "pairs"), (8, 2, "pairs"), (1, 4, "neighbors")])
@pytest.mark.parametrize("n", [9, 12, 20, 50, N, 400])
def test_sound_retrieval_is_no_collapse(sizes, n):
    """Vectors by chance, pairs and families of paraphrases, one common direction; some families are larger."""
    generator = torch.Generator().manual_seed(n)
    languages = {"language": ["de", "en", "fr"] * n}
    for trial in range(4 if n < 100 else 1):
        noise = torch.randn(n, 12, generator=generator)
        families = torch.randn(n, 12, generator=generator)
        number = torch.arange(n)
        for vectors in (
            noise,
            families[number // 2] + 0.3 * noise,
            families[number // 4] + 0.5 * noise,
            families[(number**0.5).long()] + 0.5 * noise,
            0.5 * noise + 3 * torch.eye(12)[0],
        ):
            for columns in (
                {},
                {"language": languages["language"][:n]},
                {"shard": (number % max(1, n // 12)).tolist()},
            ):
                values, findings = evidence_use(rebuilt(vectors, *sizes, **columns))
                assert not findings, (trial, values, findings)


def test_few_targets():
    """All vectors are one: the pairs cut off by chance are those of a few documents, and the others rest."""
    dataset = rebuilt(torch.ones(3000, 4), 8, 8)
    values, findings = evidence_use(dataset)
    served = sum(len(dataset[i]["labels"]) for i in range(dataset.num_groups))
    assert values["target_share"] == served / 3000
    assert findings["targets"] == (
        f"only {served} of 3000 documents are targets, because the most similar pairs are all among them, so the model "
        "learns from few texts"
    )


def by_language(shares, n=600):
    """As many documents of each language as its share, in turns as far as they last."""
    names = np.repeat(list(shares), [round(share * n) for share in shares.values()])
    return np.random.default_rng(0).permutation(names)


def groups_by_language(language, wanted, seed=0):
    """Groups of 4 targets in order; the evidence of each group is of the language that `wanted(targets)` names."""
    rng = np.random.default_rng(seed)
    groups = []
    for start in range(0, len(language), 4):
        targets = list(range(start, start + 4))
        names = wanted(language[targets], rng)
        groups.append((targets, [int(rng.choice(np.flatnonzero(language == name))) for name in names]))
    return groups


def other_languages(names, rng):
    return [rng.choice([name for name in ("de", "en", "fr") if name != own]) for own in names]


@pytest.mark.parametrize(
    ("shares", "wanted", "finding"),
    [
        # Every language by its share; every target another language; every target its own.
        (
            {"de": 0.2, "en": 0.5, "fr": 0.3},
            lambda names, rng: rng.choice(["de", "en", "fr"], 4, p=[0.2, 0.5, 0.3]),
            None,
        ),
        ({"de": 1 / 3, "en": 1 / 3, "fr": 1 / 3}, other_languages, None),
        ({"de": 1 / 3, "en": 1 / 3, "fr": 1 / 3}, lambda names, rng: names, None),
        # One of two languages is rare, and serves all targets of the other.
        ({"de": 0.9, "en": 0.1}, lambda names, rng: np.where(names == "de", "en", "de"), None),
        ({"de": 0.98, "en": 0.02}, lambda names, rng: np.where(names == "de", "en", "de"), None),
        # Nine in ten documents are German; so is the evidence.
        ({"de": 0.9, "en": 0.1}, lambda names, rng: ["de"] * 4, None),
        # A drift to one language that is not complete.
        ({"de": 0.2, "en": 0.5, "fr": 0.3}, lambda names, rng: rng.choice(["de", "en"], 4, p=[0.9, 0.1]), "de"),
        ({"de": 1 / 3, "en": 1 / 3, "fr": 1 / 3}, lambda names, rng: ["fr"] * 4, "fr"),
        # What has no language is no language.
        ({"de": 0.1, "": 0.9}, lambda names, rng: [""] * 4, None),
        ({"de": 0.1, "": 0.5, "en": 0.4}, lambda names, rng: ["de", "de", "de", ""], "de"),
    ],
)
def test_drift_to_a_language(shares, wanted, finding):
    language = by_language(shares)
    dataset = EvidenceDataset(row_documents(len(language), language=language), num_targets=4, num_evidence=4)
    _, findings = evidence_use(install(dataset, groups_by_language(language, wanted)))
    assert findings.keys() == ({"language"} if finding else set())
    if finding:
        sentence = (
            rf"\d+% of the evidence is in the language '{finding}', where its documents make \d+% likely, so documents "
            "are found for their language and not for what they say"
        )
        assert re.fullmatch(sentence, findings["language"])


def test_evidence_of_its_own():
    """All evidence is in one language, because there is no other; few texts are no hubs."""
    evidence = row_documents(12, language=["en"] * 12)
    dataset = EvidenceDataset(row_documents(N, language=["de"] * N), num_targets=4, num_evidence=8, evidence=evidence)
    dataset.rebuild(RowEmbedder(torch.randn(N, 8)), PAD, progress=False)
    values, findings = evidence_use(dataset)
    assert not findings and values["cross_language_share"] == 1 and values["target_share"] > 0.5
    # A corpus of evidence that all fits into one group cannot be used unevenly.
    dataset = EvidenceDataset(row_documents(N), num_targets=4, num_evidence=12, evidence=evidence)
    install(dataset, [([i], list(range(12))) for i in range(20)])
    values, findings = evidence_use(dataset)
    assert not findings and "evenness" not in values


def test_first_chunks_only():
    documents = row_documents(40, document=[row // 2 for row in range(40)])
    documents = documents.remove_columns("chunk").add_column("chunk", [0, 1] * 20)
    dataset = EvidenceDataset(documents, num_targets=2, num_evidence=2, first_chunks_only=True)
    values, _ = evidence_use(install(dataset, [([0, 2], [4, 5]), ([4, 6], [0, 1])]))
    assert values["target_share"] == 4 / 20 and values["distinct_share"] == 1


def test_one_group():
    values, findings = evidence_use(install(EvidenceDataset(row_documents(20), 4, 4), [([0, 1], [2, 3, 4])]))
    assert not findings and values.keys() == USE - {"evenness"}
    with pytest.raises(RuntimeError, match=r"^EvidenceDataset has no groups yet\."):
        evidence_use(EvidenceDataset(row_documents(20), 4, 4))


class Model(nn.Module):
    """Predicts the labels of a target from the mean of the evidence it may see; with dropout, and two layers' betas."""

    def __init__(self):
        super().__init__()
        self.tokens = nn.Embedding(N + 2, 64)
        self.dropout = nn.Dropout(0.3)
        self.layers = nn.ModuleList([nn.Identity(), nn.Module(), nn.Module()])
        for number in (1, 2):
            self.layers[number].relevance_weight = nn.Parameter(torch.full((1,), float(number)))
        # How far the embeddings have collapsed: 0 not at all, 1 into one vector.
        self.collapse = 0.0

    def states(self, input_ids, attention_mask):
        states = self.dropout(self.tokens(input_ids)) * attention_mask[..., None]
        return states.sum(dim=-2) / attention_mask.sum(dim=-1, keepdim=True)

    def embed(self, input_ids, attention_mask):
        assert not self.training and not torch.is_grad_enabled()
        vectors = nn.functional.normalize(self.states(input_ids[:, :1], attention_mask[:, :1]), dim=-1)
        # The first documents are nearer to the direction that is left, hence nearest to all others.
        size = (1 - self.collapse) * (1 - 0.9 * self.collapse * (input_ids[:, :1] <= 8))
        vectors = nn.functional.pad(vectors * size, (0, 1), value=self.collapse)
        return nn.functional.normalize(vectors, dim=-1)

    def forward(self, input_ids, attention_mask, labels, evidence_mask):
        weights = evidence_mask.float() / evidence_mask.sum(dim=1, keepdim=True).clamp(min=1)
        target = weights @ self.states(input_ids, attention_mask)
        logits = (target @ self.tokens.weight.T)[:, None].expand(-1, labels.shape[1], -1)
        return ModelOutput(loss=nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()))


def collate(groups):
    (group,) = groups
    evidence, labels = (
        nn.utils.rnn.pad_sequence([torch.tensor(ids) for ids in group[key]], True, fill)
        for key, fill in (("input_ids", PAD), ("labels", -100))
    )
    mask = torch.tensor(group["evidence_mask"])
    return {"input_ids": evidence, "attention_mask": (evidence != PAD).long(), "labels": labels, "evidence_mask": mask}


LANGUAGES = ["de", "en"] * (N // 2)
FAMILIES = [row // 4 for row in range(N)]


def make_dataset():
    documents = documents_of(N, shard=[row % 2 for row in range(N)], language=["de", "de", "en", "en"] * (N // 4))
    return EvidenceDataset(documents, num_targets=4, num_evidence=4, pairs_per_target=3)


@pytest.fixture
def dataset():
    return make_dataset()


@pytest.fixture
def held_out():
    return EvidenceDataset(documents_of(60, language=LANGUAGES[:60]), num_targets=4, num_evidence=4)


@pytest.fixture
def train(dataset, tmp_path):
    """Trains with the callbacks, by default after a refresh every 4 steps; returns the Trainer."""

    def train(
        *callbacks,
        model=None,
        dataset=dataset,
        max_steps=10,
        refreshes=True,
        resume=None,
        tokenizer=TOKENIZER,
        **options,
    ):
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
        if refreshes:
            callbacks = (RefreshIndexCallback(dataset, 4, progress=False), *callbacks)
        trainer = Trainer(
            Model() if model is None else model,
            arguments,
            data_collator=collate,
            train_dataset=dataset,
            processing_class=tokenizer,
            callbacks=list(callbacks),
        )
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    return train


def logged(trainer, name):
    return {
        entry["step"]: entry[f"evidence/{name}"] for entry in trainer.state.log_history if f"evidence/{name}" in entry
    }


class Watcher(TrainerCallback):
    """What an integration that comes last is given, and the modes of the model after each step."""

    def __init__(self):
        self.logs = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append((state.global_step, dict(logs)))

    def on_step_end(self, args, state, control, model=None, **kwargs):
        assert all(module.training for module in model.modules()) and torch.is_grad_enabled()


def test_what_is_logged_and_when(dataset, held_out, train):
    known = documents_of(N, language=LANGUAGES)
    watch = LogEvidenceCallback(dataset, 5, held_out, collate, known_documents=known, known_groups=FAMILIES)
    watcher = Watcher()
    trainer = train(watch, watcher, max_steps=12, logging_steps=100)
    cheap = USE | {"staleness", "collapsed"}
    measured = {"loss_retrieved", "loss_random", "loss_none", "utility", "recall_at_1", "cross_language_recall_at_1"}
    measured |= {"relevance_mean", "relevance_std", "relevance_weight_1", "relevance_weight_2"}
    for name in cheap:
        # What was measured before the first step, every five and at the end; and at the refreshes.
        assert list(logged(trainer, name)) == [1, 4, 5, 8, 10, 12], name
    for name in measured:
        assert list(logged(trainer, name)) == [1, 5, 10, 12], name
    assert list(logged(trainer, "staleness").values()) == [1, 0, 1, 0, 2, 4]
    entries = [entry for entry in trainer.state.log_history if "evidence/collapsed" in entry]
    assert {name.removeprefix("evidence/") for name in entries[0] if name.startswith("evidence/")} == cheap | measured
    for entry, (step, logs) in zip(entries, watcher.logs, strict=False):
        assert step == entry["step"] and logs == {name: value for name, value in entry.items() if name != "step"}
        assert all(isinstance(value, int | float) for value in logs.values())
    # The last measurement is of the model that comes out.
    last, model = entries[-1], trainer.model
    vectors = embed_documents(known, model, PAD, progress=False)
    assert last["evidence/recall_at_1"] == recall_at_k(vectors, FAMILIES)
    assert last["evidence/cross_language_recall_at_1"] == recall_at_k(vectors, FAMILIES, languages=LANGUAGES)
    groups, _ = held_out.find_groups(model, PAD, progress=False, number=0)
    held_out.install(groups)
    losses = evidence_losses(model, held_out, collate, progress=False)
    assert {kind: last[f"evidence/loss_{kind}"] for kind in losses} == losses
    assert last["evidence/utility"] == losses["none"] - losses["retrieved"]
    for number in (1, 2):
        weight = model.layers[number].relevance_weight
        assert last[f"evidence/relevance_weight_{number}"] == weight.item()
    assert {name: last[f"evidence/{name}"] for name in USE} == evidence_use(dataset)[0]
    vectors = embed_documents(dataset.documents, model, PAD, progress=False)
    f = [float(vectors[i] @ vectors[j]) for i in range(N) for j in range(N) if i != j]
    # All of them fit into the sample.
    assert last["evidence/relevance_mean"] == pytest.approx(np.mean(f), abs=1e-6)
    assert last["evidence/relevance_std"] == pytest.approx(np.std(f), rel=1e-4)


@pytest.mark.parametrize("are_items", [False, True])
def test_training_is_undisturbed(held_out, train, monkeypatch, are_items):
    held_out.rebuild(Model(), PAD, progress=False)
    groups = [held_out[i] for i in range(3)] if are_items else held_out
    known = documents_of(N, language=[""] * N)
    if are_items:
        known = known.remove_columns("language")
    trained = []
    for _ in range(2):
        dataset = make_dataset()
        watch = LogEvidenceCallback(
            dataset, 1, groups, collate, held_out.documents, known_documents=known, known_groups=np.array(FAMILIES)
        )
        if trained:
            monkeypatch.setattr(watch, "_watch", lambda *arguments: None)
        trainer = train(watch, Watcher(), dataset=dataset)
        trained.append((trainer, [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]))
    (watched, losses), (alone, same) = trained
    assert losses == same and len(losses) == 10
    assert torch.equal(watched.model.tokens.weight, alone.model.tokens.weight)
    assert logged(watched, "utility") and not logged(alone, "utility")
    # Without languages, there is no recall across them.
    assert logged(watched, "recall_at_1") and not logged(watched, "cross_language_recall_at_1")


def test_only_what_needs_nothing(dataset, train):
    """Groups that are never refreshed, no logs, no betas, and a callback that comes before all others."""
    model = Model()
    model.layers = nn.Identity()
    dataset.rebuild(Model(), PAD, progress=False)
    trainer = train(LogEvidenceCallback(dataset, 3), model=model, refreshes=False, max_steps=7, logging_strategy="no")
    (entry,) = trainer.state.log_history
    assert {name for name in entry if name.startswith("evidence/")} == {
        f"evidence/{name}" for name in (*USE, "staleness", "collapsed", "relevance_mean", "relevance_std")
    }
    assert entry["evidence/staleness"] == 7


def test_before_the_refreshes(dataset, train):
    """A callback that comes before sees a refresh as the next step begins, and still knows when it was."""
    watch = LogEvidenceCallback(dataset, 6)
    trainer = train(watch, RefreshIndexCallback(dataset, 4, progress=False), refreshes=False, logging_steps=100)
    assert logged(trainer, "staleness") == {1: 1, 5: 1, 6: 2, 9: 1, 10: 2}


def test_a_resumed_run_knows_its_past(dataset, train, tmp_path):
    watch = LogEvidenceCallback(dataset, 7)
    options = {"max_steps": 13, "save_strategy": "steps", "save_steps": 6}
    unbroken = train(watch, **options)
    fresh = make_dataset()
    resumed = train(LogEvidenceCallback(fresh, 7), resume=str(tmp_path / "checkpoint-6"), dataset=fresh, **options)
    for name in (*USE, "staleness", "relevance_std", "collapsed"):
        assert logged(resumed, name) == pytest.approx(logged(unbroken, name)), name
    assert logged(resumed, "staleness") == {1: 1, 4: 0, 7: 3, 8: 0, 12: 0, 13: 1}
    # A loop of one's own may have logged more before it was killed than its checkpoint knows.
    watch.on_train_begin(None, types.SimpleNamespace(log_history=unbroken.state.log_history, global_step=6), None)
    assert watch._refreshed_at == 4 and len(watch._history["cross_language_share"]) == 2


class Collapsing(TrainerCallback):
    """Collapses the embeddings at a step."""

    def __init__(self, step, collapse):
        self.step, self.collapse = step, collapse

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step == self.step:
            model.collapse = self.collapse


def warnings_of(caplog):
    return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


ADVICE = (
    "let the layers that retrieve learn more slowly, hold the first groups for longer before the first refresh, or go "
    "back to an earlier checkpoint."
)


@pytest.mark.parametrize("collapse", [0.97, 0.999])
def test_a_collapse_is_told_once(dataset, train, caplog, collapse):
    watch = LogEvidenceCallback(dataset, 2)
    trainer = train(watch, Collapsing(5, collapse), max_steps=14)
    spread, hubs = warnings_of(caplog)
    number = r"[\d.e-]+"
    assert re.fullmatch(
        rf"Retrieval collapses at step 6: the similarity f of two documents varies by {number} only \(its standard "
        rf"deviation, at first {number}\), so it does not tell which document is relevant; {ADVICE}",
        spread,
    )
    assert re.fullmatch(
        rf"Retrieval collapses at step 8: few documents serve most targets \({number} fill half of the {number} places "
        rf"for evidence, where even use takes {number}\), so targets are rebuilt from the same texts whatever they "
        f"say; {ADVICE}",
        hubs,
    )
    # It stays as long as it lasts, also at a refresh between two measurements.
    assert logged(trainer, "collapsed") == {1: 0, 2: 0, 4: 0, 6: 1, 8: 1, 10: 1, 12: 1, 14: 1}
    assert trainer.state.log_history[-2]["evidence/evenness"] < 0.2


def test_sound_training_is_told_nothing(dataset, train, caplog):
    trainer = train(LogEvidenceCallback(dataset, 1), max_steps=30)
    assert not warnings_of(caplog) and set(logged(trainer, "collapsed").values()) == {0}


def test_one_vector_from_the_start(dataset, train, caplog):
    train(LogEvidenceCallback(dataset, 5), Collapsing(0, 1.0), max_steps=5)
    assert any("the similarity f of two documents varies by 0 only" in text for text in warnings_of(caplog))


def test_drift_to_the_own_language(dataset, train, caplog):
    """Half of the pairs cross languages at first, and then none."""
    german, english = ([row for row in range(N) if dataset.documents[row]["language"] == name] for name in ("de", "en"))

    class Drift(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            own = state.global_step >= 3
            groups = [(side[i : i + 4], side[i + 4 : i + 8]) for side in (german, english) for i in range(0, 88, 4)]
            mixed = [(german[i : i + 4], english[i : i + 2] + german[i + 4 : i + 6]) for i in range(0, 88, 4)]
            install(dataset, groups if own else mixed)

    install(dataset, [([0], [2])])
    trainer = train(Drift(), LogEvidenceCallback(dataset, 5), refreshes=False, max_steps=8)
    assert warnings_of(caplog) == [
        "Retrieval collapses at step 3: 0.0% of the pairs of target and evidence are of two languages, where it was "
        f"50.0% before, so targets are no longer rebuilt from other languages; {ADVICE}"
    ]
    assert set(logged(trainer, "cross_language_share").values()) == {0, 0.5}


def test_recall_that_is_lost(dataset, train, caplog):
    """Two documents each have one vector at first, and then vectors of their own."""

    class Unlearn(TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **kwargs):
            if state.global_step in (0, 5):
                rows = torch.arange(N) // 2 * 2 if state.global_step == 0 else torch.randperm(N)
                model.tokens.weight.data[1 : N + 1] = model.tokens.weight.data[1 + rows]

    known = documents_of(N, language=[""] * N)
    options = {"known_documents": known, "known_groups": [row // 2 for row in range(N)]}
    trainer = train(Unlearn(), LogEvidenceCallback(dataset, 3, **options), max_steps=9)
    assert logged(trainer, "recall_at_1")[1] == 1 and logged(trainer, "recall_at_1")[9] < 0.2
    (text,) = warnings_of(caplog)
    sentence = (
        r"Retrieval collapses at step 6: the nearest other document is a known paraphrase of \d+\.\d% of the "
        rf"documents, where it was of 100\.0% before, so retrieval unlearns what it had; {ADVICE}"
    )
    assert re.fullmatch(sentence, text)
    # A handful of documents may be missed by chance.
    known_groups = [row // 2 if row < 8 else -1 for row in range(N)]
    watch = LogEvidenceCallback(dataset, 3, known_documents=known, known_groups=known_groups)
    watch.on_train_begin(None, types.SimpleNamespace(log_history=[], global_step=0), None)
    watch._history["cross_language_share"] = [0.0]
    for recall, findings in ((0.75, []), (0.25, []), (0.9, []), (0.3, ["recall"]), (0.8, [])):
        assert list(watch._compare({"cross_language_share": 0.0, "recall_at_1": recall})) == findings, recall


def test_translations_that_are_lost(dataset):
    """What was measured on TICO-19 with evidence of each target's own, where no document is shared by targets."""
    known_groups = np.arange(1800) // 3
    known = documents_of(1800, language=["de", "en", "fr"] * 600)
    watch = LogEvidenceCallback(dataset, 3, known_documents=known, known_groups=known_groups)
    watch.on_train_begin(None, types.SimpleNamespace(log_history=[], global_step=0), None)
    told = []
    for recall, across in ((0.07, 0.113), (0.063, 0.098), (0.07, 0.073), (0.03, 0.071)):
        values = {"cross_language_share": 1.0, "recall_at_1": recall, "cross_language_recall_at_1": across}
        told.append(watch._compare(values))
    assert [list(findings) for findings in told] == [
        *([], [], ["recall in another language"], ["recall", "recall in another language"])
    ]
    assert told[2]["recall in another language"] == (
        "the nearest other document in another language is a known paraphrase of 7.3% of the documents, where it was "
        "of 11.3% before, so retrieval unlearns what it had"
    )
    # Only those that have a translation count: of eight, some may be missed by chance.
    known = documents_of(1800, language=["de", "en"] * 4 + ["de"] * 1792)
    watch = LogEvidenceCallback(dataset, 3, known_documents=known, known_groups=np.arange(1800) // 2)
    watch.on_train_begin(None, types.SimpleNamespace(log_history=[], global_step=0), None)
    for across in (0.625, 0.375):
        values = {"cross_language_share": 1.0, "recall_at_1": 0.5, "cross_language_recall_at_1": across}
        assert watch._compare(values) == {}


RANKS = """
import multiprocessing
import os
import sys

import torch

from tests.test_evidence_metrics import run_rank


def run(rank):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    os.environ["MASTER_PORT"] = sys.argv[2]
    torch.save(run_rank(f"{sys.argv[1]}/{rank}"), f"{sys.argv[1]}/rank{rank}.pt")


ranks = [multiprocessing.get_context("fork").Process(target=run, args=(rank,)) for rank in range(2)]
for rank in ranks:
    rank.start()
for rank in ranks:
    rank.join()
assert [rank.exitcode for rank in ranks] == [0, 0]
"""


def run_rank(folder):
    """The logs of a run that keeps its weights, so that ranks with other batches still measure the same."""
    torch.manual_seed(0)
    dataset = make_dataset()
    held_out = EvidenceDataset(documents_of(60, language=LANGUAGES[:60]), num_targets=4, num_evidence=4)
    known = documents_of(N, language=LANGUAGES)
    refresh = RefreshIndexCallback(dataset, 2, progress=False)
    watch = LogEvidenceCallback(dataset, 3, held_out, collate, known_documents=known, known_groups=FAMILIES)
    arguments = TrainingArguments(
        folder,
        max_steps=5,
        per_device_train_batch_size=1,
        learning_rate=0.0,
        logging_steps=1,
        remove_unused_columns=False,
        use_cpu=True,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        ddp_find_unused_parameters=True,
    )
    trainer = Trainer(Model(), arguments, collate, dataset, processing_class=TOKENIZER, callbacks=[refresh, watch])
    trainer.train()
    return trainer.state.log_history


def test_two_processes(tmp_path, run_python):
    """Nobody waits for ever, and both have the values of one process."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
    run_python(RANKS, tmp_path, port)
    alone, *ranks = run_rank(tmp_path), *(torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2))
    for history in ranks:
        for entry, expected in zip(history, alone, strict=True):
            values = [{k: v for k, v in log.items() if k.startswith("evidence/")} for log in (entry, expected)]
            assert values[0] == pytest.approx(values[1], rel=1e-5, abs=1e-6)
    assert sum("evidence/utility" in entry for entry in alone) == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eval_steps": 0}, "eval_steps must be at least 1, but got 0."),
        (
            {"held_out": "dataset", "collator": collate},
            "held_out must not be the dataset that is trained on, whose groups would be made anew at each measurement. "
            "Give an EvidenceDataset of other documents, or some items.",
        ),
        (
            {"held_out": []},
            "held_out needs the collator that makes batches of its groups, but collator is None.",
        ),
        (
            {"held_out": [], "collator": collate},
            "held_out is a list of groups, so held_out_documents must be the documents that their rows index: random "
            "evidence is drawn from them.",
        ),
        (
            {"known_groups": [1, 1]},
            "known_documents and known_groups belong together, but only one of them was given.",
        ),
    ],
)
def test_bad_options_are_refused(dataset, options, message):
    options = {"eval_steps": 5} | {name: dataset if value == "dataset" else value for name, value in options.items()}
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        LogEvidenceCallback(dataset, **options)


def test_the_padding_token_must_be_known(dataset, train):
    dataset.rebuild(Model(), PAD, progress=False)
    message = (
        "LogEvidenceCallback must know the padding token to embed documents in batches, but neither Trainer's "
        "processing_class nor model.config has a pad_token_id. Give Trainer the tokenizer as processing_class."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        train(LogEvidenceCallback(dataset, 5), refreshes=False, tokenizer=None)
    model = Model()
    model.config = types.SimpleNamespace(pad_token_id=PAD)
    watch = LogEvidenceCallback(dataset, 5)
    assert watch._measure(model, types.SimpleNamespace(pad_token_id=None)).keys() >= {"relevance_std"}
