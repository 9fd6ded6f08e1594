import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys

import faiss
import numpy as np
import pytest
import torch
from torch import nn

from hf_paraphrase_lm.retrieval import DocumentIndex, document_index

from .reference.evidence import RowEmbedder, make_documents, row_documents

PAD = 99
N, DIM = 60, 8


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.vectors = nn.Embedding(PAD + 1, DIM)

    def embed(self, input_ids, attention_mask):
        return nn.functional.normalize(self.vectors(input_ids[:, 0]), dim=-1)


@pytest.fixture
def network():
    return Network()


@pytest.fixture
def vectors(network):
    return nn.functional.normalize(network.vectors.weight[:N].detach(), dim=-1).numpy()


@pytest.fixture
def index(network):
    return DocumentIndex.build(row_documents(N), network, PAD, progress=False)


def brute_force(vectors, queries, k, exclude=None):
    scores, indices = [], []
    for i, query in enumerate(queries):
        found = sorted(((float(query @ v), row) for row, v in enumerate(vectors)), reverse=True)
        if exclude is not None:
            found = [(score, row) for score, row in found if row not in exclude[i]]
        scores.append([score for score, _ in found[:k]])
        indices.append([row for _, row in found[:k]])
    return np.array(scores), np.array(indices)


@pytest.mark.parametrize("k", [1, 5, N])
@pytest.mark.parametrize("batch_size", [3, 1024])
def test_search_against_brute_force(index, vectors, k, batch_size):
    queries = torch.randn(10, DIM).numpy()
    scores, indices = index.search(queries, k, batch_size=batch_size, progress=False)
    expected_scores, expected_indices = brute_force(vectors, queries, k)
    assert scores.dtype == np.float32 and indices.dtype == np.int64
    np.testing.assert_array_equal(indices, expected_indices)
    np.testing.assert_allclose(scores, expected_scores, rtol=1e-5, atol=1e-6)


def test_built_in_blocks_in_the_order_of_the_rows(network, vectors, monkeypatch):
    monkeypatch.setattr("hf_paraphrase_lm.retrieval.document_index.BATCHES_PER_BLOCK", 2)
    index = DocumentIndex.build(row_documents(N), network, PAD, batch_size=7, progress=False)
    assert len(index) == N and index.dim == DIM
    np.testing.assert_array_equal(index.faiss_index.reconstruct_n(0, N), vectors)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_queries_of_any_precision(index, vectors, dtype):
    queries = torch.from_numpy(vectors[:4]).to(dtype).requires_grad_()
    scores, indices = index.search(queries, 1)
    assert scores.dtype == np.float32
    assert indices[:, 0].tolist() == [0, 1, 2, 3]
    if dtype == torch.float16:
        assert index.search(queries.detach().numpy(), 1)[1].tolist() == indices.tolist()


@pytest.mark.parametrize("exclude", [np.arange(10), np.stack([np.arange(10), np.arange(10) + 20, [-1] * 10], axis=1)])
def test_excluded_rows_are_not_found(index, vectors, exclude):
    scores, indices = index.search(vectors[:10], 7, exclude=exclude)
    expected_scores, expected_indices = brute_force(vectors, vectors[:10], 7, exclude.reshape(10, -1))
    np.testing.assert_array_equal(indices, expected_indices)
    np.testing.assert_allclose(scores, expected_scores, rtol=1e-5, atol=1e-6)


def test_no_queries(index):
    scores, indices = index.search(np.empty((0, DIM)), 3)
    assert scores.shape == indices.shape == (0, 3)


@pytest.mark.parametrize(
    ("queries", "k", "exclude", "message"),
    [
        (
            np.ones((2, 5)),
            1,
            None,
            "embeddings must have the shape (queries, 8), but got (2, 5). Was this index built with another model?",
        ),
        (
            np.ones(8),
            1,
            None,
            "embeddings must have the shape (queries, 8), but got (8,). Was this index built with another model?",
        ),
        (
            np.array([[1.0] * 8, [1.0] * 7 + [np.nan]]),
            1,
            None,
            "Query 1 has values that are not finite (NaN or infinity): nothing is nearest to it.",
        ),
        (
            np.ones((1, 8)),
            61,
            None,
            "k must be between 1 and 60, but got 61: the index has 60 documents, and 0 are excluded a query.",
        ),
        (
            np.ones((1, 8)),
            0,
            None,
            "k must be between 1 and 60, but got 0: the index has 60 documents, and 0 are excluded a query.",
        ),
        (
            np.ones((2, 8)),
            60,
            [3, 4],
            "k must be between 1 and 59, but got 60: the index has 60 documents, and 1 are excluded a query.",
        ),
    ],
)
def test_bad_queries_are_refused(index, queries, k, exclude, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        index.search(queries, k, exclude=exclude)


def test_approximate_index(network, vectors):
    index = DocumentIndex.build(row_documents(N), network, PAD, factory="IVF4,Flat", progress=False)
    index.faiss_index.nprobe = 4
    np.testing.assert_array_equal(index.search(vectors, 5)[1], brute_force(vectors, vectors, 5)[1])
    index.faiss_index.nprobe = 1
    with pytest.raises(
        ValueError,
        match=r"^The index 'IVF4,Flat' found only \d+ documents for query 0, but 50 were asked for\. Let it look at "
        r"more of them, for example: index\.faiss_index\.nprobe = 32\.$",
    ):
        index.search(vectors, 50)


@pytest.mark.parametrize("factory", ["Flatt", "IVF500,Flat"])
def test_factories_that_cannot_work_are_refused(network, factory):
    with pytest.raises(
        ValueError,
        match=rf"(?s)^FAISS cannot make an index '{factory}' for 60 vectors of length 8\. Use 'Flat' or another "
        r"faiss\.index_factory string\. FAISS says: .+$",
    ):
        DocumentIndex.build(row_documents(N), network, PAD, factory=factory, progress=False)


def test_an_empty_corpus_is_refused(network):
    with pytest.raises(ValueError, match=r"^An index needs documents, but the corpus is empty\.$"):
        DocumentIndex.build(make_documents([]), network, PAD)


def test_progress_bars(network, capfd):
    index = DocumentIndex.build(row_documents(N), network, PAD)
    assert "build index: 100%" in capfd.readouterr().err
    index.search(np.ones((9, DIM)), 1, batch_size=4)
    assert "search: 100%" in capfd.readouterr().err
    index.search(np.ones((4, DIM)), 1, batch_size=4)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("factory", ["Flat", "IVF4,Flat"])
def test_save_and_load(tmp_path, network, vectors, factory):
    documents = row_documents(N).with_format("torch")
    index = DocumentIndex.build(documents, network, PAD, factory=factory, progress=False)
    index.save(tmp_path / "new" / "index")
    loaded = DocumentIndex.load(tmp_path / "new" / "index", documents=documents, embedder=network)
    assert loaded.documents is documents
    loaded = DocumentIndex.load(str(tmp_path / "new" / "index"))
    assert loaded.documents[:] == row_documents(N)[:]
    assert loaded.factory == factory and loaded.embedder_fingerprint == index.embedder_fingerprint
    for found, expected in zip(loaded.search(vectors, 3), index.search(vectors, 3), strict=True):
        np.testing.assert_array_equal(found, expected)
    written = {path.suffix for path in (tmp_path / "new").rglob("*") if path.is_file()}
    assert written == {".json", ".arrow", ".faiss"}


@pytest.mark.parametrize("factory", ["Flat", "SQ8", "IVF4,Flat", "IVF4,SQ8", "HNSW4", "PCA4,Flat"])
def test_vectors_left_on_the_disk(tmp_path, network, vectors, factory):
    index = DocumentIndex.build(row_documents(N), network, PAD, factory=factory, progress=False)
    index.save(tmp_path / "index")
    mapped = DocumentIndex.load(tmp_path / "index", memory_map=True)
    for found, expected in zip(mapped.search(vectors, 3), index.search(vectors, 3), strict=True):
        np.testing.assert_array_equal(found, expected)
    if factory == "Flat":
        assert (
            not mapped.faiss_index.codes.is_owned and DocumentIndex.load(tmp_path / "index").faiss_index.codes.is_owned
        )
    # A newer index takes the place of the file that this one reads; what is mapped can be saved again.
    DocumentIndex.build(row_documents(20), network, PAD, progress=False).save(tmp_path / "index")
    np.testing.assert_array_equal(mapped.search(vectors, 3)[1], index.search(vectors, 3)[1])
    mapped.save(tmp_path / "index")
    np.testing.assert_array_equal(
        DocumentIndex.load(tmp_path / "index").search(vectors, 3)[1], index.search(vectors, 3)[1]
    )


def test_loading_without_the_hashes_compares_sizes(tmp_path, index):
    index.save(tmp_path)
    (path,) = tmp_path.rglob("vectors.faiss")
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert len(DocumentIndex.load(tmp_path, memory_map=True, verify=False)) == N
    with pytest.raises(ValueError, match="is damaged"):
        DocumentIndex.load(tmp_path, memory_map=True)
    path.write_bytes(content[:-1])
    with pytest.raises(ValueError, match="is damaged"):
        DocumentIndex.load(tmp_path, memory_map=True, verify=False)


def naive_recall(index, vectors, queries, k, exclude=None):
    """Share of the documents of an exact search that the index has in its first k, with one loop a query."""
    hits = 0
    for i, query in enumerate(queries):
        own = set() if exclude is None else set(exclude[i].tolist())
        _, found = index.faiss_index.search(query[None], k + len(own))
        found = [row for row in found[0].tolist() if row >= 0 and row not in own][:k]
        expected = sorted((row for row in range(N) if row not in own), key=lambda row: -(query @ vectors[row]))[:k]
        hits += len(set(found) & set(expected))
    return hits / (len(queries) * k)


@pytest.mark.parametrize("factory", ["IVF8,Flat", "IVF8,SQ4", "PQ4x3", "IVF4,PQ2x4fs"])
@pytest.mark.parametrize("exclude", [None, np.arange(30)[:, None], np.stack([np.arange(30), [-1] * 30], axis=1)])
def test_recall_against_a_naive_loop(network, vectors, monkeypatch, factory, exclude):
    monkeypatch.setattr("hf_paraphrase_lm.retrieval.document_index.BATCHES_PER_BLOCK", 2)
    index = DocumentIndex.build(row_documents(N), network, PAD, factory=factory, progress=False)
    recall = index.recall(vectors[:30], 7, exclude, network, PAD, batch_size=5, progress=False)
    assert recall == pytest.approx(naive_recall(index, vectors, vectors[:30], 7, exclude))
    assert 0 < recall < 1
    if factory == "IVF8,Flat":
        assert index.recall(vectors[:30], 7, exclude, batch_size=5, progress=False) == recall
        index.faiss_index.nprobe = 8
        assert index.recall(torch.from_numpy(vectors[:30]), 7, exclude, progress=False) == 1


def test_recall_with_equal_documents_is_one(network):
    documents = make_documents([[7, 9]] * 20 + [[8, 9]] * 20)
    index = DocumentIndex.build(documents, network, PAD, progress=False)
    queries = network.vectors.weight[7:9].detach()
    assert index.recall(queries, 5, progress=False) == 1
    assert index.recall(queries, 5, embedder=network, pad_token_id=PAD, progress=False) == 1


def test_recall_shows_a_bar(index, vectors, capfd):
    index.recall(vectors[:4], 2)
    assert "exact search: 100%" in capfd.readouterr().err


def test_recall_that_cannot_be_had_is_refused(network, vectors, index):
    with pytest.raises(ValueError, match=r"^Recall is a mean over queries, but there are none\.$"):
        index.recall(np.empty((0, DIM)), 3)
    with pytest.raises(ValueError, match=r"^k must be between 1 and 60, but got 61: "):
        index.recall(vectors, 61)
    fast_scan = DocumentIndex.build(row_documents(N), network, PAD, factory="IVF4,PQ2x4fs", progress=False)
    message = (
        "The index 'IVF4,PQ2x4fs' cannot give its vectors back (fast-scan codes). Pass embedder and pad_token_id, so "
        "that the documents are embedded again."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        fast_scan.recall(vectors, 3, progress=False)


def test_save_over_an_index_leaves_one_generation(tmp_path, index, network):
    folder = tmp_path / "index"
    index.save(folder)
    with torch.no_grad():
        network.vectors.weight.neg_()
    loaded = DocumentIndex.load(folder)
    newer = DocumentIndex.build(loaded.documents, network, PAD, progress=False)
    newer.save(folder)
    assert DocumentIndex.load(folder, embedder=network).embedder_fingerprint == newer.embedder_fingerprint
    # Documents that are memory-mapped from the folder can still go to another process.
    assert pickle.loads(pickle.dumps(loaded.documents))[:] == loaded.documents[:]
    index.save(folder)
    assert len(list(folder.iterdir())) == 2
    again = DocumentIndex.load(folder)
    again.save(folder)
    assert DocumentIndex.load(folder).documents[:] == index.documents[:]


def test_another_model_is_refused(tmp_path, index, network):
    index.save(tmp_path)
    with torch.no_grad():
        network.vectors.weight[0, 0] += 1
    message = (
        f"The index in {tmp_path} was built with another model than the Network given, or with other weights of it, so "
        "their vectors do not compare. Load that model or build the index again."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        DocumentIndex.load(tmp_path, embedder=network)


def test_embedders_that_are_no_modules_need_a_fingerprint(tmp_path):
    embedder = RowEmbedder(torch.randn(N, DIM))
    DocumentIndex.build(row_documents(N), embedder, PAD, progress=False).save(tmp_path)
    DocumentIndex.load(tmp_path)
    message = (
        f"It cannot be checked that the vectors in {tmp_path} are from this embedder: an embedder that is no nn.Module "
        "needs an attribute `fingerprint` (a string), when the index is built and when it is loaded."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        DocumentIndex.load(tmp_path, embedder=embedder)
    embedder.fingerprint = "rows-1"
    DocumentIndex.build(row_documents(N), embedder, PAD, progress=False).save(tmp_path)
    DocumentIndex.load(tmp_path, embedder=embedder)
    embedder.fingerprint = "rows-2"
    with pytest.raises(ValueError, match="was built with another model than the RowEmbedder given"):
        DocumentIndex.load(tmp_path, embedder=embedder)


@pytest.mark.parametrize("rows", [list(range(N - 1)), list(range(N))[::-1]])
def test_another_corpus_is_refused(tmp_path, index, rows):
    index.save(tmp_path)
    message = (
        f"The index in {tmp_path} was built from other documents than the {len(rows)} given: their tokens or their "
        "order differ. Load it without `documents` to use the saved ones, or build it again."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        DocumentIndex.load(tmp_path, documents=row_documents(N).select(rows))


def test_a_folder_of_something_else_is_left_alone(tmp_path, index):
    (tmp_path / "thesis.txt").write_text("ten years of work")
    message = f"{tmp_path} exists and is not a DocumentIndex, so nothing was written. Give an empty or a new folder."
    with pytest.raises(FileExistsError, match=f"^{re.escape(message)}$"):
        index.save(tmp_path)
    # Other software has an index.json too.
    (tmp_path / "index.json").write_text('{"pages": []}')
    with pytest.raises(FileExistsError, match=f"^{re.escape(message)}$"):
        index.save(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["index.json", "thesis.txt"]
    with pytest.raises(FileExistsError, match=f"^{re.escape(str(tmp_path / 'thesis.txt'))} exists and is not"):
        index.save(tmp_path / "thesis.txt")
    assert (tmp_path / "thesis.txt").read_text() == "ten years of work"


def test_other_files_in_an_index_folder_survive(tmp_path, index):
    index.save(tmp_path)
    (tmp_path / "README.md").write_text("card")
    index.save(tmp_path)
    assert (tmp_path / "README.md").read_text() == "card"


def test_no_index_there(tmp_path):
    message = (
        f"There is no index in {tmp_path}: it has no index.json. Either the path is wrong or the first save into it "
        "was interrupted; build the index again."
    )
    with pytest.raises(FileNotFoundError, match=f"^{re.escape(message)}$"):
        DocumentIndex.load(tmp_path)


@pytest.mark.parametrize("content", ["", '{"kind": "Docu', "[]", '{"kind": "other"}'])
def test_a_damaged_description_is_refused(tmp_path, content):
    (tmp_path / "index.json").write_text(content)
    message = f"{tmp_path / 'index.json'} is damaged or describes no DocumentIndex; build the index again."
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        DocumentIndex.load(tmp_path)


def test_a_later_format_is_refused(tmp_path, index):
    index.save(tmp_path)
    description = json.loads((tmp_path / "index.json").read_text())
    (tmp_path / "index.json").write_text(json.dumps(description | {"format_version": 2}))
    message = (
        f"The index in {tmp_path} has format version 2, but this version of hf_paraphrase_lm reads up to 1. Update the "
        "package, or build the index again."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        DocumentIndex.load(tmp_path)


@pytest.mark.parametrize("name", ["vectors.faiss", "*.arrow", "state.json"])
@pytest.mark.parametrize("harm", ["truncate", "change", "delete"])
def test_damaged_files_are_refused(tmp_path, index, name, harm):
    index.save(tmp_path)
    (path,) = tmp_path.rglob(name)
    content = path.read_bytes()
    size = len(content)
    if harm == "truncate":
        path.write_bytes(content[: size // 2])
        state = f"has {size // 2} bytes and not the content saved"
    elif harm == "change":
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        state = f"has {size} bytes and not the content saved"
    else:
        path.unlink()
        state = "is missing"
    message = (
        f"The index in {tmp_path} is damaged: {path.relative_to(tmp_path).as_posix()} {state} (expected {size} bytes). "
        "Copy it again from where it is whole, or build it again."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        DocumentIndex.load(tmp_path)


@pytest.mark.parametrize("place", ["os.replace", "os.fsync", "faiss.write_index"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError("No space left on device")])
def test_an_interrupted_save_leaves_the_old_index(tmp_path, index, network, monkeypatch, place, error):
    def fail(*arguments):
        raise error

    other = DocumentIndex.build(row_documents(20), network, PAD, progress=False)
    for folder, existing in ((tmp_path / "old", True), (tmp_path / "new", False)):
        if existing:
            index.save(folder)
        before = sorted(folder.rglob("*")) if existing else []
        with monkeypatch.context() as patch:
            patch.setattr(place, fail)
            with pytest.raises((KeyboardInterrupt, OSError)):
                other.save(folder)
        assert sorted(folder.rglob("*")) == before
        if existing:
            assert DocumentIndex.load(folder).corpus_fingerprint == index.corpus_fingerprint
        other.save(folder)
        assert len(DocumentIndex.load(folder)) == 20


def test_an_interrupt_after_the_switch_keeps_the_new_index(tmp_path, index, network, monkeypatch):
    replace = os.replace

    def replace_and_interrupt(*arguments):
        replace(*arguments)
        raise KeyboardInterrupt

    index.save(tmp_path)
    monkeypatch.setattr(os, "replace", replace_and_interrupt)
    with pytest.raises(KeyboardInterrupt):
        DocumentIndex.build(row_documents(20), network, PAD, progress=False).save(tmp_path)
    assert len(DocumentIndex.load(tmp_path)) == 20


# Saves over the index in the folder and kills itself at the n-th system call of the list below.
KILLED = """
import os, signal, sys, faiss
from hf_paraphrase_lm.retrieval import DocumentIndex
index = DocumentIndex.load(sys.argv[1])
index.documents = index.documents.select(range(len(index)))
calls = 0
def deadly(function):
    def call(*arguments):
        global calls
        calls += 1
        if calls == int(sys.argv[3]):
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments)
    return call
os.fsync, os.replace, faiss.write_index = deadly(os.fsync), deadly(os.replace), deadly(faiss.write_index)
index.save(sys.argv[2])
"""


@pytest.mark.parametrize("call", [1, 4, 9])
def test_a_killed_save_leaves_the_old_index(tmp_path, index, network, repository, call):
    folder, other = tmp_path / "index", tmp_path / "other"
    index.save(folder)
    DocumentIndex.build(row_documents(20), network, PAD, progress=False).save(other)
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(other), str(folder), str(call)],
        env=os.environ | {"PYTHONPATH": str(repository)},
        capture_output=True,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert len(list(folder.iterdir())) == 3
    assert len(DocumentIndex.load(folder)) == N
    index.save(folder)
    assert len(list(folder.iterdir())) == 2
    # The first save into a folder.
    shutil.rmtree(folder)
    DocumentIndex.load(other).save(folder)
    (folder / "index.json").unlink()
    index.save(folder)
    assert len(DocumentIndex.load(folder)) == N and len(list(folder.iterdir())) == 2


def test_an_index_that_is_replaced_while_it_is_loaded(tmp_path, index, network, monkeypatch):
    index.save(tmp_path)
    check_files = document_index.check_files

    def check_and_replace(data, files, verify):
        monkeypatch.setattr(document_index, "check_files", check_files)
        DocumentIndex.build(row_documents(20), network, PAD, progress=False).save(tmp_path)
        check_files(data, files, verify)

    monkeypatch.setattr(document_index, "check_files", check_and_replace)
    assert len(DocumentIndex.load(tmp_path)) == 20


def test_plain_faiss_reads_the_vectors(tmp_path, index, vectors):
    index.save(tmp_path)
    (path,) = tmp_path.rglob("vectors.faiss")
    np.testing.assert_array_equal(faiss.read_index(str(path)).reconstruct_n(0, N), vectors)
