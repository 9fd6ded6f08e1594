"""From document embeddings to groups of targets that share their evidence (Lewis et al. 2020, section 2).

Rows in this file count from 0 within one shard; everything stays inside a shard.
"""

from collections.abc import Callable, Iterator

import numpy as np
import torch

# Relevance scores held at a time: 16 MB in float32. Our choice.
SCORES_PER_BLOCK = 1 << 22


def relevant_pairs(
    targets: torch.Tensor,
    evidence: torch.Tensor,
    target_documents: torch.Tensor,
    evidence_documents: torch.Tensor,
    num_pairs: int,
    advance: Callable[[int], object] = lambda rows: None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The `num_pairs` most relevant pairs of the whole shard: one cut for all targets, not so many for each.

    f(x, z) = <g(x), g(z)> is computed exactly for all pairs of a target and an evidence document, block by block. Two
    chunks of one document (or a chunk and itself) are no pair: our choice, the paper only says that a target is not its
    own evidence.

    Args:
        targets, evidence: embeddings, float32 `(n, dim)` and `(m, dim)`, rows L2-normalised, on any device.
        target_documents, evidence_documents: the document that each row is a chunk of, int64 `(n,)` and `(m,)`, on the
            same device.
        num_pairs: how many; all pairs if there are fewer.
        advance: called with the number of targets done.

    Returns:
        rows of targets int64, rows of evidence int64 and f float32, each `(pairs,)`, in no order.
    """
    threshold = -torch.inf
    kept = (target_documents[:0], evidence_documents[:0], targets.new_empty(0))
    for start, scores in _blocks(targets, evidence, target_documents, evidence_documents):
        rows, columns = (scores > threshold).nonzero(as_tuple=True)
        found = (rows + start, columns, scores[rows, columns])
        kept = tuple(torch.cat(parts) for parts in zip(kept, found, strict=True))
        # The cut sorts, so it waits until there is about as much to drop as to keep.
        if len(kept[0]) > 2 * num_pairs:
            kept = _cut(kept, num_pairs)
            threshold = kept[2].min()
        advance(len(scores))
    return tuple(column.cpu().numpy() for column in _cut(kept, num_pairs))


def nearest_evidence(
    targets: torch.Tensor,
    evidence: torch.Tensor,
    target_documents: torch.Tensor,
    evidence_documents: torch.Tensor,
    num_evidence: int,
    advance: Callable[[int], object] = lambda rows: None,
) -> tuple[np.ndarray, np.ndarray]:
    """Each target's own `num_evidence` most relevant documents, best first; arguments as `relevant_pairs`.

    Returns:
        rows of evidence int64 and f float32, both `(n, num_evidence)`; -1 and -inf where a shard has no more documents.
    """
    nearest = torch.full((len(targets), num_evidence), -1)
    relevance = torch.full((len(targets), num_evidence), -torch.inf)
    k = min(num_evidence, len(evidence))
    for start, scores in _blocks(targets, evidence, target_documents, evidence_documents):
        best, rows = scores.topk(k)
        relevance[start : start + len(scores), :k] = best.cpu()
        nearest[start : start + len(scores), :k] = rows.masked_fill(best == -torch.inf, -1).cpu()
        advance(len(scores))
    return nearest.numpy(), relevance.numpy()


def _blocks(
    targets: torch.Tensor, evidence: torch.Tensor, target_documents: torch.Tensor, evidence_documents: torch.Tensor
) -> Iterator[tuple[int, torch.Tensor]]:
    """Yields the first target of a block and its f, `(block, m)`, -inf within a document."""
    block = max(64, SCORES_PER_BLOCK // max(1, len(evidence)))
    for start in range(0, len(targets), block):
        scores = targets[start : start + block] @ evidence.T
        same_document = target_documents[start : start + block, None] == evidence_documents
        yield start, scores.masked_fill_(same_document, -torch.inf)


def _cut(pairs: tuple[torch.Tensor, ...], num_pairs: int) -> tuple[torch.Tensor, ...]:
    if len(pairs[2]) <= num_pairs:
        return pairs
    best = pairs[2].topk(num_pairs, sorted=False).indices
    return tuple(column[best] for column in pairs)


def without_language(embeddings: torch.Tensor, languages: torch.Tensor) -> torch.Tensor:
    """What tells documents of one language apart: embeddings less the mean of their language, normalised anew.

    Our choice. What all documents of a language have in common makes those of related languages similar whatever they
    say, and they would fill the global cut.

    Args:
        embeddings: float32 `(n, dim)`, on any device.
        languages: the number of each row's language, int64 `(n,)`, on the same device; unknown ones have one, too.

    Returns:
        float32 `(n, dim)`, rows L2-normalised; zeros for the only document of a language.
    """
    _, number, count = languages.unique(return_inverse=True, return_counts=True)
    # In float64, or the mean of many documents that are all the same would not be what they are.
    means = embeddings.new_zeros(len(count), embeddings.shape[1], dtype=torch.float64)
    means.index_add_(0, number, embeddings.double()).div_(count[:, None])
    rest = embeddings - means.float()[number]
    # What rounding leaves of an embedding that is its language's mean is no direction.
    rest[rest.norm(dim=-1) < 1e-6] = 0.0
    return torch.nn.functional.normalize(rest, dim=-1)


def relevance_moments(
    targets: torch.Tensor, evidence: torch.Tensor, same_corpus: bool = True
) -> tuple[int, float, float]:
    """Number, sum and sum of squares of f over all pairs of a target and an evidence document, without making them.

    With the embeddings as rows of X and Z: sum f = <sum of X's rows, sum of Z's rows>, sum f^2 = <X^T X, Z^T Z>_F. If
    the targets are some of the evidence (`same_corpus`), less those of a row with itself. In float64, because after a
    collapse all f are near 1 and their spread is a small difference of large numbers.
    """
    total, gram, itself, itself_squared = _sums(targets)
    other_total, other_gram, *_ = (total, gram) if targets is evidence else _sums(evidence)
    count, first, second = len(targets) * len(evidence), total @ other_total, (gram * other_gram).sum()
    if same_corpus:
        count, first, second = count - len(targets), first - itself, second - itself_squared
    return count, first.item(), second.item()


def _sums(rows: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Sum of the rows, X^T X, sum and sum of squares of each row's product with itself, in float64."""
    total = rows.new_zeros(rows.shape[1], dtype=torch.float64)
    gram = rows.new_zeros(rows.shape[1], rows.shape[1], dtype=torch.float64)
    itself, itself_squared = total.new_zeros(()), total.new_zeros(())
    for block in rows.split(4096):
        block = block.double()
        total += block.sum(dim=0)
        gram += block.T @ block
        own = block.square().sum(dim=1)
        itself += own.sum()
        itself_squared += own.square().sum()
    return total, gram, itself, itself_squared


def grow_groups(
    targets: np.ndarray,
    evidence: np.ndarray,
    weights: np.ndarray,
    num_targets: int,
    num_evidence: int,
    rng: np.random.Generator,
    target_tokens: np.ndarray | None = None,
    evidence_tokens: np.ndarray | None = None,
    max_tokens: int = 0,
) -> list[tuple[list[int], list[int]]]:
    """Cuts the bipartite graph into groups, each grown greedily so as to maximise the weight of its inner edges.

    The paper grows a batch from a seed target and maximises the sum of edge weights; the order of the steps is our
    choice. A group starts with a random free target. Then evidence and targets are added in turns (always to the side
    that is less full), each time the one with the largest weight of edges into the group. When no free target has an
    edge into the group, the next free one in random order joins and brings the best of its own evidence with it; when
    the evidence is full too, the group stays short of targets. So every target of a group has an edge to its evidence,
    every target with an edge is a target once, and a target may be evidence as well, in its own group (where it must
    be masked) or another.

    With a token budget, the first document whose turn it is and that does not fit closes the group; a target that
    brings evidence fits if both do.

    Args:
        targets, evidence: int64 `(edges,)`, no edge twice.
        weights: float64 `(edges,)`, positive.
        num_targets, num_evidence: size of a full group.
        rng: draws the order of the seeds.
        target_tokens, evidence_tokens: int64, the number of tokens of each row. None: groups have no token budget.
        max_tokens: of the targets and the evidence of a group together; room for the longest target and the longest
            evidence document at least.

    Returns:
        A list of groups: rows of the targets and rows of the evidence, in the order in which they were added.
    """
    if len(targets) == 0:
        return []
    n = int(max(targets.max(), evidence.max())) + 1
    if target_tokens is None or evidence_tokens is None:
        target_tokens = evidence_tokens = np.zeros(n, dtype=np.int64)
    evidence_of, targets_of = _Neighbors(targets, evidence, weights, n), _Neighbors(evidence, targets, weights, n)
    # Weight of the edges into the group being grown; -inf for what cannot be added.
    evidence_gain, target_gain = np.zeros(n), np.zeros(n)
    free = np.zeros(n, dtype=bool)
    free[targets] = True
    order = rng.permutation(np.unique(targets)).tolist()[::-1]
    groups = []
    while (joining := _next_free(order, free)) is not None:
        group_targets: list[int] = []
        group_evidence: list[int] = []
        room = max_tokens
        is_related = False
        while joining is not None:
            rows, joining_weights = evidence_of.rows(joining), evidence_of.weights(joining)
            brought = [] if is_related else [int(rows[(evidence_gain[rows] + joining_weights).argmax()])]
            if target_tokens[joining] + evidence_tokens[brought].sum() > room:
                break
            room -= target_tokens[joining]
            group_targets.append(joining)
            free[joining] = False
            target_gain[joining] = -np.inf
            evidence_gain[rows] += joining_weights
            full = len(group_targets) == num_targets
            while len(group_evidence) < num_evidence and (
                brought or full or len(group_evidence) * num_targets < len(group_targets) * num_evidence
            ):
                chosen = brought.pop() if brought else evidence_of.best(group_targets, evidence_gain)
                if chosen is None:
                    break
                if evidence_tokens[chosen] > room:
                    # Every document has a token, so none fits from here on.
                    room = 0
                    break
                room -= evidence_tokens[chosen]
                group_evidence.append(chosen)
                evidence_gain[chosen] = -np.inf
                target_gain[targets_of.rows(chosen)] += targets_of.weights(chosen)
            if full:
                break
            joining, is_related = targets_of.best(group_evidence, target_gain), True
            if joining is None and len(group_evidence) < num_evidence:
                joining, is_related = _next_free(order, free), False
        groups.append((group_targets, group_evidence))
        for row in group_targets:
            evidence_gain[evidence_of.rows(row)] = 0
        for row in group_evidence:
            targets_of.keep(row, free)
            target_gain[targets_of.rows(row)] = 0
    return groups


def _next_free(order: list[int], free: np.ndarray) -> int | None:
    """The last row of `order` that is free; those behind it are dropped."""
    while order and not free[order[-1]]:
        order.pop()
    return order[-1] if order else None


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
