"""The files of a saved `DocumentIndex`: `index.json` names one data folder and the size and hash of every file in it.

A save writes a new data folder beside the old one and then replaces `index.json`, one atomic step.
"""

import json
import os
import re
from pathlib import Path

import xxhash

FORMAT_VERSION = 1
DATA_FOLDER = re.compile(r"index-data-[0-9a-f]{32}")


def read_description(folder: Path) -> dict:
    """The content of `index.json`.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is damaged or of something else.
    """
    path = folder / "index.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"There is no index in {folder}: it has no index.json. Either the path is wrong or the first save into it "
            "was interrupted; build the index again."
        )
    try:
        description = json.loads(path.read_text())
        if description["kind"] != "DocumentIndex" or not DATA_FOLDER.fullmatch(description["data"]):
            raise KeyError("kind")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged or describes no DocumentIndex; build the index again.") from error
    return description


def check_files(data: Path, files: dict[str, dict], verify: bool) -> None:
    """Raises a ValueError unless the files have the sizes that `index.json` says and, if `verify`, the contents."""
    for name, file in files.items():
        path = data / name
        size = path.stat().st_size if path.is_file() else None
        if size != file["bytes"] or (verify and hash_of(path) != file["xxh3_128"]):
            state = "is missing" if size is None else f"has {size} bytes and not the content saved"
            raise ValueError(
                f"The index in {data.parent} is damaged: {data.name}/{name} {state} (expected {file['bytes']} bytes). "
                "Copy it again from where it is whole, or build it again."
            )


def check_target(folder: Path) -> None:
    """Raises a FileExistsError unless an index may be written to `folder`: it is new, empty or has an index."""
    if folder.is_dir():
        try:
            read_description(folder)
            return
        except FileNotFoundError:
            # A first save that was killed leaves a data folder only.
            if all(DATA_FOLDER.fullmatch(entry.name) for entry in folder.iterdir()):
                return
        except ValueError:
            pass
    elif not folder.exists():
        return
    raise FileExistsError(
        f"{folder} exists and is not a DocumentIndex, so nothing was written. Give an empty or a new folder."
    )


def hash_of(path: Path) -> str:
    """XXH3 (128 bits) of a file's content, in hexadecimal digits; it costs no more than reading the file."""
    content = xxhash.xxh3_128()
    with open(path, "rb") as file:
        while block := file.read(1 << 24):
            content.update(block)
    return content.hexdigest()


def flush_to_disk(path: Path) -> None:
    """Returns when the file or the folder's list of names is on the disk."""
    # Windows cannot open a folder as a file.
    if path.is_dir() and os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
