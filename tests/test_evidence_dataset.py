import copy
import pickle
import re

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from hf_paraphrase_lm.retrieval import DocumentIndex, EvidenceDataset, LexicalEmbedder
from hf_paraphrase_lm.retrieval.evidence import grow_groups

from .reference import evidence as naive
from .reference.evidence import RowEmbedder, make_documents, row_documents

PAD = 99
N = 60


@pytest.fixture
def embedder():
    return RowEmbedder(torch.randn(N, 6))


def two_chunks_each(n=N, **columns):
    return row_documents(n, document=[row // 2 for row in range(n)], **columns)


def items(dataset):
    return [dataset[i] for i in range(dataset.num_groups)]


def test_items_are_groups(embedder):
    documents = two_chunks_each()
    dataset = EvidenceDataset(documents, num_targets=4, num_evidence=3)
    statistics = dataset.rebuild(embedder, PAD, progress=False)
    assert len(dataset) == 15
    for item in items(dataset):
        assert set(item) == {"input_ids", "labels", "evidence_mask", "target_rows", "evidence_rows"}
        assert item["input_ids"] == [documents[row]["input_ids"] for row in item["evidence_rows"]]
        assert item["labels"] == [documents[row]["input_ids"] for row in item["target_rows"]]
        assert item["evidence_mask"] == [
            [target // 2 != evidence // 2 for evidence in item["evidence_rows"]] for target in item["target_rows"]
        ]
        assert all(any(row) for row in item["evidence_mask"])
        assert type(item["input_ids"][0][0]) is int and type(item["evidence_mask"][0][0]) is bool
    targets = [row for item in items(dataset) for row in item["target_rows"]]
    assert len(targets) == len(set(targets)) == statistics["targets"] == N - statistics["resting_targets"]


def test_length_is_constant_and_wraps_around(embedder):
    dataset = EvidenceDataset(row_documents(N, shard=[row // 20 for row in range(N)]), num_targets=7, num_evidence=3)
    assert len(dataset) == 9 and dataset.num_groups == 0
    dataset.rebuild(embedder, PAD, shards=[1], progress=False)
    groups = dataset.num_groups
    assert len(dataset) == 9 and 3 <= groups <= 4
    assert dataset[groups] == dataset[0] != dataset[1]
    assert dataset[8] == dataset[8 % groups] == dataset[-1]
    assert len(list(dataset)) == 9
    message = "Group 9 does not exist: the dataset has 9 items."
    with pytest.raises(IndexError, match=f"^{message}$"):
        dataset[9]


def test_groups_are_those_of_the_pairs_of_each_shard(embedder, monkeypatch):
    graphs = []

    def record(targets, evidence, weights, *arguments):
        graphs.append({(int(t), int(e)): w for t, e, w in zip(targets, evidence, weights, strict=True)})
        return grow_groups(targets, evidence, weights, *arguments)

    monkeypatch.setattr("hf_paraphrase_lm.retrieval.evidence_dataset.grow_groups", record)
    shard = [row * 7 % 3 for row in range(N)]
    language = [("de", "en", "")[row % 5 % 3] for row in range(N)]
    dataset = EvidenceDataset(two_chunks_each(shard=shard, language=language), pairs_per_target=3)
    statistics = dataset.rebuild(embedder, PAD, progress=False)
    relevance, cross_language = [], []
    for graph, name in zip(graphs, dataset.shards, strict=True):
        rows = [row for row in range(N) if shard[row] == name]
        pairs = naive.all_pairs(embedder.vectors[rows].tolist(), [row // 2 for row in rows])[: 3 * len(rows)]
        expected = {}
        for f, t, e in pairs:
            languages = language[rows[t]], language[rows[e]]
            cross_language.append("" not in languages and languages[0] != languages[1])
            expected[t, e] = (100.0 if cross_language[-1] else 1.0) + 1e-3 * f
            relevance.append(f)
        assert graph == pytest.approx(expected, abs=1e-8)
    assert statistics["pairs"] == len(relevance) == 3 * N
    assert statistics["pair_relevance_mean"] == pytest.approx(np.mean(relevance), abs=1e-6)
    assert statistics["cross_language_share"] == pytest.approx(np.mean(cross_language))
    for item in items(dataset):
        assert len({shard[row] for row in item["target_rows"] + item["evidence_rows"]}) == 1


@pytest.mark.parametrize("is_evidence_apart", [False, True])
def test_languages_are_taken_away_before_comparing(is_evidence_apart):
    """Documents point where their language points; only what is left of them tells translations."""
    language = [("de", "en", "eo")[row % 3] for row in range(N)]
    texts = torch.randn(N // 3, 8).repeat_interleave(3, dim=0)
    vectors = texts + 20 * torch.randn(3, 8)[[row % 3 for row in range(N)]]
    documents = row_documents(N, language=language)
    options = {}
    if is_evidence_apart:
        is_eo = np.array(language) == "eo"
        options["evidence"] = documents.select(np.flatnonzero(is_eo))
        documents = documents.select(np.flatnonzero(~is_eo))

    def translations(center):
        dataset = EvidenceDataset(
            documents, num_targets=2, num_evidence=2, pairs_per_target=2, center_languages=center, **options
        )
        dataset.rebuild(RowEmbedder(vectors), PAD, progress=False)
        # Documents begin with their row.
        found = [
            any(target[0] // 3 == evidence[0] // 3 for evidence in item["input_ids"] if evidence != target)
            for item in items(dataset)
            for target in item["labels"]
        ]
        return np.mean(found)

    assert translations(center=True) > 0.9 > 0.5 > translations(center=False)


def test_evidence_of_other_languages_only(embedder):
    language = ["de" if row % 3 else "en" for row in range(N)]
    documents = row_documents(N, language=language)
    options = {"num_targets": 3, "num_evidence": 3, "pairs_per_target": 2}
    shares = []
    for only in (False, True):
        dataset = EvidenceDataset(documents, other_languages_only=only, **options)
        shares.append(dataset.rebuild(embedder, PAD, progress=False)["cross_language_share"])
    assert shares[0] < 0.9 and shares[1] == 1
    # Every target has evidence of another language; that of its group's other targets it may see, too.
    for item in items(dataset):
        found = {language[row] for row in item["evidence_rows"]}
        assert all(found - {language[row]} for row in item["target_rows"])
    # The original's way, every target with its own.
    dataset = EvidenceDataset(documents, 1, 3, "neighbors", other_languages_only=True)
    dataset.rebuild(embedder, PAD, progress=False)
    for item in items(dataset):
        assert language[item["target_rows"][0]] not in {language[row] for row in item["evidence_rows"]}


def test_fewer_pairs_than_targets(embedder):
    """Only the best; one at least, however small the shard."""
    dataset = EvidenceDataset(row_documents(N), num_targets=2, num_evidence=2, pairs_per_target=0.25)
    statistics = dataset.rebuild(embedder, PAD, progress=False)
    assert statistics["pairs"] == N // 4 and statistics["resting_targets"] > N // 2
    dataset = EvidenceDataset(row_documents(N), num_targets=2, num_evidence=2, pairs_per_target=0.001)
    assert dataset.rebuild(embedder, PAD, progress=False)["pairs"] == 1


def test_statistics(embedder):
    shard = [row % 2 for row in range(N)]
    dataset = EvidenceDataset(row_documents(N, shard=shard), num_targets=4, num_evidence=3)
    statistics = dataset.rebuild(embedder, PAD, progress=False)
    assert statistics["groups"] == dataset.num_groups == len({tuple(item["target_rows"]) for item in dataset})
    evidence = {row for item in items(dataset) for row in item["evidence_rows"]}
    assert statistics["distinct_evidence"] == len(evidence)
    f = [
        float(embedder.vectors[a].double() @ embedder.vectors[b].double())
        for a in range(N)
        for b in range(N)
        if a != b and shard[a] == shard[b]
    ]
    assert statistics["relevance_mean"] == pytest.approx(np.mean(f))
    assert statistics["relevance_std"] == pytest.approx(np.std(f))
    assert statistics["seconds"] > 0
    assert all(type(value) in (int, float) for value in statistics.values())


def test_neighbors_are_each_targets_own(embedder):
    dataset = EvidenceDataset(two_chunks_each(), num_targets=1, num_evidence=5, strategy="neighbors")
    statistics = dataset.rebuild(embedder, PAD, progress=False)
    assert statistics["targets"] == statistics["groups"] == len(dataset) == N
    pairs = naive.all_pairs(embedder.vectors.tolist(), [row // 2 for row in range(N)])
    for item in items(dataset):
        (target,) = item["target_rows"]
        # The order in which they are added is that of relevance.
        assert item["evidence_rows"] == [e for _, t, e in pairs if t == target][:5]
        assert item["evidence_mask"] == [[True] * 5]


def test_small_shards(embedder):
    # A shard of one, a shard of one document, a shard of two documents.
    shard = ["one"] + ["same"] * 4 + ["two"] * 2 + ["many"] * (N - 7)
    document = [0, 1, 1, 1, 1, *range(2, N - 3)]
    documents = row_documents(N, document=document).remove_columns("shard").add_column("shard", shard)
    dataset = EvidenceDataset(documents, num_targets=2, num_evidence=4)
    assert dataset.shards == ["one", "same", "two", "many"]
    statistics = dataset.rebuild(embedder, PAD, shards=["one", "same", "two"], progress=False)
    assert statistics["resting_targets"] == 5
    assert [sorted(item["target_rows"]) for item in items(dataset)] == [[5, 6]]
    message = (
        "No target has evidence in the 2 shards: each of them holds one document only, and a target never sees its "
        "own. Use larger shards, or shard_column=None in chunk_documents."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        dataset.rebuild(embedder, PAD, shards=["one", "same"], progress=False)
    # The old groups stay.
    assert [sorted(item["target_rows"]) for item in items(dataset)] == [[5, 6]]


def test_documents_that_are_all_the_same():
    dataset = EvidenceDataset(make_documents([[3, 4, 5]] * N), num_targets=4, num_evidence=4)
    statistics = dataset.rebuild(RowEmbedder(torch.randn(N, 4)), PAD, progress=False)
    assert statistics["relevance_mean"] == pytest.approx(1)
    assert statistics["relevance_std"] == pytest.approx(0, abs=1e-6)
    for item in items(dataset):
        assert all(any(row) for row in item["evidence_mask"])


def test_more_groups_than_items_keeps_the_fullest(embedder):
    # One evidence document a group: most groups stay short of targets.
    dataset = EvidenceDataset(row_documents(N), num_targets=6, num_evidence=1, pairs_per_target=2)
    statistics = dataset.rebuild(embedder, PAD, progress=False)
    assert statistics["groups"] == len(dataset) == 10
    assert statistics["targets"] + statistics["resting_targets"] == N
    assert statistics["targets"] == sum(len(item["target_rows"]) for item in items(dataset)) > 20


def test_rebuilds_follow_seed_and_number(embedder):
    first, same, other = (EvidenceDataset(row_documents(N), seed=seed) for seed in (0, 0, 1))
    for dataset in (first, same, other):
        dataset.rebuild(embedder, PAD, progress=False)
    assert list(first) == list(same) != list(other)
    before = list(first)
    for dataset in (first, same):
        dataset.rebuild(embedder, PAD, progress=False)
    assert list(first) == list(same) != before


def test_lexical_groups_find_near_duplicates():
    texts = [[*np.random.default_rng(row // 3).integers(0, 300, 20).tolist(), row] for row in range(30)]
    documents = make_documents(texts)
    dataset = EvidenceDataset(documents, num_targets=3, num_evidence=3, pairs_per_target=2)
    dataset.rebuild(LexicalEmbedder(documents, progress=False), PAD, progress=False)
    for item in items(dataset):
        assert len({row // 3 for row in item["target_rows"] + item["evidence_rows"]}) == 1


def test_first_use_without_rebuild():
    message = (
        "EvidenceDataset has no groups yet. Call dataset.rebuild(embedder, pad_token_id) first, for example with the "
        "model or a LexicalEmbedder, or give Trainer a RefreshIndexCallback."
    )
    with pytest.raises(RuntimeError, match=f"^{re.escape(message)}$"):
        EvidenceDataset(row_documents(N))[0]


@pytest.mark.parametrize(
    ("documents", "options", "message"),
    [
        (
            row_documents(8),
            {},
            "num_evidence=8 needs a corpus of at least 9 documents (a target is never its own evidence), but it has 8. "
            "Give more documents or lower num_evidence.",
        ),
        (
            make_documents([]),
            {"num_evidence": 1},
            "num_evidence=1 needs a corpus of at least 2 documents (a target is never its own evidence), but it has 0. "
            "Give more documents or lower num_evidence.",
        ),
        (
            row_documents(20, document=[4] * 20),
            {},
            "All 20 rows are chunks of one document, so no target can have evidence: a target never sees its own "
            "document. Give more documents.",
        ),
        (
            row_documents(20).remove_columns(["shard", "chunk"]),
            {},
            "The documents lack the columns ['shard']; they have ['input_ids', 'document', 'language']. Make them with "
            "chunk_documents.",
        ),
        (row_documents(20), {"num_targets": 0}, "num_targets must be at least 1, but got 0."),
        (row_documents(20), {"num_evidence": 0}, "num_evidence must be at least 1, but got 0."),
        (row_documents(20), {"pairs_per_target": 0}, "pairs_per_target must be positive, but got 0."),
        (
            row_documents(20, language=["de", None] * 10),
            {"other_languages_only": True},
            "other_languages_only=True needs the language of every document, but 10 have none. Name the column of "
            "languages in chunk_documents, or drop these documents.",
        ),
        (row_documents(20), {"cross_language_weight": 0}, "cross_language_weight must be positive, but got 0."),
        (row_documents(20), {"strategy": "knn"}, "strategy must be 'pairs' or 'neighbors', but got 'knn'."),
        (
            row_documents(20),
            {"strategy": "neighbors"},
            "strategy='neighbors' needs num_targets=1, but got 8: every target has evidence of its own, so a group has "
            "one target. Use strategy='pairs' for shared evidence.",
        ),
    ],
)
def test_bad_corpora_and_options_are_refused(documents, options, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        EvidenceDataset(documents, **options)


@pytest.mark.parametrize(("shards", "given"), [([0, 9], "[9]"), ([], "none")])
def test_unknown_shards_are_refused(embedder, shards, given):
    message = f"shards must be values of the column 'shard' ([0, 1, 2, 3, 4]...), but got {given}."
    dataset = EvidenceDataset(row_documents(N, shard=[row // 9 for row in range(N)]))
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        dataset.rebuild(embedder, PAD, shards=shards)


class Failing(RowEmbedder):
    def embed(self, input_ids, attention_mask):
        raise KeyboardInterrupt


class Interrupting:
    def __setitem__(self, place, value):
        raise KeyboardInterrupt


def test_shards_are_drawn_where_targets_can_have_evidence(embedder):
    """Not shards of one document, of one document's chunks, or without the first chunk of any."""
    shard = [0, 1, 1, 2, 2, *[3, 4] * 4]
    document = [0, 1, 1, 2, 3, *range(4, 12)]
    documents = row_documents(13, shard=shard, document=document).remove_columns("chunk")
    documents = documents.add_column("chunk", [0, 0, 1, 1, 1, *[0] * 8])
    dataset = EvidenceDataset(documents, 2, 2, first_chunks_only=True)
    drawn = [dataset.sample_shards(1, step) for step in range(20)]
    assert {value for values in drawn for value in values} == {3, 4}
    assert drawn == [dataset.sample_shards(1, step) for step in range(20)]
    assert sorted(dataset.sample_shards(5, 0)) == [3, 4]
    for step in range(5):
        dataset.rebuild(embedder, PAD, dataset.sample_shards(1, step), progress=False)
    alone = EvidenceDataset(row_documents(4, shard=list(range(4))), 2, 2)
    assert len(alone.sample_shards(3, 0)) == 3


def test_an_interrupted_rebuild_leaves_the_old_groups(embedder, monkeypatch):
    dataset = EvidenceDataset(row_documents(N))
    dataset.rebuild(embedder, PAD, progress=False)
    before = list(dataset)
    with pytest.raises(KeyboardInterrupt):
        dataset.rebuild(Failing(torch.eye(N)), PAD, progress=False)
    assert list(dataset) == before
    # In the middle of writing the new table.
    with monkeypatch.context() as patch:
        patch.setattr(dataset.tables, "_evidence", Interrupting())
        with pytest.raises(KeyboardInterrupt):
            dataset.rebuild(RowEmbedder(torch.randn(N, 6)), PAD, progress=False)
    assert list(dataset) == before
    dataset.rebuild(embedder, PAD, progress=False)
    assert list(dataset) != before


def test_a_reader_is_not_torn_by_rebuilds(embedder):
    """Two rebuilds pass while a row is read: what is returned is a group of one of them, not of both."""
    dataset = EvidenceDataset(row_documents(N), num_targets=4, num_evidence=4)
    dataset.rebuild(embedder, PAD, progress=False)

    class Slow:
        """A table that is written twice between the targets' and the evidence's reading."""

        def __init__(self, table):
            self.table, self.left = table, 1

        def __getitem__(self, place):
            if self.left:
                self.left = 0
                dataset.tables._targets = targets
                for _ in range(2):
                    dataset.rebuild(embedder, PAD, progress=False)
                dataset.tables._targets = self
                return self.table[place] * 0
            return self.table[place]

    targets = dataset.tables._targets
    dataset.tables._targets = Slow(targets)
    item = dataset[3]
    dataset.tables._targets = targets
    assert item == dataset[3]


def test_copies_and_pickles_are_independent(embedder, tmp_path):
    documents = row_documents(N)
    documents.save_to_disk(tmp_path)
    dataset = EvidenceDataset(documents.load_from_disk(tmp_path))
    dataset.rebuild(embedder, PAD, progress=False)
    before = list(dataset)
    copies = [pickle.loads(pickle.dumps(dataset)), copy.deepcopy(dataset)]
    dataset.rebuild(embedder, PAD, progress=False)
    for copied in copies:
        assert list(copied) == before != list(dataset)
        assert copied.tables._targets.is_shared()
        copied.rebuild(embedder, PAD, progress=False)
        assert list(copied) == list(dataset)


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:This DataLoader will create 2 worker processes:UserWarning")
@pytest.mark.parametrize("start", ["main process", "fork", "spawn"])
def test_workers_see_a_rebuild(embedder, start):
    dataset = EvidenceDataset(row_documents(N), num_targets=2, num_evidence=3)
    # FAISS has run in this process, with as many threads as it likes: a forked worker that used it would hang.
    DocumentIndex.build(dataset.documents, embedder, PAD, progress=False).search(torch.randn(500, 6), 3)
    dataset.rebuild(embedder, PAD, progress=False)
    options = {} if start == "main process" else {"num_workers": 2, "persistent_workers": True, "prefetch_factor": 2}
    loader = DataLoader(dataset, batch_size=1, collate_fn=list, timeout=300 * bool(options), **options)
    if options:
        loader.multiprocessing_context = start
    expected = [list(dataset)]
    assert [item for batch in loader for item in batch] == expected[0]
    # In the middle of an epoch, then between two: the workers are the same ones.
    seen = []
    for i, batch in enumerate(loader):
        seen += batch
        if i == 9:
            dataset.rebuild(embedder, PAD, progress=False)
            expected.append(list(dataset))
    old, new = expected
    assert old != new
    assert all(item in (old[i], new[i]) for i, item in enumerate(seen))
    # Ten items are read, four may be prefetched.
    assert seen[:10] == old[:10] and seen[15:] == new[15:]
    dataset.rebuild(embedder, PAD, progress=False)
    assert [item for batch in loader for item in batch] == list(dataset)


def test_progress_bar(embedder, capfd):
    dataset = EvidenceDataset(row_documents(N))
    dataset.rebuild(embedder, PAD, progress=False)
    assert capfd.readouterr().err == ""
    dataset.rebuild(embedder, PAD)
    assert "rebuild groups" in capfd.readouterr().err
