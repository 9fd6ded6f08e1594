"""Which checkpoint of `Trainer` to go on from."""

import json
import os
import shutil
import time
import zipfile
from itertools import takewhile
from pathlib import Path

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

logger = logging.get_logger(__name__)


def last_checkpoint(folder: str | os.PathLike) -> str | None:
    """The newest checkpoint of `Trainer` in a folder that was written to its end; None if there is none.

        trainer.train(resume_from_checkpoint=last_checkpoint(trainer.args.output_dir))

    A process that is killed while it saves leaves half of a checkpoint, and `get_last_checkpoint` of transformers gives
    the newest folder, whole or not. The last file that Trainer writes is `trainer_state.json`; other processes than the
    first may still write the states of their random numbers then.

    Args:
        folder: `output_dir` of the run; it need not exist.
    """
    return next((str(checkpoint) for checkpoint in _newest_first(folder) if _is_whole(checkpoint)), None)


def set_aside_half_checkpoints(folder: str | os.PathLike, seconds: float = 2.0) -> None:
    """Renames what a killed process has left of its last save, so that `resume_from_checkpoint=True` does not take it.

    `checkpoint-100` becomes `unfinished-checkpoint-100`, if it is newer than the last whole one. While a process still
    writes a checkpoint its files change, and it stays where it is.

    Args:
        folder: `output_dir` of the run.
        seconds: how long nothing must have changed. 2 is our choice.
    """
    half = {path: _sizes(path) for path in takewhile(lambda path: not _is_whole(path), _newest_first(folder))}
    if half:
        time.sleep(seconds)
    for checkpoint, sizes in half.items():
        if not _is_whole(checkpoint) and _sizes(checkpoint) == sizes:
            unfinished = checkpoint.with_name(f"unfinished-{checkpoint.name}")
            shutil.rmtree(unfinished, ignore_errors=True)
            checkpoint.rename(unfinished)
            logger.warning(
                f"{checkpoint} was not written to its end: the process that saved it was killed. It is called "
                f"{unfinished.name} now, so that resume_from_checkpoint=True takes the one before it."
            )


def _newest_first(folder: str | os.PathLike) -> list[Path]:
    prefix = f"{PREFIX_CHECKPOINT_DIR}-"
    found = [path for path in Path(folder).glob(f"{prefix}*") if path.name.removeprefix(prefix).isdecimal()]
    return sorted(found, key=lambda path: int(path.name.removeprefix(prefix)), reverse=True)


def _is_whole(checkpoint: Path) -> bool:
    try:
        json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    # What torch.save writes is a ZIP file, whose table of contents comes last.
    return all(map(zipfile.is_zipfile, checkpoint.glob("rng_state*.pth")))


def _sizes(checkpoint: Path) -> dict[str, tuple[int, int]]:
    """Size in bytes and time of the last change, in ns, of every file."""
    return {path.name: (path.stat().st_size, path.stat().st_mtime_ns) for path in checkpoint.iterdir()}
