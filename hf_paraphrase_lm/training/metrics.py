"""Does retrieval find paraphrases, does what it finds help, and what of a corrupted text is told and restored?"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
import torch
from datasets import Dataset
from tqdm.auto import tqdm

from ..data import DataCollatorForCorrectiveLM
from ..retrieval import EvidenceDataset, evaluation_mode

# Rows compared at a time with all others. Our choice.
QUERIES_PER_BLOCK = 1024


def recall_at_k(
    embeddings: np.ndarray | torch.Tensor,
    groups: Sequence[int],
    k: int = 1,
    languages: Sequence[str | None] | None = None,
) -> float:
    """Share of the documents with a known paraphrase that have one among their k nearest others.

    Args:
        embeddings: float `(n, dim)`, compared by inner product in float32: L2-normalise them for cosines.
        groups: int `(n,)`, the same number for documents that paraphrase each other, -1 for those without a known
            paraphrase. These are distractors, never queries; neither is the only document of a group, which has nothing
            to find.
        k: how many of the nearest others count.
        languages: str `(n,)`, "" or None where it is not known. If given, others are those of another language only,
            and documents of unknown language are left out: the recall of translations.

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
    if languages is not None and len(languages) != len(groups):
        raise ValueError(f"languages must be one a document, but got {len(languages)} for {len(groups)} documents.")
    if not 1 <= k < len(groups):
        raise ValueError(f"k must be between 1 and {len(groups) - 1}, the number of other documents, but got {k}.")
    if not embeddings.isfinite().all():
        raise ValueError("embeddings must be finite, but have NaN or infinite values.")
    queries, kinds = recall_queries(groups, languages)
    if len(queries) == 0:
        raise ValueError(
            f"groups must hold two documents of one group{' in two languages' if languages is not None else ''} at "
            "least, but there is nothing to find."
        )
    found = 0
    for block in queries.split(QUERIES_PER_BLOCK):
        scores = embeddings[block] @ embeddings.T
        scores.masked_fill_((kinds[block, None] == kinds) | (kinds == -1), -torch.inf)
        best, nearest = scores.topk(k)
        is_paraphrase = (groups[nearest] == groups[block, None]) & (best > -torch.inf)
        found += int(is_paraphrase.any(dim=1).sum())
    return found / len(queries)


def recall_queries(
    groups: torch.Tensor, languages: Sequence[str | None] | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The documents that [`recall_at_k`] asks for, and the number of each document's language, -1 if not known.

    Returns:
        int64 `(queries,)` and `(n,)`.
    """
    # Without languages, every document is of another one.
    numbers: dict = {"": -1, None: -1}
    names = range(len(groups)) if languages is None else languages
    kinds = torch.tensor([numbers.setdefault(name, len(numbers)) for name in names], device=groups.device)
    is_known = (groups != -1) & (kinds != -1)
    found_in, _ = torch.stack([groups, kinds])[:, is_known].unique(dim=1)
    several, count = found_in.unique(return_counts=True)
    return (is_known & torch.isin(groups, several[count > 1])).nonzero()[:, 0], kinds


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
        documents: the corpus that the rows of items index, of targets and of evidence; not needed for an
            `EvidenceDataset`, which has its own.
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
    has_own_evidence = False
    if isinstance(groups, EvidenceDataset):
        has_own_evidence = groups.evidence is not groups.documents
        documents = groups.evidence
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
            # A corpus of evidence alone has no documents of the targets.
            own = [] if has_own_evidence else document_ids[group["target_rows"]]
            others = np.flatnonzero(~np.isin(document_ids, own))
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


def corrective_lm_metrics(
    model,
    dataset: Dataset | Sequence[dict],
    collator: DataCollatorForCorrectiveLM,
    batch_size: int = 32,
    seed: int = 0,
    progress: bool = True,
) -> dict[str, float]:
    """The four losses of COCO-LM and how well it tells replaced tokens from original ones, in eval mode.

    Masks and crops follow from the seed and the text alone, so models can be compared, and one model before and after
    its training. The replacements follow from the seed too, but are drawn from the model's own auxiliary network: the
    better it is, the fewer they are and the harder to tell, so every model has a majority rate of its own. The caller's
    random numbers are untouched.

    A token is told to be replaced where sigmoid(copy_logits) < 0.5, that is where its logit is negative. Originals are
    about nine in ten, so accuracy says little by itself: precision, recall and F1 are those of the replaced tokens
    (Clark et al. 2020 log precision and recall beside accuracy in ELECTRA's pre-training).

    Args:
        model: `CocoLMForPretraining` or one that returns the same losses, `copy_logits` and `corrupted_input_ids`. If
            `copy_logits` is None, as with the objective "masked_lm", nothing is said about detection.
        dataset: rows with `input_ids`.
        collator: as in training; its own seed is not used.
        batch_size: largest number of texts in a batch; the contrastive loss has 2 * batch_size - 2 negatives. Texts
            are shuffled with the seed and batches are as equal as they can be, so that a small last batch does not
            make the contrastive loss look better.
        seed: of masks, crops, replacements and the order of the texts.
        progress: show a bar.

    Returns:
        Means over the whole dataset: `mlm_loss` and `corrective_lm_loss` over masked tokens, `copy_loss` over all
        tokens that are not padding, `contrastive_loss` over both views of all texts, in nats, unweighted.
        `detection_accuracy`: over all tokens that are not padding. `majority_rate`: share of the originals among them,
        the accuracy of always saying "original". `detection_precision`, `detection_recall`, `detection_f1`: 0 where
        there is nothing to divide by.

    Raises:
        ValueError: no texts, or batch_size below 1; what the collator and the model raise.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, but got {batch_size}.")
    if len(dataset) == 0:
        raise ValueError("corrective_lm_metrics needs one text at least, but got none.")
    collator = dataclasses.replace(collator, seed=seed)
    order = np.random.default_rng(seed).permutation(len(dataset))
    batches = np.array_split(order, math.ceil(len(order) / batch_size))
    sums = dict.fromkeys(("mlm_loss", "copy_loss", "corrective_lm_loss", "contrastive_loss"), 0.0)
    masked = tokens = flagged = replaced = hits = 0
    with evaluation_mode(model) as device, torch.random.fork_rng([] if device.type == "cpu" else [device]):
        torch.manual_seed(seed)
        for rows in tqdm(batches, desc="corrective LM metrics", disable=not progress):
            batch = {name: tensor.to(device) for name, tensor in collator([dataset[int(i)] for i in rows]).items()}
            output = model(**batch)
            is_token = batch["labels"] != -100
            counts = {
                "mlm_loss": int((is_token & (batch["labels"] != batch["input_ids"])).sum()),
                "copy_loss": int(is_token.sum()),
                "contrastive_loss": len(rows),
            }
            counts["corrective_lm_loss"] = counts["mlm_loss"]
            for name, count in counts.items():
                sums[name] += output[name].item() * count
            masked += counts["mlm_loss"]
            tokens += counts["copy_loss"]
            if output.copy_logits is None:
                continue
            is_replaced = is_token & (output.corrupted_input_ids != batch["labels"])
            is_flagged = is_token & (output.copy_logits < 0)
            replaced += int(is_replaced.sum())
            flagged += int(is_flagged.sum())
            hits += int((is_replaced & is_flagged).sum())
    sizes = {"mlm_loss": masked, "copy_loss": tokens, "corrective_lm_loss": masked, "contrastive_loss": len(order)}
    losses = {name: total / max(sizes[name], 1) for name, total in sums.items()}
    if output.copy_logits is None:
        return losses
    return losses | {
        # Of all tokens, those flagged in error and those missed are wrong.
        "detection_accuracy": 1 - (flagged + replaced - 2 * hits) / tokens,
        "majority_rate": 1 - replaced / tokens,
        "detection_precision": hits / max(flagged, 1),
        "detection_recall": hits / max(replaced, 1),
        "detection_f1": 2 * hits / max(flagged + replaced, 1),
    }
