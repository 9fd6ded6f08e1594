"""What all tests share. They run offline, on the CPU, with warnings as errors (`pyproject.toml`)."""

import os
import subprocess
import sys
from pathlib import Path

# Read when huggingface_hub and torch are imported, hence before anything imports them; child processes inherit them.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# In tiny tensors threads mostly wait for each other, many times longer where other processes want the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import transformers

from .hub_server import TOKEN, running_hub

# Makes an import of the package fail, as in a process where it is not installed.
WITHOUT_PACKAGE = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "hf_paraphrase_lm":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Blocked())
"""


@pytest.fixture(autouse=True)
def seeded():
    """Every test starts from the same random numbers, whatever ran before it."""
    transformers.set_seed(0)


@pytest.fixture(scope="session")
def repository():
    """The root of the checkout."""
    return Path(__file__).resolve().parent.parent


@pytest.fixture
def loopback_hub():
    """A loopback Hub (`tests/hub_server.py`); hand it to `run_python`."""
    with running_hub() as server:
        yield server


@pytest.fixture
def run_python(tmp_path, repository):
    """Runs code in a new process, without this package if `package=False`, with the loopback Hub if one is given.

    Returns what it printed; where it fails, the test fails with its stderr.
    """

    def run(code, *arguments, package=True, hub=None, timeout=300):
        environment = os.environ | {"HF_HOME": str(tmp_path / "hf_home")}
        environment["PYTHONPATH"] = str(repository) if package else ""
        if hub is not None:
            environment |= {"HF_ENDPOINT": hub.endpoint, "HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "0"}
            environment |= {"HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1"}
        done = subprocess.run(
            [sys.executable, "-c", code if package else WITHOUT_PACKAGE + code, *map(str, arguments)],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=timeout,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run
