"""The groups that are served, in shared memory, and which batch is served which of them."""

import torch
from torch.utils.data import get_worker_info

Groups = tuple[torch.Tensor, torch.Tensor]


class GroupTables:
    """Groups of target and evidence rows that DataLoader workers read while new ones are installed.

    Batches are read ahead of the update that uses them, by workers further ahead, and how far depends on the machine.
    So groups are installed together with the first batch that is to hold them: batches before it are served the groups
    from before, whoever reads them and when. As long as no batch from there on has been read yet, the data of every
    update follow from its number alone, and a run that is resumed after any update reads what the unbroken run reads.

    A batch has the number of its place in the running pass over the data (of this process, if there are several). It is
    known from the order in which a DataLoader hands out batches: one after the other, or by turns to its workers. The
    tables lie in shared memory: workers that run already, forked or spawned, persistent or not, read the same ones.

    Args:
        length: most groups of one installation.
        num_targets, num_evidence: most rows of a group.
    """

    def __init__(self, length: int, num_targets: int, num_evidence: int):
        # One is read while the other is written. -1 is no row.
        self._targets = torch.full((2, length, num_targets), -1)
        self._evidence = torch.full((2, length, num_evidence), -1)
        # How many groups a table has, and the first batch of the running pass that is served them.
        self._served = torch.zeros((2, 2), dtype=torch.int64)
        # Installations (table `installations % tables` has the last), rebuilds, passes begun, first batch of the pass.
        self._clock = torch.zeros(4, dtype=torch.int64)
        # Of this process: the pass that it reads, and how many batches of it.
        self._pass, self._read = 0, 0
        self._share()

    def _share(self) -> None:
        for table in (self._targets, self._evidence, self._served, self._clock):
            table.share_memory_()

    def __setstate__(self, state: dict) -> None:
        # Tensors that came through shared memory (spawned workers) stay shared; copies get a memory of their own.
        self.__dict__.update(state)
        self._share()

    @property
    def num_groups(self) -> int:
        """Groups of the last installation; 0 before the first one."""
        return int(self._served[int(self._clock[0]) % len(self._served), 0])

    @property
    def num_rebuilds(self) -> int:
        return int(self._clock[1])

    def install(self, groups: Groups, num_rebuilds: int, first_batch: int = 0) -> None:
        """Writes the table that nobody reads, then makes it one that is read.

        Args:
            groups: rows of the targets int64 `(groups, num_targets)` and of their evidence `(groups, num_evidence)`.
            num_rebuilds: from now on.
            first_batch: number of the first batch in the running pass that is served them; 0: all from now on.
        """
        installations = int(self._clock[0]) + 1
        table = installations % len(self._served)
        for rows, found in zip((self._targets, self._evidence), groups, strict=True):
            rows[table] = -1
            rows[table, : len(found)] = found
        self._served[table] = torch.tensor([len(groups[0]), first_batch])
        self._clock[1] = num_rebuilds
        self._clock[0] = installations

    def reserve(self, num_tables: int) -> None:
        """Makes room for so many installations at a time, before workers are started.

        Two are enough, the one that is read and the one that is written, unless one follows the other before the first
        batch is read that is served the first one.
        """
        more = num_tables - len(self._served)
        if more > 0:
            # The last installation goes to the last table.
            last = int(self._clock[0]) % len(self._served) + 1
            for name in ("_targets", "_evidence", "_served"):
                old = getattr(self, name)
                new = torch.cat([old.new_zeros(more, *old.shape[1:]), old[last:], old[:last]])
                setattr(self, name, new)
            self._clock[0] = (num_tables - 1) if self._clock[0] > 0 else 0
            self._share()

    def begin_pass(self, first_batch: int = 0) -> None:
        """Says that batches are counted anew, before the DataLoader is iterated over.

        Args:
            first_batch: number of the first one, above 0 where a pass goes on. The beginning of one serves the newest
                groups from its first batch on.
        """
        if first_batch == 0:
            self._served[:, 1] = 0
        self._clock[3] = first_batch
        self._clock[2] += 1

    def next_batch(self) -> int:
        """Number of the batch that this process reads now; to be called once for each."""
        _, _, running, first_batch = self._clock.tolist()
        if running != self._pass:
            self._pass, self._read = running, 0
        worker = get_worker_info()
        turn = self._read if worker is None else worker.id + worker.num_workers * self._read
        self._read += 1
        return first_batch + turn

    def read(self, index: int, batch: int | None = None) -> tuple[list[int], list[int]]:
        """Target rows and evidence rows of group `index`, modulo their number, for this batch; None: of the newest."""
        while True:
            installations = int(self._clock[0])
            table = self._tables(batch)[-1]
            group = index % int(self._served[table, 0])
            targets, evidence = self._targets[table, group].tolist(), self._evidence[table, group].tolist()
            # Again if another installation has passed over it meanwhile.
            if int(self._clock[0]) == installations:
                return [row for row in targets if row >= 0], [row for row in evidence if row >= 0]

    def groups(self, batch: int | None = None) -> list[tuple[Groups, int]]:
        """The groups that batches from this one on are served, oldest first, each with its first batch.

        With None the newest alone, and 0.
        """
        found = []
        for table in reversed(self._tables(batch)):
            count, first_batch = self._served[table].tolist()
            rows = self._targets[table, :count].clone(), self._evidence[table, :count].clone()
            found.append((rows, first_batch if batch is not None else 0))
        return found

    def _tables(self, batch: int | None) -> list[int]:
        """Those that this batch and later ones are served, newest first."""
        newest, found = int(self._clock[0]), []
        for age in range(len(self._served)):
            table = (newest - age) % len(self._served)
            count, first_batch = self._served[table].tolist()
            if count == 0:
                break
            found.append(table)
            if batch is None or first_batch <= batch:
                break
        return found
