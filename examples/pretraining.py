"""What the pre-training scripts share: settings, the tokenizer of the corpus, the loop of those without `Trainer`."""

import logging
import math
import os
import platform
import shlex
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count, islice
from pathlib import Path
from typing import Literal

import torch
from accelerate import Accelerator, skip_first_batches
from accelerate.utils import DataLoaderConfiguration, GradientAccumulationPlugin
from datasets import Dataset
from huggingface_hub import ModelCard, ModelCardData
from transformers import AutoTokenizer, TrainingArguments, get_linear_schedule_with_warmup

from hf_paraphrase_lm import __version__, keep_freed_memory, train_tokenizer
from hf_paraphrase_lm.training import weight_decay_groups
from runs import DataArguments, ModelArguments, full_disk_explained, override

logger = logging.getLogger(__name__)


def bf16_is_faster(use_cpu: bool = False) -> bool:
    """Whether this machine has instructions for products in bfloat16, which then are faster than those in float32."""
    if torch.cuda.is_available() and not use_cpu:
        return torch.cuda.is_bf16_supported(including_emulation=False)
    # Asked rather than measured, so that all processes of a run get the same answer. Old PyTorch cannot tell.
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    return any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16"))


def warn_of_slow_bf16(use_cpu: bool):
    """Where bfloat16 was asked for on a CPU that has no instructions for it."""
    if (use_cpu or not torch.accelerator.is_available()) and not bf16_is_faster(use_cpu):
        logger.warning(
            "bfloat16 was asked for, but this CPU has no instructions for it, without which products can take 50 times "
            "as long as in float32. Leave it out: these scripts compute in bfloat16 by themselves where it is faster."
        )


@dataclass
class PretrainingArguments(TrainingArguments):
    """transformers.TrainingArguments with other defaults."""

    adam_beta2: float = field(default=0.98, metadata={"help": "beta2 of Adam"})
    adam_epsilon: float = field(default=1e-6, metadata={"help": "epsilon of Adam"})
    weight_decay: float = field(default=0.01, metadata={"help": "weight decay"})
    # As `bool | None` it could not be given without a value.
    bf16: bool = field(
        default=None, metadata={"help": "mixed precision with bfloat16; by default where the machine is faster with it"}
    )
    # The collators read columns that are no arguments of forward.
    remove_unused_columns: bool = field(default=False, metadata={"help": "must be false"})

    def __post_init__(self):
        if self.bf16 is None:
            self.bf16 = not self.fp16 and bf16_is_faster(self.use_cpu)
        elif self.bf16:
            warn_of_slow_bf16(self.use_cpu)
        super().__post_init__()


def load_tokenizer(config_class, network, corpus, texts, folder: Path, is_to_train: bool):
    """The tokenizer that is named, that of the checkpoint, or one trained on the texts, or earlier on those.

    Args:
        config_class: the family's, to which `--config_overrides` apply.
        network, corpus: arguments of the script.
        texts: a dataset, or something else where there are none to train on.
        folder: where the trained one is. It allows texts as long as the model takes, which may be longer than those
            of pre-training.
        is_to_train: whether this process is to train it, if none is named.

    Raises:
        ValueError: there are no texts to train it on, or `--max_length` is above the model's positions.
    """
    if name := network.tokenizer_name or network.model_name_or_path:
        return ModelArguments(name).load_tokenizer()
    if not isinstance(texts, Dataset):
        raise ValueError("There are no training texts for a tokenizer. Give --model_name_or_path or --tokenizer_name.")
    if is_to_train:
        positions = override(config_class(), network.config_overrides).max_position_embeddings
        check_length(corpus.max_length, positions)
        tokenizer = train_tokenizer(
            texts, corpus.vocab_size, corpus.text_column, corpus.lowercase, model_max_length=positions
        )
        tokenizer.save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


def check_length(length: int, positions: int):
    """Raises a ValueError if texts of this length, in tokens, are too long for a model."""
    if length > positions:
        raise ValueError(
            f"--max_length must be at most the model's max_position_embeddings ({positions}), but got {length}. Give a "
            "smaller one or, for random weights, --config_overrides max_position_embeddings=..."
        )


def pretraining_card(
    template: str,
    folder: Path,
    origin: str | None,
    corpus: DataArguments,
    metrics: dict,
    device: torch.device,
    num_processes: int,
    name: str | None = None,
    **values,
) -> ModelCard:
    """A template of the folder `model_cards` (its values see there) with what it says of every run."""
    name, resumed = name or folder.name, metrics["train_resumed"]
    hardware = f"{num_processes} x {platform.machine()} CPU, {torch.get_num_threads()} threads each"
    if device.type == "cuda":
        hardware = f"{num_processes} x {torch.cuda.get_device_name()}"
    return ModelCard.from_template(
        ModelCardData(
            model_name=name,
            # The Hub accepts only models that it has.
            base_model=None if origin is None or Path(origin).is_dir() else origin,
            datasets=corpus.dataset_name,
        ),
        template_path=Path(__file__).parent.parent / "model_cards" / template,
        repo_id=name,
        version=__version__,
        origin=f"`{origin}`" if origin else "random weights",
        corpus=f"`{corpus.dataset_name or corpus.train_file}`",
        hardware=hardware,
        duration=f"{metrics['train_runtime'] / 3600:.2f} h{' since it last went on' if resumed else ''}",
        command=shlex.join(["python", *sys.argv]),
        **values,
    )


@dataclass
class LoopArguments:
    """The training, in the names of transformers.TrainingArguments."""

    output_dir: str = field(default="runs/model", metadata={"help": "folder for checkpoints, model and results"})
    per_device_train_batch_size: int = field(default=8, metadata={"help": "examples in a batch, on each device"})
    gradient_accumulation_steps: int = field(default=1, metadata={"help": "batches of an update, on each device"})
    num_train_epochs: float = field(default=3.0, metadata={"help": "how often the corpus is read"})
    max_steps: int = field(default=-1, metadata={"help": "if above 0, the number of updates instead"})
    learning_rate: float = field(default=1e-4, metadata={"help": "highest learning rate"})
    warmup_steps: float = field(default=0.1, metadata={"help": "updates, or if below 1 their share"})
    weight_decay: float = field(default=0.01, metadata={"help": "weight decay"})
    max_grad_norm: float = field(default=1.0, metadata={"help": "gradients are clipped to this norm; 0: not at all"})
    mixed_precision: Literal["no", "fp16", "bf16"] | None = field(
        default=None,
        metadata={"help": "by default that of `accelerate launch`, and without it bf16 where the machine is faster"},
    )
    use_cpu: bool = field(default=False, metadata={"help": "even if there is a GPU"})
    dataloader_num_workers: int = field(default=0, metadata={"help": "processes that make the batches of a device"})
    checkpointing_steps: int = field(default=500, metadata={"help": "updates between checkpoints; two are kept"})
    logging_steps: int = field(default=100, metadata={"help": "updates between logs of their mean losses"})
    report_to: str = field(default="none", metadata={"help": "also log to 'tensorboard', 'wandb', ... or 'all'"})
    disable_tqdm: bool = field(default=False, metadata={"help": "show no progress bar"})
    seed: int = field(default=42, metadata={"help": "of weights, order, masks and dropout"})

    def __post_init__(self):
        if self.mixed_precision is None and "ACCELERATE_MIXED_PRECISION" not in os.environ:
            self.mixed_precision = "bf16" if bf16_is_faster(self.use_cpu) else "no"
        elif self.mixed_precision == "bf16":
            warn_of_slow_bf16(self.use_cpu)
        sizes = ("per_device_train_batch_size", "gradient_accumulation_steps", "checkpointing_steps", "logging_steps")
        for name in sizes:
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} must be at least 1, but got {getattr(self, name)}.")
        if self.max_steps < 1 and self.num_train_epochs <= 0:
            raise ValueError(f"--num_train_epochs must be above 0, but got {self.num_train_epochs}.")


def make_accelerator(args: LoopArguments) -> Accelerator:
    accelerator = Accelerator(
        cpu=args.use_cpu,
        mixed_precision=args.mixed_precision,
        log_with=None if args.report_to == "none" else args.report_to,
        project_dir=args.output_dir,
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True, data_seed=args.seed),
        # The scripts divide losses themselves: the last update of an epoch may have fewer batches.
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
    )
    if accelerator.device.type == "cpu":
        keep_freed_memory()
    # It would say at every checkpoint that shared weights are saved once.
    logging.getLogger("accelerate.utils.other").setLevel(logging.ERROR)
    return accelerator


def find_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints `step_<updates>`, oldest first. Only whole ones have such a name."""
    found = {path.name.removeprefix("step_"): path for path in folder.glob("step_*")}
    return [found[step] for step in sorted(filter(str.isdecimal, found), key=int)]


def save_checkpoint(accelerator: Accelerator, folder: Path, step: int, model: torch.nn.Module):
    """Writes `step_<step>`, with the log so far. It gets this name when it is whole, and then all but two go."""
    unfinished = folder / "unfinished"
    if accelerator.is_main_process:
        shutil.rmtree(unfinished, ignore_errors=True)
    accelerator.wait_for_everyone()
    with full_disk_explained(folder, model):
        accelerator.save_state(unfinished)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        shutil.copy(folder / "log.jsonl", unfinished)
        unfinished.rename(folder / f"step_{step}")
        for old in find_checkpoints(folder)[:-2]:
            shutil.rmtree(old)


def load_checkpoint(accelerator: Accelerator, checkpoint: Path) -> int:
    """Loads weights, optimizer, schedule, random numbers and log. Returns the number of updates.

    Raises:
        ValueError: the checkpoint is of another number of processes.
    """
    num_processes = len(list(checkpoint.glob("random_states_*.pkl")))
    if num_processes != accelerator.num_processes:
        raise ValueError(
            f"{checkpoint} is of a run with {num_processes} processes, but there are {accelerator.num_processes}. "
            f"Start {num_processes}, or give another --output_dir to start anew."
        )
    accelerator.load_state(checkpoint)
    if accelerator.is_main_process:
        print(f"Going on from {checkpoint}. To start anew, give another --output_dir.", file=sys.stderr)
        shutil.copy(checkpoint / "log.jsonl", checkpoint.parent)
    return int(checkpoint.name.removeprefix("step_"))


@contextmanager
def delayed_interrupt():
    """Yields a list that Ctrl-C makes longer, instead of breaking off. A second one does: checkpoints are safe."""
    pressed = []

    def remember(number, frame):
        signal.signal(signal.SIGINT, previous)
        pressed.append(number)
        print("\nCtrl-C: stopping after this update. Press it again to stop at once.", file=sys.stderr)

    previous = signal.signal(signal.SIGINT, remember)
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, previous)


def make_optimizer(model, args: LoopArguments) -> torch.optim.AdamW:
    """AdamW; biases and normalisation do not decay, as in Trainer."""
    groups = weight_decay_groups(model, args.weight_decay)
    return torch.optim.AdamW(groups, args.learning_rate, betas=(0.9, 0.98), eps=1e-6)


def make_scheduler(optimizer, args: LoopArguments, num_updates: int) -> torch.optim.lr_scheduler.LambdaLR:
    """Linear warm-up to the highest learning rate, then linear to 0."""
    share = args.warmup_steps
    warmup = int(share) if share >= 1 else math.ceil(num_updates * share)
    return get_linear_schedule_with_warmup(optimizer, warmup, num_updates)


def read_updates(
    loader, batches_per_update: int, step: int, new_epoch: Callable[[int], object] = lambda epoch: None
) -> Iterator[list[dict]]:
    """The batches of each update of this process after the first `step`, epoch after epoch without end.

    Args:
        loader: prepared by an accelerator of `make_accelerator`; the order follows from seed and epoch alone.
        new_epoch: called with the number of each epoch before its batches are made.
    """
    per_epoch = math.ceil(len(loader) / batches_per_update)
    for epoch in count(step // per_epoch):
        new_epoch(epoch)
        loader.set_epoch(epoch)
        batches = iter(skip_first_batches(loader, step % per_epoch * batches_per_update))
        while update := list(islice(batches, batches_per_update)):
            yield update
        step = 0
