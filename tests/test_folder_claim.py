import os
import re
import signal
import subprocess
import sys

import pytest
from transformers import TrainingArguments

from hf_paraphrase_lm.retrieval import DocumentIndex, FolderClaim

from .reference.evidence import row_documents
from .scripts import import_example
from .test_document_index import PAD, Network
from .test_resume import make_trainer

# Claims a folder, says so, and lives on, as does a process that it has forked.
CLAIMING = """
import os, sys, time
from folder_claim import FolderClaim
FolderClaim(sys.argv[1])
if os.fork() == 0:
    print(os.getpid(), flush=True)
time.sleep(600)
"""


def start(folder, repository, code):
    """A process that has imported that one file only, which is quick."""
    environment = os.environ | {"PYTHONPATH": str(repository / "hf_paraphrase_lm/retrieval")}
    return subprocess.Popen(
        [sys.executable, "-c", code, str(folder)], env=environment, stdout=subprocess.PIPE, text=True
    )


def message(folder):
    return re.escape(
        f"Another process is writing to {folder}, and two would overwrite each other's files. Wait until it has "
        "ended, or give another folder."
    )


@pytest.fixture
def claimed(tmp_path, repository):
    """A folder of another process, which ends with the test, and what kills that process."""
    folder = tmp_path / "claimed"
    folder.mkdir()
    process = start(folder, repository, CLAIMING)
    child = int(process.stdout.readline())

    def kill():
        process.kill()
        process.wait()

    yield folder, kill
    kill()
    process.stdout.close()
    os.kill(child, signal.SIGKILL)


def test_of_another_process_until_it_is_killed(claimed):
    """Even if its child lives."""
    folder, kill = claimed
    with pytest.raises(RuntimeError, match=f"^{message(folder)}$"):
        FolderClaim(folder)
    kill()
    FolderClaim(folder).release()
    assert list(folder.iterdir()) == []


def test_within_one_process(tmp_path, repository):
    """The first claim counts, and what comes after its release is a new one."""

    def is_free():
        code = "import sys; from folder_claim import FolderClaim; FolderClaim(sys.argv[1]); print('free')"
        with start(tmp_path, repository, code) as process:
            return process.stdout.read() == "free\n"

    with FolderClaim(tmp_path):
        FolderClaim(tmp_path).release()
        assert not is_free()
    assert is_free()


def test_a_run_in_the_folder_of_another(claimed):
    folder, kill = claimed
    half = folder / "checkpoint-2"
    half.mkdir()
    trainer = make_trainer(folder, max_steps=2)
    with pytest.raises(RuntimeError, match=f"^{message(folder)}$"):
        trainer.train()
    assert list(folder.iterdir()) == [half]
    # It writes nothing.
    make_trainer(folder, max_steps=2, save_strategy="no").train()
    kill()
    trainer.train()
    FolderClaim(folder).release()


def test_a_script_in_the_folder_of_another(claimed, monkeypatch, repository):
    folder, kill = claimed
    runs = import_example(monkeypatch, repository, "runs")
    with pytest.raises(RuntimeError, match=f"^{message(folder)}$"):
        runs.note_arguments(False, True, TrainingArguments(str(folder)))
    assert list(folder.iterdir()) == []
    kill()
    runs.note_arguments(False, True, TrainingArguments(str(folder)))
    assert [file.name for file in folder.iterdir()] == ["arguments.json"]


def test_two_saves_of_an_index(claimed):
    folder, kill = claimed
    index = DocumentIndex.build(row_documents(20), Network(), PAD, progress=False)
    with pytest.raises(RuntimeError, match=f"^{message(folder)}$"):
        index.save(folder)
    assert list(folder.iterdir()) == []
    kill()
    index.save(folder)
    index.save(folder)
    assert len(DocumentIndex.load(folder)) == 20
