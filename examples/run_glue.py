"""Fine-tunes a model on a task of GLUE, and writes predictions of the test data as the benchmark wants them.

    python examples/run_glue.py --model_name_or_path microsoft/cocolm-base --task_name mrpc \
        --num_train_epochs 10 --per_device_train_batch_size 16 --learning_rate 4e-5 \
        --do_train --do_eval --do_predict --output_dir runs/mrpc

    python examples/run_glue.py --model_name_or_path runs/mnli --task_name ax --do_predict --output_dir runs/mnli

The data is that of the Hub (nyu-mll/glue) or in files; --sentence1_key, --sentence2_key and --label_column say which
columns of other names to read. Labels in files are names as on the Hub or their numbers. --do_predict writes MRPC.tsv
and so on to --output_dir; all eleven of them in one zip file make a submission to gluebenchmark.com.

Settings with which the authors' base++ did best (README in folder fairseq of github.com/microsoft/COCO-LM):

    task                          mnli   qqp    qnli   sst2   cola   rte    mrpc   stsb
    --per_device_train_batch_size 32     32     32     32     16     16     16     16
    --learning_rate               2e-5   3e-5   1e-5   2e-5   2e-5   2e-5   4e-5   4e-5
    --num_train_epochs            2      5      5      5      10     10     10     10
    --warmup_steps                0.0625 0.0625 0.0625 0.0625 0.0625 0.1    0.0625 0.0625
"""

from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np
from datasets import Dataset
from sklearn.metrics import f1_score, matthews_corrcoef
from transformers import set_seed

from classification_data import REGRESSION, SINGLE, encode_labels, read_labels, read_texts, set_names
from run_classification import make_trainer, measure_labels, predicted_labels, save_metrics, write_predictions
from runs import (
    DataArguments,
    FineTuningArguments,
    ModelArguments,
    check_run,
    finish,
    load_splits,
    parse_arguments,
    train,
    wanted_splits,
)


class Task(NamedTuple):
    """A task of GLUE.

    columns: of texts. labels: their names in the order of their numbers on the Hub; none for scores. file: of
    predictions. names_in_file: whether it has names or else numbers of labels.
    """

    columns: tuple[str, ...]
    labels: tuple[str, ...]
    file: str
    names_in_file: bool = False


PAIR, PREMISE = ("sentence1", "sentence2"), ("premise", "hypothesis")
NLI, ENTAILMENT = ("entailment", "neutral", "contradiction"), ("entailment", "not_entailment")
# Columns, labels and their order: card of huggingface.co/datasets/nyu-mll/glue. Content of the files, a score of STS-B
# cut to 0..5 and with three digits: src/main.py and src/evaluate.py of github.com/nyu-mll/GLUE-baselines; their names:
# jiant/scripts/postproc/glue of github.com/nyu-mll/jiant.
TASKS = {
    "cola": Task(("sentence",), ("unacceptable", "acceptable"), "CoLA.tsv"),
    "sst2": Task(("sentence",), ("negative", "positive"), "SST-2.tsv"),
    "mrpc": Task(PAIR, ("not_equivalent", "equivalent"), "MRPC.tsv"),
    "stsb": Task(PAIR, (), "STS-B.tsv"),
    "qqp": Task(("question1", "question2"), ("not_duplicate", "duplicate"), "QQP.tsv"),
    "mnli": Task(PREMISE, NLI, "MNLI-m.tsv", names_in_file=True),
    "qnli": Task(("question", "sentence"), ENTAILMENT, "QNLI.tsv", names_in_file=True),
    "rte": Task(PAIR, ENTAILMENT, "RTE.tsv", names_in_file=True),
    "wnli": Task(PAIR, ("not_entailment", "entailment"), "WNLI.tsv"),
    "ax": Task(PREMISE, NLI, "AX.tsv", names_in_file=True),
}


@dataclass(kw_only=True)
class GlueArguments(DataArguments):
    """The task, and where its data is."""

    task_name: Literal["cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte", "wnli", "ax"] = field(
        metadata={"help": "the task; 'ax' is to be predicted by a model of 'mnli'"}
    )
    validation_mismatched_file: str | None = field(default=None, metadata={"help": "MNLI: data of other genres"})
    test_mismatched_file: str | None = field(default=None, metadata={"help": "MNLI: data of other genres"})
    sentence1_key: str | None = field(default=None, metadata={"help": "column of texts, if it is not that of the Hub"})
    sentence2_key: str | None = field(default=None, metadata={"help": "column of second texts, likewise"})
    label_column: str = field(default="label", metadata={"help": "column of labels"})
    max_length: int = field(default=512, metadata={"help": "tokens in the longest text or pair; longer ones are cut"})

    def __post_init__(self):
        if self.dataset_name is None and not any(value for name, value in vars(self).items() if name.endswith("_file")):
            self.dataset_name, self.dataset_config_name = "nyu-mll/glue", self.task_name

    @property
    def text_columns(self) -> list[str]:
        keys = (self.sentence1_key, self.sentence2_key)
        return [key or column for key, column in zip(keys, TASKS[self.task_name].columns, strict=False)]


@dataclass
class GlueTrainingArguments(FineTuningArguments):
    """transformers.TrainingArguments with the authors' settings for GLUE, where most tasks had the same."""

    warmup_steps: float = field(default=1 / 16, metadata={"help": "updates, or if below 1 their share"})


def measure_task(task: str, predictions: np.ndarray, labels: np.ndarray, names: list[str]) -> dict[str, float]:
    """The metrics of GLUE (Wang et al. 2018, table 1): `predictions` and `labels` `(rows,)` are indices or scores."""
    if task == "stsb":
        metrics = measure_labels(predictions, labels, REGRESSION)
        return {name: metrics[name] for name in ("pearson", "spearman")}
    if task == "cola":
        return {"matthews_correlation": float(matthews_corrcoef(labels, predictions))}
    metrics = {"accuracy": float((predictions == labels).mean())}
    if task in ("mrpc", "qqp"):
        positive = names.index(TASKS[task].labels[1])
        metrics["f1"] = float(f1_score(labels == positive, predictions == positive, zero_division=0))
    return metrics


def submitted_predictions(task: Task, decisions: np.ndarray, names: list[str]) -> list[str]:
    """Decisions of a model as the benchmark wants them."""
    if not task.labels:
        return [f"{score:.3f}" for score in np.clip(decisions, 0, 5)]
    words = [name if task.names_in_file else str(task.labels.index(name)) for name in names]
    return [words[i] for i in decisions]


def load_task(data: GlueArguments, wanted: list[str]) -> dict[str, Dataset]:
    """The wanted splits, and for MNLI validation_mismatched and test_mismatched too if there are any."""
    on_hub = data.task_name == "mnli" and data.dataset_name in ("nyu-mll/glue", "glue")
    names = {split: f"{split}_matched" if on_hub and split != "train" else split for split in wanted}
    names |= {f"{split}_mismatched": f"{split}_mismatched" for split in wanted if data.task_name == "mnli"}
    splits = load_splits(data, *(names[split] for split in wanted))
    return {split: splits[name] for split, name in names.items() if name in splits}


def main():
    checkpoint, data, training = parse_arguments(
        __doc__.splitlines()[0], ModelArguments, GlueArguments, GlueTrainingArguments
    )
    wanted, task = wanted_splits(training), TASKS[data.task_name]
    if data.task_name == "ax" and wanted != ["test"]:
        raise ValueError("The task ax has only test data: give --do_predict alone, and a model of the task mnli.")
    check_run(training, checkpoint, data)
    set_seed(training.seed)
    splits = load_task(data, wanted)
    problem = SINGLE if task.labels else REGRESSION
    config = checkpoint.load_config()
    names = set_names(config, problem, list(task.labels) or ["score"], training.do_train)
    if task.labels and set(names) != set(task.labels):
        known, needed = ", ".join(names), ", ".join(task.labels)
        raise ValueError(f"The model must know the labels {needed} of {data.task_name}, but it knows {known}.")
    texts, labels = {}, {}
    for split, rows in splits.items():
        texts[split] = read_texts(rows, split, data.text_columns)
        labels[split] = read_labels(rows, split, data.label_column)
        if labels[split] is not None:
            named = dict(enumerate(task.labels))
            values = [named.get(label, label) if isinstance(label, int) else label for label in labels[split]]
            labels[split] = encode_labels(values, split, problem, names)

    def compute_metrics(output):
        predictions = predicted_labels(output.predictions, problem)
        return measure_task(data.task_name, predictions, output.label_ids, names)

    trainer, inputs = make_trainer(checkpoint, training, config, texts, labels, data.max_length, compute_metrics)
    if training.do_train:
        train(trainer)
    for split, prefix in (("validation", "eval"), ("validation_mismatched", "eval_mismatched")):
        if split in inputs:
            save_metrics(trainer, prefix, trainer.evaluate(inputs[split], metric_key_prefix=prefix), inputs[split])
    for split, prefix in (("test", "predict"), ("test_mismatched", "predict_mismatched")):
        if split in inputs:
            output = trainer.predict(inputs[split], metric_key_prefix=prefix)
            save_metrics(trainer, prefix, output.metrics, inputs[split])
            file = "MNLI-mm.tsv" if split == "test_mismatched" else task.file
            predictions = submitted_predictions(task, predicted_labels(output.predictions, problem), names)
            write_predictions(trainer, file, "prediction", enumerate(predictions))
    finish(trainer, checkpoint, data, "text-classification")


if __name__ == "__main__":
    main()
