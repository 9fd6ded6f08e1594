"""Retrieval and groups with one loop an index, and corpora small enough for them.

The pairs, the weights and the groups are those of Lewis et al. 2020, section 2; where the paper leaves the order of the
steps open, `grow_groups` of the package says which one is meant.
"""

import math
from collections import Counter

import numpy as np
import torch
from datasets import Dataset, Features, List, Value

FEATURES = Features(
    {
        "input_ids": List(Value("int32")),
        "document": Value("int64"),
        "chunk": Value("int64"),
        "shard": Value("int64"),
        "language": Value("string"),
    }
)


def make_documents(input_ids, document=None, shard=None, language=None):
    """A documents dataset as `chunk_documents` makes it, of one chunk a document, one shard, no language by default."""
    n = len(input_ids)
    columns = {
        "input_ids": [list(ids) for ids in input_ids],
        "document": list(range(n)) if document is None else list(document),
        "chunk": [0] * n,
        "shard": [0] * n if shard is None else list(shard),
        "language": [""] * n if language is None else list(language),
    }
    return Dataset.from_dict(columns, features=FEATURES)


def row_documents(n, **columns):
    """Documents whose first token is their row, of lengths 1 to 7."""
    return make_documents([[row] + [n] * (row * 5 % 7) for row in range(n)], **columns)


class RowEmbedder:
    """Gives a document of `row_documents` the vector of its row."""

    def __init__(self, vectors):
        self.vectors = torch.nn.functional.normalize(torch.as_tensor(vectors, dtype=torch.float32), dim=-1)

    def embed(self, input_ids, attention_mask):
        return self.vectors[input_ids[:, 0]]


def all_pairs(embeddings, document_ids):
    """[(f, target, evidence)] of all ordered pairs of different documents, best first."""
    n = len(embeddings)
    pairs = []
    for target in range(n):
        for evidence in range(n):
            if document_ids[target] != document_ids[evidence]:
                f = sum(float(a) * float(b) for a, b in zip(embeddings[target], embeddings[evidence], strict=True))
                pairs.append((f, target, evidence))
    return sorted(pairs, reverse=True)


def without_language(embeddings, languages):
    """Every embedding less the mean of its language, divided by its length, as lists."""
    rest = []
    for row, language in zip(embeddings, languages, strict=True):
        others = [other for other, same in zip(embeddings, languages, strict=True) if same == language]
        vector = [x - sum(column) / len(others) for x, *column in zip(row, *others, strict=True)]
        length = math.sqrt(sum(x * x for x in vector))
        rest.append([x / length if length > 1e-6 else 0.0 for x in vector])
    return rest


def inner_weight(weight, targets, evidence):
    """Sum of the weights of a group's inner edges; `weight` is a dictionary (target, evidence) -> weight."""
    return sum(weight.get((t, e), 0.0) for t in targets for e in evidence)


def grow_groups(
    weight, num_targets, num_evidence, order, target_tokens=None, evidence_tokens=None, max_tokens=math.inf
):
    """Greedy groups: `order` lists the targets as seeds. Every step tries every candidate."""
    free = list(order)
    all_evidence = sorted({e for _, e in weight})
    groups = []

    def gain_of_target(t, evidence):
        return inner_weight(weight, [t], evidence)

    def best_evidence(targets, evidence, candidates=all_evidence):
        gains = {e: inner_weight(weight, targets, [e]) for e in candidates if e not in evidence}
        best = max(gains, key=gains.get, default=None)
        return best if best is not None and gains[best] > 0 else None

    def fits(targets, evidence):
        if target_tokens is None:
            return True
        return sum(target_tokens[t] for t in targets) + sum(evidence_tokens[e] for e in evidence) <= max_tokens

    while free:
        targets, evidence = [], []
        joining = free[0]
        while joining is not None:
            brought = []
            if gain_of_target(joining, evidence) == 0:
                brought = [best_evidence([*targets, joining], evidence, [e for t, e in weight if t == joining])]
            if not fits([*targets, joining], evidence + brought):
                break
            targets.append(joining)
            free.remove(joining)
            evidence += brought
            # The evidence is filled up as far as the targets are: e / num_evidence >= t / num_targets.
            is_closed = False
            while len(evidence) < num_evidence and len(evidence) / num_evidence < len(targets) / num_targets:
                more = best_evidence(targets, evidence)
                if more is None:
                    break
                if not fits(targets, [*evidence, more]):
                    is_closed = True
                    break
                evidence.append(more)
            joining = None
            if len(targets) < num_targets and free and not is_closed:
                joining = max(free, key=lambda t: gain_of_target(t, evidence))
                if gain_of_target(joining, evidence) == 0:
                    joining = free[0] if len(evidence) < num_evidence else None
        groups.append((targets, evidence))
    return groups


def recall_at_k(embeddings, groups, k):
    found = queries = 0
    for query in range(len(groups)):
        others = [other for other in range(len(groups)) if other != query]
        if groups[query] == -1 or all(groups[other] != groups[query] for other in others):
            continue
        others.sort(key=lambda other: -float(np.dot(embeddings[query], embeddings[other])))
        queries += 1
        found += any(groups[other] == groups[query] for other in others[:k])
    return found / queries


def tf_idf(texts, text):
    """{token: (1 + log tf) * idf} of one text, idf = log(texts / texts with the token)."""
    weights = {}
    for token, count in Counter(text).items():
        having = sum(token in other for other in texts)
        weights[token] = (1 + math.log(count)) * math.log(len(texts) / having) if having else 0.0
    return weights
