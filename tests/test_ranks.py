import numpy as np
import pytest
import torch

from hf_paraphrase_lm.retrieval import EvidenceDataset
from hf_paraphrase_lm.retrieval.ranks import rank_and_count, share_out, sum_over_ranks

from .reference.evidence import RowEmbedder, row_documents

PAD = 99
SIZES = [30, 5, 12, 8, 20, 1]
N = sum(SIZES)


def test_one_process_does_all():
    assert rank_and_count() == (0, 1)
    tensor = torch.randn(3)
    assert sum_over_ranks(tensor) is tensor
    assert share_out(SIZES, 1).tolist() == [0] * 6


@pytest.mark.parametrize("count", [2, 3, 8])
def test_the_load_is_balanced(count):
    sizes = np.random.default_rng(0).integers(1, 1000, 200).tolist()
    owner = share_out(sizes, count)
    load = np.bincount(owner, sizes, minlength=count)
    assert load.max() - load.min() <= 20
    assert share_out([9, 1, 1], count).tolist()[1] != share_out([9, 1, 1], count).tolist()[0]


class Recording(RowEmbedder):
    """Notes the rows that it embeds."""

    def __init__(self, vectors):
        super().__init__(vectors)
        self.rows = []

    def embed(self, input_ids, attention_mask):
        self.rows += input_ids[:, 0].tolist()
        return super().embed(input_ids, attention_mask)


class Failing(Recording):
    def embed(self, input_ids, attention_mask):
        raise ValueError("No vectors today.")


def make_dataset(**options):
    """Shards of the sizes above, in two languages."""
    shard = np.repeat(np.arange(len(SIZES)), SIZES).tolist()
    documents = row_documents(N, shard=shard, language=["de" if row % 3 else "en" for row in range(N)])
    return EvidenceDataset(documents, num_targets=3, num_evidence=4, pairs_per_target=3, **options)


def run_rank(folder, rank):
    """What one of two processes finds: groups of all shards, of some, with another group, and when the other fails."""
    embedder = Recording(torch.load(f"{folder}/vectors.pt"))
    dataset = make_dataset()
    results, rows = [], []
    for arguments in ({}, {"shards": [4, 1, 5]}, {"group": torch.distributed.new_group()}, {"shards": [0]}):
        results.append(dataset.find_groups(embedder, PAD, progress=False, **arguments))
        results[-1][1].pop("seconds")
        rows = rows or list(embedder.rows)
    dataset.rebuild(embedder, PAD, progress=False)
    items = list(dataset)
    message = ""
    try:
        dataset.rebuild(Failing(embedder.vectors) if rank == 1 else embedder, PAD, progress=False)
    except (ValueError, RuntimeError) as error:
        message = str(error)
    assert list(dataset) == items
    torch.save((results, items, rows, message), f"{folder}/{rank}")


RANKS = """
import multiprocessing
import sys

import torch

from tests.test_ranks import run_rank

folder = sys.argv[1]


def run(rank):
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    run_rank(folder, rank)
    torch.distributed.destroy_process_group()


ranks = [multiprocessing.get_context("fork").Process(target=run, args=(rank,)) for rank in range(2)]
for rank in ranks:
    rank.start()
for rank in ranks:
    rank.join()
assert [rank.exitcode for rank in ranks] == [0, 0]
"""


def test_two_ranks_are_one(tmp_path, run_python):
    vectors = torch.randn(N, 6)
    torch.save(vectors, tmp_path / "vectors.pt")
    embedder = RowEmbedder(vectors)
    run_python(RANKS, tmp_path)
    dataset = make_dataset()
    expected = [
        dataset.find_groups(embedder, PAD, progress=False, **arguments)
        for arguments in ({}, {"shards": [4, 1, 5]}, {}, {"shards": [0]})
    ]
    dataset.rebuild(embedder, PAD, progress=False)
    embedded = []
    for rank in range(2):
        results, items, rows, message = torch.load(tmp_path / str(rank), weights_only=False)
        for (groups, statistics), (expected_groups, expected_statistics) in zip(results, expected, strict=True):
            assert all(torch.equal(mine, theirs) for mine, theirs in zip(groups, expected_groups, strict=True))
            assert statistics == {k: v for k, v in expected_statistics.items() if k != "seconds"}
        assert items == list(dataset)
        embedded.append(rows)
        failed = "No vectors today.", "Another process failed to make its groups; its error message says why."
        assert message == failed[1 - rank]
    # Each document by one of them, whole shards, about as many.
    assert sorted(embedded[0] + embedded[1]) == list(range(N))
    assert abs(len(embedded[0]) - len(embedded[1])) <= 4
    shard = np.repeat(np.arange(len(SIZES)), SIZES)
    assert not set(shard[embedded[0]]) & set(shard[embedded[1]])
