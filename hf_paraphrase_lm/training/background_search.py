"""Finds groups in a thread with a copy of the weights, while the model trains on."""

import copy
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from itertools import chain

import torch
from transformers import Trainer

# Of the CPU's threads, what the search takes beside the training. Our choice.
SHARE_OF_THREADS = 1 / 4


class BackgroundSearch:
    """A search that has begun, or the result of one.

    Its thread ends with the search, at `stop`, and soon after `Trainer.train` has been left, also by an exception,
    which Trainer tells no callback of: before each batch it looks whether its starter is still in there.

    Args:
        step: number of the update with whose weights it searches.
        future: the result, for example of a search before a run was resumed.
    """

    def __init__(self, step: int, future: Future):
        self.step = step
        self.future = future
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="refresh")
        self._stopped = threading.Event()

    @classmethod
    def start(cls, step: int, model: torch.nn.Module, find: Callable) -> "BackgroundSearch":
        """Calls `find` with an embedder that has the weights which the model has now."""
        search = cls(step, Future())
        device = next(chain(model.parameters(), model.buffers())).device
        trainer_thread = threading.get_ident() if _is_in_train(threading.get_ident()) else None
        embedder = _Copy(copy.deepcopy(model).eval(), device, lambda: search._goes_on(trainer_thread))
        stream = nullcontext()
        if device.type == "cuda":
            # Beside the training's kernels, but after those that wrote the copy.
            side = torch.cuda.Stream(device)
            side.wait_stream(torch.cuda.current_stream(device))
            stream = torch.cuda.stream(side)
        # Read here: in the thread it would be the number that an earlier search has set.
        threads = max(1, int(torch.get_num_threads() * SHARE_OF_THREADS))

        def run():
            if device.type == "cpu":
                # Of this thread alone; the training keeps its own number.
                torch.set_num_threads(threads)
            with stream:
                return find(embedder)

        search.future = search._executor.submit(run)
        # The thread ends with this piece of work.
        search._executor.shutdown(wait=False)
        return search

    @property
    def failed(self) -> bool:
        return self.future.done() and self.future.exception() is not None

    def result(self):
        """Waits for what `find` returns, or raises what it raised, with a note on where."""
        error = self.future.exception()
        self._executor.shutdown()
        if error is not None:
            error.add_note(f"This happened in the background, to the search for groups begun at step {self.step}.")
        return self.future.result()

    def stop(self) -> None:
        """Ends the search before its next batch, and waits for that."""
        self._stopped.set()
        self._executor.shutdown()

    def _goes_on(self, trainer_thread: int | None) -> bool:
        return not self._stopped.is_set() and (trainer_thread is None or _is_in_train(trainer_thread))


class _Stopped(Exception):
    """Nobody waits for the groups any more."""


class _Copy:
    """An embedder with weights of its own, as long as it is wanted."""

    def __init__(self, model: torch.nn.Module, device: torch.device, goes_on: Callable[[], bool]):
        self.model = model
        self.device = device
        self.goes_on = goes_on

    def embed(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        if not self.goes_on():
            raise _Stopped
        return self.model.embed(input_ids, attention_mask)


def _is_in_train(thread: int) -> bool:
    """Whether a thread is in `Trainer.train` now."""
    frame = sys._current_frames().get(thread)
    while frame is not None and frame.f_code is not Trainer.train.__code__:
        frame = frame.f_back
    return frame is not None
