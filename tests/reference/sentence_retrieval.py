"""Naive loops of margin scoring and of mining (Artetxe and Schwenk 2019, arXiv 1811.01136, section 3)."""

import numpy as np


def cosine(x, y):
    return float(np.dot(x, y) / np.sqrt(np.dot(x, x) * np.dot(y, y)))


def neighbors(x, others, k):
    """The k others that are closest to x, by index."""
    return sorted(range(len(others)), key=lambda j: -cosine(x, others[j]))[:k]


def margin(x, y, sources, targets, k):
    """cos(x, y) over the sum of cos(x, z) / 2k, for z among the k nearest targets, and of cos(y, z) / 2k likewise."""
    near_x, near_y = neighbors(x, targets, k), neighbors(y, sources, k)
    total = 0.0
    for j in near_x:
        total += cosine(x, targets[j]) / (2 * len(near_x))
    for i in near_y:
        total += cosine(y, sources[i]) / (2 * len(near_y))
    return cosine(x, y) / total


def accuracy(sources, targets, k, by):
    """How many sources, in percent, have the target of the same row as their best candidate."""
    right = 0
    for i, x in enumerate(sources):
        scores = {}
        for j in neighbors(x, targets, k):
            y = targets[j]
            scores[j] = cosine(x, y) if by == "cosine" else margin(x, y, sources, targets, k)
        right += max(scores, key=scores.get) == i
    return 100 * right / len(sources)


def mine(sources, targets, k):
    """Margin, source and target of the candidates: of both directions, the highest first, each sentence once."""
    pairs = []
    for i, x in enumerate(sources):
        best = max(neighbors(x, targets, k), key=lambda j: margin(x, targets[j], sources, targets, k))
        pairs.append((margin(x, targets[best], sources, targets, k), i, best))
    for j, y in enumerate(targets):
        best = max(neighbors(y, sources, k), key=lambda i: margin(sources[i], y, sources, targets, k))
        pairs.append((margin(sources[best], y, sources, targets, k), best, j))
    taken = []
    for score, i, j in sorted(pairs, reverse=True):
        if all(i != other for _, other, _ in taken) and all(j != other for _, _, other in taken):
            taken.append((score, i, j))
    return taken


def best_f1(candidates, gold):
    """The highest F1, in percent, that any threshold reaches."""
    best = 0.0
    for threshold, _, _ in candidates:
        taken = {(i, j) for score, i, j in candidates if score >= threshold}
        precision, recall = len(taken & gold) / len(taken), len(taken & gold) / len(gold)
        if precision + recall > 0:
            best = max(best, 100 * 2 * precision * recall / (precision + recall))
    return best
