import numpy as np
import pytest
import torch

from hf_paraphrase_lm.retrieval import evidence as module
from hf_paraphrase_lm.retrieval.evidence import (
    grow_groups,
    nearest_evidence,
    relevance_moments,
    relevant_pairs,
    without_language,
)

from .reference import evidence as naive

# More than one block of 64 targets.
N = 150


@pytest.fixture(params=["one block", "several blocks"])
def blocks(request, monkeypatch):
    if request.param == "several blocks":
        monkeypatch.setattr(module, "SCORES_PER_BLOCK", 1)


@pytest.fixture
def embeddings():
    return torch.nn.functional.normalize(torch.randn(N, 5), dim=-1)


@pytest.fixture
def document_ids():
    return torch.arange(N) // 4


def both(embeddings, document_ids):
    """Every document may be target and evidence."""
    return embeddings, embeddings, document_ids, document_ids


@pytest.mark.parametrize("num_pairs", [1, 7, 8 * N, N * N])
def test_pairs_are_the_best_of_the_shard(embeddings, document_ids, num_pairs, blocks):
    done = []
    targets, evidence, relevance = relevant_pairs(*both(embeddings, document_ids), num_pairs, done.append)
    expected = naive.all_pairs(embeddings.tolist(), document_ids.tolist())[:num_pairs]
    assert targets.dtype == evidence.dtype == np.int64 and relevance.dtype == np.float32
    # f(x, z) = f(z, x), so both ends of a pair tie; what the cut divides is one such tie.
    found = set(zip(targets.tolist(), evidence.tolist(), strict=True))
    assert len(found) == len(targets) == len(expected)
    assert all({(t, e), (e, t)} & found for _, t, e in expected)
    if num_pairs != 7 and num_pairs != 1:
        assert found == {(t, e) for _, t, e in expected}
    f = {(t, e): f for f, t, e in naive.all_pairs(embeddings.tolist(), document_ids.tolist())}
    np.testing.assert_allclose(relevance, [f[pair] for pair in zip(targets, evidence, strict=True)], atol=1e-6)
    assert sum(done) == N


def test_the_cut_is_global():
    # Rows 0 and 1 are near to each other and to 2 and 3; all others are far from everything.
    embeddings = torch.nn.functional.normalize(torch.eye(20) + 0.01 * torch.randn(20, 20), dim=-1)
    embeddings[:4] = torch.nn.functional.normalize(torch.ones(4, 20) + 0.01 * torch.randn(4, 20), dim=-1)
    targets, evidence, _ = relevant_pairs(*both(embeddings, torch.arange(20)), 12)
    assert set(targets.tolist()) == set(evidence.tolist()) == {0, 1, 2, 3}


def test_one_document_has_no_pairs(embeddings):
    sides = both(embeddings, torch.zeros(N, dtype=torch.int64))
    targets, evidence, relevance = relevant_pairs(*sides, 10)
    assert len(targets) == len(evidence) == len(relevance) == 0
    evidence, relevance = nearest_evidence(*sides, 3)
    assert (evidence == -1).all() and (relevance == -np.inf).all()


def test_a_shard_of_one(embeddings):
    sides = both(embeddings[:1], torch.zeros(1, dtype=torch.int64))
    targets, *_ = relevant_pairs(*sides, 8)
    assert len(targets) == 0
    assert nearest_evidence(*sides, 3)[0].tolist() == [[-1, -1, -1]]


def test_no_more_than_a_block_of_scores_is_held(embeddings, document_ids, monkeypatch):
    monkeypatch.setattr(module, "SCORES_PER_BLOCK", 1)
    sizes = [tuple(scores.shape) for _, scores in module._blocks(*both(embeddings, document_ids))]
    assert sizes == [(64, N), (64, N), (22, N)]


@pytest.mark.parametrize("num_evidence", [1, 5, 149])
def test_nearest_evidence(embeddings, document_ids, num_evidence, blocks):
    evidence, relevance = nearest_evidence(*both(embeddings, document_ids), num_evidence)
    assert evidence.shape == relevance.shape == (N, num_evidence)
    pairs = naive.all_pairs(embeddings.tolist(), document_ids.tolist())
    for target in range(N):
        expected = [(f, e) for f, t, e in pairs if t == target][:num_evidence]
        found = evidence[target].tolist()
        assert found == [e for _, e in expected] + [-1] * (num_evidence - len(expected))
        np.testing.assert_allclose(relevance[target, : len(expected)], [f for f, _ in expected], atol=1e-6)


@pytest.mark.parametrize("spread", [1.0, 1e-4])
def test_relevance_moments(spread):
    # With the small spread, the cosines differ from 1 by about 1e-8.
    embeddings = torch.nn.functional.normalize(torch.ones(40, 6) + spread * torch.randn(40, 6), dim=-1)
    exact = embeddings.double()
    f = (exact @ exact.T)[~torch.eye(40, dtype=torch.bool)]
    count, total, squares = relevance_moments(embeddings, embeddings, same_corpus=True)
    assert count == 40 * 39
    assert total == pytest.approx(f.sum().item(), rel=1e-12)
    assert squares == pytest.approx(f.square().sum().item(), rel=1e-12)


def test_relevance_moments_of_two_sides():
    targets, evidence = (torch.nn.functional.normalize(torch.randn(n, 6), dim=-1) for n in (30, 50))
    f = targets.double() @ evidence.double().T
    count, total, squares = relevance_moments(targets, evidence, same_corpus=False)
    assert (count, total, squares) == (1500, pytest.approx(f.sum().item()), pytest.approx(f.square().sum().item()))
    # Targets that are some of the evidence: not with themselves.
    some = torch.arange(0, 50, 3)
    f = (evidence.double() @ evidence.double().T)[some][torch.arange(50) != some[:, None]]
    count, total, squares = relevance_moments(evidence[some], evidence, same_corpus=True)
    assert (count, total, squares) == (17 * 49, pytest.approx(f.sum().item()), pytest.approx(f.square().sum().item()))


@pytest.mark.parametrize("num_pairs", [20, 10_000])
def test_pairs_of_two_sides(embeddings, document_ids, num_pairs, blocks):
    targets, evidence = embeddings[:90], embeddings[60:]
    sides = targets, evidence, document_ids[:90], document_ids[60:]
    f = (targets.double() @ evidence.double().T).masked_fill(sides[2][:, None] == sides[3], -torch.inf)
    best = f.flatten().topk(min(num_pairs, int((f > -torch.inf).sum()))).indices
    rows, columns, relevance = relevant_pairs(*sides, num_pairs)
    assert sorted(zip(rows.tolist(), columns.tolist(), strict=True)) == sorted(
        divmod(place, 90) for place in best.tolist()
    )
    np.testing.assert_allclose(relevance, f[rows, columns], atol=1e-6)
    nearest, relevance = nearest_evidence(*sides, 5)
    np.testing.assert_array_equal(nearest, f.topk(5).indices)
    np.testing.assert_allclose(relevance, f.topk(5).values, atol=1e-6)


def random_graph(rng, n, num_edges, cross_language=0.0):
    """Weights of 1 or 100 with a different small part for each edge, so that no two groups weigh the same."""
    weight = {}
    while len(weight) < num_edges:
        target, evidence = (int(row) for row in rng.integers(0, n, 2))
        if target != evidence:
            weight[target, evidence] = (100.0 if rng.random() < cross_language else 1.0) + rng.random() * 1e-3
    return weight


def as_arrays(weight):
    targets, evidence = (np.array(ends) for ends in zip(*weight, strict=True))
    return targets, evidence, np.array(list(weight.values()))


class FixedOrder:
    def __init__(self, order):
        self.order = np.array(order)

    def permutation(self, targets):
        assert sorted(self.order.tolist()) == targets.tolist()
        return self.order


@pytest.mark.parametrize("size", [(8, 8), (1, 8), (8, 1), (3, 2), (2, 5), (1, 1)])
@pytest.mark.parametrize("cross_language", [0.0, 0.3])
@pytest.mark.parametrize("num_edges", [20, 120])
def test_groups_against_a_loop(size, cross_language, num_edges):
    rng = np.random.default_rng(0)
    for _ in range(5):
        weight = random_graph(rng, 40, num_edges, cross_language)
        order = rng.permutation(np.unique([target for target, _ in weight])).tolist()
        groups = grow_groups(*as_arrays(weight), *size, FixedOrder(order))
        assert groups == naive.grow_groups(weight, *size, order)


@pytest.mark.parametrize("size", [(8, 8), (1, 8), (3, 2), (50, 50)])
@pytest.mark.parametrize("max_tokens", [18, 30, 64])
def test_groups_with_a_token_budget_against_a_loop(size, max_tokens):
    rng = np.random.default_rng(0)
    for _ in range(5):
        weight = random_graph(rng, 40, 150)
        order = rng.permutation(np.unique([target for target, _ in weight])).tolist()
        tokens = rng.integers(1, 10, (2, 40))
        groups = grow_groups(*as_arrays(weight), *size, FixedOrder(order), *tokens, max_tokens)
        assert groups == naive.grow_groups(weight, *size, order, *tokens.tolist(), max_tokens)
        assert all(tokens[0, targets].sum() + tokens[1, evidence].sum() <= max_tokens for targets, evidence in groups)
        assert sorted(target for targets, _ in groups for target in targets) == sorted(order)


def test_a_token_budget_is_filled():
    weight = random_graph(np.random.default_rng(0), 300, 4000)
    tokens = np.random.default_rng(1).integers(10, 20, (2, 300))
    groups = grow_groups(*as_arrays(weight), 300, 300, np.random.default_rng(0), *tokens, 400)
    sizes = [tokens[0, targets].sum() + tokens[1, evidence].sum() for targets, evidence in groups]
    # The next document does not fit, but where targets run out.
    assert all(size > 400 - 20 for size in sizes[:-3]) and max(sizes) <= 400
    assert all(abs(len(targets) - len(evidence)) <= 1 for targets, evidence in groups[:-3])


def test_every_target_once_and_related():
    rng = np.random.default_rng(0)
    weight = random_graph(rng, 300, 2000)
    groups = grow_groups(*as_arrays(weight), 8, 8, rng)
    targets = [target for group, _ in groups for target in group]
    assert sorted(targets) == np.unique([target for target, _ in weight]).tolist()
    for group_targets, group_evidence in groups:
        assert 1 <= len(group_targets) <= 8 and 1 <= len(group_evidence) <= 8
        assert len(set(group_evidence)) == len(group_evidence)
        for target in group_targets:
            assert naive.inner_weight(weight, [target], group_evidence) > 0
    # Almost all groups are full: padding is waste.
    assert len(groups) <= 300 // 8 + 2


def test_separate_clusters_are_found():
    # Four complete clusters of eight: the groups of the largest weight are the clusters themselves.
    weight = {
        (8 * cluster + t, 8 * cluster + e): 1.0 for cluster in range(4) for t in range(8) for e in range(8) if t != e
    }
    groups = grow_groups(*as_arrays(weight), 8, 8, np.random.default_rng(0))
    assert sorted(sorted(targets) for targets, _ in groups) == [list(range(8 * c, 8 * c + 8)) for c in range(4)]
    for targets, evidence in groups:
        assert sorted(targets) == sorted(evidence)


def test_cross_language_edges_come_first():
    # Row 0 has three edges of its language and one into another.
    weight = {(0, 1): 1.0, (0, 2): 1.0, (0, 3): 1.0, (0, 4): 100.0, (5, 1): 1.0, (6, 4): 1.0}
    (targets, evidence), *_ = grow_groups(*as_arrays(weight), 2, 1, FixedOrder([0, 5, 6]))
    assert (targets, evidence) == ([0, 6], [4])


def test_groups_follow_the_random_numbers():
    rng = np.random.default_rng(0)
    arrays = as_arrays(random_graph(rng, 60, 300))
    first, same, other = (grow_groups(*arrays, 4, 4, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert first == same != other


def test_no_edges_no_groups():
    empty = np.empty(0, dtype=np.int64)
    assert grow_groups(empty, empty, np.empty(0), 8, 8, np.random.default_rng(0)) == []


def test_hubs_do_not_slow_it_down():
    """After a collapse every target has the same few documents as evidence; the time must not grow with the square."""
    targets, evidence = (ends.ravel() for ends in np.meshgrid(np.arange(8, 10_008), np.arange(8), indexing="ij"))
    order = np.random.default_rng(0).permutation(len(targets))
    groups = grow_groups(targets[order], evidence[order], np.ones(len(targets)), 8, 8, np.random.default_rng(0))
    assert len(groups) == 1250
    assert all(len(group_targets) == len(group_evidence) == 8 for group_targets, group_evidence in groups)


def test_embeddings_without_their_language(embeddings):
    # The last one is the only document of its language.
    languages = torch.tensor([row % 3 - 1 for row in range(N - 1)] + [7])
    found = without_language(embeddings, languages)
    np.testing.assert_allclose(found, naive.without_language(embeddings.tolist(), languages.tolist()), atol=1e-6)
    assert not found[-1].any()
    norms = found[:-1].norm(dim=-1)
    torch.testing.assert_close(norms, torch.ones_like(norms))


def test_documents_of_a_language_that_are_all_the_same():
    vectors = torch.nn.functional.normalize(torch.rand(1, 64), dim=-1).expand(1000, 64)
    assert not without_language(vectors, torch.zeros(1000, dtype=torch.int64)).any()
