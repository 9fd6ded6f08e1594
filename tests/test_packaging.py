"""The metadata, the pinned versions, the Makefile and the papers of the project agree with each other."""

import configparser
import re
import subprocess
import tomllib
from importlib.metadata import version

import pytest
import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

import hf_paraphrase_lm


@pytest.fixture(scope="module")
def setup(repository):
    parser = configparser.ConfigParser()
    parser.read(repository / "setup.cfg", encoding="utf-8")
    return parser


@pytest.fixture(scope="module")
def pins(repository):
    lines = (repository / "constraints.txt").read_text().splitlines()
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


def requirements(text):
    return [Requirement(line) for line in text.split("\n") if line.strip()]


def test_dependencies_are_the_six_libraries(setup):
    names = [requirement.name for requirement in requirements(setup["options"]["install_requires"])]
    assert names == ["torch", "transformers", "datasets", "accelerate", "tokenizers", "faiss-cpu"]


def test_every_requirement_is_pinned_to_a_version_it_allows(setup, pins):
    listed = [setup["options"]["install_requires"], *setup["options.extras_require"].values()]
    for requirement in requirements("\n".join(listed)):
        assert pins[requirement.name] in requirement.specifier, f"{requirement} is pinned to {pins[requirement.name]}"
    # A local label such as +cpu would exclude every other build; without one each machine takes the build it has.
    assert not [name for name, pin in pins.items() if "+" in pin]


def test_the_makefile_asks_for_the_pythons_that_the_package_supports(setup, repository):
    supported = SpecifierSet(setup["options"]["python_requires"])
    first, last = re.search(r"\((\d+, \d+)\) <= .* <= \((\d+, \d+)\)", (repository / "Makefile").read_text()).groups()
    first, last = first.replace(", ", "."), last.replace(", ", ".")
    listed = [f"3.{minor}" for minor in range(8, 20) if f"3.{minor}" in supported]
    assert (first, last) == (listed[0], listed[-1])
    classifiers = setup["metadata"]["classifiers"].split("Programming Language :: Python :: ")
    assert [line.split()[0] for line in classifiers if line.startswith("3.")] == listed


def test_one_version_everywhere(repository):
    assert version("hf-paraphrase-lm") == hf_paraphrase_lm.__version__
    citation = yaml.safe_load((repository / "CITATION.cff").read_text())
    assert citation["version"] == hf_paraphrase_lm.__version__
    assert f"## {hf_paraphrase_lm.__version__}" in (repository / "CHANGELOG.md").read_text()


def test_make_lists_its_targets(repository):
    printed = subprocess.run(
        ["make", "--no-print-directory", "help"], cwd=repository, capture_output=True, text=True, check=True
    ).stdout
    targets = re.search(r"^\.PHONY: (.+)$", (repository / "Makefile").read_text(), re.MULTILINE)[1].split()
    assert [line.split()[1].rstrip(":") for line in printed.splitlines()] == targets


def test_warnings_are_errors(repository):
    options = tomllib.loads((repository / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]
    assert options["filterwarnings"][0] == "error"


@pytest.mark.parametrize("family", ["marge", "cocolm"])
def test_model_cards_fill_in_to_what_the_hub_reads(repository, family):
    template = repository / "model_cards" / f"{family}.md"
    names = set(re.findall(r"{{ (\w+) }}", template.read_text())) - {"card_data"}
    result = EvalResult("text-retrieval", "docs", "Python documentation", "recall@1", 0.5)
    card = ModelCard.from_template(
        ModelCardData(language="en", model_name="Tiny", eval_results=[result]),
        template_path=template,
        results=[{"metric": "recall@1", "value": 0.5, "baseline": "0.25 untrained"}],
        **{name: f"<{name}>" for name in names},
    )
    assert (card.data.license, card.data.library_name, card.data.language) == ("apache-2.0", "transformers", "en")
    assert {family, "custom_code"} <= set(card.data.tags)
    assert card.data.eval_results == [result]
    assert "{{" not in card.text and "{%" not in card.text
    assert "\n| recall@1 | 0.5 | 0.25 untrained |\n\n## Limits" in card.text
    assert all(f"<{name}>" in card.text for name in names)
