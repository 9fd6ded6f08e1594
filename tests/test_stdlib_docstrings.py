import json
import re
import subprocess
import sys

from hf_paraphrase_lm.data import stdlib_docstrings as reader

SOURCE = '''
"""About the module."""

raise SystemExit("never run")

if unknown:
    def function(x):
        """About the function."""
        def inner():
            """Not reached."""
else:
    async def coroutine(): "About the coroutine."

try:
    class Outer(Unknown):
        """About the class."""
        class Inner:
            def method(self):
                """
                About the method.

                    Indented.
                """
        undocumented = lambda self: 0
except ImportError:
    def fallback(): """About the fallback."""
'''

CHAPTER = """Mapping Types
*************

About mappings.

class dict(**kwargs)

   About the class.

   get(key, default=None)
   get(key)

      About get.

         Indented.

   print(x)

   More about the class.

str.split(sep=None)

   About split.

h(elp) [command]

   About help.

Views
=====

About views.
"""


def test_source_is_read_and_not_run(tmp_path):
    file = tmp_path / "module.py"
    file.write_text(SOURCE)
    documented = {name: text for name, text in reader.source_docstrings("module", file) if text}
    assert documented == {
        "module": "About the module.",
        "module.function": "About the function.",
        "module.coroutine": "About the coroutine.",
        "module.Outer": "About the class.",
        "module.Outer.Inner.method": "About the method.\n\n    Indented.",
        "module.fallback": "About the fallback.",
    }


def test_unreadable_source_is_left_out(tmp_path):
    (tmp_path / "broken.py").write_text("def f(:\n")
    (tmp_path / "binary.py").write_bytes(b"\x00\xff")
    for name in ("broken", "binary", "missing"):
        assert list(reader.source_docstrings(name, tmp_path / f"{name}.py")) == []


def test_c_modules_are_introspected():
    assert {"builtins", "_io", "math"} <= set(reader.c_modules())
    documented = dict(reader.c_docstrings("builtins"))
    assert documented["str.split"] == str.split.__doc__
    assert documented["len"] == len.__doc__
    assert "str.__len__" not in documented, "what slots document is the same for every type"
    assert dict(reader.c_docstrings("math"))["math.sqrt"].startswith("Return the square root")
    assert list(reader.c_docstrings("no_such_module")) == []


def test_manual_is_cut_into_sections_and_entries():
    texts = [(name, text) for name, text in reader.manual_texts("topics.t", re.split(r"\n(?: *\n)+", CHAPTER)) if text]
    assert dict(texts) == {
        "topics.t.Mapping Types": "About mappings.",
        "topics.t.dict": "About the class.\n\nprint(x)\n\nMore about the class.",
        "topics.t.dict.get": "About get.\n\n   Indented.",
        "topics.t.str.split": "About split.",
        "topics.t.help": "About help.",
        "topics.t.Views": "About views.\n",
    }


def test_program_prints_one_line_a_module():
    lines = subprocess.run(
        [sys.executable, "-I", "-S", "-B", reader.__file__], capture_output=True, check=True, encoding="utf-8"
    ).stdout.splitlines()
    modules = [json.loads(line) for line in lines[1:]]
    assert int(lines[0]) == len(modules)
    names = [module for module, _ in modules]
    assert {"ntpath", "posixpath", "builtins", "pydoc_data.topics"} <= set(names)
    assert not [name for name in names if name.partition(".")[0] in {"test", "idlelib", "numpy", "torch"}]
