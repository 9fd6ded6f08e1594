"""Watches retrieval while a model trains: is evidence varied, does it help, and has retrieval collapsed?"""

import math
import re
from collections.abc import Sequence

import numpy as np
import torch
from datasets import Dataset
from transformers import TrainerCallback
from transformers.utils import logging

from ..retrieval import EvidenceDataset, embed_documents
from .collapse import evidence_use
from .metrics import evidence_losses, recall_at_k, recall_queries

logger = logging.get_logger(__name__)

# The numbers of the alarm are our choice.
# Least share of pairs across languages, spread of f and recall: as a part of the largest share, the first spread and
# the largest recall of the run.
LEAST_SHARE, LEAST_SPREAD, LEAST_RECALL = 0.1, 0.1, 2 / 3
# A share of pairs across languages below this is too small to be lost.
SHARE_TO_LOSE = 0.1
# A spread of f that is no more than rounding.
ROUNDING = 1e-5
# Documents between which the spread of f is measured.
SAMPLE = 256
ADVICE = (
    "let the layers that retrieve learn more slowly, hold the first groups for longer before the first refresh, or go "
    "back to an earlier checkpoint"
)


class LogEvidenceCallback(TrainerCallback):
    """Logs whether retrieval works, beside the loss, and warns when it collapses.

        refresh = RefreshIndexCallback(dataset, refresh_steps=1000)
        watch = LogEvidenceCallback(dataset, eval_steps=500, held_out=held_out, collator=collator)
        Trainer(model=model, train_dataset=dataset, data_collator=collator, callbacks=[refresh, watch], ...)

    Logged before the first update (with the first), every `eval_steps` and at the end:
        `evidence/distinct_share`, `evidence/largest_share`, `evidence/evenness`, `evidence/target_share`,
            `evidence/cross_language_share`: how varied the evidence in use is, see [`evidence_use`]; also at each
            refresh.
        `evidence/staleness`: updates since the last refresh, or since training began; also at each refresh. After a
            search in the background, the weights it used are older, by `refresh/staleness`.
        `evidence/relevance_mean`, `evidence/relevance_std`: of f with the current weights, between 256 documents.
        `evidence/relevance_weight_<layer>`: beta of each decoder layer that reads evidence, a parameter
            `relevance_weight` of the model.
        `evidence/loss_retrieved`, `evidence/loss_random`, `evidence/loss_none`, in nats a token, and
            `evidence/utility`, the last less the first, with `held_out`; see [`evidence_losses`].
        `evidence/recall_at_1`, and `evidence/cross_language_recall_at_1` among the documents of other languages, where
            they are known, with `known_documents`; see [`recall_at_k`].
        `evidence/collapsed`: 1 if there is a finding as below, else 0.
    As with [`RefreshIndexCallback`] they are in `state.log_history`, on the console and in the `logs` of the callbacks
    that come after this one; integrations are to be given after it.

    A warning, one for each finding, says what was found and what to do:
        few documents serve most targets, few are targets, or evidence drifts to one language: see [`evidence_use`];
        pairs across languages, once over 0.1 of all, are less than a tenth of what they were;
        the standard deviation of f is less than a tenth of what it was at first, or below 1e-5, hence rounding;
        the recall, of all documents or across languages, is less than two thirds of what it was, by 4 standard errors.
    These thresholds are our choice; "was" is in this run, including what it was resumed from.

    Modes, gradients and random numbers of the training are untouched. Every process measures everything, so that none
    waits for another; the groups of an EvidenceDataset that is held out are found together.

    Args:
        dataset: the `train_dataset` of the Trainer.
        eval_steps: updates from one measurement to the next.
        held_out: groups of documents that are not trained on. Those of an `EvidenceDataset` are found anew with the
            current weights each time; items of one stay as they are.
        collator: of the trainer, with `held_out`.
        held_out_documents: what the rows of items index, where `held_out` is no EvidenceDataset.
        max_groups: losses of so many groups of `held_out` only, the first ones; all if None. 64 is our choice.
        known_documents: dataset with the column `input_ids` and perhaps `language`, among them known paraphrases.
        known_groups: int `(documents,)`, the same for paraphrases of each other, -1 for none.
        batch_size: documents that are embedded at once.
        progress: show bars.

    Raises:
        ValueError: `held_out` is the dataset itself, or comes without `collator` or, as items, without
            `held_out_documents`; one of `known_documents` and `known_groups` without the other; eval_steps below 1;
            nobody knows the padding token; what the measurements raise.
    """

    def __init__(
        self,
        dataset: EvidenceDataset,
        eval_steps: int,
        held_out: EvidenceDataset | Sequence[dict] | None = None,
        collator=None,
        held_out_documents: Dataset | None = None,
        max_groups: int | None = 64,
        known_documents: Dataset | None = None,
        known_groups: Sequence[int] | None = None,
        batch_size: int = 64,
        progress: bool = False,
    ):
        if eval_steps < 1:
            raise ValueError(f"eval_steps must be at least 1, but got {eval_steps}.")
        if held_out is dataset:
            raise ValueError(
                "held_out must not be the dataset that is trained on, whose groups would be made anew at each "
                "measurement. Give an EvidenceDataset of other documents, or some items."
            )
        if held_out is not None and collator is None:
            raise ValueError("held_out needs the collator that makes batches of its groups, but collator is None.")
        if not isinstance(held_out, EvidenceDataset | None) and held_out_documents is None:
            raise ValueError(
                "held_out is a list of groups, so held_out_documents must be the documents that their rows index: "
                "random evidence is drawn from them."
            )
        if (known_documents is None) != (known_groups is None):
            raise ValueError("known_documents and known_groups belong together, but only one of them was given.")
        self.dataset = dataset
        self.eval_steps = eval_steps
        self.held_out = held_out
        self.collator = collator
        self.held_out_documents = held_out_documents
        self.max_groups = max_groups
        self.known_documents = known_documents
        self.known_groups = known_groups
        self.batch_size = batch_size
        self.progress = progress
        self._languages = None
        if known_documents is not None and "language" in known_documents.column_names:
            languages = known_documents["language"][:]
            known = [pair for pair in zip(known_groups, languages, strict=False) if pair[0] != -1 and pair[1]]
            if len(set(known)) > len({group for group, _ in known}):
                self._languages = languages

    def on_train_begin(self, args, state, control, **kwargs):
        self._rebuilds = None
        self._not_logged: dict[str, float] = {}
        self._warned: set[str] = set()
        # A resumed run goes on from what was logged before its checkpoint.
        past = [entry for entry in state.log_history if entry["step"] <= state.global_step]
        self._history = {
            name: [entry[f"evidence/{name}"] for entry in past if f"evidence/{name}" in entry]
            for name in ("cross_language_share", "relevance_std", "recall_at_1", "cross_language_recall_at_1")
        }
        refreshed_at = (entry["step"] - entry["evidence/staleness"] for entry in past if "evidence/staleness" in entry)
        self._refreshed_at = max(refreshed_at, default=state.global_step)

    def on_step_begin(self, args, state, control, model=None, processing_class=None, **kwargs):
        # Other callbacks may make or restore the groups as training begins.
        is_first = self._rebuilds is None
        if is_first:
            self._rebuilds = self.dataset.num_rebuilds
        self._watch(state, model, processing_class, is_first and state.global_step == 0)

    def on_step_end(self, args, state, control, model=None, processing_class=None, **kwargs):
        is_due = state.global_step % self.eval_steps == 0 or state.global_step == state.max_steps
        self._watch(state, model, processing_class, is_due)
        if self._not_logged and args.logging_strategy != "no":
            control.should_log = True

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self._not_logged:
            self._not_logged["evidence/staleness"] = state.global_step - self._refreshed_at
        logs.update(self._not_logged)
        state.log_history[-1].update(self._not_logged)
        self._not_logged = {}

    def _watch(self, state, model, processing_class, is_due: bool) -> None:
        """Measures everything if it is due, and what costs little if the groups are new."""
        is_refreshed = self.dataset.num_rebuilds != self._rebuilds
        if is_refreshed:
            self._rebuilds, self._refreshed_at = self.dataset.num_rebuilds, state.global_step
        if not (is_due or is_refreshed):
            return
        values, findings = evidence_use(self.dataset)
        if is_due:
            values |= self._measure(model, processing_class)
        findings |= self._compare(values)
        values["collapsed"] = float(bool(findings))
        self._not_logged |= {f"evidence/{name}": value for name, value in values.items()}
        if state.is_world_process_zero:
            for name, sentence in findings.items():
                if name not in self._warned:
                    logger.warning(f"Retrieval collapses at step {state.global_step}: {sentence}; {ADVICE}.")
        self._warned |= findings.keys()

    def _compare(self, values: dict[str, float]) -> dict[str, str]:
        """Adds the values to the history, and returns what is found in it."""
        findings = {}
        for name, history in self._history.items():
            history += [values[name]] if name in values else []
        crossing, spread, *recalls = self._history.values()
        if crossing[-1] < LEAST_SHARE * max(crossing) and max(crossing) > SHARE_TO_LOSE:
            findings["own language"] = (
                f"{crossing[-1]:.1%} of the pairs of target and evidence are of two languages, where it was "
                f"{max(crossing):.1%} before, so targets are no longer rebuilt from other languages"
            )
        if spread and spread[-1] < max(LEAST_SPREAD * spread[0], ROUNDING):
            findings["spread"] = (
                f"the similarity f of two documents varies by {spread[-1]:.2g} only (its standard deviation, at first "
                f"{spread[0]:.2g}), so it does not tell which document is relevant"
            )
        kinds = (None, ""), (self._languages, " in another language")
        for recall, (languages, where) in zip(recalls, kinds, strict=True):
            if not recall or self.known_groups is None:
                continue
            queries, _ = recall_queries(torch.as_tensor(self.known_groups), languages)
            noise = 4 * math.sqrt(max(recall) * (1 - max(recall)) / len(queries))
            if recall[-1] < min(LEAST_RECALL * max(recall), max(recall) - noise):
                findings[f"recall{where}"] = (
                    f"the nearest other document{where} is a known paraphrase of {recall[-1]:.1%} of the documents, "
                    f"where it was of {max(recall):.1%} before, so retrieval unlearns what it had"
                )
        return findings

    def _measure(self, model, processing_class) -> dict[str, float]:
        """What takes forward passes, and the relevance weights."""
        known = (getattr(part, "pad_token_id", None) for part in (processing_class, getattr(model, "config", None)))
        pad_token_id = next((number for number in known if number is not None), None)
        if pad_token_id is None:
            raise ValueError(
                "LogEvidenceCallback must know the padding token to embed documents in batches, but neither Trainer's "
                "processing_class nor model.config has a pad_token_id. Give Trainer the tokenizer as processing_class."
            )
        embedding = {"embedder": model, "pad_token_id": pad_token_id, "batch_size": self.batch_size}
        embedding["progress"] = self.progress
        documents = self.dataset.documents
        sample = np.random.default_rng(0).choice(len(documents), min(SAMPLE, len(documents)), replace=False)
        # After a collapse all f are near 1, and their spread is a small difference of large numbers.
        vectors = embed_documents(documents, rows=sample, **embedding).astype(np.float64)
        relevance = (vectors @ vectors.T)[~np.eye(len(sample), dtype=bool)]
        values = {"relevance_mean": float(relevance.mean()), "relevance_std": float(relevance.std())}
        for name, parameter in model.named_parameters():
            if name.endswith("relevance_weight"):
                layer = (re.findall(r"\d+", name) or [0])[-1]
                values[f"relevance_weight_{layer}"] = parameter.item()
        if self.held_out is not None:
            if isinstance(self.held_out, EvidenceDataset):
                groups, _ = self.held_out.find_groups(**embedding, number=0)
                self.held_out.install(groups)
            losses = evidence_losses(
                model, self.held_out, self.collator, self.held_out_documents, self.max_groups, progress=self.progress
            )
            values |= {f"loss_{kind}": loss for kind, loss in losses.items()}
            values["utility"] = losses["none"] - losses["retrieved"]
        if self.known_documents is not None:
            vectors = embed_documents(self.known_documents, **embedding)
            values["recall_at_1"] = recall_at_k(vectors, self.known_groups)
            if self._languages is not None:
                values["cross_language_recall_at_1"] = recall_at_k(
                    vectors, self.known_groups, languages=self._languages
                )
        return values
