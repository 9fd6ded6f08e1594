"""What the training scripts share: their arguments, their data, resuming, and what a run leaves behind.

Every script takes its arguments on the command line or from one JSON or YAML file:

    python examples/run_classification.py --help
    python examples/run_classification.py arguments.yaml

Data comes from local files (CSV, TSV, JSON, JSON lines, Parquet, plain text) or from the Hub. In a TSV file quotation
marks are part of the text. A run started again with the same `--output_dir` goes on from its last checkpoint, or does
not train if it is done; its arguments are noted in `arguments.json`, and others that train otherwise are refused. It
leaves there the model with its tokenizer, `all_results.json` and, once the script is done, a model card.
"""

import csv
import hashlib
import json
import os
import shlex
import shutil
import sys
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path

import torch
import yaml
from datasets import DatasetDict, load_dataset
from datasets.exceptions import DatasetGenerationError
from huggingface_hub import ModelCard, ModelCardData
from torch.utils.data import SequentialSampler
from transformers import (
    AutoConfig,
    AutoTokenizer,
    HfArgumentParser,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerState,
    TrainingArguments,
)

from hf_paraphrase_lm import CocoLMConfig, StopOnInterruptCallback, __version__, keep_freed_memory
from hf_paraphrase_lm.retrieval import FolderClaim
from hf_paraphrase_lm.training import last_checkpoint

BUILDERS = {
    ".csv": "csv",
    ".tsv": "csv",
    ".json": "json",
    ".jsonl": "json",
    ".parquet": "parquet",
    ".txt": "text",
}
# How the names of arguments begin that may be others when a run goes on: they say where it runs, and what it measures,
# logs and saves, but not what it learns.
CHANGEABLE = (
    *("do_", "eval_", "log", "save_", "hub_", "push_to_hub", "report_to", "run_name", "project", "trackio"),
    *("output_dir", "validation_", "test_", "max_eval_samples", "max_predict_samples", "per_device_eval_batch_size"),
    *("n_best_size", "max_answer_length", "null_score_diff_threshold", "checkpointing_steps", "resume_from_checkpoint"),
    *("num_beams", "generation_", "bleu_tokenizer"),
    *("use_cpu", "attn_implementation", "trust_remote_code", "ddp_", "include_", "skip_memory_metrics", "disable_tqdm"),
    *("dataloader_num_workers", "dataloader_pin_memory", "dataloader_prefetch_factor", "dataloader_persistent", "_"),
)
CARD = """---
{{ card_data }}
---

# {{ name }}

{{ origin }}, fine-tuned for {{ task }} on {{ dataset }} with `hf-paraphrase-lm` {{ version }}.

## Measured

| metric | value |
|---|---|
{% for name, value in metrics.items() -%}
| {{ name }} | {{ value }} |
{% endfor %}
Metrics that begin with `eval_` are of the validation data and those with `predict_` of the test data.

## Training

{{ updates }} updates of {{ batch }} examples.

```bash
{{ command }}
```

"""


@dataclass
class DataArguments:
    """Where the data is: on the Hub, or in one file for each split."""

    dataset_name: str | None = field(default=None, metadata={"help": "data set on the Hub, such as 'rajpurkar/squad'"})
    dataset_config_name: str | None = field(default=None, metadata={"help": "its configuration, such as 'mrpc'"})
    train_file: str | None = field(
        default=None, metadata={"help": "training data: .csv, .tsv, .json, .jsonl, .parquet or .txt"}
    )
    validation_file: str | None = field(default=None, metadata={"help": "data to evaluate on, of any of these kinds"})
    test_file: str | None = field(default=None, metadata={"help": "data to predict, with or without labels"})
    max_train_samples: int | None = field(default=None, metadata={"help": "train on the first so many rows only"})
    max_eval_samples: int | None = field(default=None, metadata={"help": "evaluate on the first so many rows only"})
    max_predict_samples: int | None = field(default=None, metadata={"help": "predict the first so many rows only"})

    def max_samples(self, split: str) -> int | None:
        """How many rows of a split to use, of validation_matched as of validation; None: all of them."""
        names = {"train": "max_train_samples", "validation": "max_eval_samples", "test": "max_predict_samples"}
        return getattr(self, names.get(split.partition("_")[0], ""), None)


@dataclass
class ModelArguments:
    """Which model is fine-tuned."""

    model_name_or_path: str = field(metadata={"help": "checkpoint: a folder, or a name on the Hub"})
    tokenizer_name: str | None = field(default=None, metadata={"help": "folder or name, if the tokenizer is elsewhere"})
    model_revision: str = field(default="main", metadata={"help": "branch, tag or commit on the Hub"})
    trust_remote_code: bool = field(default=False, metadata={"help": "run code that comes with the checkpoint"})
    random_weights: bool = field(
        default=False, metadata={"help": "only the architecture and the tokenizer: shows what pre-training is worth"}
    )
    config_overrides: str | None = field(
        default=None,
        metadata={
            "help": "fields of the configuration, such as hidden_dropout_prob=0.2,attention_probs_dropout_prob=0"
        },
    )
    ignore_mismatched_sizes: bool = field(
        default=False, metadata={"help": "start with a fresh head if that of the checkpoint has other labels"}
    )
    attn_implementation: str | None = field(
        default=None,
        metadata={
            "help": "'sdpa', 'eager' or 'flex_attention'; on a CPU with --bf16, 'eager' is the fastest for short texts"
        },
    )

    def load_config(self) -> PreTrainedConfig:
        """The configuration of the checkpoint, with the fields that are to differ."""
        name, source = self.model_name_or_path, {"revision": self.model_revision}
        # The released COCO-LM checkpoints do not say which family they are of.
        is_released = "model_type" not in PreTrainedConfig.get_config_dict(name, **source)[0]
        config = (CocoLMConfig if is_released else AutoConfig).from_pretrained(
            name, trust_remote_code=self.trust_remote_code, **source
        )
        return override(config, self.config_overrides)

    def load_tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer that is named, or that of the checkpoint."""
        return AutoTokenizer.from_pretrained(
            self.tokenizer_name or self.model_name_or_path,
            revision="main" if self.tokenizer_name else self.model_revision,
            trust_remote_code=self.trust_remote_code,
            config=None if self.tokenizer_name else self.load_config(),
        )

    def load(self, auto_class, config: PreTrainedConfig):
        """The model of an Auto class with this configuration, from the checkpoint or from random weights."""
        # A checkpoint in half precision is trained in full precision; --bf16 computes in half.
        settings = {"attn_implementation": self.attn_implementation, "dtype": torch.float32}
        if self.random_weights:
            return auto_class.from_config(config, trust_remote_code=self.trust_remote_code, **settings)
        return auto_class.from_pretrained(
            self.model_name_or_path,
            config=config,
            revision=self.model_revision,
            trust_remote_code=self.trust_remote_code,
            ignore_mismatched_sizes=self.ignore_mismatched_sizes,
            **settings,
        )


def override(config: PreTrainedConfig, text: str | None) -> PreTrainedConfig:
    """The configuration itself, with other values in some fields, as in "hidden_size=256,corrective_lm_form=paper".

    Raises:
        ValueError: a part has another form, or there is no such field.
        huggingface_hub.errors.StrictDataclassError: the configuration does not allow a value.
    """
    names = type(config).__annotations__
    for part in text.split(",") if text else ():
        name, equals, value = part.strip().partition("=")
        if not equals or name not in names:
            raise ValueError(
                f"--config_overrides must be fields of {type(config).__name__} with their values, such as "
                f"hidden_size=256, but has {part.strip()!r}. The fields are {', '.join(names)}."
            )
        try:
            setattr(config, name, json.loads(value))
        except json.JSONDecodeError:
            setattr(config, name, value)
    config.validate()
    return config


@dataclass
class FineTuningArguments(TrainingArguments):
    """transformers.TrainingArguments with the authors' fine-tuning settings.

    From `run_glue.sh`, `run_squad.sh` and the tables of best settings in the README beside them (folder fairseq of
    github.com/microsoft/COCO-LM). For base++ they name 2 to 10 epochs, batches of 16 or 32, learning rates of 1e-5 to
    4e-5 and warm-up over 1/16 or 1/10 of the updates.
    """

    learning_rate: float = field(default=2e-5, metadata={"help": "highest learning rate"})
    per_device_train_batch_size: int = field(default=32, metadata={"help": "texts in a batch, on each device"})
    warmup_steps: float = field(default=0.1, metadata={"help": "updates, or if below 1 their share"})
    adam_beta2: float = field(default=0.98, metadata={"help": "beta2 of Adam"})
    adam_epsilon: float = field(default=1e-6, metadata={"help": "epsilon of Adam"})
    weight_decay: float = field(default=0.01, metadata={"help": "weight decay"})
    max_grad_norm: float = field(default=0.0, metadata={"help": "gradients are clipped to this norm; 0: not at all"})


class OrderedTrainer(Trainer):
    """Evaluates rows in their order, also with `--train_sampling_strategy group_by_length`.

    Trainer groups the rows that it evaluates too, and then returns their predictions in that other order.
    """

    def _get_eval_sampler(self, eval_dataset):
        return SequentialSampler(eval_dataset)

    def create_model_card(self, **kwargs):
        """Does nothing: Trainer would put its own card in the place of that of `finish` whenever it pushes."""


def parse_arguments(description: str, *classes) -> tuple:
    """One instance of each dataclass, from the command line or from the one JSON or YAML file that is given there.

    Raises:
        RuntimeError: of several processes, only this one was started.
    """
    # Without GPUs `accelerate launch` prepares for --num_processes but leaves starting them to MPI.
    sizes = {"WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE"}
    if {"ACCELERATE_USE_CPU", "MASTER_PORT"} <= os.environ.keys() and not sizes & os.environ.keys():
        raise RuntimeError(
            "`accelerate launch` was to start several processes, but on a CPU it has started this one only. Give it "
            "--multi_gpu as well, which works there too, or use `torchrun --nproc_per_node` in its place."
        )
    parser = HfArgumentParser(classes, description=description, allow_abbrev=False)
    if len(sys.argv) != 2 or not sys.argv[1].endswith((".json", ".yaml", ".yml")):
        return parser.parse_args_into_dataclasses()
    file = Path(sys.argv[1])
    if not file.is_file():
        parser.error(f"there is no file {file}")
    text = file.read_text(encoding="utf-8")
    settings = json.loads(text) if file.suffix == ".json" else yaml.safe_load(text)
    if not isinstance(settings, dict):
        parser.error(f"{file} must hold names and values, but holds {settings!r}")
    # Written as a command line, so that values have the types that they have there: to YAML, 2e-5 is a string.
    arguments = []
    for name, value in settings.items():
        if isinstance(value, list):
            arguments += [f"--{name}", *map(str, value)]
        elif value is not None:
            arguments.append(f"--{name}={json.dumps(value) if isinstance(value, dict) else value}")
    return parser.parse_args_into_dataclasses(arguments)


def wanted_splits(training: TrainingArguments) -> list[str]:
    """The splits that are to be trained on, evaluated and predicted.

    Raises:
        ValueError: there is none.
    """
    wanted = {"train": training.do_train, "validation": training.do_eval, "test": training.do_predict}
    if not any(wanted.values()):
        raise ValueError("There is nothing to do. Give --do_train, --do_eval or --do_predict, or several of them.")
    return [split for split in wanted if wanted[split]]


def load_splits(data: DataArguments, *needed: str) -> DatasetDict:
    """The splits of the data set, or one for each file: train, validation and test; `needed` must be there.

    Raises:
        ValueError: neither a data set nor files are given, or both; a file is of another kind; a split is missing.
        FileNotFoundError: there is no such file.
    """
    files = {name.removesuffix("_file"): file for name, file in vars(data).items() if name.endswith("_file")}
    files = {split: Path(file) for split, file in files.items() if file is not None}
    if bool(files) == (data.dataset_name is not None):
        raise ValueError("Give either --dataset_name or files (--train_file, --validation_file, --test_file).")
    if data.dataset_name is not None:
        splits = load_dataset(data.dataset_name, data.dataset_config_name)
    else:
        for split, file in files.items():
            if file.suffix not in BUILDERS:
                raise ValueError(f"--{split}_file must be one of {', '.join(BUILDERS)}, but got {str(file)!r}.")
            if not file.is_file():
                raise FileNotFoundError(f"--{split}_file: there is no file {file}.")
        # One at a time: the splits may be of different kinds and, without labels to predict, have other columns.
        splits = DatasetDict({split: load_file(file) for split, file in files.items()})
    for split in needed:
        if split not in splits:
            raise ValueError(f"There is no split {split!r}, only {', '.join(splits)}.")
    for split in splits:
        if (limit := data.max_samples(split)) is not None:
            splits[split] = splits[split].select(range(min(limit, len(splits[split]))))
    return splits


def load_file(file: Path):
    """The rows of a file.

    Raises:
        ValueError: there are none, or it is no file of its kind.
    """
    options = {}
    if BUILDERS[file.suffix] == "csv":
        # Only an empty cell has no value: "None", "null" and "NA" are words.
        options = {"keep_default_na": False, "na_values": [""]}
    if file.suffix == ".tsv":
        options |= {"sep": "\t", "quoting": csv.QUOTE_NONE}
    try:
        return load_dataset(BUILDERS[file.suffix], data_files=str(file), split="train", **options)
    except (DatasetGenerationError, StopIteration, ValueError) as error:
        reason = error.__cause__ or error
        raise ValueError(
            f"{file} has no rows or cannot be read as {BUILDERS[file.suffix]}. {reason}".strip()
        ) from error


def check_run(training: TrainingArguments, *others):
    """Before training, does what `note_arguments` does with these and the other arguments; on a CPU, keeps memory."""
    if training.device.type == "cpu":
        keep_freed_memory()
    if training.do_train:
        goes_on = last_checkpoint(Path(training.output_dir)) is not None
        note_arguments(goes_on, training.process_index == 0, training, *others)


def note_arguments(goes_on: bool, is_main_process: bool, *arguments):
    """Writes the arguments of a run to `arguments.json` in its folder, or compares them with what is written there.

    From here to its end this process alone may run in that folder.

    Args:
        goes_on: whether the folder has a checkpoint, from which the run is to go on.
        is_main_process: whether this process is to write.
        arguments: dataclasses; names that begin as in `CHANGEABLE` are left out.

    Raises:
        RuntimeError: another process runs in this folder.
        ValueError: the run in this folder had other arguments, or another content of a file that it trains on.
    """
    values = {each.name: getattr(some, each.name) for some in arguments for each in fields(some)}
    folder = Path(values["output_dir"])
    if is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        FolderClaim(folder)
    for name in ("train_file", "evidence_file"):
        if values.get(name) and Path(values[name]).is_file():
            with open(values[name], "rb") as file:
                values[name] += f" (SHA-256 {hashlib.file_digest(file, 'sha256').hexdigest()})"
    values = {name: value for name, value in values.items() if not name.startswith(CHANGEABLE)}
    text, file = json.dumps(values, indent=1, default=str), folder / "arguments.json"
    if goes_on and file.is_file():
        values, known = json.loads(text), json.loads(file.read_text(encoding="utf-8"))
        other = [name for name in values if name in known and values[name] != known[name]]
        if other:
            changes = ", ".join(f"--{name} was {known[name]!r} and is {values[name]!r}" for name in other)
            raise ValueError(
                f"The run in {folder} had other arguments: {changes}. Give the same to go on with it, or another "
                "--output_dir to start anew."
            )
    elif is_main_process:
        file.write_text(text + "\n", encoding="utf-8")


def load_finished(trainer: Trainer, checkpoint: str) -> bool:
    """Whether the run is done already; if so, the trainer gets its model and its state.

    Its model is in the folder of the run or, if it was broken off while it was saved there, in the checkpoint.
    """
    for folder in (trainer.args.output_dir, checkpoint):
        file = Path(folder) / "trainer_state.json"
        if file.is_file() and (state := TrainerState.load_from_json(str(file))).global_step >= state.max_steps:
            if folder == checkpoint and trainer.args.load_best_model_at_end:
                folder = state.best_model_checkpoint or checkpoint
            trainer.model.load_state_dict(trainer.model.from_pretrained(folder).state_dict())
            trainer.state = state
            return True
    return False


@contextmanager
def full_disk_explained(folder: Path, model: torch.nn.Module):
    """Names a full disk as the likely cause of an error in here; torch says only that a position is unexpected.

    Raises:
        OSError: any other error, if less room is left in `folder` than a checkpoint takes, three times the weights.
    """
    try:
        yield
    except Exception as error:
        room, needed = shutil.disk_usage(folder).free, 3 * sum(weight.nbytes for weight in model.parameters())
        if room >= needed:
            raise
        raise OSError(
            f"The run failed, probably because its disk is full: {folder} has room for {room / 1e6:.0f} MB, but a "
            f"checkpoint takes about {needed / 1e6:.0f} MB. The checkpoints from before are whole: make room, and the "
            "same command goes on from the last one."
        ) from error


def train(trainer: Trainer) -> dict[str, float]:
    """Trains, goes on from the last whole checkpoint if there is one, and saves model, tokenizer, metrics and state.

    At Ctrl-C a checkpoint is saved (unless `--save_strategy no`) and the script ends. A run that is done is not trained
    again, and its metrics of training stay; those of evaluation and prediction are removed, to be measured anew.

    Returns:
        the metrics of training; `train_resumed` says whether they are those since the run last went on.
    """
    stop, folder = StopOnInterruptCallback(), Path(trainer.args.output_dir)
    trainer.add_callback(stop)
    checkpoint = trainer.args.resume_from_checkpoint or last_checkpoint(folder)
    metrics = {"train_runtime": 0.0, "train_resumed": checkpoint is not None}
    results, state = folder / "train_results.json", folder / "trainer_state.json"
    if checkpoint is not None and load_finished(trainer, checkpoint):
        print(f"The run in {folder} is done. To start anew, give another --output_dir.", file=sys.stderr)
        metrics |= json.loads(results.read_text(encoding="utf-8")) if results.is_file() else {}
    else:
        if checkpoint is not None:
            print(f"Going on from {checkpoint}. To start anew, give another --output_dir.", file=sys.stderr)
        elif trainer.is_world_process_zero():
            # Those of an earlier run would pass for this one's.
            results.unlink(missing_ok=True)
            state.unlink(missing_ok=True)
        with full_disk_explained(folder, trainer.model):
            metrics |= trainer.train(resume_from_checkpoint=checkpoint).metrics
        if stop.interrupted:
            sys.exit(f"Interrupted at update {trainer.state.global_step}. The same command goes on from there.")
    if trainer.is_world_process_zero():
        for file in folder.glob("*_results.json"):
            file.unlink()
    metrics["train_samples"] = len(trainer.train_dataset)
    trainer.save_model()
    trainer.log_metrics("train", metrics)
    trainer.save_metrics("train", metrics)
    trainer.save_state()
    return metrics


def finish(trainer: Trainer, checkpoint: ModelArguments, data: DataArguments, task: str):
    """After training, writes the model card, and pushes all to the Hub with `--push_to_hub`."""
    if not trainer.args.do_train:
        return
    if trainer.is_world_process_zero():
        model_card(trainer, checkpoint, data, task).save(Path(trainer.args.output_dir) / "README.md")
    if trainer.args.push_to_hub:
        trainer.push_to_hub()


def model_card(trainer: Trainer, checkpoint: ModelArguments, data: DataArguments, task: str) -> ModelCard:
    """What was trained, on what, by which command, and what was measured."""
    args, origin = trainer.args, checkpoint.model_name_or_path
    sources = (data.dataset_name, data.dataset_config_name, data.train_file)
    results = json.loads((Path(args.output_dir) / "all_results.json").read_text(encoding="utf-8"))
    metrics = {
        name: f"{value:.6g}"
        for name, value in results.items()
        if name.startswith(("eval_", "predict_")) and not name.endswith(("_runtime", "_per_second"))
    }
    return ModelCard.from_template(
        ModelCardData(
            library_name="transformers",
            pipeline_tag=task,
            tags=["generated_from_trainer"],
            # The Hub accepts only models that it has.
            base_model=None if checkpoint.random_weights or Path(origin).is_dir() else origin,
            datasets=data.dataset_name,
        ),
        template_str=CARD,
        name=args.hub_model_id or Path(args.output_dir).name,
        origin=f"The architecture of `{origin}` with random weights" if checkpoint.random_weights else f"`{origin}`",
        task=task.replace("-", " "),
        dataset=" ".join(f"`{source}`" for source in sources if source),
        version=__version__,
        metrics=metrics,
        updates=trainer.state.global_step,
        batch=args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
        command=shlex.join(["python", *sys.argv]),
    )
