"""Losses of COCO-LM over the whole batch of an update, however it is cut into batches and ranks."""

from collections.abc import Iterator

import torch
from accelerate import Accelerator
from torch.utils.checkpoint import get_device_states, set_device_states
from transformers import Trainer


class CorrectiveLMTrainer(Trainer):
    """`Trainer` whose updates depend on the global batch only: 8 texts on one rank, 4 on each of two ranks, and two
    accumulated batches of 4 give the same losses and gradients.

    COCO-LM's losses are means over masked tokens, tokens and texts. With plain `Trainer`, which averages the batches,
    a token in a batch with few of them weighs more, and a text is contrasted with the texts of its own batch only (on
    all ranks). See [`global_batch`] for what it takes to be exact.

    It is used as `Trainer` is, with a [`CocoLMForPretraining`] as `model`.

    Raises:
        ValueError: one process has several GPUs, among which `torch.nn.DataParallel` would divide a batch.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if self.args.n_gpu > 1:
            raise ValueError(
                f"CorrectiveLMTrainer needs a process for each GPU, but this one has {self.args.n_gpu}. Start the "
                f"script with `accelerate launch --num_processes {self.args.n_gpu}`, or show it one GPU with "
                "CUDA_VISIBLE_DEVICES=0."
            )

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        self._batches, num_items_in_batch = super().get_batch_samples(epoch_iterator, num_batches, device)
        return self._batches, num_items_in_batch

    def training_step(self, model, inputs, num_items_in_batch=None):
        if inputs is self._batches[0]:
            model.train()
            # Not in get_batch_samples: when a run is resumed, the random numbers are restored after it.
            self._global_batch = global_batch(self.accelerator.unwrap_model(model), self._batches, self.accelerator)
        return super().training_step(model, next(self._global_batch), num_items_in_batch)


def global_batch(model, batches: list[dict], accelerator: Accelerator) -> Iterator[dict]:
    """The batches of one update, each with what makes its losses a part of those of the whole update.

    The mean over batches and ranks of their losses is then the loss of the global batch, and so are the gradients:

        for batch in global_batch(model, batches, accelerator):
            accelerator.backward(model(**batch).loss / len(batches))

    Normalisers are the numbers of masked tokens, tokens and anchors of the update, divided by the number of batches and
    ranks. With several batches the contrastive loss needs the embeddings of all others, so that all texts are encoded
    twice: at first without gradient, and then in turn, with the same random numbers (Gao et al. 2021, "Scaling Deep
    Contrastive Learning Batch Size under Memory Limited Setup"). This costs about a third more time, and no memory but
    that of the embeddings. With `contrastive_loss_weight=0` or batches without `span_input_ids` it is left out.

    Args:
        model: `CocoLMForPretraining`, in training mode and not wrapped; `accelerator.unwrap_model(model)`.
        batches: arguments of its forward, on its device. Every rank has as many and, where it is one, of as many texts;
            with `even_batches`, the default of Accelerate, it is so.
        accelerator: sums over the ranks.

    Yields:
        Each batch with `loss_normalizers` and, if there are several, `other_embeddings`. The state of the random
        numbers is what it was before the batch was encoded without gradient, so use the batch at once.
    """
    num_items = torch.stack([model.count_items(**batch) for batch in batches]).sum(0)
    num_items = accelerator.reduce(num_items, "sum")
    normalizers = num_items.clamp(min=1) / (len(batches) * accelerator.num_processes)
    batches = [batch | {"loss_normalizers": normalizers} for batch in batches]
    if len(batches) == 1 or not model.config.contrastive_loss_weight or "span_input_ids" not in batches[0]:
        yield from batches
        return

    views, states = [], []
    for batch in batches:
        states.append((torch.get_rng_state(), *get_device_states(batch["input_ids"])))
        with torch.no_grad():
            output = model(**batch, output_logits=True)
        views.append(torch.stack([output.contrastive_embeddings, output.span_embeddings], dim=1))
    is_text = [(batch["labels"] != -100).any(dim=-1) for batch in batches]
    stops = torch.tensor([len(rows) for rows in is_text]).cumsum(0).tolist()
    all_views = accelerator.gather(accelerator.pad_across_processes(torch.cat(views)))
    is_other = accelerator.gather(accelerator.pad_across_processes(torch.cat(is_text)))
    first = accelerator.process_index * (len(all_views) // accelerator.num_processes)
    for batch, rows, stop, (state, *device_states) in zip(batches, is_text, stops, states, strict=True):
        is_other_text = is_other.clone()
        is_other_text[first + stop - len(rows) : first + stop] = False
        torch.set_rng_state(state)
        set_device_states(*device_states)
        yield batch | {"other_embeddings": all_views[is_other_text].transpose(0, 1)}
