"""What MARGE trains on: groups of targets with shared evidence, made anew from the model's own embeddings."""

import time

import numpy as np
import pyarrow.compute as pc
import torch
from datasets import Dataset
from tqdm.auto import tqdm

from .embedding import embed_documents, evaluation_mode
from .evidence import grow_groups, nearest_evidence, relevance_moments, relevant_pairs

COLUMNS = ("input_ids", "document", "shard", "language")
# Added to an edge's weight times f, so that ties go to the more relevant; too small to outweigh an edge. Our choice.
TIE_BREAK = 1e-3


class EvidenceDataset(torch.utils.data.Dataset):
    """A map-style dataset whose items are groups (Lewis et al. 2020, section 2), for `DataCollatorForParaphrasing`.

    `rebuild` embeds the documents shard by shard, keeps the most relevant pairs of each shard and grows groups from
    them. The groups lie in shared memory: DataLoader workers that run already (forked or spawned, persistent or not)
    serve the new ones from then on, except for batches they have prefetched. Workers read tables, never search.

    An item is a dictionary of
        `input_ids`: the evidence, up to `num_evidence` lists of token ids,
        `labels`: the targets, up to `num_targets` lists of token ids,
        `evidence_mask`: bool, targets x evidence; False where the target must not see the document, because it is the
            target itself or a chunk of the same document,
        `target_rows`, `evidence_rows`: rows of `documents`, for analysis.
    The length is always `ceil(documents / num_targets)`, one pass over the corpus at the most; item i is group
    `i % num_groups`.

    Args:
        documents: dataset with the columns `input_ids, document, shard, language` that `chunk_documents` makes; a row
            is one possible target and one possible evidence document.
        num_targets: targets of a group, at the most. The paper fills a token budget; 8 is our choice.
        num_evidence: evidence documents of a group, at the most; 8 is our choice.
        strategy: "pairs": the paper's groups, see `relevant_pairs` and `grow_groups`. "neighbors": every target by
            itself with its own most relevant documents of its shard; needs `num_targets=1`.
        pairs_per_target: "pairs" keeps the best `pairs_per_target * (size of the shard)` pairs of a shard. The paper
            does not print its number; 8 is our choice.
        cross_language_weight: weight of an edge between documents of two known languages, others weigh 1 (paper: 100).
        seed: of the order in which groups are grown, together with the number of rebuilds so far.

    Raises:
        ValueError: a missing column, a bad option, or no more than `num_evidence` documents, or all of one document.
        RuntimeError: an item is read before the first `rebuild`.
    """

    def __init__(
        self,
        documents: Dataset,
        num_targets: int = 8,
        num_evidence: int = 8,
        strategy: str = "pairs",
        pairs_per_target: int = 8,
        cross_language_weight: float = 100.0,
        seed: int = 0,
    ):
        for name, value in (
            ("num_targets", num_targets),
            ("num_evidence", num_evidence),
            ("pairs_per_target", pairs_per_target),
        ):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, but got {value}.")
        if cross_language_weight <= 0:
            raise ValueError(f"cross_language_weight must be positive, but got {cross_language_weight}.")
        if strategy not in ("pairs", "neighbors"):
            raise ValueError(f"strategy must be 'pairs' or 'neighbors', but got {strategy!r}.")
        if strategy == "neighbors" and num_targets != 1:
            raise ValueError(
                f"strategy='neighbors' needs num_targets=1, but got {num_targets}: every target has evidence of its "
                "own, so a group has one target. Use strategy='pairs' for shared evidence."
            )
        missing = [column for column in COLUMNS if column not in documents.column_names]
        if missing:
            raise ValueError(
                f"The documents lack the columns {missing}; they have {documents.column_names}. "
                "Make them with chunk_documents."
            )
        if len(documents) <= num_evidence:
            raise ValueError(
                f"num_evidence={num_evidence} needs a corpus of at least {num_evidence + 1} documents (a target is "
                f"never its own evidence), but it has {len(documents)}. Give more documents or lower num_evidence."
            )
        self.documents = documents
        self.num_targets = num_targets
        self.num_evidence = num_evidence
        self.strategy = strategy
        self.pairs_per_target = pairs_per_target
        self.cross_language_weight = cross_language_weight
        self.seed = seed
        self._texts = documents.select_columns("input_ids").with_format(None)
        self._document_ids, document_values = _encode(documents, "document")
        self._shard_ids, self.shards = _encode(documents, "shard")
        self._language_ids, languages = _encode(documents, "language")
        self._language_ids[np.isin(self._language_ids, [i for i, name in enumerate(languages) if not name])] = -1
        if len(document_values) == 1:
            raise ValueError(
                f"All {len(documents)} rows are chunks of one document, so no target can have evidence: "
                "a target never sees its own document. Give more documents."
            )
        # Two tables: one is read while the other is written. -1 is no row.
        self._targets = torch.full((2, len(self), num_targets), -1)
        self._evidence = torch.full((2, len(self), num_evidence), -1)
        # Number of rebuilds (table `rebuilds % 2` is read; 0: none yet), then the groups in each table.
        self._state = torch.zeros(3, dtype=torch.int64)
        self._share()

    def _share(self) -> None:
        for table in (self._targets, self._evidence, self._state):
            table.share_memory_()

    def __setstate__(self, state: dict) -> None:
        # Tensors that came through shared memory (spawned workers) stay shared; copies get a memory of their own.
        self.__dict__.update(state)
        self._share()

    def __len__(self) -> int:
        return -(-len(self.documents) // self.num_targets)

    @property
    def num_groups(self) -> int:
        """Groups of the last rebuild; 0 before the first one."""
        rebuilds = int(self._state[0])
        return int(self._state[1 + rebuilds % 2])

    def _group(self, index: int) -> tuple[list[int], list[int]]:
        """Target rows and evidence rows. Read again if two rebuilds have passed over it meanwhile."""
        while True:
            rebuilds = int(self._state[0])
            if rebuilds == 0:
                raise RuntimeError(
                    "EvidenceDataset has no groups yet. Call dataset.rebuild(embedder, pad_token_id) first, for "
                    "example with the model or a LexicalEmbedder, or give Trainer a RefreshIndexCallback."
                )
            table = rebuilds % 2
            group = index % int(self._state[1 + table])
            targets, evidence = self._targets[table, group].tolist(), self._evidence[table, group].tolist()
            if int(self._state[0]) == rebuilds:
                return [row for row in targets if row >= 0], [row for row in evidence if row >= 0]

    def __getitem__(self, index: int) -> dict[str, list]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"Group {index} does not exist: the dataset has {len(self)} items.")
        targets, evidence = self._group(int(index) % len(self))
        ids = self._texts[targets + evidence]["input_ids"]
        allowed = self._document_ids[targets][:, None] != self._document_ids[evidence]
        return {
            "input_ids": ids[len(targets) :],
            "labels": ids[: len(targets)],
            "evidence_mask": allowed.tolist(),
            "target_rows": targets,
            "evidence_rows": evidence,
        }

    def rebuild(
        self, embedder, pad_token_id: int, shards: list | None = None, batch_size: int = 64, progress: bool = True
    ) -> dict[str, float]:
        """Embeds the documents, makes new groups and swaps them in at once. If it fails, the old groups stay.

        Memory is that of one shard's embeddings, whatever the corpus. A pass then consists of the shards named here.

        Args:
            embedder: any object with `embed(input_ids, attention_mask)`, see `embed_documents`.
            pad_token_id: of the documents' tokenizer.
            shards: values of the column `shard` to take groups from; all if None. `dataset.shards` lists them.
            batch_size: documents in one call of `embed`.
            progress: show a bar; a document counts when embedded and when compared.

        Returns:
            `groups`, `targets`; `resting_targets`: documents of these shards that are no target until the next rebuild;
            `pairs` kept and `distinct_evidence` in use; `relevance_mean`, `relevance_std` of f over all pairs of a
            shard, over all shards; `pair_relevance_mean` over those kept; `cross_language_share` of those kept;
            `seconds`.

        Raises:
            ValueError: an unknown shard; not one target has evidence; what `embed_documents` raises.
        """
        began = time.perf_counter()
        values = self.shards if shards is None else list(shards)
        unknown = [value for value in values if value not in self.shards]
        if unknown or not values:
            raise ValueError(
                f"shards must be values of the column 'shard' ({self.shards[:5]}{'...' * (len(self.shards) > 5)}), "
                f"but got {unknown or 'none'}."
            )
        rng = np.random.default_rng([self.seed, int(self._state[0])])
        chosen = [np.flatnonzero(self._shard_ids == self.shards.index(value)) for value in dict.fromkeys(values)]
        groups: list[tuple[np.ndarray, np.ndarray]] = []
        pairs = []
        moments = np.zeros(3)
        with tqdm(total=2 * sum(map(len, chosen)), desc="rebuild groups", disable=not progress, leave=False) as bar:
            for rows in chosen:
                embeddings = torch.from_numpy(
                    embed_documents(self.documents, embedder, pad_token_id, batch_size, rows, progress=bar)
                )
                with evaluation_mode(embedder) as device:
                    embeddings = embeddings.to(device)
                    moments += relevance_moments(embeddings)
                    targets, evidence, relevance = self._find_pairs(embeddings, rows, bar)
                crosses_languages = self._cross_languages(rows[targets], rows[evidence])
                pairs.append((relevance, crosses_languages))
                weights = np.where(crosses_languages, self.cross_language_weight, 1.0) + TIE_BREAK * relevance
                found = grow_groups(targets, evidence, weights, self.num_targets, self.num_evidence, rng)
                groups += [(rows[group_targets], rows[group_evidence]) for group_targets, group_evidence in found]
        if not groups:
            raise ValueError(
                f"No target has evidence in the {len(chosen)} shards: each of them holds one document only, and a "
                "target never sees its own. Use larger shards, or shard_column=None in chunk_documents."
            )
        groups = [groups[i] for i in rng.permutation(len(groups))]
        if len(groups) > len(self):
            # Only with groups far from full. The fullest go first, the targets of the others rest.
            groups = sorted(groups, key=lambda group: -len(group[0]))[: len(self)]
        self._install(groups)
        relevance, crosses_languages = (np.concatenate(column) for column in zip(*pairs, strict=True))
        count, total, squares = moments
        num_targets = sum(len(group_targets) for group_targets, _ in groups)
        return {
            "groups": len(groups),
            "targets": num_targets,
            "resting_targets": sum(map(len, chosen)) - num_targets,
            "pairs": len(relevance),
            "distinct_evidence": len(np.unique(np.concatenate([evidence for _, evidence in groups]))),
            "relevance_mean": float(total / count),
            "relevance_std": float(np.sqrt(max(0.0, squares / count - (total / count) ** 2))),
            "pair_relevance_mean": float(relevance.mean()),
            "cross_language_share": float(crosses_languages.mean()),
            "seconds": time.perf_counter() - began,
        }

    def _find_pairs(
        self, embeddings: torch.Tensor, rows: np.ndarray, bar: tqdm
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Edges of one shard's graph: targets and evidence int64 (rows of the shard), f float32, all `(pairs,)`."""
        document_ids = torch.from_numpy(self._document_ids[rows]).to(embeddings.device)
        if self.strategy == "pairs":
            return relevant_pairs(embeddings, document_ids, self.pairs_per_target * len(rows), bar.update)
        evidence, relevance = nearest_evidence(embeddings, document_ids, self.num_evidence, bar.update)
        targets, order = (evidence >= 0).nonzero()
        return targets, evidence[targets, order], relevance[targets, order]

    def _cross_languages(self, targets: np.ndarray, evidence: np.ndarray) -> np.ndarray:
        first, second = self._language_ids[targets], self._language_ids[evidence]
        return (first != second) & (first >= 0) & (second >= 0)

    def _install(self, groups: list[tuple[np.ndarray, np.ndarray]]) -> None:
        """Writes the table that nobody reads, then makes it the one that is read."""
        rebuilds = int(self._state[0]) + 1
        table = rebuilds % 2
        for rows, column in ((self._targets, 0), (self._evidence, 1)):
            rows[table] = -1
            for i, group in enumerate(groups):
                rows[table, i, : len(group[column])] = torch.from_numpy(group[column])
        self._state[1 + table] = len(groups)
        self._state[0] = rebuilds


def _encode(documents: Dataset, column: str) -> tuple[np.ndarray, list]:
    """A column as int64 numbers `(rows,)` into the list of its distinct values, which may be of any type."""
    values = documents.select_columns(column).with_format("arrow")[:].column(column).combine_chunks()
    encoded = pc.dictionary_encode(values, null_encoding="encode")
    return encoded.indices.to_numpy().astype(np.int64), encoded.dictionary.to_pylist()
