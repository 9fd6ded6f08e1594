"""Does retrieval find paraphrases, and does what it finds help?"""

from collections.abc import Sequence

import numpy as np
import torch
from datasets import Dataset
from tqdm.auto import tqdm

from ..retrieval import EvidenceDataset, evaluation_mode

# Rows compared at a time with all others. Our choice.
QUERIES_PER_BLOCK = 1024


def recall_at_k(embeddings: np.ndarray | torch.Tensor, groups: Sequence[int], k: int = 1) -> float:
    """Share of the documents with a known paraphrase that have one among their k nearest others.

    Args:
        embeddings: float `(n, dim)`, compared by inner product in float32: L2-normalise them for cosines.
        groups: int `(n,)`, the same number for documents that paraphrase each other, -1 for those without a known
            paraphrase. These are distractors, never queries; neither is the only document of a group, which has nothing
            to find.
        k: how many of the nearest others count.

    Raises:
        ValueError: shapes that do not fit, values that are not finite, k out of range, no query.
    """
    embeddings = torch.as_tensor(embeddings).detach().float()
    groups = torch.as_tensor(groups, device=embeddings.device)
    if embeddings.ndim != 2 or groups.shape != embeddings.shape[:1]:
        raise ValueError(
            f"embeddings must have the shape (n, dim) and groups (n,), but got {tuple(embeddings.shape)} and "
            f"{tuple(groups.shape)}."
        )
    if not 1 <= k < len(groups):
        raise ValueError(f"k must be between 1 and {len(groups) - 1}, the number of other documents, but got {k}.")
    if not embeddings.isfinite().all():
        raise ValueError("embeddings must be finite, but have NaN or infinite values.")
    _, group, size = groups.unique(return_inverse=True, return_counts=True)
    queries = ((groups != -1) & (size[group] > 1)).nonzero()[:, 0]
    if len(queries) == 0:
        raise ValueError("groups must hold two documents of one group at least, but there is nothing to find.")
    found = 0
    for block in queries.split(QUERIES_PER_BLOCK):
        scores = embeddings[block] @ embeddings.T
        scores[torch.arange(len(block)), block] = -torch.inf
        nearest = scores.topk(k).indices
        found += int((groups[nearest] == groups[block, None]).any(dim=1).sum())
    return found / len(queries)


def evidence_losses(
    model,
    groups: EvidenceDataset | Sequence[dict],
    collator,
    documents: Dataset | None = None,
    max_groups: int | None = None,
    seed: int = 0,
    progress: bool = True,
) -> dict[str, float]:
    """Mean loss a target token of the same targets with three kinds of evidence, in eval mode.

    "none" - "retrieved" is the utility of retrieval; "random" tells how much of it any text gives.

    Args:
        model: its `model(**batch).loss` is the mean over the labels that are not -100; one group is one batch.
        groups: an `EvidenceDataset`, or some of its items, for example held-out ones.
        collator: list of items -> batch of tensors, with the key `labels`; `DataCollatorForParaphrasing`.
        documents: the corpus that the items' rows belong to; that of the dataset if None.
        max_groups: only so many groups, the first ones; all if None.
        seed: of the random evidence.
        progress: show a bar.

    Returns:
        "retrieved": with the group's evidence and its `evidence_mask`; "random": with as many documents, drawn without
        replacement from the corpus less all documents that the group's targets are chunks of; "none": with an
        `evidence_mask` that is False everywhere.

    Raises:
        ValueError: no groups; items without `documents`; a corpus that has no document but the targets'.
    """
    if isinstance(groups, EvidenceDataset):
        documents = groups.documents if documents is None else documents
        # Without groups, reading the first item raises the error that says what to do.
        groups = [groups[i] for i in range(max(1, groups.num_groups))[:max_groups]]
    groups = groups[:max_groups]
    if documents is None:
        raise ValueError(
            "evidence_losses draws random evidence: give the `documents` that the rows of the items index."
        )
    if not groups:
        raise ValueError("evidence_losses needs one group at least, but got none.")
    texts = documents.select_columns("input_ids").with_format(None)
    document_ids = np.asarray(documents.with_format("numpy")["document"][:])
    rng = np.random.default_rng(seed)
    totals = dict.fromkeys(("retrieved", "random", "none"), 0.0)
    tokens = 0
    with evaluation_mode(model) as device:
        for group in tqdm(groups, desc="evidence losses", disable=not progress):
            others = np.flatnonzero(~np.isin(document_ids, document_ids[group["target_rows"]]))
            if len(others) == 0:
                raise ValueError(
                    f"There is no random evidence for the targets {group['target_rows']}: every row of the corpus is a "
                    "chunk of one of their documents. Give more documents."
                )
            drawn = rng.choice(others, min(len(others), len(group["evidence_rows"])), replace=False).tolist()
            num_targets = len(group["labels"])
            kinds = {
                "retrieved": group,
                "random": group
                | {
                    "input_ids": texts[drawn]["input_ids"],
                    "evidence_rows": drawn,
                    "evidence_mask": [[True] * len(drawn)] * num_targets,
                },
                "none": group | {"evidence_mask": [[False] * len(group["input_ids"])] * num_targets},
            }
            for kind, item in kinds.items():
                batch = {name: tensor.to(device) for name, tensor in collator([item]).items()}
                count = int((batch["labels"] != -100).sum())
                totals[kind] += model(**batch).loss.item() * count
            tokens += count
    return {kind: total / tokens for kind, total in totals.items()}
