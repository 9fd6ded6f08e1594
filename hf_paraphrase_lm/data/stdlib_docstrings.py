"""Prints the documentation of this Python's standard library as JSON lines, for `python_docs`, which runs it.

Modules with source are read with `ast` and never imported: no code of theirs runs, no window opens, and what belongs to
other platforms (`ntpath`, `asyncio.windows_events`) is there too. Modules written in C have no source to read, so they
are imported. The chapters of the manual in `pydoc_data.topics` are cut into sections and entries. The first line is the
number of modules; then comes one line a module, `[module, [[name, text], ...]]`, in an order that depends on the Python
alone. It needs the standard library only and writes no file.
"""

import ast
import importlib
import importlib.util
import inspect
import json
import os
import re
import sys
import sysconfig
import textwrap
import types
import zlib
from importlib.machinery import EXTENSION_SUFFIXES, BuiltinImporter
from pathlib import Path

# Tests and demonstrations, which many machines lack, tables and grammar.
SKIPPED = {"test", "tests", "idlelib", "turtledemo", "lib2to3", "ensurepip", "encodings", "pydoc_data", "_ast"}
DEFINITIONS = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
C_MEMBERS = (
    types.BuiltinFunctionType,
    types.MethodDescriptorType,
    types.ClassMethodDescriptorType,
    types.GetSetDescriptorType,
    types.MemberDescriptorType,
    staticmethod,
)
# C types that their own module does not name.
UNNAMED_TYPES = {
    "re": {"Pattern": re.Pattern, "Match": re.Match},
    "types": vars(types),
    "zlib": {"Compress": type(zlib.compressobj()), "Decompress": type(zlib.decompressobj())},
}
# The head of an entry of the manual: `str.split(sep=None)`, `class dict(**kwargs)`, or a debugger command: `h(elp)`.
ENTRY = re.compile(
    r"(?P<command>[a-z]{1,3}\([a-z]{2,5}\))( .*)?|((async|class|classmethod|static) )*(?P<name>[\w.]+)\(.*"
)


def source_modules():
    """`(module, path)` of every module that has a source file, sorted by path."""
    library = Path(sysconfig.get_path("stdlib"))
    for path in sorted(library.rglob("*.py")):
        parts = path.relative_to(library).with_suffix("").parts
        if parts[0] in sys.stdlib_module_names and SKIPPED.isdisjoint(parts):
            yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path


def source_docstrings(module, path):
    """`(name, docstring)` of a module, its classes, functions and methods, in the order of the file."""

    def walk(node, name):
        yield name, ast.get_docstring(node)
        for child in [] if isinstance(node, DEFINITIONS[1:]) else definitions(node):
            yield from walk(child, f"{name}.{child.name}")

    def definitions(node):
        # They may also stand in the branches of an `if` or a `try`.
        for child in ast.iter_child_nodes(node):
            if isinstance(child, DEFINITIONS):
                yield child
            elif isinstance(child, ast.stmt | ast.excepthandler):
                yield from definitions(child)

    try:
        return walk(ast.parse(path.read_bytes()), module)
    except (OSError, SyntaxError, ValueError):
        return ()


def c_modules():
    """Names of the modules written in C, sorted: those built into the interpreter and those in extension files."""
    for name in sorted(sys.stdlib_module_names - SKIPPED):
        # Modules made to test the interpreter are called _testcapi, _xxtestfuzz, xxlimited and the like.
        if "test" not in name and "xx" not in name:
            spec = importlib.util.find_spec(name)
            if spec and (spec.loader is BuiltinImporter or str(spec.origin).endswith(tuple(EXTENSION_SUFFIXES))):
                yield name


def c_docstrings(module, namespace=None):
    """`(name, docstring)` of a C module, its functions, its types and what these themselves define, sorted by name."""
    if namespace is None:
        try:
            namespace = vars(importlib.import_module(module))
        # An extension may raise anything, and its documentation is then missing.
        except (Exception, SystemExit):
            return
        yield module, namespace.get("__doc__")
    for name, value in sorted(namespace.items()):
        alias = getattr(value, "__name__", name)
        if name.startswith("__") or (alias != name and namespace.get(alias) is value):
            continue
        qualified = name if module == "builtins" else f"{module}.{name}"
        if isinstance(value, type):
            yield qualified, vars(value).get("__doc__")
            for member, descriptor in sorted(vars(value).items()):
                if isinstance(descriptor, C_MEMBERS):
                    yield f"{qualified}.{member}", descriptor.__doc__
        elif isinstance(value, types.BuiltinFunctionType):
            yield qualified, value.__doc__


def manual_texts(name, blocks):
    """`(name, text)` of each section and each entry in `blocks`, the paragraphs of a chapter or of an entry."""
    section, prose, position = name, [], 0
    while position < len(blocks):
        block, end = blocks[position], position + 1
        while end < len(blocks) and indentation(blocks[end]) > indentation(block):
            end += 1
        title, _, underline = block.partition("\n")
        entry = ENTRY.fullmatch(title.strip())
        if entry and end > position + 1:
            entry_name = re.sub(r"\W", "", entry["command"]) if entry["command"] else entry["name"]
            yield from manual_texts(f"{name}.{entry_name}", blocks[position + 1 : end])
            position = end
            continue
        if underline and not underline.strip("*=-~"):
            yield section, textwrap.dedent("\n\n".join(prose))
            section, prose = f"{name}.{title}", []
        else:
            prose.append(block)
        position += 1
    yield section, textwrap.dedent("\n\n".join(prose))


def indentation(block):
    return len(block) - len(block.lstrip(" "))


def manual():
    """`(name, text)` of the manual's chapters."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        return
    for topic, text in sorted(topics.items()):
        yield from manual_texts(f"pydoc_data.topics.{topic}", re.split(r"\n(?: *\n)+", text.strip("\n")))


def main():
    # What an extension prints while it is imported must not get between our lines.
    output = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    sources = [(module, source_docstrings, (module, path)) for module, path in source_modules()]
    compiled = [(module, c_docstrings, (module,)) for module in c_modules()]
    unnamed = [(module, c_docstrings, (module, namespace)) for module, namespace in UNNAMED_TYPES.items()]
    jobs = [*sources, *compiled, *unnamed, ("pydoc_data.topics", manual, ())]
    print(len(jobs), file=output)
    for module, read, arguments in jobs:
        texts = [[name, inspect.cleandoc(text)] for name, text in read(*arguments) if isinstance(text, str)]
        print(json.dumps([module, texts]), file=output, flush=True)


if __name__ == "__main__":
    main()
