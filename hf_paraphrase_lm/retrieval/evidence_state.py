"""Saved groups that tell what they belong to and whether they are whole."""

import json

import torch
import xxhash


def add_description(tensors: dict[str, torch.Tensor], origin: dict) -> dict[str, torch.Tensor]:
    """The tensors and `description`, JSON as uint8: `origin`, their shapes, and a hash of all this."""
    shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
    description = origin | {"shapes": shapes}
    text = json.dumps(description | {"hash": _hash(tensors, description)}, default=float)
    return tensors | {"description": torch.tensor(list(text.encode()), dtype=torch.uint8)}


def check_description(state: dict[str, torch.Tensor], origin: dict) -> dict[str, torch.Tensor]:
    """The tensors that `add_description` was given, if they are whole and have this origin.

    Raises:
        ValueError: there is no description or a damaged one, another origin, or tensors that were not saved like this.
    """
    tensors = {name: tensor for name, tensor in state.items() if name != "description"}
    try:
        description = json.loads(bytes(state["description"].tolist()))
        saved_hash, shapes = description.pop("hash"), description["shapes"]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(
            "The state of an EvidenceDataset must have the tensor 'description', JSON as uint8, but it has "
            f"{sorted(state)} and reading it gives {error!r}. It is truncated, damaged or something else: use another "
            "checkpoint, or rebuild the groups."
        ) from error
    other = [
        f"{name} is {description.get(name)!r} in the state and {ours!r} here"
        for name, ours in origin.items()
        if description.get(name) != ours
    ]
    if other:
        raise ValueError(
            f"The state is of another EvidenceDataset: {'; '.join(other)}. Groups fit only the corpora and options "
            "that they were made with: use these, or rebuild the groups."
        )
    given = {name: list(tensor.shape) for name, tensor in tensors.items()}
    if given != shapes or _hash(tensors, description) != saved_hash:
        raise ValueError(
            f"The state must have tensors of the shapes {shapes} with the content that was saved, but has {given}"
            f"{' with other content' * (given == shapes)}. It is truncated or damaged: use another checkpoint, or "
            "rebuild the groups."
        )
    return tensors


def _hash(tensors: dict[str, torch.Tensor], description: dict) -> str:
    content = xxhash.xxh3_128(json.dumps(description, default=float).encode())
    for name in sorted(tensors):
        content.update(str(tensors[name].dtype).encode())
        content.update(tensors[name].cpu().contiguous().view(torch.uint8).numpy())
    return content.hexdigest()
