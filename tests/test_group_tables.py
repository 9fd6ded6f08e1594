import copy
import pickle

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from hf_paraphrase_lm.retrieval.group_tables import GroupTables

LENGTH = 6


def make_groups(number, count=LENGTH):
    """Groups in which every row is the number of their installation; the last target and evidence row are missing."""
    targets, evidence = torch.full((count, 3), number), torch.full((count, 2), number)
    targets[:, -1] = evidence[:, -1] = -1
    return targets, evidence


def served(tables, batch=None):
    targets, evidence = tables.read(1, batch)
    assert targets == evidence * 2
    return targets[0]


def test_every_installation_from_its_first_batch_on():
    tables = GroupTables(LENGTH, 3, 2)
    assert tables.num_groups == tables.num_rebuilds == 0 and tables.groups() == []
    tables.install(make_groups(1), num_rebuilds=7)
    assert [served(tables, batch) for batch in (None, 0, 99)] == [1, 1, 1]
    tables.install(make_groups(2, count=4), num_rebuilds=8, first_batch=5)
    assert [served(tables, batch) for batch in (None, 0, 4, 5, 99)] == [2, 1, 1, 2, 2]
    assert tables.num_groups == 4 and tables.num_rebuilds == 8
    # Items wrap around.
    assert tables.read(4, 0) == tables.read(4, 0) == ([1, 1], [1]) and tables.read(4, 5) == ([2, 2], [2])
    tables.begin_pass(first_batch=3)
    assert [served(tables, batch) for batch in (3, 4, 5)] == [1, 1, 2]
    tables.begin_pass()
    assert served(tables, 0) == 2


@pytest.mark.parametrize(("every", "ahead"), [(1, 1), (1, 5), (2, 5), (3, 7), (5, 5), (9, 4)])
def test_as_many_tables_as_are_read(every, ahead):
    """Against the plain list of installations, at every place that a batch may be read at."""
    tables = GroupTables(LENGTH, 3, 2)
    tables.install(make_groups(0), 1)
    # Room may be made when groups are there.
    tables.reserve(1 + -(-ahead // every))
    installed = [(0, 0)]
    for used in range(1, 60):
        if used % every == 0:
            installed.append((used + ahead, len(installed)))
            tables.install(make_groups(len(installed) - 1), len(installed), used + ahead)
        for batch in range(used, used + ahead + 3):
            assert served(tables, batch) == max(number for first, number in installed if first <= batch)
        # What a checkpoint keeps says the same.
        kept = [(first, int(targets[0, 0])) for (targets, _), first in tables.groups(used)]
        assert kept == [(first, number) for first, number in installed if number >= served(tables, used)]


def test_room_may_be_made_at_any_time():
    tables = GroupTables(LENGTH, 3, 2)
    tables.reserve(3)
    tables.install(make_groups(1), 1)
    tables.install(make_groups(2), 2, first_batch=4)
    for number in (3, 5, 4):
        tables.reserve(number)
        assert [served(tables, batch) for batch in (0, 3, 4)] == [1, 1, 2] and tables.num_rebuilds == 2
    tables.install(make_groups(3), 3, first_batch=6)
    assert [served(tables, batch) for batch in (3, 4, 6)] == [1, 2, 3]


def test_batches_are_counted_in_their_pass():
    tables = GroupTables(LENGTH, 3, 2)
    assert [tables.next_batch() for _ in range(3)] == [0, 1, 2]
    tables.begin_pass(first_batch=8)
    assert [tables.next_batch() for _ in range(3)] == [8, 9, 10]
    tables.begin_pass()
    assert tables.next_batch() == 0


class Places(torch.utils.data.Dataset):
    """Items are the numbers of their batch."""

    def __init__(self, tables):
        self.tables = tables

    def __len__(self):
        return 14

    def __getitems__(self, indices):
        return [self.tables.next_batch()] * len(indices)


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:This DataLoader will create .* worker processes:UserWarning")
@pytest.mark.parametrize(
    "options", [{}, {"num_workers": 1}, {"num_workers": 3}, {"num_workers": 3, "prefetch_factor": 3}]
)
@pytest.mark.parametrize("is_persistent", [False, True])
def test_workers_count_in_turns(options, is_persistent):
    tables = GroupTables(LENGTH, 3, 2)
    options = options | {"persistent_workers": is_persistent and bool(options)}
    loader = DataLoader(Places(tables), batch_size=2, collate_fn=lambda items: items[0], **options)
    for first_batch in (0, 0, 3):
        tables.begin_pass(first_batch)
        assert list(loader) == [first_batch + place for place in range(7)]


def test_copies_have_a_memory_of_their_own():
    tables = GroupTables(LENGTH, 3, 2)
    tables.install(make_groups(1), 1)
    copies = [pickle.loads(pickle.dumps(tables)), copy.deepcopy(tables)]
    tables.install(make_groups(2), 2)
    for copied in copies:
        assert served(copied) == 1 and copied._targets.is_shared()
        copied.install(make_groups(3), 3)
    assert served(tables) == 2
    assert np.array_equal(tables.groups()[0][0][0], make_groups(2)[0])
