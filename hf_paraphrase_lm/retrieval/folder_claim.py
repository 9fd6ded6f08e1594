"""Folders that only one process at a time writes to."""

import os

try:
    import fcntl
except ImportError:
    # Windows has no such locks, so there processes are not kept apart.
    fcntl = None

# Locks of this process: the open file descriptor that holds each, by device and number of its folder.
_held: dict[tuple[int, int], int] = {}


class FolderClaim:
    """Keeps other processes from claiming a folder until `release`, or until this process ends, however it ends.

        with FolderClaim(folder):
            ...  # write

    Nothing is written. A claim to a folder that this process has claimed already does nothing, also when released.
    Nobody is kept from anything on Windows and where the file system has no locks.

    Args:
        folder: it must exist.

    Raises:
        RuntimeError: another process has claimed it.
    """

    def __init__(self, folder: str | os.PathLike):
        self._identity = None
        if fcntl is None:
            return
        descriptor = os.open(folder, os.O_RDONLY)
        status = os.fstat(descriptor)
        identity = status.st_dev, status.st_ino
        try:
            if identity not in _held:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _held[identity], self._identity = descriptor, identity
        except BlockingIOError:
            raise RuntimeError(
                f"Another process is writing to {folder}, and two would overwrite each other's files. Wait until it "
                "has ended, or give another folder."
            ) from None
        except OSError:
            pass
        finally:
            if self._identity is None:
                os.close(descriptor)

    def release(self) -> None:
        """Lets others claim the folder."""
        if self._identity in _held:
            os.close(_held.pop(self._identity))
        self._identity = None

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.release()


def _forget() -> None:
    # A lock lasts as long as a copy of its descriptor is open, and a forked worker may outlive this process.
    for descriptor in _held.values():
        os.close(descriptor)
    _held.clear()


if fcntl is not None:
    os.register_at_fork(after_in_child=_forget)
