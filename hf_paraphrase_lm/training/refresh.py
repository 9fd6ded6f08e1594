"""Makes the groups of an `EvidenceDataset` anew while the model trains, at once or in the background."""

import base64
import time
import zlib
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from pathlib import Path

import safetensors.torch
import torch
import torch.distributed as dist
from safetensors import SafetensorError
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from ..retrieval import EvidenceDataset, FolderClaim
from .background_search import BackgroundSearch
from .checkpoints import set_aside_half_checkpoints

# What a resumed run must have as the one before it.
OPTIONS = ("refresh_steps", "shards_per_refresh", "mode")


class RefreshIndexCallback(TrainerCallback, ExportableState):
    """Rebuilds the groups with the current weights, before training if there are none, then every `refresh_steps`.

    The model embeds its own documents in eval mode (Lewis et al. 2020, section 2: every 10k updates, on a sample of the
    shards); modes, gradients and random numbers of the training are untouched. No refresh follows the last step:
    nothing would train on it. Groups that the dataset has already, for example from a `LexicalEmbedder`, are held until
    the first refresh.

        refresh = RefreshIndexCallback(dataset, refresh_steps=1000)
        Trainer(model=model, train_dataset=dataset, data_collator=collator, callbacks=[refresh], ...)

    `mode="blocking"`: training waits while the new groups are found. `mode="async"`: a thread finds them with a copy of
    the weights, on the same device, while training goes on; they are put to use at the next refresh, exactly
    `refresh_steps` updates after the weights they were found with. A search that is not done by then is waited for, one
    that is done early waits: so the data depend on the numbers of the updates alone and not on how fast the machine is,
    a run is reproducible and resumable as a blocking one, and all ranks change over in step. On a CPU the thread
    computes with a quarter of the threads of the training. With workers that are forked anew in every epoch,
    `dataloader_persistent_workers=True` spares a fork of the process while the thread computes.

    Batches are read ahead: one without workers, and `dataloader_num_workers * dataloader_prefetch_factor` more with
    them. They hold the groups from before a refresh; those after them hold the new ones, to the batch.

    **Resuming.** Every checkpoint has the groups in its `trainer_state.json`, the last file that Trainer writes and the
    one whose content it hands to callbacks, wherever the checkpoint lies: about 5 bytes for each target and for each
    evidence document. `trainer.train(resume_from_checkpoint=...)`, `True` or a path, goes on with them and ends, on a
    CPU, with the weights of an unbroken run, to the bit. In async mode a checkpoint between two refreshes waits for the
    search and has its groups, too; at a refresh it does not, because the resumed run searches again with the same
    weights, those of the checkpoint: let `save_steps` be a multiple of `refresh_steps`. What a process that was killed
    in a save has left of a checkpoint is renamed when the next Trainer is made with this callback, see
    [`set_aside_half_checkpoints`]; without it, [`last_checkpoint`] finds the last whole one. `batch_size`, the
    number of cores and that of workers may change on the way, but then vectors differ in their last digits, and new
    groups come some batches earlier or later. An evaluation during training with `dataloader_persistent_workers=True`
    makes dropout of a resumed run another, because new workers draw a random number.

    **Logs**, with the next loss (a step with a refresh is logged, unless `logging_strategy="no"`), as `refresh/...`:
    what the search returns, see `EvidenceDataset.find_groups`, where `seconds` is how long training stood still for it;
    `background_seconds`: how long the search took beside it (async); `share_of_time`: how much of the time since
    training began, or went on, it has stood still for refreshes; `staleness`: how many updates old the weights are
    with which the groups were found. They are in `state.log_history`, on the console, and in the `logs` of every
    callback that comes after this one. Trainer puts the integrations of `report_to` before the callbacks it is given;
    to send them these values as well, set `report_to="none"` and give their callbacks after this one, for example
    `callbacks=[refresh, transformers.integrations.TensorBoardCallback()]`.

    With several processes each does its share of the search, see `EvidenceDataset.find_groups`.

    Args:
        dataset: the `train_dataset` of the Trainer.
        refresh_steps: updates from one refresh to the next.
        shards_per_refresh: how many shards to sample, see `EvidenceDataset.sample_shards`; all if None. Which ones
            follows from the dataset's seed and the step, so a resumed run samples the same.
        batch_size: documents that are embedded at once.
        progress: show a bar; "async" shows none.
        mode: "blocking" or "async".

    Raises:
        RuntimeError: another process trains in the same `output_dir`, with checkpoints.
        ValueError: options out of range; `dispatch_batches` or `restore_callback_states_from_checkpoint` is on; nobody
            knows the padding token; the checkpoint has no groups, damaged ones, those of another corpus or of other
            options; what `EvidenceDataset.find_groups` raises, in async mode with the next update after it happened.
    """

    def __init__(
        self,
        dataset: EvidenceDataset,
        refresh_steps: int,
        shards_per_refresh: int | None = None,
        batch_size: int = 64,
        progress: bool = True,
        mode: str = "blocking",
    ):
        if refresh_steps < 1:
            raise ValueError(f"refresh_steps must be at least 1, but got {refresh_steps}.")
        if shards_per_refresh is not None and not 1 <= shards_per_refresh <= len(dataset.shards):
            raise ValueError(
                f"shards_per_refresh must be between 1 and {len(dataset.shards)}, the number of shards of the dataset, "
                f"but got {shards_per_refresh}."
            )
        if mode not in ("blocking", "async"):
            raise ValueError(f"mode must be 'blocking' or 'async', but got {mode!r}.")
        self.dataset = dataset
        self.refresh_steps = refresh_steps
        self.shards_per_refresh = shards_per_refresh
        self.batch_size = batch_size
        self.progress = progress
        self.mode = mode
        # Of the running training: its state, and how many batches of the running pass have been used.
        self._training = None
        self._batches = 0
        self._search: BackgroundSearch | None = None
        self._process_group = None
        self._claim: FolderClaim | None = None
        self._not_logged: dict[str, float] = {}

    def on_init_end(self, args, state, control, **kwargs):
        # The others look for a checkpoint when this is done.
        with args.main_process_first(local=False, desc="setting half checkpoints aside"):
            # What another run is writing is not to be set aside.
            if args.process_index == 0 and Path(args.output_dir).is_dir():
                with suppress(RuntimeError), FolderClaim(args.output_dir):
                    set_aside_half_checkpoints(args.output_dir)
        if args.restore_callback_states_from_checkpoint:
            raise ValueError(
                "restore_callback_states_from_checkpoint must be False, because with it Trainer makes its callbacks "
                "anew, and it cannot make the dataset of RefreshIndexCallback. Its state is restored anyway."
            )

    def on_train_begin(self, args, state, control, model=None, processing_class=None, train_dataloader=None, **kwargs):
        if args.accelerator_config.dispatch_batches:
            raise ValueError(
                "dispatch_batches must be False, because one process would read the batches of all, and the groups of "
                "each could not be told from its place. Leave it out: every process then reads its own batches."
            )
        if args.process_index == 0 and args.save_strategy != "no":
            self._claim = self._claim or FolderClaim(args.output_dir)
        self._end_search()
        self._training = None
        self._train_began, self._stood_still, self._max_steps = time.perf_counter(), 0.0, state.max_steps
        # Accelerate reads one batch ahead, to know which is the last one.
        self._read_ahead = 1 + args.dataloader_num_workers * (args.dataloader_prefetch_factor or 2)
        between_refreshes = self.refresh_steps * args.gradient_accumulation_steps
        self.dataset.tables.reserve(1 + -(-self._read_ahead // between_refreshes))
        if self.mode == "async" and dist.is_available() and dist.is_initialized():
            # What the threads say to each other must not meet what the training says.
            self._process_group = dist.new_group(backend="gloo", timeout=args.ddp_timeout_delta)
        self._batches = self._skipped = 0
        self._has_workers = False
        if state.global_step > 0:
            if not args.ignore_data_skip:
                updates_per_epoch = max(1, -(-len(train_dataloader) // args.gradient_accumulation_steps))
                self._skipped = state.global_step % updates_per_epoch * args.gradient_accumulation_steps
            self._restore(state, model, processing_class)
        elif self.dataset.num_groups == 0:
            self._refresh(0, model, processing_class)
        self._training = state

    def on_epoch_begin(self, args, state, control, **kwargs):
        if args.dataloader_persistent_workers and self._has_workers:
            # Workers that live on get no new seed; those of a resumed run do, which changes dropout.
            torch.empty((), dtype=torch.int64).random_()
        # Trainer skips batches with another DataLoader.
        self._has_workers |= self._skipped == 0
        self._batches, self._skipped = self._skipped, 0
        self.dataset.tables.begin_pass(self._batches)

    def on_substep_end(self, args, state, control, **kwargs):
        self._batches += 1

    def on_step_end(self, args, state, control, model=None, processing_class=None, **kwargs):
        self._batches += 1
        if self._search is not None and self._search.failed:
            self._take_search()
        if state.global_step % self.refresh_steps == 0 and state.global_step < state.max_steps:
            self._refresh(state.global_step, model, processing_class)
        if self._not_logged and args.logging_strategy != "no":
            control.should_log = True

    def on_log(self, args, state, control, logs=None, **kwargs):
        logs.update(self._not_logged)
        state.log_history[-1].update(self._not_logged)
        self._not_logged = {}

    def on_train_end(self, args, state, control, **kwargs):
        self._end_search()
        self._training = None
        if self._claim is not None:
            self._claim.release()
            self._claim = None

    def state(self) -> dict:
        """What a checkpoint keeps, for JSON: the options and, while a training runs, its groups and its search."""
        record = {"args": {name: getattr(self, name) for name in OPTIONS}, "attributes": {}}
        if self._training is None:
            return record
        record["attributes"]["groups"] = _to_text(self.dataset.state_dict(self._batches))
        if self._search is not None:
            search = record["attributes"]["search"] = {"step": self._search.step}
            if self._search.step != self._training.global_step:
                began = time.perf_counter()
                (targets, evidence), search["statistics"] = self._search.result()
                self._stood_still += time.perf_counter() - began
                search["groups"] = _to_text({"targets": targets, "evidence": evidence})
        return record

    def _restore(self, state, model, processing_class) -> None:
        record = state.stateful_callbacks.get(type(self).__name__)
        if not record or "groups" not in record["attributes"]:
            raise ValueError(
                f"The checkpoint of step {state.global_step} has no groups of evidence, so it was saved without a "
                f"{type(self).__name__}, and the run would go on with other data. Resume from a checkpoint that was "
                "saved with it, or load only its weights, with from_pretrained, and start anew."
            )
        other = [
            f"{name} was {record['args'].get(name)!r} and is {getattr(self, name)!r}"
            for name in OPTIONS
            if record["args"].get(name) != getattr(self, name)
        ]
        if other:
            raise ValueError(
                f"The checkpoint of step {state.global_step} was saved by a {type(self).__name__} with other options: "
                f"{', '.join(other)}. Give the same to go on with its run."
            )
        search = record["attributes"].get("search")
        try:
            groups = _from_text(record["attributes"]["groups"])
            found = _from_text(search["groups"]) if search and "groups" in search else None
        except (ValueError, TypeError, zlib.error, SafetensorError) as error:
            raise ValueError(
                f"The groups of evidence in the checkpoint of step {state.global_step} are damaged ({error}). Resume "
                "from another checkpoint."
            ) from error
        self.dataset.load_state_dict(groups)
        if found is not None:
            future = Future()
            future.set_result(((found["targets"], found["evidence"]), search["statistics"]))
            self._search = BackgroundSearch(search["step"], future)
        elif search:
            # These weights are those that it had begun with.
            self._begin_search(state.global_step, model, processing_class)

    def _refresh(self, step: int, model, processing_class) -> None:
        """Installs groups found with these weights or, in async mode, those of the search since the last time.

        In async mode the next search begins, if its groups will be used. Without any groups this one is waited for.
        """
        began = time.perf_counter()
        groups = None
        if self.mode == "blocking" or self.dataset.num_groups == 0:
            groups, statistics = self._finder(step, model, processing_class, progress=self.progress)(model)
            statistics["staleness"] = 0
        elif self._search is not None:
            statistics = {"staleness": step - self._search.step}
            groups, found = self._take_search()
            statistics |= found | {"background_seconds": found["seconds"]}
        if groups is not None:
            self.dataset.install(groups, self._batches + self._read_ahead)
        if self.mode == "async" and 0 < step < self._max_steps - self.refresh_steps:
            self._begin_search(step, model, processing_class)
        now = time.perf_counter()
        self._stood_still += now - began
        if groups is not None:
            share = self._stood_still / (now - self._train_began)
            statistics |= {"seconds": now - began, "share_of_time": share}
            self._not_logged = {f"refresh/{name}": value for name, value in statistics.items()}

    def _begin_search(self, step: int, model, processing_class) -> None:
        find = self._finder(step, model, processing_class, progress=False, group=self._process_group)
        self._search = BackgroundSearch.start(step, model, find)

    def _take_search(self) -> tuple:
        """Its groups and statistics, once it is done, or its error; from then on there is none."""
        search, self._search = self._search, None
        return search.result()

    def _end_search(self) -> None:
        if self._search is not None:
            self._search.stop()
            self._search = None

    def _finder(self, step: int, model, processing_class, **options) -> partial:
        """`find_groups`, but for the embedder."""
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
            shards = self.dataset.sample_shards(self.shards_per_refresh, step)
        return partial(
            self.dataset.find_groups, pad_token_id=pad_token_id, shards=shards, batch_size=self.batch_size, **options
        )


def _to_text(tensors: dict[str, torch.Tensor]) -> str:
    content = safetensors.torch.save({name: tensor.contiguous() for name, tensor in tensors.items()})
    return base64.b64encode(zlib.compress(content, level=1)).decode()


def _from_text(text: str) -> dict[str, torch.Tensor]:
    return safetensors.torch.load(zlib.decompress(base64.b64decode(text, validate=True)))
