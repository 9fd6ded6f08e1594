import torch
from datasets import concatenate_datasets, load_from_disk
from torch import nn

from hf_paraphrase_lm.retrieval import corpus_fingerprint, embedder_fingerprint

from .reference.evidence import RowEmbedder, make_documents

TEXTS = [[1, 2, 3], [4], [5, 6], [7, 8, 9, 10]]


def test_corpus_fingerprint_is_that_of_the_content(tmp_path):
    documents = make_documents(TEXTS)
    documents.save_to_disk(tmp_path / "documents", num_shards=2)
    same = [
        load_from_disk(tmp_path / "documents"),
        concatenate_datasets([documents.select([0]), documents.select([1, 2, 3])]),
        make_documents([*TEXTS[::-1], [11]]).select([3, 2, 1, 0]),
        make_documents(TEXTS, shard=[3, 4, 5, 6]).with_format("torch"),
    ]
    assert {corpus_fingerprint(dataset) for dataset in same} == {corpus_fingerprint(documents)}


def test_corpus_fingerprint_sees_tokens_order_and_borders():
    corpora = [
        TEXTS,
        TEXTS[::-1],
        TEXTS[:3],
        [[1, 2], [3, 4], [5, 6], [7, 8, 9, 10]],
        [[1, 2, 3], [4], [5, 6], [7]],
        [],
    ]
    assert len({corpus_fingerprint(make_documents(texts)) for texts in corpora}) == len(corpora)


def test_corpus_fingerprint_is_the_same_in_another_process(run_python):
    code = (
        "from datasets import *\n"
        "from hf_paraphrase_lm.retrieval import corpus_fingerprint\n"
        f"print(corpus_fingerprint(Dataset.from_dict({{'input_ids': {TEXTS}}})))"
    )
    # Other integers there, int64 instead of int32.
    assert run_python(code).strip() == corpus_fingerprint(make_documents(TEXTS))


def test_embedder_fingerprint_is_that_of_the_weights():
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    copy = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    assert embedder_fingerprint(model) != embedder_fingerprint(copy)
    copy.load_state_dict(model.state_dict())
    assert embedder_fingerprint(model) == embedder_fingerprint(copy.eval())
    with torch.no_grad():
        copy[0].weight[2, 1] += 1e-6
    assert embedder_fingerprint(model) != embedder_fingerprint(copy)
    assert embedder_fingerprint(model) != embedder_fingerprint(model.to(torch.bfloat16))


def test_embedders_that_are_no_modules_may_say_it():
    embedder = RowEmbedder(torch.eye(2))
    assert embedder_fingerprint(embedder) is None
    embedder.fingerprint = "rows-1"
    assert embedder_fingerprint(embedder) == "rows-1"
