import copy
import re

import pytest
import torch
from safetensors.torch import load_file, save_file

from hf_paraphrase_lm.retrieval import EvidenceDataset

from .reference.evidence import RowEmbedder, row_documents

PAD = 99
N = 60
OPTIONS = {"num_targets": 4, "num_evidence": 3}


@pytest.fixture
def embedder():
    return RowEmbedder(torch.randn(2 * N, 6))


@pytest.fixture
def dataset(embedder):
    dataset = EvidenceDataset(row_documents(N), **OPTIONS)
    for _ in range(3):
        dataset.rebuild(embedder, PAD, progress=False)
    return dataset


@pytest.mark.parametrize("before", [0, 1, 2])
def test_the_same_groups_are_served_and_rebuilt(dataset, embedder, before, tmp_path):
    save_file(dataset.state_dict(), tmp_path / "groups.safetensors")
    other = EvidenceDataset(row_documents(N), **OPTIONS)
    for _ in range(before):
        other.rebuild(RowEmbedder(torch.randn(N, 6)), PAD, progress=False)
    other.load_state_dict(load_file(tmp_path / "groups.safetensors"))
    assert list(other) == list(dataset)
    assert other.num_rebuilds == dataset.num_rebuilds == 3 and other.num_groups == dataset.num_groups
    for each in (dataset, other):
        each.rebuild(embedder, PAD, progress=False)
    assert list(other) == list(dataset)


def test_groups_that_wait_for_their_batch_are_saved(dataset, embedder):
    first, second = list(dataset), None
    dataset.rebuild(embedder, PAD, progress=False)
    second = list(dataset)
    dataset.load_state_dict(state_of(dataset, embedder, first_batch=7))
    third = list(dataset)
    state = dataset.state_dict(batch=5)
    assert state["served"].tolist() == [[len(state["targets"]) - dataset.num_groups, 0], [dataset.num_groups, 7]]
    other = EvidenceDataset(row_documents(N), **OPTIONS)
    other.load_state_dict(state)
    other.tables.begin_pass(5)
    # Batches of one item: the fifth and the sixth, then those that the new groups were made for.
    served = [other.__getitems__([0])[0] for _ in range(4)]
    assert served == [second[0], second[0], third[0], third[0]] and first != second
    assert dataset.state_dict(batch=7)["served"].tolist() == [[dataset.num_groups, 7]]


def state_of(dataset, embedder, first_batch):
    """The state of a dataset after another rebuild, whose groups are for batches from `first_batch` on."""
    dataset = copy.deepcopy(dataset)
    found, _ = dataset.find_groups(embedder, PAD, progress=False)
    dataset.install(found, first_batch)
    return dataset.state_dict(batch=0)


def test_the_state_is_a_copy(dataset, embedder):
    state = dataset.state_dict()
    saved = copy.deepcopy(state)
    dataset.rebuild(embedder, PAD, progress=False)
    dataset.rebuild(embedder, PAD, progress=False)
    assert all(torch.equal(state[name], saved[name]) for name in saved)
    assert all(isinstance(tensor, torch.Tensor) for tensor in state.values())


def test_no_groups_no_state():
    with pytest.raises(RuntimeError, match=r"^EvidenceDataset has no groups yet\. "):
        EvidenceDataset(row_documents(N)).state_dict()


@pytest.mark.parametrize(
    ("documents", "options", "message"),
    [
        (row_documents(N), {"num_evidence": 4}, "num_evidence is 3 in the state and 4 here"),
        (row_documents(N), {"seed": 5}, "seed is 0 in the state and 5 here"),
        (row_documents(N), {"max_tokens": 90}, "max_tokens is None in the state and 90 here"),
        (
            row_documents(N),
            {"pairs_per_target": 2, "cross_language_weight": 1},
            "pairs_per_target is 8 in the state and 2 here; cross_language_weight is 100.0 in the state and 1 here",
        ),
        (row_documents(N), {"num_targets": 1, "strategy": "neighbors"}, None),
        (row_documents(N), {"first_chunks_only": True}, "first_chunks_only is False in the state and True here"),
        (row_documents(N + 1), {}, None),
        (row_documents(N, document=[row // 2 for row in range(N)]), {}, None),
        (row_documents(N), {"evidence": row_documents(2 * N)}, None),
    ],
)
def test_the_state_of_another_dataset_is_refused(dataset, embedder, documents, options, message):
    other = EvidenceDataset(documents, **OPTIONS | options)
    other.rebuild(embedder, PAD, progress=False)
    before = list(other)
    message = "[^.]+" if message is None else message if "100" not in message else message.replace(".", "[.]")
    message = (
        f"The state is of another EvidenceDataset: {message}. Groups fit only the corpora and options that they were "
        "made with: use these, or rebuild the groups."
    )
    with pytest.raises(ValueError, match=f"^{message}$"):
        other.load_state_dict(dataset.state_dict())
    assert list(other) == before and other.num_rebuilds == 1


def change(name, act):
    return lambda state: state | {name: act(state[name].clone())}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda state: {name: tensor for name, tensor in state.items() if name != "description"},
            "The state of an EvidenceDataset must have the tensor 'description', JSON as uint8, but it has "
            "['evidence', 'num_rebuilds', 'served', 'targets'] and reading it gives KeyError('description'). It is "
            "truncated, damaged or something else: use another checkpoint, or rebuild the groups.",
        ),
        (change("description", lambda tensor: tensor[:40]), "The state of an EvidenceDataset must have the tensor "),
        (change("description", torch.zeros_like), "The state of an EvidenceDataset must have the tensor "),
        (lambda state: {}, "The state of an EvidenceDataset must have the tensor "),
        (
            change("targets", lambda table: table[:10]),
            "The state must have tensors of the shapes {'targets': [15, 4], 'evidence': [15, 3], 'served': [1, 2], "
            "'num_rebuilds': [1]} with the content that was saved, but has {'targets': [10, 4], 'evidence': [15, 3], "
            "'served': [1, 2], 'num_rebuilds': [1]}. It is truncated or damaged: use another checkpoint, or "
            "rebuild the groups.",
        ),
        (
            change("evidence", torch.zeros_like),
            "The state must have tensors of the shapes {'targets': [15, 4], 'evidence': [15, 3], 'served': [1, 2], "
            "'num_rebuilds': [1]} with the content that was saved, but has {'targets': [15, 4], 'evidence': [15, 3], "
            "'served': [1, 2], 'num_rebuilds': [1]} with other content. It is truncated or damaged: use another "
            "checkpoint, or rebuild the groups.",
        ),
        (change("evidence", lambda table: table.int()), "The state must have tensors of the shapes "),
        (change("num_rebuilds", lambda number: number + 1), "The state must have tensors of the shapes "),
        (
            lambda state: {name: tensor for name, tensor in state.items() if name != "evidence"},
            "The state must have tensors of the shapes ",
        ),
        (lambda state: state | {"more": torch.zeros(1)}, "The state must have tensors of the shapes "),
    ],
)
def test_a_damaged_state_is_refused(dataset, embedder, damage, message):
    other = EvidenceDataset(row_documents(N), **OPTIONS)
    other.rebuild(RowEmbedder(torch.randn(N, 6)), PAD, progress=False)
    before = list(other)
    with pytest.raises(ValueError, match="^" + re.escape(message) + ("$" if message.endswith("groups.") else "")):
        other.load_state_dict(damage(dataset.state_dict()))
    assert list(other) == before and other.num_rebuilds == 1
