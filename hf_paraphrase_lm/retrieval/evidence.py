"""From document embeddings to groups of targets that share their evidence (Lewis et al. 2020, section 2).

Rows in this file count from 0 within one shard; everything stays inside a shard.
"""

from collections.abc import Callable, Iterator

import numpy as np
import torch

# Relevance scores held at a time: 16 MB in float32. Our choice.
SCORES_PER_BLOCK = 1 << 22


def relevant_pairs(
    embeddings: torch.Tensor,
    document_ids: torch.Tensor,
    num_pairs: int,
    advance: Callable[[int], object] = lambda rows: None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The `num_pairs` most relevant pairs of the whole shard: one cut for all targets, not so many for each.

    f(x, z) = <g(x), g(z)> is computed exactly for all ordered pairs, block by block. Two chunks of one document (or a
    chunk and itself) are no pair: our choice, the paper only says that a target is not its own evidence.

    Args:
        embeddings: float32 `(n, dim)`, rows L2-normalised, on any device.
        document_ids: int64 `(n,)`, on the same device.
        num_pairs: how many; all pairs if there are fewer.
        advance: called with the number of targets done.

    Returns:
        targets int64, evidence int64 and f float32, each `(pairs,)`, in no order.
    """
    threshold = -torch.inf
    kept = (document_ids[:0], document_ids[:0], embeddings[:0, 0])
    for start, scores in _blocks(embeddings, document_ids):
        targets, evidence = (scores > threshold).nonzero(as_tuple=True)
        found = (targets + start, evidence, scores[targets, evidence])
        kept = tuple(torch.cat(columns) for columns in zip(kept, found, strict=True))
        # The cut sorts, so it waits until there is about as much to drop as to keep.
        if len(kept[0]) > 2 * num_pairs:
            kept = _cut(kept, num_pairs)
            threshold = kept[2].min()
        advance(len(scores))
    return tuple(column.cpu().numpy() for column in _cut(kept, num_pairs))


def nearest_evidence(
    embeddings: torch.Tensor,
    document_ids: torch.Tensor,
    num_evidence: int,
    advance: Callable[[int], object] = lambda rows: None,
) -> tuple[np.ndarray, np.ndarray]:
    """Each target's own `num_evidence` most relevant documents, best first; arguments as `relevant_pairs`.

    Returns:
        evidence int64 and f float32, both `(n, num_evidence)`; -1 and -inf where a shard has no more documents.
    """
    evidence = torch.full((len(embeddings), num_evidence), -1)
    relevance = torch.full((len(embeddings), num_evidence), -torch.inf)
    k = min(num_evidence, len(embeddings))
    for start, scores in _blocks(embeddings, document_ids):
        best, rows = scores.topk(k)
        relevance[start : start + len(scores), :k] = best.cpu()
        evidence[start : start + len(scores), :k] = rows.masked_fill(best == -torch.inf, -1).cpu()
        advance(len(scores))
    return evidence.numpy(), relevance.numpy()


def _blocks(embeddings: torch.Tensor, document_ids: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
    """Yields the first target of a block and its f, `(block, n)`, -inf within a document."""
    block = max(64, SCORES_PER_BLOCK // max(1, len(embeddings)))
    for start in range(0, len(embeddings), block):
        scores = embeddings[start : start + block] @ embeddings.T
        same_document = document_ids[start : start + block, None] == document_ids
        yield start, scores.masked_fill_(same_document, -torch.inf)


def _cut(pairs: tuple[torch.Tensor, ...], num_pairs: int) -> tuple[torch.Tensor, ...]:
    if len(pairs[2]) <= num_pairs:
        return pairs
    best = pairs[2].topk(num_pairs, sorted=False).indices
    return tuple(column[best] for column in pairs)


def relevance_moments(embeddings: torch.Tensor) -> tuple[int, float, float]:
    """Number, sum and sum of squares of f over all ordered pairs of different rows, without making the pairs.

    With the embeddings as rows of X: sum f = |sum of rows|^2, sum f^2 = |X^T X|_F^2, less those of a row with itself.
    In float64, because after a collapse all f are near 1 and their spread is a small difference of large numbers.
    """
    total = embeddings.new_zeros(embeddings.shape[1], dtype=torch.float64)
    gram = embeddings.new_zeros(embeddings.shape[1], embeddings.shape[1], dtype=torch.float64)
    itself = itself_squared = 0.0
    for block in embeddings.split(4096):
        block = block.double()
        total += block.sum(dim=0)
        gram += block.T @ block
        own = block.square().sum(dim=1)
        itself += own.sum().item()
        itself_squared += own.square().sum().item()
    count = len(embeddings) * (len(embeddings) - 1)
    return count, total.square().sum().item() - itself, gram.square().sum().item() - itself_squared


def grow_groups(
    targets: np.ndarray,
    evidence: np.ndarray,
    weights: np.ndarray,
    num_targets: int,
    num_evidence: int,
    rng: np.random.Generator,
) -> list[tuple[list[int], list[int]]]:
    """Cuts the bipartite graph into groups, each grown greedily so as to maximise the weight of its inner edges.

    The paper grows a batch from a seed target and maximises the sum of edge weights; the order of the steps is our
    choice. A group starts with a random free target. Then evidence and targets are added in turns (always to the side
    that is less full), each time the one with the largest weight of edges into the group. When no free target has an
    edge into the group, the next free one in random order joins and brings the best of its own evidence with it; when
    the evidence is full too, the group stays short of targets. So every target of a group has an edge to its evidence,
    every target with an edge is a target once, and a target may be evidence as well, in its own group (where it must
    be masked) or another.

    Args:
        targets, evidence: int64 `(edges,)`, no edge twice.
        weights: float64 `(edges,)`, positive.
        num_targets, num_evidence: size of a full group.
        rng: draws the order of the seeds.

    Returns:
        A list of groups: rows of the targets and rows of the evidence, in the order in which they were added.
    """
    if len(targets) == 0:
        return []
    n = int(max(targets.max(), evidence.max())) + 1
    evidence_of, targets_of = _Neighbors(targets, evidence, weights, n), _Neighbors(evidence, targets, weights, n)
    # Weight of the edges into the group being grown; -inf for what cannot be added.
    evidence_gain, target_gain = np.zeros(n), np.zeros(n)
    free = np.zeros(n, dtype=bool)
    free[targets] = True
    order = iter(rng.permutation(np.unique(targets)).tolist())
    groups = []
    while (joining := next((row for row in order if free[row]), None)) is not None:
        group_targets: list[int] = []
        group_evidence: list[int] = []
        brings_its_own = True
        while joining is not None:
            group_targets.append(joining)
            free[joining] = False
            target_gain[joining] = -np.inf
            evidence_gain[evidence_of.rows(joining)] += evidence_of.weights(joining)
            full = len(group_targets) == num_targets
            while len(group_evidence) < num_evidence and (
                brings_its_own or full or len(group_evidence) * num_targets < len(group_targets) * num_evidence
            ):
                chosen = evidence_of.best([joining] if brings_its_own else group_targets, evidence_gain)
                if chosen is None:
                    break
                group_evidence.append(chosen)
                evidence_gain[chosen] = -np.inf
                target_gain[targets_of.rows(chosen)] += targets_of.weights(chosen)
                brings_its_own = False
            if full:
                break
            joining = targets_of.best(group_evidence, target_gain)
            if joining is None and len(group_evidence) < num_evidence:
                joining, brings_its_own = next((row for row in order if free[row]), None), True
        groups.append((group_targets, group_evidence))
        for row in group_targets:
            evidence_gain[evidence_of.rows(row)] = 0
        for row in group_evidence:
            targets_of.keep(row, free)
            target_gain[targets_of.rows(row)] = 0
    return groups


class _Neighbors:
    """Rows and weights at the other end of each row's edges."""

    def __init__(self, sources: np.ndarray, ends: np.ndarray, weights: np.ndarray, n: int):
        order = np.argsort(sources, kind="stable")
        self._ends, self._weights = ends[order], weights[order]
        bounds = np.searchsorted(sources[order], np.arange(n + 1))
        self._start, self._stop = bounds[:-1].tolist(), bounds[1:].tolist()

    def rows(self, source: int) -> np.ndarray:
        return self._ends[self._start[source] : self._stop[source]]

    def weights(self, source: int) -> np.ndarray:
        return self._weights[self._start[source] : self._stop[source]]

    def best(self, sources: list[int], gain: np.ndarray) -> int | None:
        """The neighbor of any of the sources with the largest gain, None if none can be added."""
        candidates = np.concatenate([self.rows(source) for source in sources])
        if len(candidates) == 0:
            return None
        best = candidates[gain[candidates].argmax()]
        return int(best) if gain[best] > -np.inf else None

    def keep(self, source: int, mask: np.ndarray) -> None:
        """Forgets the neighbors that are not in the mask, so that a row with many is not read in full for ever."""
        start, stop = self._start[source], self._stop[source]
        keep = mask[self._ends[start:stop]]
        kept = int(keep.sum())
        self._ends[start : start + kept] = self._ends[start:stop][keep]
        self._weights[start : start + kept] = self._weights[start:stop][keep]
        self._stop[source] = start + kept
