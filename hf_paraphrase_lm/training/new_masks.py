"""Masks that are new in every epoch, and yet the same ones when a run is resumed."""

from transformers import TrainerCallback

from ..data import DataCollatorForCorrectiveLM


class NewMasksCallback(TrainerCallback):
    """Seeds the collator with the seed of the data order and the number of the epoch.

    The random numbers of the process would not do: data is read ahead of the update that uses it, and is not read again
    when a run is resumed.

        Trainer(model=model, data_collator=collator, callbacks=[NewMasksCallback(collator)], ...)

    Args:
        collator: that of the trainer.

    Raises:
        ValueError: with `dataloader_persistent_workers=True`, whose workers would keep the first epoch's collator.
    """

    def __init__(self, collator: DataCollatorForCorrectiveLM):
        self.collator = collator

    def on_train_begin(self, args, state, control, **kwargs):
        if args.dataloader_persistent_workers:
            raise ValueError(
                "dataloader_persistent_workers must be False, because workers that live on never see the masks of a "
                "new epoch. Leave it out: starting workers once an epoch costs little."
            )

    def on_epoch_begin(self, args, state, control, **kwargs):
        seed = args.seed if args.data_seed is None else args.data_seed
        self.collator.seed = seed + int(state.epoch or 0)
