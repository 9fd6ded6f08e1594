"""Shows the parts of a model's loss in the logs of `Trainer`."""

from collections import Counter
from collections.abc import Sequence
from itertools import chain

import torch
from transformers import TrainerCallback


class LogComponentLossesCallback(TrainerCallback):
    """Logs the losses that a model returns besides `loss`, next to it: for COCO-LM `mlm_loss`, `copy_loss`,
    `corrective_lm_loss` and `contrastive_loss`.

    They are means over the batches of an update, over the updates since the last log and over all processes, as Trainer
    averages a loss that is a mean over the batch: then their weighted sum is the logged `loss`. Only training counts,
    and the device is waited for at logs only.

        Trainer(model=model, callbacks=[LogComponentLossesCallback()], ...)

    They are in `state.log_history`, on the console and in the `logs` of every callback that comes after this one.
    Trainer puts the integrations of `report_to` before the callbacks it is given; to send them these values as well,
    set `report_to="none"` and give their callbacks after this one, for example
    `callbacks=[LogComponentLossesCallback(), transformers.integrations.TensorBoardCallback()]`.

    A run that ends with an exception leaves a forward hook on the model, which does nothing else than to remember
    scalars in training mode; the next run with this callback removes it.

    Args:
        names: fields of the model's output, each a scalar tensor. None: every scalar tensor whose name ends in `_loss`.

    Raises:
        ValueError: the output lacks one of the `names`, or has something else there than a scalar tensor.
    """

    def __init__(self, names: Sequence[str] | None = None):
        self.names = names
        self._hook = None

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.on_train_end(args, state, control)
        # The losses of each forward pass of this update; a list, because the threads of DataParallel append to it.
        self._batches: list[dict[str, torch.Tensor]] = []
        # Since the last log: sum over the updates, and how many there were.
        self._sums: dict[str, torch.Tensor] = {}
        self._updates: Counter[str] = Counter()
        self._hook = model.register_forward_hook(self._remember)

    def on_step_end(self, args, state, control, **kwargs):
        for name in dict.fromkeys(chain.from_iterable(self._batches)):
            # Under DataParallel they lie on several devices.
            losses = [batch[name].to(args.device) for batch in self._batches if name in batch]
            self._sums[name] = self._sums.get(name, 0) + torch.stack(losses).mean()
            self._updates[name] += 1
        self._batches = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        # Evaluations and the summary at the end are logged too, without a training loss.
        if "loss" not in logs or self._hook is None or not self._sums:
            return
        means = torch.stack([total / self._updates[name] for name, total in self._sums.items()])
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(means)
            means /= torch.distributed.get_world_size()
        losses = dict(zip(self._sums, means.tolist(), strict=True))
        logs.update(losses)
        state.log_history[-1].update(losses)
        self._sums = {}
        self._updates = Counter()

    def on_train_end(self, args, state, control, **kwargs):
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def _remember(self, module, arguments, output):
        # Without gradient, a batch is encoded for the sake of others and comes again.
        if not module.training or not torch.is_grad_enabled():
            return
        fields = output if isinstance(output, dict) else {}
        scalars = {name: value for name, value in fields.items() if torch.is_tensor(value) and value.ndim == 0}
        names = [name for name in scalars if name.endswith("_loss")] if self.names is None else self.names
        for name in names:
            if name not in scalars:
                raise ValueError(
                    f"LogComponentLossesCallback is to log {name}, but the output of {type(module).__name__} has no "
                    f"scalar tensor of this name, only {', '.join(scalars) or 'others'}."
                )
        self._batches.append({name: scalars[name].detach().float() for name in names})
