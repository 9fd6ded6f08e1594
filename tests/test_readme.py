"""The README's code runs as printed: offline, from top to bottom, in an empty folder."""

import contextlib
import doctest
import io
import re
import shlex

import pytest

BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def blocks(repository):
    """`(language, text, language and text of the block that follows directly)` for each fenced block."""
    readme = (repository / "README.md").read_text(encoding="utf-8")
    found = list(BLOCK.finditer(readme))
    follows = [
        other.groups() if other and not readme[block.end() : other.start()].strip() else (None, None)
        for block, other in zip(found, [*found[1:], None], strict=True)
    ]
    return [(*block.groups(), *next_block) for block, next_block in zip(found, follows, strict=True)]


def test_python_blocks_print_what_the_readme_says(blocks, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "readme"}
    scripts = [(text, after, output) for language, text, after, output in blocks if language == "python"]
    assert scripts
    for text, after, output in scripts:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(text, "README.md", "exec"), namespace)
        # `...` in the README stands for what differs from run to run.
        if after == "text" and not doctest.OutputChecker().check_output(output, printed.getvalue(), doctest.ELLIPSIS):
            pytest.fail(f"The README says:\n{output}\nIts code prints:\n{printed.getvalue()}")


def test_shell_blocks_name_targets_and_files_that_exist(blocks, repository):
    targets = set(re.search(r"^\.PHONY: (.+)$", (repository / "Makefile").read_text(), re.MULTILINE)[1].split())
    commands = [line for language, text, _, _ in blocks if language == "bash" for line in text.splitlines()]
    assert "make demo" in " ".join(commands) and "make test" in " ".join(commands)
    for command in commands:
        words = shlex.split(command, comments=True)
        if words[:1] == ["make"]:
            assert {word for word in words[1:] if "=" not in word} <= targets, command
        for word in words[1:]:
            assert not re.fullmatch(r"[\w./-]+\.(py|txt|md|cfg)", word) or (repository / word).is_file(), command


def test_links_to_files_lead_somewhere(repository):
    readme = (repository / "README.md").read_text(encoding="utf-8")
    links = re.findall(r"\]\((?!https?://|#)([^)#]+)", readme)
    assert links
    assert not [link for link in links if not (repository / link).exists()]
