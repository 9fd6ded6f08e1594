"""Fine-tunes a model to classify or score texts or pairs of texts.

    python examples/run_classification.py --model_name_or_path microsoft/cocolm-base --train_file train.csv \
        --validation_file validation.csv --do_train --do_eval --output_dir runs/sentiment

    python examples/run_classification.py --model_name_or_path runs/cocolm --dataset_name stanfordnlp/snli \
        --text_column premise --text_pair_column hypothesis --do_train --do_eval --do_predict --output_dir runs/snli

Any model of AutoModelForSequenceClassification will do. What is learned is told from the labels, unless
--problem_type says otherwise: numbers with a point mean regression, lists several labels for a text (the labels that it
has, not a 0 or 1 for each), and anything else one label of several. Rows whose class is -1, as in SNLI, are left out.

Besides what all scripts leave in --output_dir (see `runs.py`), --do_predict writes there `predict_results.txt`: the
index of each row of the test data and its label, its labels with commas between them, or its number.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
from datasets import Dataset
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, mean_squared_error
from torch.nn import functional as F
from transformers import (
    AutoModelForSequenceClassification,
    DataCollatorWithPadding,
    PreTrainedConfig,
    Trainer,
    set_seed,
)

from classification_data import (
    MULTI,
    REGRESSION,
    SINGLE,
    class_label,
    class_names,
    encode_labels,
    labelled_rows,
    read_labels,
    read_texts,
    set_names,
    tell_problem,
)
from runs import (
    DataArguments,
    FineTuningArguments,
    ModelArguments,
    OrderedTrainer,
    check_run,
    finish,
    load_splits,
    parse_arguments,
    train,
    wanted_splits,
)


@dataclass
class TextArguments(DataArguments):
    """The texts, and what is learned about them."""

    text_column: str = field(default="text", metadata={"help": "the column of texts"})
    text_pair_column: str | None = field(default=None, metadata={"help": "the column of second texts, for pairs"})
    label_column: str = field(default="label", metadata={"help": "the column of labels"})
    problem_type: Literal["single_label_classification", "multi_label_classification", "regression"] | None = field(
        default=None, metadata={"help": "what is learned, if the labels do not tell"}
    )
    max_length: int = field(default=512, metadata={"help": "tokens in the longest text or pair; longer ones are cut"})

    @property
    def text_columns(self) -> list[str]:
        return [self.text_column] if self.text_pair_column is None else [self.text_column, self.text_pair_column]


def predicted_labels(logits: np.ndarray, problem: str) -> np.ndarray:
    """What a model says, encoded as labels are: `(rows,)`, or `(rows, num_labels)` for several labels."""
    if problem == SINGLE:
        return logits.argmax(-1)
    return (logits > 0).astype(int) if problem == MULTI else logits.squeeze(-1)


def measure_labels(predictions: np.ndarray, labels: np.ndarray, problem: str) -> dict[str, float]:
    """The metrics that go with a problem type. Correlations with a constant are 0 (our choice; they have no value)."""
    if problem == REGRESSION:
        varies = min(np.ptp(predictions), np.ptp(labels)) > 0
        return {
            "pearson": float(pearsonr(predictions, labels).statistic) if varies else 0.0,
            "spearman": float(spearmanr(predictions, labels).statistic) if varies else 0.0,
            "mse": float(mean_squared_error(labels, predictions)),
        }
    macro = {"macro_f1": float(f1_score(labels, predictions, average="macro", zero_division=0))}
    if problem == MULTI:
        return {"micro_f1": float(f1_score(labels, predictions, average="micro", zero_division=0))} | macro
    return {"accuracy": float(accuracy_score(labels, predictions))} | macro


def loss_function(problem: str, label_smoothing: float) -> Callable:
    """The mean loss over the labels of the whole batch, which may be divided among processes and micro-batches.

    Most models of transformers return the mean over a micro-batch, which Trainer takes for a part of the mean over the
    whole batch: gradients would be as many times too large as there are micro-batches.
    """
    functions = {
        SINGLE: partial(F.cross_entropy, label_smoothing=label_smoothing),
        MULTI: F.binary_cross_entropy_with_logits,
        REGRESSION: F.mse_loss,
    }

    def loss(outputs, labels, num_items_in_batch=None):
        logits = outputs["logits"].float()
        logits = logits.squeeze(-1) if problem == REGRESSION else logits
        return functions[problem](logits, labels, reduction="sum") / (num_items_in_batch or labels.numel())

    return loss


def make_trainer(
    checkpoint: ModelArguments,
    training: FineTuningArguments,
    config: PreTrainedConfig,
    texts: dict[str, Dataset],
    labels: dict[str, list | None],
    max_length: int,
    compute_metrics: Callable,
) -> tuple[Trainer, dict[str, Dataset]]:
    """The trainer of a model with this configuration, and its inputs for each split.

    Args:
        config: its `problem_type` and `label2id` say what the model learns.
        texts: the columns of texts of each split, from `read_texts`.
        labels: the encoded labels of each split, from `encode_labels`, or None.
        max_length: tokens in the longest text or pair.
        compute_metrics: of Trainer.
    """
    tokenizer = checkpoint.load_tokenizer()
    max_length = min(max_length, tokenizer.model_max_length)

    def tokenize(batch):
        return tokenizer(*batch.values(), truncation=True, max_length=max_length)

    inputs = {}
    with training.main_process_first(desc="tokenizing"):
        for split, rows in texts.items():
            inputs[split] = rows.map(
                tokenize, batched=True, remove_columns=rows.column_names, desc=f"Tokens of the {split} data"
            )
            if labels[split] is not None:
                inputs[split] = inputs[split].add_column("labels", labels[split])
    trainer = OrderedTrainer(
        model=checkpoint.load(AutoModelForSequenceClassification, config),
        args=training,
        train_dataset=inputs.get("train"),
        eval_dataset=inputs.get("validation"),
        processing_class=tokenizer,
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_loss_func=loss_function(config.problem_type, training.label_smoothing_factor),
        compute_metrics=compute_metrics,
        # Some models return more than logits.
        preprocess_logits_for_metrics=lambda logits, labels: logits[0] if isinstance(logits, tuple) else logits,
    )
    return trainer, inputs


def save_metrics(trainer: Trainer, name: str, metrics: dict[str, float], rows: Dataset):
    """Prints metrics and writes them to {name}_results.json and all_results.json."""
    metrics[f"{name}_samples"] = len(rows)
    trainer.log_metrics(name, metrics)
    trainer.save_metrics(name, metrics)


def write_predictions(trainer: Trainer, file: str, title: str, predictions: Iterable[tuple[int, str]]):
    """Writes a line with the index of each row and what is predicted for it, below a line of titles."""
    if trainer.is_world_process_zero():
        lines = [f"index\t{title}", *(f"{index}\t{prediction}" for index, prediction in predictions)]
        (Path(trainer.args.output_dir) / file).write_text("\n".join(lines) + "\n", encoding="utf-8")


def main():
    checkpoint, data, training = parse_arguments(
        __doc__.splitlines()[0], ModelArguments, TextArguments, FineTuningArguments
    )
    wanted = wanted_splits(training)
    check_run(training, checkpoint, data)
    set_seed(training.seed)
    splits = load_splits(data, *wanted)
    kept = {split: labelled_rows(splits[split], split, data.label_column) for split in wanted}
    rows = {split: splits[split].select(kept[split]) for split in wanted}
    texts = {split: read_texts(rows[split], split, data.text_columns) for split in wanted}
    labels = {split: read_labels(rows[split], split, data.label_column) for split in wanted}
    config, trained, first = checkpoint.load_config(), training.do_train, wanted[0]
    problem = data.problem_type or (None if trained else config.problem_type) or tell_problem(labels[first])
    if problem == REGRESSION:
        names = [data.label_column]
    elif trained:
        names = class_names(rows[first], data.label_column, labels[first])
    else:
        # Without names of their own, the labels are the model's outputs by their number.
        classes = class_label(rows[first], data.label_column)
        names = classes.names if classes else [str(i) for i in range(config.num_labels)]
    names = set_names(config, problem, names, trained)
    labels = {split: some and encode_labels(some, split, problem, names) for split, some in labels.items()}

    def compute_metrics(output):
        return measure_labels(predicted_labels(output.predictions, problem), output.label_ids, problem)

    trainer, inputs = make_trainer(checkpoint, training, config, texts, labels, data.max_length, compute_metrics)
    if training.do_train:
        train(trainer)
    if training.do_eval:
        save_metrics(trainer, "eval", trainer.evaluate(), inputs["validation"])
    if training.do_predict:
        output = trainer.predict(inputs["test"], metric_key_prefix="predict")
        save_metrics(trainer, "predict", output.metrics, inputs["test"])
        decisions = predicted_labels(output.predictions, problem)
        if problem == REGRESSION:
            lines = [f"{number:.6g}" for number in decisions]
        elif problem == SINGLE:
            lines = [names[i] for i in decisions]
        else:
            lines = [",".join(name for name, has in zip(names, row, strict=True) if has) for row in decisions]
        write_predictions(trainer, "predict_results.txt", "label", zip(kept["test"], lines, strict=True))
    finish(trainer, checkpoint, data, "text-classification")


if __name__ == "__main__":
    main()
