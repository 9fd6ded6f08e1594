"""Targets and evidence of two corpora, first chunks as targets, and token budgets."""

import re

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Value, concatenate_datasets

from hf_paraphrase_lm.retrieval import EvidenceDataset, corpus_fingerprint
from hf_paraphrase_lm.retrieval.corpus import Corpus

from .reference import evidence as naive
from .reference.evidence import RowEmbedder, make_documents, row_documents

PAD = 999
N, M = 40, 30


@pytest.fixture
def embedder():
    return RowEmbedder(torch.randn(N + M, 6))


def two_corpora(**evidence_columns):
    """Documents with the vectors 0 to N - 1, evidence with those that follow; shards and languages in other orders."""
    columns = {"shard": [row * 7 % 3 for row in range(N)], "language": ["de" if row % 2 else "" for row in range(N)]}
    documents = make_documents([[row] for row in range(N)], **columns)
    columns = {
        "shard": [2 - row % 3 for row in range(M)],
        "language": [("fr", "de", "")[row % 5 % 3] for row in range(M)],
    }
    evidence = make_documents([[N + row] for row in range(M)], **columns | evidence_columns)
    return documents, evidence


def items(dataset):
    return [dataset[i] for i in range(dataset.num_groups)]


@pytest.mark.parametrize("strategy", ["pairs", "neighbors"])
def test_evidence_comes_from_the_same_shard_of_the_other_corpus(embedder, strategy):
    documents, evidence = two_corpora()
    num_targets = 4 if strategy == "pairs" else 1
    dataset = EvidenceDataset(documents, num_targets, 3, strategy, pairs_per_target=2, evidence=evidence)
    statistics = dataset.rebuild(embedder, PAD, progress=False)
    assert dataset.evidence is evidence and dataset.documents is documents
    assert len(dataset) == N // num_targets
    for item in items(dataset):
        assert item["input_ids"] == [[N + row] for row in item["evidence_rows"]]
        assert item["labels"] == [[row] for row in item["target_rows"]]
        # Numbers of documents are those of its own corpus: all may be seen.
        assert all(all(row) for row in item["evidence_mask"])
        shards = {documents[row]["shard"] for row in item["target_rows"]}
        assert len(shards | {evidence[row]["shard"] for row in item["evidence_rows"]}) == 1
    f, crossing = [], []
    for shard in dataset.shards:
        rows = [row for row in range(N) if documents[row]["shard"] == shard]
        others = [row for row in range(M) if evidence[row]["shard"] == shard]
        scores = embedder.vectors[rows].double() @ embedder.vectors[N:][others].double().T
        f.append(scores.flatten())
        kept = scores.flatten().topk(2 * len(rows)).indices.tolist()
        for place in kept if strategy == "pairs" else []:
            pair = documents[rows[place // len(others)]], evidence[others[place % len(others)]]
            languages = {row["language"] for row in pair}
            crossing.append("" not in languages and len(languages) == 2)
    assert statistics["relevance_mean"] == pytest.approx(float(torch.cat(f).mean()))
    assert statistics["relevance_std"] == pytest.approx(float(torch.cat(f).std(correction=0)))
    if strategy == "pairs":
        assert statistics["pairs"] == 2 * N
        assert statistics["cross_language_share"] == pytest.approx(np.mean(crossing))
        assert 0 < statistics["cross_language_share"] < 1
    else:
        assert statistics["targets"] == N
        for item in items(dataset):
            (target,) = item["target_rows"]
            others = [row for row in range(M) if evidence[row]["shard"] == documents[target]["shard"]]
            scores = embedder.vectors[N:][others] @ embedder.vectors[target]
            assert sorted(item["evidence_rows"]) == sorted(others[i] for i in scores.topk(3).indices)


def test_evidence_that_is_the_documents(embedder, tmp_path):
    documents = row_documents(N, document=[row // 2 for row in range(N)])
    documents.save_to_disk(tmp_path)
    plain = EvidenceDataset(documents)
    plain.rebuild(embedder, PAD, progress=False)
    for evidence in (documents, documents.load_from_disk(tmp_path)):
        dataset = EvidenceDataset(documents, evidence=evidence)
        assert dataset.evidence is documents
        dataset.rebuild(embedder, PAD, progress=False)
        assert list(dataset) == list(plain)
    # The same rows in another order are another corpus.
    assert EvidenceDataset(documents, evidence=documents.select(range(N)[::-1])).evidence is not documents


def test_a_corpus_smaller_than_the_evidence_of_a_group(embedder):
    documents, evidence = two_corpora(shard=[0] * M)
    dataset = EvidenceDataset(documents.select([0]), num_targets=1, evidence=evidence)
    assert dataset.rebuild(embedder, PAD, progress=False)["targets"] == len(dataset) == 1
    assert len(dataset[0]["evidence_rows"]) == 8


@pytest.mark.parametrize("is_evidence_apart", [False, True])
def test_first_chunks_only(embedder, is_evidence_apart):
    chunk = [row % 3 for row in range(N)]
    documents = row_documents(N, document=[row // 3 for row in range(N)])
    documents = documents.remove_columns("chunk").add_column("chunk", chunk)
    evidence = make_documents([[N + row] for row in range(M)]) if is_evidence_apart else None
    dataset = EvidenceDataset(documents, 3, 4, pairs_per_target=6, first_chunks_only=True, evidence=evidence)
    targets = [row for row in range(N) if chunk[row] == 0]
    assert len(dataset) == -(-len(targets) // 3)
    statistics = dataset.rebuild(embedder, PAD, progress=False)
    assert statistics["pairs"] == 6 * len(targets)
    assert statistics["targets"] + statistics["resting_targets"] == len(targets)
    others = range(N, N + M) if is_evidence_apart else range(N)
    f = [
        float(embedder.vectors[target].double() @ embedder.vectors[other].double())
        for target in targets
        for other in others
        if target != other
    ]
    assert statistics["relevance_mean"] == pytest.approx(np.mean(f))
    assert {row for item in items(dataset) for row in item["target_rows"]} <= set(targets)
    if not is_evidence_apart:
        assert {chunk[row] for item in items(dataset) for row in item["evidence_rows"]} == {0, 1, 2}
        for item in items(dataset):
            expected = [[t // 3 != e // 3 for e in item["evidence_rows"]] for t in item["target_rows"]]
            assert item["evidence_mask"] == expected


def test_a_shard_without_targets(embedder):
    documents, evidence = two_corpora()
    chunk = [int(row["shard"] == 1) for row in documents]
    documents = documents.remove_columns("chunk").add_column("chunk", chunk)
    for other in (evidence, None):
        dataset = EvidenceDataset(documents, evidence=other, first_chunks_only=True)
        statistics = dataset.rebuild(embedder, PAD, progress=False)
        assert statistics["targets"] + statistics["resting_targets"] == chunk.count(0)
        with pytest.raises(ValueError, match=r"^No target has evidence in the 1 shards: "):
            dataset.rebuild(embedder, PAD, shards=[1], progress=False)


@pytest.mark.parametrize("max_tokens", [16, 40, 100])
def test_max_tokens(embedder, max_tokens):
    # Of 1 to 7 tokens.
    documents, evidence = row_documents(N), row_documents(N + M).select(range(N, N + M))
    for other in (None, evidence):
        dataset = EvidenceDataset(documents, 20, 10, max_tokens=max_tokens, evidence=other)
        statistics = dataset.rebuild(embedder, PAD, progress=False)
        sizes = [sum(map(len, item["labels"] + item["input_ids"])) for item in items(dataset)]
        assert max(sizes) <= max_tokens
        assert statistics["targets"] > 0.8 * N
        assert dataset.num_groups <= len(dataset) <= N
        # One pass, not several.
        assert len(dataset) < 3 * dataset.num_groups


def test_without_a_budget_nothing_is_counted(embedder):
    plain, wide = (EvidenceDataset(row_documents(N), 4, 4, max_tokens=max_tokens) for max_tokens in (None, 10_000))
    for dataset in (plain, wide):
        dataset.rebuild(embedder, PAD, progress=False)
    assert list(plain) == list(wide)


def test_the_groups_of_a_shard_depend_on_seed_number_and_shard_alone(embedder):
    documents = row_documents(N, shard=[row % 4 for row in range(N)])

    def groups(shards, seed=0, number=0):
        (targets, evidence), _ = EvidenceDataset(documents, 3, 3, seed=seed).find_groups(
            embedder, PAD, shards, progress=False, number=number
        )
        return {tuple(row) for row in torch.cat([targets, evidence], dim=1).tolist() if row[0] % 4 == 2}

    first = groups([2])
    assert first == groups([0, 2]) == groups([3, 2, 1, 2]) == groups(None)
    assert first != groups([2], seed=1) and first != groups([2], number=1)


def test_find_groups_changes_nothing_until_they_are_installed(embedder):
    dataset = EvidenceDataset(row_documents(N), 3, 3)
    found, statistics = dataset.find_groups(embedder, PAD, progress=False)
    assert dataset.num_groups == dataset.num_rebuilds == 0
    dataset.install(found)
    assert dataset.num_rebuilds == 1 and dataset.num_groups == statistics["groups"]
    before = list(dataset)
    targets, evidence = found
    assert targets.dtype == evidence.dtype == torch.int64
    assert targets.shape == evidence.shape == (dataset.num_groups, 3)
    assert [row for row in targets[0].tolist() if row >= 0] == dataset[0]["target_rows"]
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(dataset.groups, found, strict=True))
    newer, _ = dataset.find_groups(embedder, PAD, progress=False)
    # The number says which rebuild it is, whatever has happened here.
    again, _ = dataset.find_groups(embedder, PAD, progress=False, number=0)
    assert list(dataset) == before
    assert torch.equal(again[0], targets) and not torch.equal(newer[0], targets)


@pytest.mark.parametrize(
    ("documents", "evidence", "options", "message"),
    [
        (
            row_documents(20),
            row_documents(5),
            {},
            "num_evidence=8 needs at least as many evidence documents, but there are 5. Give more evidence or lower "
            "num_evidence.",
        ),
        (make_documents([]), row_documents(9), {}, "The documents have no rows, so there is no target."),
        (
            row_documents(20),
            row_documents(10).remove_columns("document"),
            {},
            "The evidence lack the columns ['document']; they have ['input_ids', 'chunk', 'shard', 'language']. Make "
            "them with chunk_documents.",
        ),
        (
            row_documents(20).remove_columns("chunk"),
            None,
            {"first_chunks_only": True},
            "The documents lack the columns ['chunk']; they have ['input_ids', 'document', 'shard', 'language']. Make "
            "them with chunk_documents.",
        ),
        (
            row_documents(20).remove_columns("chunk").add_column("chunk", [1] * 20),
            None,
            {"first_chunks_only": True},
            "first_chunks_only=True leaves no target: no row of the documents has chunk 0.",
        ),
        (
            row_documents(20, shard=[row // 2 for row in range(20)]),
            row_documents(10, shard=[3] * 10),
            {},
            "The evidence has no document in 9 of the 10 shards of the documents ([0, 1, 2, 4, 5]...), and a target "
            "has its evidence from its own shard. Give evidence there, or drop these documents.",
        ),
        (
            row_documents(20),
            row_documents(10).cast_column("shard", Value("string")),
            {},
            "Shards are matched by value, but the column 'shard' is Value('int64') in the documents and "
            "Value('string') in the evidence. Use evidence.cast_column('shard', documents.features['shard']).",
        ),
        (
            row_documents(20).cast_column("shard", ClassLabel(names=["a", "b"])),
            row_documents(10).cast_column("shard", ClassLabel(names=["b", "a"])),
            {},
            "Shards are matched by value, but the column 'shard' is ClassLabel(names=['a', 'b']) in the documents and "
            "ClassLabel(names=['b', 'a']) in the evidence. Use evidence.cast_column('shard', "
            "documents.features['shard']).",
        ),
        (
            make_documents([[1] * 30] + [[2]] * 20),
            make_documents([[1] * 12] * 20),
            {"max_tokens": 41},
            "max_tokens must be at least 42, the longest target (30 tokens) with the longest evidence document (12 "
            "tokens), but got 41. Raise it, or cut the documents into shorter chunks.",
        ),
    ],
)
def test_bad_corpora_and_options_are_refused(documents, evidence, options, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        EvidenceDataset(documents, evidence=evidence, **options)


def test_an_empty_document(embedder):
    documents = make_documents([[row] for row in range(20)] + [[]])
    message = (
        "Row 20 of the documents has no tokens, so it has no embedding. Drop empty documents, as chunk_documents does."
    )
    for max_tokens in (None, 10):
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            EvidenceDataset(documents, max_tokens=max_tokens).rebuild(embedder, PAD, progress=False)


def test_arrays_of_a_corpus():
    documents = make_documents(
        [[1], [2, 3], [4], [5, 6, 7]], document=[7, 7, 3, 3], shard=[5, 2, 5, 2], language=["de", "", "fr", "de"]
    )
    shards, languages = {}, {"": -1, None: -1}
    corpus = Corpus(documents, shards, languages)
    assert shards == {5: 0, 2: 1}
    assert corpus.document_ids.tolist() == [0, 0, 1, 1]
    assert corpus.language_ids[0] == corpus.language_ids[3] != corpus.language_ids[2] >= 0 > corpus.language_ids[1]
    assert [corpus.rows(shard).tolist() for shard in (0, 1)] == [[0, 2], [1, 3]]
    assert corpus.lengths.tolist() == [1, 2, 1, 3]
    other = Corpus(make_documents([[9]] * 3, shard=[2, 8, 2], language=["fr", "xx", ""]), shards, languages)
    assert [other.rows(shard).tolist() for shard in (0, 1)] == [[], [0, 2]]
    assert other.language_ids[0] == corpus.language_ids[2] and other.language_ids[2] == -1
    assert other.language_ids[1] not in corpus.language_ids


def test_the_fingerprint_is_that_of_all_that_groups_are_made_of():
    documents = row_documents(6)

    def fingerprint(documents, **options):
        return Corpus(documents, {}, {}, **options).fingerprint

    assert fingerprint(documents) == fingerprint(
        concatenate_datasets([documents.select([0]), documents.select(range(1, 6))])
    )
    others = [
        row_documents(6, document=[0, 0, 1, 2, 3, 4]),
        row_documents(6, shard=[0, 0, 0, 0, 0, 1]),
        row_documents(6, language=["de", "", "", "", "", ""]),
        make_documents([[1]] * 6),
    ]
    assert len({fingerprint(other) for other in (documents, *others)}) == 5
    assert corpus_fingerprint(documents) == corpus_fingerprint(others[0])


def test_all_pairs_of_the_naive_loop_are_the_papers():
    """The reference itself: no pair within a document, best first."""
    pairs = naive.all_pairs([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0]], [0, 0, 1])
    assert [pair[1:] for pair in pairs] == [(2, 1), (1, 2), (2, 0), (0, 2)]
