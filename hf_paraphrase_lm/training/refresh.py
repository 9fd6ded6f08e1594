"""Makes the groups of an `EvidenceDataset` anew while the model trains."""

import numpy as np
from transformers import TrainerCallback

from ..retrieval import EvidenceDataset


class RefreshIndexCallback(TrainerCallback):
    """Rebuilds the groups with the current weights, before training if there are none, then every `refresh_steps`.

    The model embeds its own documents in eval mode (Lewis et al. 2020, section 2: every 10k updates, on a sample of the
    shards); modes, gradients and random numbers of the training are untouched. No refresh follows the last step:
    nothing would train on it. Groups that the dataset has already, for example from a `LexicalEmbedder`, are held until
    the first refresh.

        refresh = RefreshIndexCallback(dataset, refresh_steps=1000)
        Trainer(model=model, train_dataset=dataset, data_collator=collator, callbacks=[refresh], ...)

    What `rebuild` returns is logged as `refresh/...` with the next loss (a step with a refresh is logged, unless
    `logging_strategy="no"`): in `state.log_history`, on the console, and to every callback that comes after this one.
    Trainer puts the integrations of `report_to` before the callbacks it is given; to send them these values as well,
    set `report_to="none"` and give their callbacks after this one, for example
    `callbacks=[refresh, transformers.integrations.TensorBoardCallback()]`.

    Args:
        dataset: the `train_dataset` of the Trainer.
        refresh_steps: updates from one refresh to the next.
        shards_per_refresh: how many shards to sample; all if None. Which ones follows from the dataset's seed and the
            step, so a resumed run samples the same.
        batch_size: documents in one call of `embed`.
        progress: show a bar.

    Raises:
        ValueError: options out of range; nobody knows the padding token; what `EvidenceDataset.rebuild` raises.
    """

    def __init__(
        self,
        dataset: EvidenceDataset,
        refresh_steps: int,
        shards_per_refresh: int | None = None,
        batch_size: int = 64,
        progress: bool = True,
    ):
        if refresh_steps < 1:
            raise ValueError(f"refresh_steps must be at least 1, but got {refresh_steps}.")
        if shards_per_refresh is not None and not 1 <= shards_per_refresh <= len(dataset.shards):
            raise ValueError(
                f"shards_per_refresh must be between 1 and {len(dataset.shards)}, the number of shards of the dataset, "
                f"but got {shards_per_refresh}."
            )
        self.dataset = dataset
        self.refresh_steps = refresh_steps
        self.shards_per_refresh = shards_per_refresh
        self.batch_size = batch_size
        self.progress = progress
        self._not_logged: dict[str, float] = {}

    def on_train_begin(self, args, state, control, model=None, processing_class=None, **kwargs):
        if self.dataset.num_groups == 0:
            self._refresh(state.global_step, model, processing_class)

    def on_step_end(self, args, state, control, model=None, processing_class=None, **kwargs):
        if state.global_step % self.refresh_steps == 0 and state.global_step < state.max_steps:
            self._refresh(state.global_step, model, processing_class)
        if self._not_logged and args.logging_strategy != "no":
            control.should_log = True

    def on_log(self, args, state, control, logs=None, **kwargs):
        logs.update(self._not_logged)
        state.log_history[-1].update(self._not_logged)
        self._not_logged = {}

    def _refresh(self, step: int, model, processing_class) -> None:
        pad_token_id = getattr(processing_class, "pad_token_id", None)
        if pad_token_id is None:
            pad_token_id = getattr(getattr(model, "config", None), "pad_token_id", None)
        if pad_token_id is None:
            raise ValueError(
                "RefreshIndexCallback must know the padding token to embed documents in batches, but neither Trainer's "
                "processing_class nor model.config has a pad_token_id. Give Trainer the tokenizer as processing_class."
            )
        shards = None
        if self.shards_per_refresh is not None:
            rng = np.random.default_rng([self.dataset.seed, step])
            sample = rng.choice(len(self.dataset.shards), self.shards_per_refresh, replace=False)
            shards = [self.dataset.shards[i] for i in sample]
        statistics = self.dataset.rebuild(model, pad_token_id, shards, self.batch_size, self.progress)
        self._not_logged = {f"refresh/{name}": value for name, value in statistics.items()}
