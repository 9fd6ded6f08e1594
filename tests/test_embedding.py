import itertools
import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch import nn

from hf_paraphrase_lm.retrieval import LexicalEmbedder, embed_documents, evaluation_mode
from hf_paraphrase_lm.retrieval.embedding import pad_documents

from .reference.evidence import RowEmbedder, make_documents, row_documents, tf_idf

PAD = 99


class Recorder(RowEmbedder):
    def __init__(self, vectors):
        super().__init__(vectors)
        self.batches = []

    def embed(self, input_ids, attention_mask):
        assert input_ids.dtype == attention_mask.dtype == torch.int64
        self.batches.append((input_ids, attention_mask))
        return super().embed(input_ids, attention_mask)


def test_pad_documents():
    input_ids, attention_mask = pad_documents([[5, 6], [7], [8, 9, 4]], PAD)
    assert input_ids.tolist() == [[5, 6, PAD], [7, PAD, PAD], [8, 9, 4]]
    assert attention_mask.tolist() == [[1, 1, 0], [1, 0, 0], [1, 1, 1]]


@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_order_is_restored_and_batches_have_similar_lengths(batch_size, monkeypatch):
    # Blocks of three batches, so that there are several.
    monkeypatch.setattr("hf_paraphrase_lm.retrieval.embedding.BATCHES_PER_BLOCK", 3)
    documents = row_documents(50)
    embedder = Recorder(torch.randn(50, 4))
    embeddings = embed_documents(documents, embedder, PAD, batch_size=batch_size, progress=False)
    assert embeddings.dtype == np.float32
    np.testing.assert_array_equal(embeddings, embedder.vectors.numpy())
    lengths = [mask.sum(dim=1).tolist() for _, mask in embedder.batches]
    for start in range(0, len(lengths), 3):
        block = [length for batch in lengths[start : start + 3] for length in batch]
        assert block == sorted(block, reverse=True)
    for input_ids, mask in embedder.batches:
        assert ((input_ids == PAD) == (mask == 0)).all()
        assert mask.shape[1] == mask.sum(dim=1).max()


def test_rows_choose_and_order():
    embedder = Recorder(torch.randn(50, 4))
    rows = np.array([40, 3, 3, 17])
    embeddings = embed_documents(row_documents(50), embedder, PAD, rows=rows, progress=False)
    np.testing.assert_array_equal(embeddings, embedder.vectors[rows].numpy())


def test_selected_documents_and_other_formats():
    documents = row_documents(50).select([9, 4, 30]).with_format("torch")
    embedder = Recorder(torch.randn(50, 4))
    embeddings = embed_documents(documents, embedder, PAD, progress=False)
    np.testing.assert_array_equal(embeddings, embedder.vectors[[9, 4, 30]].numpy())


class Network(nn.Module):
    """Dropout, a frozen part in eval mode, parameters that want gradients."""

    def __init__(self, vocabulary=100, dim=8, dtype=torch.float32):
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, dim, dtype=dtype)
        self.dropout = nn.Dropout(0.5)
        self.frozen = nn.Sequential(nn.Dropout(0.5)).eval()
        self.fail = False

    def embed(self, input_ids, attention_mask):
        assert not torch.is_grad_enabled() and not any(module.training for module in self.modules())
        if self.fail:
            raise KeyboardInterrupt
        states = self.frozen(self.dropout(self.tokens(input_ids))) * attention_mask[..., None]
        return nn.functional.normalize(states.sum(dim=1), dim=-1)


@pytest.mark.parametrize("fail", [False, True])
def test_modes_gradients_and_random_numbers_are_left_alone(fail):
    network = Network().train()
    network.frozen.eval()
    network.fail = fail
    before = torch.get_rng_state()
    if fail:
        with pytest.raises(KeyboardInterrupt):
            embed_documents(row_documents(9), network, PAD, progress=False)
    else:
        embed_documents(row_documents(9), network, PAD, progress=False)
    assert network.training and network.dropout.training and network.tokens.training
    assert not network.frozen.training and not network.frozen[0].training
    assert torch.is_grad_enabled()
    assert torch.equal(before, torch.get_rng_state())


def test_padding_and_batches_change_nothing():
    documents, network = row_documents(30), Network()
    together = embed_documents(documents, network, PAD, batch_size=30, progress=False)
    alone = embed_documents(documents, network, PAD, batch_size=1, progress=False)
    np.testing.assert_allclose(together, alone, atol=1e-6)


@pytest.fixture
def three_cores():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


class Witness(Network):
    """Notes the thread of each call, its cores and autocast, and how many documents it got."""

    is_thread_safe = True

    def __init__(self):
        super().__init__()
        self.calls = []
        # All threads have to be in their first call at once, or this one fails.
        self.meeting, self.met = threading.Barrier(3), set()

    def embed(self, input_ids, attention_mask):
        if threading.get_ident() not in self.met:
            self.met.add(threading.get_ident())
            self.meeting.wait(timeout=20)
        autocast = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None
        self.calls.append((threading.get_ident(), torch.get_num_threads(), autocast, len(input_ids)))
        return super().embed(input_ids, attention_mask)


@pytest.mark.parametrize("dtype", [None, torch.float16])
def test_threads_share_cores_and_batch(dtype, three_cores):
    documents, network = row_documents(50), Witness()
    with torch.autocast("cpu", dtype, enabled=dtype is not None):
        together = embed_documents(documents, network, PAD, batch_size=24, progress=False)
    threads, cores, autocasts, sizes = zip(*network.calls, strict=True)
    assert len(set(threads)) == 3 and threading.get_ident() not in threads
    assert set(cores) == {1} and set(autocasts) == {dtype} and sorted(sizes, reverse=True) == [8] * 6 + [2]
    # Here, and for threads to come, everything is as before.
    assert torch.get_num_threads() == 3 and torch.is_grad_enabled()
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(torch.get_num_threads).result() == 3
    torch.set_num_threads(1)
    alone = Network()
    alone.load_state_dict(network.state_dict())
    np.testing.assert_allclose(together, embed_documents(documents, alone, PAD, 8, progress=False), atol=1e-6)


def test_error_in_a_thread_ends_all(three_cores, monkeypatch):
    network, numbers, raised = Network(), itertools.count(), threading.Event()
    network.is_thread_safe = True

    def embed(input_ids, attention_mask):
        if next(numbers) == 0:
            raised.set()
            raise KeyboardInterrupt
        # So the calling thread has the time to cancel what is left.
        assert raised.wait(20)
        time.sleep(0.2)
        return torch.ones(len(input_ids), 1)

    monkeypatch.setattr(network, "embed", embed)
    with pytest.raises(KeyboardInterrupt):
        embed_documents(row_documents(400), network, PAD, batch_size=24, progress=False)
    assert next(numbers) < 20 and torch.get_num_threads() == 3


def test_threads_see_new_weights(three_cores):
    """Autocast keeps weights in bfloat16 for as long as a thread is in it."""

    class OwnAutocast(Network):
        is_thread_safe = True

        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def embed(self, input_ids, attention_mask):
            with torch.autocast("cpu", torch.bfloat16):
                return nn.functional.normalize(self.linear(super().embed(input_ids, attention_mask)).float(), dim=-1)

    network, documents = OwnAutocast(), row_documents(50)
    embed_documents(documents, network, PAD, batch_size=24, progress=False)
    network.linear.load_state_dict(nn.Linear(8, 8).state_dict())
    after = embed_documents(documents, network, PAD, batch_size=24, progress=False)
    # Other tensors, of which nothing can have been kept.
    alone = OwnAutocast()
    alone.load_state_dict(network.state_dict())
    alone.is_thread_safe = False
    np.testing.assert_allclose(after, embed_documents(documents, alone, PAD, progress=False), atol=0.02)


@pytest.mark.parametrize(
    ("cores", "batch_size", "documents", "threads", "sizes"),
    [
        (3, 64, 7, 1, {7}),  # too few documents to share
        (3, 16, 50, 1, {16, 2}),  # 2 threads would leave a core idle
        (4, 16, 50, 2, {8, 2}),
        (4, 64, 20, 2, {10}),  # fewer documents than a batch
        (2, 5, 50, 1, {5}),
    ],
)
def test_number_of_threads(cores, batch_size, documents, threads, sizes, three_cores):
    seen = []

    class Noting(Network):
        is_thread_safe = True

        def embed(self, input_ids, attention_mask):
            seen.append((torch.get_num_threads(), len(input_ids)))
            return super().embed(input_ids, attention_mask)

    torch.set_num_threads(cores)
    embed_documents(row_documents(documents), Noting(), PAD, batch_size=batch_size, progress=False)
    assert {number for number, _ in seen} == {cores // threads} and {size for _, size in seen} == sizes


def test_threads_only_where_they_are_safe(three_cores):
    documents, callers = row_documents(50), set()

    class Noting(Network):
        def embed(self, input_ids, attention_mask):
            callers.add(threading.get_ident())
            return super().embed(input_ids, attention_mask)

    network = Noting()
    embed_documents(documents, network, PAD, batch_size=24, progress=False)
    network.is_thread_safe = True
    hook = network.tokens.register_forward_hook(lambda *_: None)
    embed_documents(documents, network, PAD, batch_size=24, progress=False)
    assert callers == {threading.get_ident()}
    hook.remove()
    embed_documents(documents, network, PAD, batch_size=24, progress=False)
    assert len(callers) > 1


def test_half_precision_embedders_give_float32():
    embeddings = embed_documents(row_documents(9), Network(dtype=torch.bfloat16), PAD, progress=False)
    assert embeddings.dtype == np.float32


def test_device_of_a_model():
    with evaluation_mode(Network()) as device:
        assert device == torch.device("cpu")
    with evaluation_mode(nn.Module()) as device:
        assert device == torch.device("cpu")
    with evaluation_mode(RowEmbedder(torch.ones(1, 1))) as device:
        assert device == torch.device("cpu")
    on_meta = RowEmbedder(torch.ones(1, 1))
    on_meta.device = "meta"
    with evaluation_mode(on_meta) as device:
        assert device == torch.device("meta")


class Wrong:
    def __init__(self, vectors):
        self.vectors = vectors

    def embed(self, input_ids, attention_mask):
        return self.vectors


@pytest.mark.parametrize(
    ("vectors", "message"),
    [
        (
            torch.eye(3) * torch.tensor([1.0, 1.7, 1.0])[:, None],
            "embed() must return vectors of length 1, but that of row 1 has length 1.7. The inner product would be no "
            "cosine: normalise the rows, or if they are not finite, look at the weights.",
        ),
        (
            torch.tensor([[1.0], [1.0], [torch.nan]]),
            "embed() must return vectors of length 1, but that of row 2 has length nan. The inner product would be no "
            "cosine: normalise the rows, or if they are not finite, look at the weights.",
        ),
        (
            torch.ones(3, 2, 1),
            "embed() must return one vector a document, shape (3, dim), but it returned (3, 2, 1).",
        ),
        (torch.ones(2, 1), "embed() must return one vector a document, shape (3, dim), but it returned (2, 1)."),
    ],
)
def test_wrong_embeddings_are_refused(vectors, message):
    documents = make_documents([[5], [5], [5]])
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        embed_documents(documents, Wrong(vectors), PAD, progress=False)


def test_nothing_to_embed_is_refused():
    message = "There is nothing to embed: the corpus has no documents, or no rows were asked for."
    with pytest.raises(ValueError, match=f"^{message}$"):
        embed_documents(make_documents([]), RowEmbedder(torch.eye(2)), PAD, progress=False)
    with pytest.raises(ValueError, match=f"^{message}$"):
        embed_documents(make_documents([[1]]), RowEmbedder(torch.eye(2)), PAD, rows=[], progress=False)


def test_a_document_without_tokens_is_refused():
    message = (
        "Row 2 of the documents has no tokens, so it has no embedding. Drop empty documents, as chunk_documents does."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        embed_documents(make_documents([[1], [0, 1], []]), RowEmbedder(torch.eye(2)), PAD, progress=False)


def test_progress_bar(capfd):
    documents, embedder = row_documents(5), RowEmbedder(torch.eye(5))
    embed_documents(documents, embedder, PAD, progress=False)
    LexicalEmbedder(documents, progress=False)
    assert capfd.readouterr().err == ""
    embed_documents(documents, embedder, PAD)
    LexicalEmbedder(documents)
    shown = capfd.readouterr().err
    assert "embed: 100%" in shown and "count tokens: 100%" in shown


TEXTS = [[0, 7, 8, 8, 8, 2], [0, 7, 9, 2], [0, 20, 2], [0, 2], [0, 8, 9, 9, 12, 2]]


def test_lexical_embedding_against_a_loop():
    embedder = LexicalEmbedder(make_documents(TEXTS), dim=16, seed=3, progress=False)
    vectors = torch.randn(21, 16, generator=torch.Generator().manual_seed(3))
    # 15 is no token of the corpus but below its largest, 5000 above.
    queries = [*TEXTS, [0, 8, 15, 2], [9, 5000]]
    embeddings = embedder.embed(*pad_documents(queries, PAD))
    assert embeddings.shape == (7, 16) and embeddings.dtype == torch.float32
    for query, embedding in zip(queries, embeddings, strict=True):
        expected = torch.zeros(16)
        for token, weight in tf_idf(TEXTS, query).items():
            if weight:
                expected += weight * vectors[token]
        torch.testing.assert_close(embedding, nn.functional.normalize(expected, dim=0), atol=1e-6, rtol=1e-5)
    # Nothing but tokens of every document.
    assert (embeddings[3] == 0).all()


def test_lexical_relevance_is_about_the_tf_idf_cosine():
    random = np.random.default_rng(0)
    texts = [random.zipf(1.3, 40).clip(max=500).tolist() for _ in range(20)]
    documents = make_documents(texts)
    embeddings = embed_documents(documents, LexicalEmbedder(documents, dim=8192, progress=False), PAD, progress=False)
    bags = np.zeros((20, 501))
    for bag, text in zip(bags, texts, strict=True):
        for token, weight in tf_idf(texts, text).items():
            bag[token] = weight
    bags /= np.linalg.norm(bags, axis=1, keepdims=True)
    # Six standard deviations of 1 / sqrt(dim).
    np.testing.assert_allclose(embeddings @ embeddings.T, bags @ bags.T, atol=6 / 8192**0.5)


def test_lexical_embedder_follows_its_seed():
    documents = make_documents(TEXTS)
    first, same, other = (LexicalEmbedder(documents, 8, seed, progress=False) for seed in (0, 0, 1))
    assert torch.equal(first.weighted_projection, same.weighted_projection)
    assert not torch.equal(first.weighted_projection, other.weighted_projection)


def test_lexical_embedder_needs_documents():
    message = "LexicalEmbedder needs documents to count tokens in, but the corpus is empty."
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        LexicalEmbedder(make_documents([]))
