"""How varied the evidence of an `EvidenceDataset` is, compared with chance, and whether retrieval has collapsed."""

import math

import numpy as np
import pyarrow as pa
from datasets import Dataset

from ..retrieval import EvidenceDataset

# The numbers of the alarm are our choice.
# Of the way from even use of the documents (1) to the same ones for all targets (0), what a collapse has left. The hubs
# of untrained models were seen to leave 0.34 and more, those of trained ones 0.5 and more.
LEAST_EVENNESS = 0.2
# How many times as many documents even use must take as the same ones for all, or too few are there to tell.
LEAST_ROOM = 1.5
# Of the documents that could be targets, how many a collapse has left.
LEAST_TARGETS = 0.1
# How far one language may come, of the way from what its documents make likely (0) to all evidence (1), and how far if
# that way is short.
LARGEST_EXCESS, SMALLEST_EXCESS = 0.5, 0.25
# Draws by chance for a small corpus; large ones vary little, so few draws do.
DRAWS, DRAWN_DOCUMENTS = 100, 100_000
# Groups compared at a time.
GROUPS_PER_BLOCK = 4096


def evidence_use(dataset: EvidenceDataset) -> tuple[dict[str, float], dict[str, str]]:
    """How varied the evidence of a dataset's current groups is, and what speaks for a collapse of retrieval.

    Evidence is counted in places: a document that is evidence of a group fills one, however many targets share it.
    Even use, for comparison, is that by chance: each group draws from its shard, and a language has the share of its
    documents, or more where targets that prefer languages other than their own, as EvidenceDataset does, would give it
    more (of two languages, the rare one serves the many targets of the other).

    Returns:
        Numbers between 0 and 1:
            `distinct_share`: different evidence documents, of as many as there could be (places, or documents of the
                shards if these are fewer).
            `largest_share`: share of the places that the most used documents fill, those being 1% of as many as there
                could be, rounded up.
            `evenness`: (n - a) / (b - a) with n the number of documents that fill half of the places, b that number in
                even use, and a that number if all groups of a shard had the same evidence. Above 1 for more than even
                use; left out where b is below 1.5 a: so few documents or groups tell nothing.
            `target_share`: share of the documents of the shards that are targets; the others rest.
            `cross_language_share`: share of the pairs of target and evidence, chunks of one document left out, whose
                languages are known and differ.
        Findings, each a clause with the figures and what they mean, by name:
            "documents": evenness is below 0.2, and n smaller than chance gives in 100 draws.
            "targets": target_share is below 0.1.
            "language": the evidence in one language is over half of the way from its share in even use to everything,
                more than that share by 0.25 and by 4 standard errors, a group being one draw.
        These thresholds are our choice.

    Raises:
        RuntimeError: the dataset has no groups yet.
    """
    targets, evidence = (rows.numpy() for rows in dataset.groups)
    _, shard_of_target, shard = _encode("shard", dataset.documents, dataset.evidence)
    filled = evidence[evidence >= 0]
    counts = np.bincount(filled, minlength=len(shard))
    # Of each shard: documents, places, groups.
    size = np.bincount(shard, minlength=shard_of_target.max() + 1)
    places = np.bincount(shard[filled], minlength=len(size))
    groups = np.bincount(shard[evidence[:, 0]], minlength=len(size))

    may_be_target = groups[shard_of_target] > 0
    if dataset.first_chunks_only:
        may_be_target &= np.asarray(dataset.documents.with_format("numpy")["chunk"][:]) == 0
    possible, served = np.count_nonzero(may_be_target), np.count_nonzero(targets >= 0)
    available = int(np.minimum(size, places).sum())
    values = {
        "distinct_share": np.count_nonzero(counts) / available,
        "largest_share": np.sort(counts)[::-1][: math.ceil(available / 100)].sum() / len(filled),
        "target_share": served / possible,
    }
    findings = {}
    if served < LEAST_TARGETS * possible:
        findings["targets"] = (
            f"only {served} of {possible} documents are targets, because the most similar pairs are all among them, so "
            "the model learns from few texts"
        )

    languages, language_of_target, language = _encode("language", dataset.documents, dataset.evidence)
    is_known = np.array([bool(name) for name in languages])
    of_targets = np.bincount(language_of_target[targets[targets >= 0]], minlength=len(languages)) / served
    share = np.bincount(language[filled], minlength=len(languages)) / len(filled)
    of_documents = np.bincount(language, (places / size.clip(min=1))[shard], minlength=len(languages)) / len(filled)
    # Evidence of the targets in one language, divided by the documents of all others.
    to_others = np.divide(of_targets, 1 - of_documents, out=np.zeros(len(share)), where=of_documents < 1)
    likely = np.maximum(of_documents, of_documents * (to_others.sum() - to_others)).clip(max=1)
    excess = np.where(is_known, share - likely, -1.0)
    most = int(excess.argmax())
    noise = 4 * math.sqrt(likely[most] * (1 - likely[most]) / len(evidence))
    if excess[most] > max(LARGEST_EXCESS * (1 - likely[most]), SMALLEST_EXCESS, noise):
        findings["language"] = (
            f"{share[most]:.0%} of the evidence is in the language {languages[most]!r}, where its documents make "
            f"{likely[most]:.0%} likely, so documents are found for their language and not for what they say"
        )

    weight = np.divide(likely, of_documents, out=np.ones(len(share)), where=of_documents > 0)[language]
    in_shard = np.bincount(shard, weight, minlength=len(size))
    probability = (places / np.maximum(groups * in_shard, 1e-9))[shard] * weight
    rng = np.random.default_rng(0)
    draws = range(max(1, min(DRAWS, DRAWN_DOCUMENTS // len(shard))))
    even = [_half(rng.binomial(groups[shard], probability.clip(max=1))) for _ in draws]
    half, same = _half(counts), _half(np.repeat(groups, -(-places // groups.clip(min=1))))
    if np.mean(even) >= LEAST_ROOM * same:
        values["evenness"] = (half - same) / (np.mean(even) - same)
        if values["evenness"] < LEAST_EVENNESS and half < min(even):
            findings["documents"] = (
                f"few documents serve most targets ({half} fill half of the {len(filled)} places for evidence, where "
                f"even use takes {np.mean(even):.0f}), so targets are rebuilt from the same texts whatever they say"
            )

    _, document = _encode("document", dataset.documents)
    pairs = crossing = 0
    for start in range(0, len(targets), GROUPS_PER_BLOCK):
        block = slice(start, start + GROUPS_PER_BLOCK)
        target, found = targets[block, :, None], evidence[block, None]
        is_pair = (target >= 0) & (found >= 0)
        if dataset.evidence is dataset.documents:
            is_pair &= document[target] != document[found]
        first, second = language_of_target[target], language[found]
        pairs += np.count_nonzero(is_pair)
        crossing += np.count_nonzero(is_pair & (first != second) & is_known[first] & is_known[second])
    values["cross_language_share"] = crossing / max(pairs, 1)
    return {name: float(value) for name, value in values.items()}, findings


def _half(counts: np.ndarray) -> int:
    """The smallest number of documents that fill half of the places."""
    filled = np.cumsum(np.sort(counts)[::-1])
    return int(np.searchsorted(filled, filled[-1] / 2)) + 1


def _encode(column: str, *datasets: Dataset) -> tuple[list, ...]:
    """The distinct values of a column, and for each dataset their numbers, int64 `(rows,)`."""
    parts = [part.select_columns(column).with_format("arrow")[:].column(column) for part in datasets]
    encoded = pa.chunked_array([chunk for part in parts for chunk in part.chunks]).combine_chunks()
    encoded = encoded.dictionary_encode(null_encoding="encode")
    numbers = encoded.indices.to_numpy().astype(np.int64)
    return encoded.dictionary.to_pylist(), *np.split(numbers, np.cumsum([len(part) for part in parts[:-1]]))
