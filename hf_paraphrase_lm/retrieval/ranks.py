"""Work shared out over the processes of `torch.distributed`; where that is not initialised, one process does it all."""

import numpy as np
import torch
import torch.distributed as dist


def rank_and_count(group=None) -> tuple[int, int]:
    """This process' rank in the group (None: of all processes) and their number."""
    if not (dist.is_available() and dist.is_initialized()):
        return 0, 1
    return dist.get_rank(group), dist.get_world_size(group)


def share_out(sizes: list[int], count: int) -> np.ndarray:
    """The rank that does each piece of work, int64 `(pieces,)`: the largest piece left to whoever has least so far."""
    load, owner = np.zeros(count), np.empty(len(sizes), dtype=np.int64)
    for piece in np.argsort(-np.asarray(sizes), kind="stable"):
        owner[piece] = load.argmin()
        load[owner[piece]] += sizes[piece]
    return owner


def sum_over_ranks(tensor: torch.Tensor, group=None) -> torch.Tensor:
    """The sum of the ranks' tensors, which have one shape, on the CPU; what only one rank has filled in is exact."""
    if rank_and_count(group)[1] == 1:
        return tensor
    # NCCL sums what is on a GPU only.
    tensor = tensor.to("cuda" if dist.get_backend(group) == "nccl" else "cpu")
    dist.all_reduce(tensor, group=group)
    return tensor.cpu()
