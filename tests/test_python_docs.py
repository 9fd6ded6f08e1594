import re
import sys
from collections import Counter

import pytest
from datasets import Features, Value

from hf_paraphrase_lm.data import load_python_docs, python_docs
from hf_paraphrase_lm.data.python_docs import without_signatures


@pytest.fixture(scope="module")
def modules():
    return python_docs.read_modules(progress=False)


@pytest.fixture(scope="module")
def docs():
    return load_python_docs(progress=False)


@pytest.fixture(scope="module")
def group(docs):
    return dict(zip(docs["name"], docs["group"], strict=True))


def test_thousands_of_documents_with_hundreds_of_groups(docs):
    assert docs.features == Features(
        {"text": Value("string"), "name": Value("string"), "module": Value("string"), "group": Value("int64")}
    )
    assert len(docs) > 5000 and sum(map(len, docs["text"])) > 1_000_000
    sizes = Counter(docs["group"])
    assert sizes.pop(-1) > 3000
    assert sorted(sizes) == list(range(len(sizes))) and len(sizes) > 300
    assert min(sizes.values()) >= 2
    assert list(dict.fromkeys(group for group in docs["group"] if group >= 0)) == list(range(len(sizes)))


def test_no_text_stands_twice(docs):
    texts = [" ".join(text.casefold().split()) for text in docs["text"]]
    assert len(set(texts)) == len(texts)
    assert len(set(docs["name"])) == len(docs)
    assert all(len(text) >= 40 and text == text.strip() for text in docs["text"])


def test_names_belong_to_their_modules(docs):
    for name, module in zip(docs["name"], docs["module"], strict=True):
        assert module == "builtins" or name == module or name.startswith(f"{module}."), (name, module)
    # No tests, no site packages.
    assert {module.partition(".")[0] for module in docs["module"]} <= set(sys.stdlib_module_names)
    assert not [module for module in docs["module"] if "test" in module.split(".") or "idlelib" in module]


@pytest.mark.parametrize(
    "names",
    [
        ("str.splitlines", "bytes.splitlines", "pydoc_data.topics.string-methods.str.splitlines"),
        ("str.capitalize", "pydoc_data.topics.string-methods.str.capitalize"),
        ("posixpath.split", "ntpath.split"),
        ("dict.popitem", "collections.OrderedDict.popitem", "pydoc_data.topics.typesmapping.dict.popitem"),
        ("_collections.deque.pop", "array.array.pop", "bytearray.pop"),
        ("array.array.insert", "bytearray.insert"),
        ("set.discard", "_collections_abc.MutableSet.discard"),
        ("_pydecimal.Decimal.compare_total", "_decimal.Decimal.compare_total"),
        ("math.isnan", "cmath.isnan", "_decimal.Decimal.is_nan"),
        ("gzip.open", "bz2.open", "lzma.open"),
        ("threading.Event.wait", "asyncio.locks.Event.wait"),
        ("queue.Queue.put", "asyncio.queues.Queue.put"),
        ("json.loads", "_pickle.loads", "marshal.loads", "plistlib.loads"),
        ("re.findall", "re.Pattern.findall"),
        ("logging.error", "logging.Logger.error"),
    ],
)
def test_known_paraphrases_share_a_group(group, names):
    assert group[names[0]] >= 0 and len({group[name] for name in names}) == 1


@pytest.mark.parametrize(
    "names",
    [
        ("str.find", "str.rfind"),
        ("json.load", "json.loads"),
        ("str.count", "array.array.count"),
        ("threading.Event.wait", "threading.Condition.wait"),
        ("logging.error", "logging.info"),
        ("_decimal.Decimal.max", "_decimal.Decimal.min"),
    ],
)
def test_different_operations_do_not(group, names):
    assert min(map(group.get, names)) >= 0 and len({group[name] for name in names}) == len(names)


def test_the_same_documents_in_the_same_order_each_time(docs, capfd):
    before = set(sys.modules)
    again = load_python_docs(progress=False)
    assert again._fingerprint == docs._fingerprint and again.to_dict() == docs.to_dict()
    # Nothing is printed and nothing imported: the reading is done by another process.
    assert capfd.readouterr() == ("", "") and not {"turtle", "_tkinter", "readline"} & (set(sys.modules) - before)
    assert docs.cache_files == []


@pytest.mark.parametrize("max_documents", [1, 10, 1000, 5000, 10**9])
def test_fewer_documents(docs, modules, monkeypatch, max_documents):
    monkeypatch.setattr(python_docs, "read_modules", lambda progress: modules)
    fewer = load_python_docs(max_documents)
    assert len(fewer) == min(max_documents, len(docs))
    row = {name: number for number, name in enumerate(docs["name"])}
    rows = [row[name] for name in fewer["name"]]
    assert rows == sorted(rows)
    # Groups are whole, and as frequent as in the whole.
    group = docs["group"][:]
    sizes, taken = Counter(group), Counter(group[number] for number in rows)
    assert all(taken[number] == sizes[number] for number in taken if number >= 0)
    assert [number < 0 for number in fewer["group"]] == [group[number] < 0 for number in rows]
    if max_documents >= 1000:
        assert taken[-1] / len(rows) == pytest.approx(sizes[-1] / len(docs), abs=0.04)


def test_progress_bar(capfd):
    load_python_docs(1)
    assert "Reading Python's documentation: 100%" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Return x.", "Return x."),
        ("pop(key[, default])\n\nRemove it.", "Remove it."),
        (
            "S.isupper() -> bool\n\nReturn True if all (cased) characters are.",
            "Return True if all (cased) characters are.",
        ),
        ("D.pop(k[,d]) -> v, remove the key.\nIf not found", "v, remove the key.\nIf not found"),
        ("S.append(value) -- append value to the end", "append value to the end"),
        (
            "range(stop) -> range object\nrange(start, stop[, step]) -> range object\n\nReturn an object.",
            "Return an object.",
        ),
        ("get(name=f(x),\n    other=(1, 2)) -> dict\n\nGet it.", "Get it."),
        ("print(x) writes x.", "print(x) writes x."),
        ("pop()", ""),
        ("", ""),
    ],
)
def test_signatures_are_cut_off(text, expected):
    assert without_signatures(text) == expected


def test_wrong_number_of_documents():
    with pytest.raises(ValueError, match=r"^max_documents must be at least 1 or None for all documents, but got 0\.$"):
        load_python_docs(0)


@pytest.mark.skipif(sys.platform == "win32", reason="the stand-in for Python is a shell script")
@pytest.mark.parametrize(
    ("script", "sentence"),
    [
        (
            "echo 2; echo '[\"a\", []]'; echo broken >&2; exit 3",
            "{} could not read the standard library's documentation (exit status 3): broken",
        ),
        ("echo 2", "{} could not read the standard library's documentation (exit status 0): "),
        ("echo 0", "No documentation was found for the Python at {}. Is its standard library installed?"),
    ],
)
def test_unreadable_library(tmp_path, monkeypatch, script, sentence):
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\n{script}\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    with pytest.raises(RuntimeError, match=f"^{re.escape(sentence.format(python))}$"):
        load_python_docs(progress=False)
