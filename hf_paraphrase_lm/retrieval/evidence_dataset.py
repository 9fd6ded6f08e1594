"""What MARGE trains on: groups of targets with shared evidence, made anew from the model's own embeddings."""

import time
from functools import cached_property

import numpy as np
import torch
from datasets import Dataset
from tqdm.auto import tqdm

from .corpus import Corpus
from .embedding import embed_documents, evaluation_mode
from .evidence import grow_groups, nearest_evidence, relevance_moments, relevant_pairs, without_language
from .evidence_state import add_description, check_description
from .fingerprint import corpus_fingerprint
from .group_tables import Groups, GroupTables
from .ranks import rank_and_count, share_out, sum_over_ranks

COLUMNS = ("input_ids", "document", "shard", "language")
# What groups follow from, besides the corpora and the vectors.
OPTIONS = ("num_targets", "num_evidence", "strategy", "pairs_per_target", "cross_language_weight", "seed")
OPTIONS += ("first_chunks_only", "max_tokens", "center_languages", "other_languages_only")
# Added to an edge's weight times f, so that ties go to the more relevant; too small to outweigh an edge. Our choice.
TIE_BREAK = 1e-3


class EvidenceDataset(torch.utils.data.Dataset):
    """A map-style dataset whose items are groups (Lewis et al. 2020, section 2), for `DataCollatorForParaphrasing`.

    `rebuild` embeds the documents shard by shard, keeps the most relevant pairs of each shard and grows groups from
    them. The groups lie in shared memory (`tables`): DataLoader workers that run already (forked or spawned, persistent
    or not) serve the new ones from then on, except for batches they have prefetched. Workers read tables, never search.

    An item is a dictionary of
        `input_ids`: the evidence, up to `num_evidence` lists of token ids,
        `labels`: the targets, up to `num_targets` lists of token ids,
        `evidence_mask`: bool, targets x evidence; False where the target must not see the document, because it is the
            target itself or a chunk of the same document,
        `target_rows`, `evidence_rows`: rows of `documents` and of `evidence`, for analysis.
    The length is constant, about one pass over the targets: `ceil(targets / num_targets)`, or with `max_tokens` as many
    groups as the tokens of all targets with their share of evidence fill. Item i is group `i % num_groups`.

    Args:
        documents: dataset with the columns `input_ids, document, shard, language` that `chunk_documents` makes; a row
            is one possible target and, without `evidence`, one possible evidence document.
        num_targets: targets of a group, at the most. The paper fills a token budget; 8 is our choice.
        num_evidence: evidence documents of a group, at the most; 8 is our choice.
        strategy: "pairs": the paper's groups, see `relevant_pairs` and `grow_groups`. "neighbors": every target by
            itself with its own most relevant documents of its shard; needs `num_targets=1`.
        pairs_per_target: "pairs" keeps the best `pairs_per_target * (targets of the shard)` pairs of a shard, one at
            least; below 1, most targets rest. The paper does not print its number; 8 is our choice.
        cross_language_weight: weight of an edge between documents of two known languages, others weigh 1 (paper: 100).
        seed: of the order in which groups are grown, together with the number of the rebuild and the shard.
        evidence: dataset of the same columns from which alone evidence comes: a target's from the shard with the same
            value. Its document numbers have nothing to do with those of `documents`, so leave out of it what the
            targets must not see; only a dataset of the same texts row by row is `documents` itself.
        first_chunks_only: a document's chunk 0 alone is a target, every chunk may be evidence (the paper, for news).
        max_tokens: tokens of a group, targets and evidence together and without padding, at the most; `num_targets` and
            `num_evidence` then are the ratio in which the two sides grow, and bounds. None: no budget.
        center_languages: take away the mean embedding of each language of a shard before documents are compared, see
            `without_language`. The paper compares embeddings as they are.
        other_languages_only: pairs of one language are none; else they fill most of the cut. The paper has both kinds.

    Raises:
        ValueError: a missing column, a bad option, no more than `num_evidence` documents, or all of one document; no
            evidence for a shard of the documents; a document of unknown language with `other_languages_only`.
        RuntimeError: an item is read before the first `rebuild`.
    """

    def __init__(
        self,
        documents: Dataset,
        num_targets: int = 8,
        num_evidence: int = 8,
        strategy: str = "pairs",
        pairs_per_target: float = 8,
        cross_language_weight: float = 100.0,
        seed: int = 0,
        evidence: Dataset | None = None,
        first_chunks_only: bool = False,
        max_tokens: int | None = None,
        center_languages: bool = False,
        other_languages_only: bool = False,
    ):
        for name, value in (("num_targets", num_targets), ("num_evidence", num_evidence)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, but got {value}.")
        positive = {"pairs_per_target": pairs_per_target, "cross_language_weight": cross_language_weight}
        for name, value in positive.items():
            if value <= 0:
                raise ValueError(f"{name} must be positive, but got {value}.")
        if strategy not in ("pairs", "neighbors"):
            raise ValueError(f"strategy must be 'pairs' or 'neighbors', but got {strategy!r}.")
        if strategy == "neighbors" and num_targets != 1:
            raise ValueError(
                f"strategy='neighbors' needs num_targets=1, but got {num_targets}: every target has evidence of its "
                "own, so a group has one target. Use strategy='pairs' for shared evidence."
            )
        _check_columns(documents, "documents", (*COLUMNS, "chunk") if first_chunks_only else COLUMNS)
        if evidence is not None:
            _check_columns(evidence, "evidence", COLUMNS)
        self.documents = documents
        self.evidence = documents if evidence is None or _same_texts(evidence, documents) else evidence
        self.num_targets = num_targets
        self.num_evidence = num_evidence
        self.strategy = strategy
        self.pairs_per_target = pairs_per_target
        self.cross_language_weight = cross_language_weight
        self.seed = seed
        self.first_chunks_only = first_chunks_only
        self.max_tokens = max_tokens
        self.center_languages = center_languages
        self.other_languages_only = other_languages_only
        self._check_sizes()
        # An unknown language is no other language.
        shards, languages = {}, {"": -1, None: -1}
        self._target_side = Corpus(documents, shards, languages, first_chunks_only)
        self.shards = list(shards)
        if self._one_corpus and not first_chunks_only:
            self._evidence_side = self._target_side
        else:
            self._evidence_side = Corpus(self.evidence, shards, languages)
        self._check_sides()
        self._length = self._count_items()
        self.tables = GroupTables(self._length, num_targets, num_evidence)

    @property
    def _one_corpus(self) -> bool:
        return self.evidence is self.documents

    def _check_sizes(self) -> None:
        if self._one_corpus and len(self.documents) <= self.num_evidence:
            raise ValueError(
                f"num_evidence={self.num_evidence} needs a corpus of at least {self.num_evidence + 1} documents (a "
                f"target is never its own evidence), but it has {len(self.documents)}. Give more documents or lower "
                "num_evidence."
            )
        if len(self.evidence) < self.num_evidence:
            raise ValueError(
                f"num_evidence={self.num_evidence} needs at least as many evidence documents, but there are "
                f"{len(self.evidence)}. Give more evidence or lower num_evidence."
            )
        if len(self.documents) == 0:
            raise ValueError("The documents have no rows, so there is no target.")
        ours, theirs = self.documents.features["shard"], self.evidence.features["shard"]
        if ours != theirs:
            raise ValueError(
                f"Shards are matched by value, but the column 'shard' is {ours} in the documents and {theirs} in the "
                "evidence. Use evidence.cast_column('shard', documents.features['shard'])."
            )

    def _check_sides(self) -> None:
        if len(self._target_side) == 0:
            raise ValueError("first_chunks_only=True leaves no target: no row of the documents has chunk 0.")
        if not self._one_corpus:
            # No document of one corpus is a document of the other.
            self._evidence_side.document_ids += int(self._target_side.document_ids.max()) + 1
        elif self._target_side.document_ids.max() == 0:
            raise ValueError(
                f"All {len(self.documents)} rows are chunks of one document, so no target can have evidence: "
                "a target never sees its own document. Give more documents."
            )
        sides = (self._target_side, self._evidence_side) if self.other_languages_only else ()
        unknown = [int((side.language_ids < 0).sum()) for side in sides]
        if any(unknown):
            raise ValueError(
                f"other_languages_only=True needs the language of every document, but {max(unknown)} have none. Name "
                "the column of languages in chunk_documents, or drop these documents."
            )
        without = [value for i, value in enumerate(self.shards) if len(self._evidence_side.rows(i)) == 0]
        if without:
            raise ValueError(
                f"The evidence has no document in {len(without)} of the {len(self.shards)} shards of the documents "
                f"({without[:5]}{'...' * (len(without) > 5)}), and a target has its evidence from its own shard. Give "
                "evidence there, or drop these documents."
            )

    def _count_items(self) -> int:
        """Groups in about one pass over the targets."""
        groups = -(-len(self._target_side) // self.num_targets)
        if self.max_tokens is None:
            return groups
        targets, evidence = (side.lengths[side.by_shard] for side in (self._target_side, self._evidence_side))
        longest = int(targets.max()), int(evidence.max())
        if self.max_tokens < sum(longest):
            raise ValueError(
                f"max_tokens must be at least {sum(longest)}, the longest target ({longest[0]} tokens) with the "
                f"longest evidence document ({longest[1]} tokens), but got {self.max_tokens}. Raise it, or cut the "
                "documents into shorter chunks."
            )
        tokens = targets.sum() + len(targets) * evidence.mean() * self.num_evidence / self.num_targets
        # The document that closes a group did not fit, so the group is short of the budget by less than the longest.
        by_tokens = int(np.ceil(tokens / max(1, self.max_tokens - max(longest))))
        return min(len(targets), max(groups, by_tokens))

    def __len__(self) -> int:
        return self._length

    @property
    def num_groups(self) -> int:
        """Groups of the last rebuild; 0 before the first one."""
        return self.tables.num_groups

    @property
    def num_rebuilds(self) -> int:
        """How often new groups were installed, in this run and those that it resumes."""
        return self.tables.num_rebuilds

    @property
    def groups(self) -> Groups:
        """The groups of the last rebuild, as `find_groups` returns them."""
        self._check_has_groups()
        ((groups, _),) = self.tables.groups()
        return groups

    def __getitem__(self, index: int) -> dict[str, list]:
        return self._item(index)

    def __getitems__(self, indices: list[int]) -> list[dict[str, list]]:
        """What a DataLoader calls, once for each batch; the groups are those of its batch, see `GroupTables`."""
        batch = self.tables.next_batch()
        return [self._item(index, batch) for index in indices]

    def _item(self, index: int, batch: int | None = None) -> dict[str, list]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"Group {index} does not exist: the dataset has {len(self)} items.")
        self._check_has_groups()
        targets, evidence = self.tables.read(int(index) % len(self), batch)
        allowed = self._target_side.document_ids[targets][:, None] != self._evidence_side.document_ids[evidence]
        return {
            "input_ids": self._evidence_side.texts[evidence]["input_ids"],
            "labels": self._target_side.texts[targets]["input_ids"],
            "evidence_mask": allowed.tolist(),
            "target_rows": targets,
            "evidence_rows": evidence,
        }

    def _check_has_groups(self) -> None:
        if self.num_groups == 0:
            raise RuntimeError(
                "EvidenceDataset has no groups yet. Call dataset.rebuild(embedder, pad_token_id) first, for "
                "example with the model or a LexicalEmbedder, or give Trainer a RefreshIndexCallback."
            )

    def rebuild(
        self,
        embedder,
        pad_token_id: int,
        shards: list | None = None,
        batch_size: int = 64,
        progress: bool = True,
        group=None,
    ) -> dict[str, float]:
        """`find_groups` and `install`: embeds the documents, makes new groups and swaps them in at once.

        Arguments, errors and the statistics returned are those of `find_groups`. If it fails, the old groups stay.
        """
        groups, statistics = self.find_groups(embedder, pad_token_id, shards, batch_size, progress, group=group)
        self.install(groups)
        return statistics

    def find_groups(
        self,
        embedder,
        pad_token_id: int,
        shards: list | None = None,
        batch_size: int = 64,
        progress: bool = True,
        number: int | None = None,
        group=None,
    ) -> tuple[Groups, dict[str, float]]:
        """New groups, for `install`; those that are served stay, so it may run in another thread with another model.

        Memory is that of one shard's embeddings, whatever the corpus. A pass then consists of the shards named here.
        Where `torch.distributed` is initialised, every process of the group must call it with the same arguments and
        weights: each embeds and searches shards of its own and all return the groups that one process alone would.

        Args:
            embedder: any object with `embed(input_ids, attention_mask)`, see `embed_documents`.
            pad_token_id: of the documents' tokenizer.
            shards: values of the column `shard` to take groups from; all if None. `dataset.shards` lists them.
            batch_size: documents that are embedded at once.
            progress: show a bar, of this process' part if its rank is 0; a document counts when embedded and when
                compared.
            number: of the rebuild; it sets the random order in each shard, with the seed. None: `num_rebuilds`.
            group: the `torch.distributed` process group; None is the default one. Collectives of several threads must
                not mix, so a thread beside the training needs one of its own.

        Returns:
            groups: rows of the targets int64 `(groups, num_targets)` and of their evidence int64
                `(groups, num_evidence)`; -1 is no row.
            statistics: `groups`, `targets`; `resting_targets`: possible targets of these shards that are none until
                the next rebuild; `pairs` kept and `distinct_evidence` in use; `relevance_mean`, `relevance_std` of f
                over all pairs of a shard, over all shards; `pair_relevance_mean` over those kept, as compared;
                `cross_language_share` of those kept; `seconds`.

        Raises:
            ValueError: an unknown shard; not one target has evidence; what `embed_documents` raises.
            RuntimeError: another process of the group has raised an error.
        """
        began = time.perf_counter()
        number = self.num_rebuilds if number is None else number
        chosen = self._numbers_of(shards)
        rank, count = rank_and_count(group)
        num_targets, num_evidence = (
            [len(side.rows(i)) for i in chosen] for side in (self._target_side, self._evidence_side)
        )
        # Targets that are no evidence are embedded, too.
        work = [(1 if self._one_corpus else 2) * n + m for n, m in zip(num_targets, num_evidence, strict=True)]
        own = np.flatnonzero(share_out(work, count) == rank)
        found = {}
        # Of each shard: groups; number, sum, sum of squares of f; pairs kept, sum of their f, those across languages.
        sums = torch.zeros(len(chosen), 7, dtype=torch.float64)
        failure = None
        bar = tqdm(
            total=sum(work[i] for i in own), desc="rebuild groups", disable=not progress or rank > 0, leave=False
        )
        try:
            with bar:
                for i in own:
                    if num_targets[i] == 0:
                        continue
                    found[i], sums[i] = self._groups_of(chosen[i], embedder, pad_token_id, batch_size, number, bar)
        except Exception as error:
            # The others wait for these numbers, so they are told instead of left waiting.
            failure, sums[own] = error, torch.nan
        sums = sum_over_ranks(sums, group)
        if failure is not None:
            raise failure
        if sums.isnan().any():
            raise RuntimeError("Another process failed to make its groups; its error message says why.")
        ends = sums[:, 0].long().cumsum(dim=0).tolist()
        if ends[-1] == 0:
            raise ValueError(
                f"No target has evidence in the {len(chosen)} shards: each of them holds one document only, and a "
                "target never sees its own. Use larger shards, or shard_column=None in chunk_documents."
            )
        groups = torch.zeros(ends[-1], self.num_targets + self.num_evidence, dtype=torch.int64)
        for i, rows in found.items():
            groups[ends[i] - len(rows) : ends[i]] = rows
        groups = sum_over_ranks(groups, group)
        groups = groups[np.random.default_rng([self.seed, number]).permutation(len(groups))]
        if len(groups) > len(self):
            # Only with groups far from full. The fullest go first, the targets of the others rest.
            fullness = (groups[:, : self.num_targets] >= 0).sum(dim=1)
            groups = groups[fullness.argsort(descending=True, stable=True)[: len(self)]]
        targets, evidence = groups.split([self.num_targets, self.num_evidence], dim=1)
        in_use = int((targets >= 0).sum())
        _, pairs_compared, total, squares, pairs, pair_relevance, crossing = sums.sum(dim=0).tolist()
        return (targets, evidence), {
            "groups": len(groups),
            "targets": in_use,
            "resting_targets": sum(num_targets) - in_use,
            "pairs": int(pairs),
            "distinct_evidence": len(evidence[evidence >= 0].unique()),
            "relevance_mean": total / pairs_compared,
            "relevance_std": max(0.0, squares / pairs_compared - (total / pairs_compared) ** 2) ** 0.5,
            "pair_relevance_mean": pair_relevance / pairs,
            "cross_language_share": crossing / pairs,
            "seconds": time.perf_counter() - began,
        }

    def sample_shards(self, count: int, step: int) -> list:
        """Values of `count` shards drawn at random, which follow from the seed and the number of an update.

        Only shards in which a target can have evidence, hence not those of a single document, are drawn; all of them
        if they are fewer.
        """
        shards = self._shards_of_pairs or range(len(self.shards))
        rng = np.random.default_rng([self.seed, step])
        sample = rng.choice(len(shards), min(count, len(shards)), replace=False)
        return [self.shards[shards[i]] for i in sample]

    @cached_property
    def _shards_of_pairs(self) -> list[int]:
        """Numbers of the shards in which a target can have evidence."""
        found = []
        for shard in range(len(self.shards)):
            sides = self._target_side, self._evidence_side
            targets, evidence = (side.document_ids[side.rows(shard)] for side in sides)
            if len(targets) > 0 and (targets[0] != evidence).any():
                found.append(shard)
        return found

    def _numbers_of(self, shards: list | None) -> list[int]:
        numbers = {value: number for number, value in enumerate(self.shards)}
        values = self.shards if shards is None else list(dict.fromkeys(shards))
        unknown = [value for value in values if value not in numbers]
        if unknown or not values:
            raise ValueError(
                f"shards must be values of the column 'shard' ({self.shards[:5]}{'...' * (len(self.shards) > 5)}), "
                f"but got {unknown or 'none'}."
            )
        return [numbers[value] for value in values]

    def _groups_of(
        self, shard: int, embedder, pad_token_id: int, batch_size: int, number: int, bar: tqdm
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Of one shard: the groups in one int64 table, targets then evidence, and what `find_groups` adds up."""
        target_rows, evidence_rows = self._target_side.rows(shard), self._evidence_side.rows(shard)
        targets, evidence, relevance, moments = self._find_pairs(
            target_rows, evidence_rows, embedder, pad_token_id, batch_size, bar
        )
        first = self._target_side.language_ids[target_rows[targets]]
        second = self._evidence_side.language_ids[evidence_rows[evidence]]
        crosses_languages = (first != second) & (first >= 0) & (second >= 0)
        has_budget = self.max_tokens is not None
        groups = grow_groups(
            targets,
            evidence,
            np.where(crosses_languages, self.cross_language_weight, 1.0) + TIE_BREAK * relevance,
            self.num_targets,
            self.num_evidence,
            # The numbers of a seed may end in zeros that change nothing, hence + 1.
            np.random.default_rng([self.seed, number, shard + 1]),
            self._target_side.lengths[target_rows] if has_budget else None,
            self._evidence_side.lengths[evidence_rows] if has_budget else None,
            self.max_tokens or 0,
        )
        table = [
            # Row -1 is the one appended.
            np.append(rows, -1)[np.array([found + [-1] * (size - len(found)) for found in side], int).reshape(-1, size)]
            for rows, size, side in (
                (target_rows, self.num_targets, [group[0] for group in groups]),
                (evidence_rows, self.num_evidence, [group[1] for group in groups]),
            )
        ]
        sums = [len(groups), *moments, len(relevance), relevance.sum(dtype=np.float64), crosses_languages.sum()]
        return torch.from_numpy(np.concatenate(table, axis=1)), torch.tensor(sums, dtype=torch.float64)

    def _find_pairs(
        self,
        target_rows: np.ndarray,
        evidence_rows: np.ndarray,
        embedder,
        pad_token_id: int,
        batch_size: int,
        bar: tqdm,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, tuple[int, float, float]]:
        """Edges of one shard's graph: places of targets and of evidence int64 in their rows and f float32, all
        `(pairs,)`; then the `relevance_moments`."""

        def embed(corpus: Dataset, rows: np.ndarray) -> torch.Tensor:
            vectors = embed_documents(corpus, embedder, pad_token_id, batch_size, rows, progress=bar)
            return torch.from_numpy(vectors).to(device)

        with evaluation_mode(embedder) as device:
            evidence = embed(self.evidence, evidence_rows)
            if not self._one_corpus:
                targets = embed(self.documents, target_rows)
            elif len(target_rows) == len(evidence_rows):
                targets = evidence
            else:
                targets = evidence[np.searchsorted(evidence_rows, target_rows)]
            moments = relevance_moments(targets, evidence, self._one_corpus)
            sides = (self._target_side, target_rows), (self._evidence_side, evidence_rows)
            documents = [torch.from_numpy(side.document_ids[rows]).to(device) for side, rows in sides]
            languages = [torch.from_numpy(side.language_ids[rows]).to(device) for side, rows in sides]
            if self.center_languages:
                targets, evidence = map(without_language, (targets, evidence), languages)
            # What a target is never paired with: its own document, or all of its language.
            documents = languages if self.other_languages_only else documents
            if self.strategy == "pairs":
                num_pairs = max(1, int(self.pairs_per_target * len(target_rows)))
                return *relevant_pairs(targets, evidence, *documents, num_pairs, bar.update), moments
            nearest, relevance = nearest_evidence(targets, evidence, *documents, self.num_evidence, bar.update)
            edges, order = (nearest >= 0).nonzero()
            return edges, nearest[edges, order], relevance[edges, order], moments

    def install(self, groups: Groups, first_batch: int = 0) -> None:
        """Serves the groups that `find_groups` returned, here and in the workers that run.

        Args:
            first_batch: number of the first batch in the running pass that is served them, see `GroupTables`; 0: all
                from now on.
        """
        self.tables.install(groups, self.num_rebuilds + 1, first_batch)

    def state_dict(self, batch: int | None = None) -> dict[str, torch.Tensor]:
        """The groups and what they belong to.

        Args:
            batch: number of the first batch that is not yet used, see `GroupTables`; None: any may come.

        Returns:
            `targets` and `evidence`, int64, the groups that batches from there on are served, oldest first; `served`,
            int64 `(installations, 2)`, how many groups each has and its first batch; `num_rebuilds`, int64 `(1,)`;
            `description`, see `add_description`: the options, fingerprints of the corpora and a hash of it all.

        Raises:
            RuntimeError: there are no groups yet.
        """
        self._check_has_groups()
        groups, first_batches = zip(*self.tables.groups(batch), strict=True)
        targets, evidence = (torch.cat(tables) for tables in zip(*groups, strict=True))
        served = [[len(found), first] for (found, _), first in zip(groups, first_batches, strict=True)]
        tensors = {"targets": targets, "evidence": evidence, "served": torch.tensor(served)}
        return add_description(tensors | {"num_rebuilds": torch.tensor([self.num_rebuilds])}, self._origin())

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Serves the groups of a `state_dict` and counts rebuilds on from there; if it fails, nothing has changed.

        Raises:
            ValueError: the state is of other corpora or options, incomplete or damaged.
        """
        state = check_description(state, self._origin())
        counts, first_batches = state["served"].T.tolist()
        self.tables.reserve(len(counts))
        groups = zip(state["targets"].split(counts), state["evidence"].split(counts), strict=True)
        for found, first_batch in zip(groups, first_batches, strict=True):
            self.tables.install(found, int(state["num_rebuilds"]), first_batch)

    def _origin(self) -> dict:
        """All that groups follow from, besides the weights and the number of the rebuild."""
        fingerprints = {"documents": self._target_side.fingerprint, "evidence": self._evidence_side.fingerprint}
        return fingerprints | {name: getattr(self, name) for name in OPTIONS}


def _check_columns(corpus: Dataset, name: str, columns: tuple[str, ...]) -> None:
    missing = [column for column in columns if column not in corpus.column_names]
    if missing:
        raise ValueError(
            f"The {name} lack the columns {missing}; they have {corpus.column_names}. Make them with chunk_documents."
        )


def _same_texts(one: Dataset, other: Dataset) -> bool:
    return one is other or (len(one) == len(other) and corpus_fingerprint(one) == corpus_fingerprint(other))
