"""Muon for the matrices of a network, AdamW for everything else."""

from contextlib import nullcontext

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers.trainer_pt_utils import get_parameter_names


def weight_decay_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """The weights that need gradients: those that decay, and biases and those of normalisation, as in `Trainer`."""
    undecayed = ["bias", "layernorm", "rmsnorm", r"(?:^|\.)norm(?:$|\.)", r"_norm(?:$|\.)"]
    decayed = set(get_parameter_names(model, [nn.LayerNorm], undecayed))
    groups = [{"params": [], "weight_decay": weight_decay}, {"params": [], "weight_decay": 0.0}]
    for name, weight in model.named_parameters():
        if weight.requires_grad:
            groups[name not in decayed]["params"].append(weight)
    return groups


class _Float32(TorchFunctionMode):
    """Within it, what would become bfloat16 becomes float32."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        return (torch.Tensor.float if function is torch.Tensor.bfloat16 else function)(*args, **(kwargs or {}))


class MuonWithAdamW(torch.optim.Optimizer):
    """[`torch.optim.Muon`] for the weights of linear layers, [`torch.optim.AdamW`] for all others. Our choice.

    Embeddings, linear layers that share their weight with one (the output over a vocabulary) and those with one output
    are AdamW's, as are vectors. Muon's steps are scaled to the size of AdamW's, so that one learning rate serves both.

    Muon's products are computed in bfloat16, on a CPU in float32: many have no instructions for bfloat16, and without
    them an update would take several times as long as one of AdamW.

    Args:
        model: its weights that need gradients are trained.
        lr: learning rate of both.
        weight_decay: of both; see [`weight_decay_groups`].
        betas, eps: AdamW's.
        momentum: Muon's.

    Raises:
        ValueError: the model has no linear layer to train, or a value is out of its range.

    Source: Jordan et al., "Muon: An optimizer for hidden layers in neural networks" (2024); the scale is that of Liu et
    al., "Muon is scalable for LLM training" (2025).
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float = 1e-3,
        weight_decay: float = 0.01,
        betas: tuple[float, float] = (0.9, 0.98),
        eps: float = 1e-6,
        momentum: float = 0.95,
    ):
        embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
        linear = {id(module.weight) for module in model.modules() if isinstance(module, nn.Linear)} - embeddings

        def is_own(weight: nn.Parameter) -> bool:
            return weight.requires_grad and id(weight) in linear and len(weight) > 1

        matrices = [weight for weight in model.parameters() if is_own(weight)]
        if not matrices:
            raise ValueError("Muon is for the weights of linear layers, but this model has none to train. Take AdamW.")
        own = {id(weight) for weight in matrices}
        others = weight_decay_groups(model, weight_decay)
        for group in others:
            group["params"] = [weight for weight in group["params"] if id(weight) not in own]
        self.muon = torch.optim.Muon(
            matrices, lr, weight_decay=weight_decay, momentum=momentum, adjust_lr_fn="match_rms_adamw"
        )
        self.adamw = torch.optim.AdamW(others, lr, betas=betas, eps=eps)
        super().__init__(self.muon.param_groups + self.adamw.param_groups, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        """One update. Returns the loss of `closure`, which computes it with its gradients, if there is one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        # Schedulers and checkpoints know the groups and the state of this optimizer only, and may replace them.
        for optimizer, is_muon in ((self.muon, True), (self.adamw, False)):
            optimizer.param_groups = [group for group in self.param_groups if ("momentum" in group) == is_muon]
            optimizer.state = self.state
            on_cpu = any(weight.is_cpu for group in optimizer.param_groups for weight in group["params"])
            with _Float32() if is_muon and on_cpu else nullcontext():
                optimizer.step()
        return loss
