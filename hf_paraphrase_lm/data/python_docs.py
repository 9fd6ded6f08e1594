"""The documentation of the Python on this machine as a corpus with known paraphrases: text that needs no download."""

import json
import random
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

from datasets import Dataset, Features, Value
from datasets.utils import tqdm

from .python_families import paraphrase_groups

# Our choice: shorter texts ("See os.stat().") say too little to be recognised.
MIN_CHARACTERS = 40

# A call such as `pop(key[, default])`; alone in a paragraph, perhaps with its result, `-> bool`; or before its
# description, `-- remove ...`.
CALL = r"[\w.]+\((?:[^()]|\([^()]*\))*\)"
SIGNATURE_LINE = re.compile(rf"{CALL}[ ]*(?:(?:--?>|=>).*)?\n(?=\s*\n|{CALL})")
SIGNATURE = re.compile(rf"{CALL}(?:[ ]*$|\s*(?:--?>|=>|--|:)\s*)", re.MULTILINE)


def load_python_docs(max_documents: int | None = None, progress: bool = True) -> Dataset:
    """Reads the docstrings of Python's standard library and the chapters of its manual, in a process of its own.

    The same operation is often documented several times in different words: `str.split` and `bytes.split`,
    `posixpath.join` and `pathlib.PurePath.joinpath`, `threading.Event.wait` and `asyncio.Event.wait`. Such texts form a
    group (`python_families.FAMILIES` lists them), so how many are found by their paraphrases can be measured. Texts
    that are equal but for white space and case are kept once, and signatures in front of a text are cut off, so that
    neither a copy nor the repeated name of the function gives a paraphrase away.

    Args:
        max_documents: keep a sample of so many, in which groups are whole and as frequent as among all (our choice).
            None keeps all: with Python 3.11 about 7900 documents of 2.2 million characters, 1360 of them in 490 groups.
        progress: show a progress bar over the modules.

    Returns:
        A dataset in memory, in an order that depends on the Python alone, with the columns `text` (string), `name`
        (string, such as `str.split`), `module` (string) and `group` (int64: consecutive numbers of the groups of
        paraphrases, -1 where none is known).

    Raises:
        ValueError: `max_documents` is less than 1.
        RuntimeError: the standard library could not be read or has no documentation.
    """
    if max_documents is not None and max_documents < 1:
        raise ValueError(f"max_documents must be at least 1 or None for all documents, but got {max_documents}.")
    found = {}
    for module, texts in read_modules(progress):
        for name, text in texts:
            text = without_signatures(text)
            if len(text) >= MIN_CHARACTERS:
                found.setdefault(name, (text, name, module))
    group_of_name = paraphrase_groups(found)
    documents, group_of_text = {}, {}
    for name, document in found.items():
        key = " ".join(document[0].casefold().split())
        documents.setdefault(key, document)
        if name in group_of_name:
            # A copy may stand in a family where its original does not.
            group_of_text.setdefault(key, group_of_name[name])
    if not documents:
        raise RuntimeError(
            f"No documentation was found for the Python at {sys.executable}. Is its standard library installed?"
        )
    rows = [(*document, group_of_text.get(key)) for key, document in documents.items()]
    rows = number_groups(select(number_groups(rows), max_documents))
    text, name, module, group = zip(*rows, strict=True)
    features = Features(
        {"text": Value("string"), "name": Value("string"), "module": Value("string"), "group": Value("int64")}
    )
    return Dataset.from_dict({"text": text, "name": name, "module": module, "group": group}, features=features)


def read_modules(progress):
    """`[module, [[name, text], ...]]` of each module: what `stdlib_docstrings` prints in a process of its own."""
    script = Path(__file__).with_name("stdlib_docstrings.py")
    # Isolated (-I) and without site packages (-S), it can import the standard library only; -B writes no bytecode.
    command = [sys.executable, "-I", "-S", "-B", "-W", "ignore", str(script)]
    modules = []
    with tempfile.TemporaryFile() as errors, tempfile.TemporaryDirectory() as folder:
        with subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors, cwd=folder, encoding="utf-8"
        ) as process:
            try:
                total = int(process.stdout.readline() or 0)
                lines = tqdm(
                    process.stdout, "Reading Python's documentation", total, unit="module", disable=not progress
                )
                modules.extend(json.loads(line) for line in lines)
            except BaseException:
                process.kill()
                raise
        if process.returncode or len(modules) != total:
            errors.seek(0)
            raise RuntimeError(
                f"{sys.executable} could not read the standard library's documentation (exit status "
                f"{process.returncode}): {errors.read().decode(errors='replace').strip()[-2000:]}"
            )
    return modules


def without_signatures(text):
    while match := SIGNATURE_LINE.match(text) or SIGNATURE.match(text):
        text = text[match.end() :].lstrip()
    return text.rstrip()


def number_groups(rows):
    """Rows of (text, name, module, group) with the groups numbered from 0, and -1 for None and for groups of one."""
    members = Counter(group for *_, group in rows if group not in (None, -1))
    numbers = {}
    return [
        (*document, numbers.setdefault(group, len(numbers)) if members[group] > 1 else -1) for *document, group in rows
    ]


def select(rows, max_documents):
    """At most `max_documents` of the rows, in their order, drawn as whole groups and single documents."""
    units = {}
    for position, (*_, group) in enumerate(rows):
        units.setdefault((group, position if group < 0 else None), []).append(position)
    units, chosen = list(units.values()), []
    random.Random(0).shuffle(units)
    for unit in units:
        if max_documents is None or len(chosen) + len(unit) <= max_documents:
            chosen += unit
    return [rows[position] for position in sorted(chosen)]
