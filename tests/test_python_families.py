from itertools import combinations

from hf_paraphrase_lm.data.python_families import families, paraphrase_groups

NAMES = [
    "str.split",
    "bytes.split",
    "bytearray.split",
    "str.index",
    "list.index",
    "bytearray.index",
    "bytearray.pop",
    "list.pop",
    "_collections_abc.MutableSequence.pop",
    "_collections_abc.MutableSequence._private",
    "str.__len__",
    "bytes.__len__",
    "pathlib.Path.is_file",
    "pathlib._abc.PathBase.is_file",
    "posix.DirEntry.is_file",
    "genericpath.isfile",
    "pathlib.Path.open",
    "posix.open",
    "open",
    "gzip.open",
    "json.loads",
    "marshal.loads",
    "json.detect_encoding",
    "strange.split",
    "module.alone",
]


def naive_groups(names):
    """Names are linked if a family has both with one operation; what is linked, through others too, is a group."""
    names = [name for name in names if not name.split(".")[-1].startswith("_")]
    groups = [{name} for name in names]
    for first, second in combinations(names, 2):
        linked = any(
            first.startswith(p) and second.startswith(q) and first[len(p) :] == second[len(q) :]
            and pattern.fullmatch(first[len(p) :])
            for prefixes, pattern in families()
            for p in prefixes
            for q in prefixes
        )  # fmt: skip
        if linked:
            mine, theirs = (next(group for group in groups if name in group) for name in (first, second))
            if mine is not theirs:
                groups.remove(theirs)
                mine |= theirs
    return sorted(sorted(group) for group in groups if len(group) > 1)


def test_groups_equal_a_loop_over_pairs():
    representative = paraphrase_groups(NAMES)
    groups = {}
    for name, first in representative.items():
        groups.setdefault(first, []).append(name)
    assert sorted(sorted(group) for group in groups.values()) == naive_groups(NAMES)
    assert ["bytearray.split", "bytes.split", "str.split"] in naive_groups(NAMES)


def test_order_and_strangers_change_nothing():
    expected = paraphrase_groups(NAMES)
    assert paraphrase_groups([*reversed(NAMES), "another.name"]) == expected
    assert paraphrase_groups([]) == {}
    assert "module.alone" not in expected and "strange.split" not in expected and "str.__len__" not in expected


def test_families_are_well_formed():
    for prefixes, pattern in families():
        assert len(prefixes) >= 2 and len(set(prefixes)) == len(prefixes), prefixes
        assert ":" not in pattern.pattern and not {"PATH", "OS", ":"} & {
            prefix.partition(".")[0] for prefix in prefixes
        }
