"""Which part of the package may import which, and that its public names are there and documented."""

import ast
import inspect
from pathlib import Path

import pytest

import hf_paraphrase_lm

PACKAGE = Path(hf_paraphrase_lm.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
# What the files of each part may import besides the files of the part itself; a part is a folder or a file.
MAY_IMPORT = {
    "models": set(),
    "data": set(),
    "retrieval": {"data"},
    "training": {"retrieval", "data"},
    "hub": {"models"},
    "pipelines": {"models", "hub", "training", "retrieval", "data"},
    "__init__": {"models", "hub", "pipelines", "training", "retrieval", "data"},
}


def imported_modules(file):
    """Dotted names of the modules of this package that a file imports anywhere in it, relative imports resolved."""
    here = [PACKAGE.name, *file.relative_to(PACKAGE).parent.parts]
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == PACKAGE.name)
        elif isinstance(node, ast.ImportFrom):
            base = here[: len(here) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            if module.split(".")[0] == PACKAGE.name:
                # `from . import x` and `from package import x` name modules; elsewhere x may be a class.
                shallow = module == PACKAGE.name or node.module is None
                yield from (f"{module}.{alias.name}" for alias in node.names) if shallow else [module]


def part(dotted_name):
    return dotted_name.split(".")[1] if "." in dotted_name else "__init__"


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_imports_point_one_way(file):
    mine = file.relative_to(PACKAGE).with_suffix("").parts[0]
    forbidden = {name for name in imported_modules(file) if part(name) not in MAY_IMPORT[mine] | {mine}}
    assert not forbidden, f"{mine} may import {sorted(MAY_IMPORT[mine])}, but {file.name} imports {sorted(forbidden)}"


@pytest.mark.parametrize("file", sorted(PACKAGE.glob("models/*/*.py")), ids=lambda file: file.name)
def test_model_files_import_only_siblings_that_travel_with_them(file):
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            # The Hub's loader follows `from .file import name` and nothing else.
            assert node.level == 1 and node.module is not None and "." not in node.module, ast.unparse(node)
            assert (file.parent / f"{node.module}.py").is_file(), ast.unparse(node)
            if file.stem.startswith("modeling_"):
                assert node.module == file.stem.replace("modeling", "configuration"), ast.unparse(node)


@pytest.mark.parametrize("folder", sorted({file.parent for file in FILES}), ids=lambda folder: folder.name)
def test_every_folder_is_a_package(folder):
    assert (folder / "__init__.py").is_file()


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_every_file_says_what_it_is(file):
    assert ast.get_docstring(ast.parse(file.read_text(encoding="utf-8")))


def test_public_names_are_complete():
    """Whatever `__init__` imports from this package is public, and nothing else."""
    tree = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    ours = [node for node in tree.body if isinstance(node, ast.ImportFrom) and node.level]
    imported = {alias.asname or alias.name for node in ours for alias in node.names}
    assert sorted(hf_paraphrase_lm.__all__) == sorted(imported)


@pytest.mark.parametrize("name", hf_paraphrase_lm.__all__)
def test_public_names_are_documented(name):
    public = getattr(hf_paraphrase_lm, name)
    assert public.__doc__
    if inspect.isclass(public):
        bases = [base for base in public.__mro__ if not base.__module__.startswith(PACKAGE.name)]
        mine = [n for n in vars(public) if not n.startswith("_") and not any(hasattr(base, n) for base in bases)]
        undocumented = [n for n in mine if callable(getattr(public, n)) and not inspect.getdoc(getattr(public, n))]
        assert not undocumented
