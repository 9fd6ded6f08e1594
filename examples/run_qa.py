"""Fine-tunes a model to mark the answer to a question in a text, as in SQuAD.

    python examples/run_qa.py --model_name_or_path microsoft/cocolm-base --dataset_name rajpurkar/squad_v2 \
        --version_2_with_negative --do_train --do_eval --output_dir runs/squad2

    python examples/run_qa.py --model_name_or_path runs/cocolm --train_file train.parquet --do_train \
        --validation_file validation.parquet --do_eval --test_file test.parquet --do_predict --output_dir runs/squad

    python examples/run_qa.py arguments.yaml

Any model of AutoModelForQuestionAnswering with a fast tokenizer will do. A row of the data has the columns `id`,
`context`, `question` and `answers`, a dictionary of two lists: `text` and `answer_start` (in characters of the
context). With --version_2_with_negative both may be empty: the context does not hold the answer. Training learns the
first answer of a question; evaluation accepts any. Data to predict needs no answers. The official JSON files are read
too.

Besides what all scripts leave in --output_dir (see `runs.py`), --do_predict writes there `predictions.json` (the answer
to each id), `nbest_predictions.json` and, in version 2, `null_odds.json` (by how much no answer scores higher than the
best one; the official evaluation takes it as --na-prob-file). --do_eval writes the same with `eval_` in front.
"""

import json
import logging
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from datasets import Dataset
from transformers import AutoModelForQuestionAnswering, DataCollatorWithPadding, set_seed

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
from squad_metrics import best_thresholds, squad_metrics
from squad_windows import WINDOW_COLUMNS, find_answers, make_windows

logger = logging.getLogger(__name__)


@dataclass
class QuestionArguments(DataArguments):
    """The questions, how they are cut into windows, and which answers are looked for."""

    version_2_with_negative: bool = field(default=False, metadata={"help": "some questions have no answer (SQuAD v2)"})
    max_length: int = field(default=384, metadata={"help": "most tokens of a question with a window of its context"})
    doc_stride: int = field(default=128, metadata={"help": "tokens that two successive windows of a context share"})
    n_best_size: int = field(default=20, metadata={"help": "answers to each question in nbest_predictions.json"})
    max_answer_length: int = field(default=30, metadata={"help": "tokens of the longest answer that is looked for"})
    null_score_diff_threshold: float = field(
        default=0.0, metadata={"help": "answer a question unless its null odds are above this (SQuAD v2)"}
    )

    def __post_init__(self):
        for name, least in (("doc_stride", 0), ("n_best_size", 1), ("max_answer_length", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"--{name} must be at least {least}, but got {getattr(self, name)}.")


def read_questions(rows: Dataset, split: str, version_2: bool, limit: int | None) -> Dataset:
    """The columns id, context, question and, of the right answers, texts and start (of the first one, in characters).

    Questions to train on whose first answer is not at its `answer_start` are left out, which is logged. The test data
    has no answers where none of its questions has one.

    Args:
        rows: as described at the top of this file.
        split: `train`, `validation` or `test`.
        version_2: whether questions may have no answer.
        limit: how many questions to use; None: all of them.

    Raises:
        ValueError: a column is missing or of another kind, a context is empty, two ids are the same, no question is
            left, or one has no answer in version 1.
    """
    if "data" in rows.column_names and "context" not in rows.column_names:
        rows = nested_rows(rows[0]["data"])
        rows = rows.select(range(len(rows) if limit is None else min(limit, len(rows))))
    answered = split != "test" or "answers" in rows.column_names
    columns = ["id", "context", "question"] + ["answers"] * answered
    for name in columns:
        if name not in rows.column_names:
            raise ValueError(f"The {split} data has no column {name!r}, only {', '.join(rows.column_names)}.")
    if answered and not (isinstance(kind := rows.features["answers"], dict) and {"text", "answer_start"} <= set(kind)):
        raise ValueError(
            f"The column 'answers' of the {split} data must hold dictionaries of two lists, text and answer_start, but "
            f"it holds {kind}."
        )
    examples = []
    for row in rows.select_columns(columns):
        if not (row["context"] or "").strip():
            raise ValueError(f"The context of question {row['id']!r} of the {split} data is empty.")
        answers = row.pop("answers", None) or {}
        row["question"] = (row["question"] or "").strip()
        examples.append(row | {"texts": answers.get("text") or [], "start": (answers.get("answer_start") or [-1])[0]})
    if len({example["id"] for example in examples}) < len(examples):
        raise ValueError(f"Each question must have an id of its own, but two of the {split} data have the same.")
    unanswered = sum(not example["texts"] for example in examples)
    if split == "test" and unanswered == len(examples):
        examples = [{name: example[name] for name in columns[:3]} for example in examples]
    elif unanswered and not version_2:
        raise ValueError(
            f"{unanswered} of {len(examples)} questions of the {split} data have no answer. If their contexts do not "
            "hold one, give --version_2_with_negative."
        )
    if split == "train":
        total, examples = len(examples), [example for example in examples if is_trainable(**example)]
        if left := total - len(examples):
            logger.warning("%d of %d questions are left out: their answer is not at its answer_start.", left, total)
    if not examples:
        raise ValueError(f"There is no question in the {split} data.")
    return Dataset.from_list(examples)


def is_trainable(context: str, texts: list[str], start: int, **other) -> bool:
    """Whether the first answer is where it should be in the context; also true if there is none."""
    return not texts or (start >= 0 and texts[0].strip() != "" and context.startswith(texts[0], start))


def nested_rows(data: list[dict]) -> Dataset:
    """The rows of a JSON file that has them under `data`, also as in the official files, by article and paragraph."""
    if data and "paragraphs" in data[0]:
        data = [
            {
                "id": question["id"],
                "context": paragraph["context"],
                "question": question["question"],
                "answers": {key: [answer[key] for answer in question["answers"]] for key in ("text", "answer_start")},
            }
            for article in data
            for paragraph in article["paragraphs"]
            for question in paragraph["qas"]
        ]
    return Dataset.from_list(data)


def cut_questions(examples: Dataset, tokenizer, limit: int) -> Dataset:
    """Cuts questions after `limit` tokens."""
    questions = examples["question"][:]
    tokens = tokenizer(questions, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ends = [spans[limit - 1][1] if len(spans) > limit else None for spans in tokens["offset_mapping"]]
    if cut := len(ends) - ends.count(None):
        logger.warning("%d of %d questions are cut after %d tokens.", cut, len(ends), limit)
    questions = [question[:end] for question, end in zip(questions, ends, strict=True)]
    return examples.remove_columns("question").add_column("question", questions)


def prepare(examples: Dataset, split: str, tokenizer, data: QuestionArguments) -> Dataset:
    """The windows of questions; those to train on in their order, others the longest first.

    Raises:
        ValueError: the tokenizer is a slow one, or the windows are too short for `--doc_stride`.
    """
    if not tokenizer.is_fast:
        raise ValueError(f"Answers need the offsets of a fast tokenizer, but got a {type(tokenizer).__name__}.")
    # Positions and windows are counted from the left.
    tokenizer.padding_side = tokenizer.truncation_side = "right"
    max_length = min(data.max_length, tokenizer.model_max_length)
    room = max_length - tokenizer.num_special_tokens_to_add(pair=True) - data.doc_stride
    if room < 2:
        raise ValueError(
            f"--doc_stride must be at most {data.doc_stride + room - 2} in windows of {max_length} tokens, but got "
            f"{data.doc_stride}. There must be room for a question and for what is new in a window."
        )
    # The other half of the room, at least, is for what is new in a window (our choice).
    windows = cut_questions(examples, tokenizer, room // 2).map(
        make_windows,
        batched=True,
        with_indices=True,
        remove_columns=examples.column_names,
        fn_kwargs={
            "tokenizer": tokenizer,
            "max_length": max_length,
            "doc_stride": data.doc_stride,
            "training": split == "train",
        },
        desc=f"Windows of the {split} data",
    )
    if split == "train":
        return windows
    # Windows of about the same length share a batch, which is padded little.
    lengths = np.array([len(ids) for ids in windows["input_ids"]])
    return windows.select(np.argsort(-lengths, kind="stable"))


def choose_answers(answers: list, odds: list[float], data: QuestionArguments) -> list[str]:
    """The answer to each question: its best text, or in version 2 an empty one if its null odds are too high."""
    threshold = data.null_score_diff_threshold if data.version_2_with_negative else np.inf
    return [texts[0][0] if odd <= threshold else "" for texts, odd in zip(answers, odds, strict=True)]


def score_answers(examples: Dataset, answers: list, odds: list[float], data: QuestionArguments) -> dict[str, float]:
    """Metrics of the chosen answers, in version 2 with the best that any threshold reaches; none without answers."""
    if "texts" not in examples.column_names:
        return {}
    right = examples["texts"][:]
    metrics = squad_metrics(choose_answers(answers, odds, data), right, data.version_2_with_negative)
    if data.version_2_with_negative:
        metrics |= best_thresholds([texts[0][0] for texts in answers], odds, right)
    return metrics


def write_answers(
    folder: Path, prefix: str, examples: Dataset, answers: list, odds: list[float], data: QuestionArguments
):
    """Writes the predictions: the files are described at the top."""
    files = {"predictions": choose_answers(answers, odds, data), "nbest_predictions": []}
    for texts, odd in zip(answers, odds, strict=True):
        if data.version_2_with_negative:
            texts = sorted([*texts, ("", texts[0][1] + odd)], key=lambda item: -item[1])
        weights = np.exp([score - texts[0][1] for _, score in texts])
        probabilities = (weights / weights.sum()).tolist()
        files["nbest_predictions"].append(
            [{"text": t, "score": s, "probability": p} for (t, s), p in zip(texts, probabilities, strict=True)]
        )
    if data.version_2_with_negative:
        files["null_odds"] = odds
    for name, values in files.items():
        content = json.dumps(dict(zip(examples["id"], values, strict=True)), indent=1, ensure_ascii=False)
        (folder / f"{prefix}{name}.json").write_text(content + "\n", encoding="utf-8")


def main():
    checkpoint, data, training = parse_arguments(
        __doc__.splitlines()[0], ModelArguments, QuestionArguments, FineTuningArguments
    )
    wanted = wanted_splits(training)
    check_run(training, checkpoint, data)
    set_seed(training.seed)
    splits = load_splits(data, *wanted)
    tokenizer = checkpoint.load_tokenizer()
    examples = {
        split: read_questions(splits[split], split, data.version_2_with_negative, data.max_samples(split))
        for split in wanted
    }
    windows = {split: prepare(examples[split], split, tokenizer, data) for split in wanted}
    # The model's own columns.
    inputs = {split: w if split == "train" else w.remove_columns(WINDOW_COLUMNS) for split, w in windows.items()}

    def answers_of(split: str, logits: tuple) -> tuple:
        """Answers and null odds."""
        contexts = examples[split]["context"][:]
        return find_answers(contexts, windows[split], logits, data.n_best_size, data.max_answer_length)

    trainer = OrderedTrainer(
        model=checkpoint.load(AutoModelForQuestionAnswering, checkpoint.load_config()),
        args=training,
        train_dataset=inputs.get("train"),
        eval_dataset=inputs.get("validation"),
        processing_class=tokenizer,
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=lambda output: score_answers(
            examples["validation"], *answers_of("validation", output.predictions), data
        ),
        # Some models return more than the logits of starts and ends.
        preprocess_logits_for_metrics=lambda logits, labels: logits[:2],
    )
    if training.do_train:
        train(trainer)
    # From here on the answers themselves are needed too.
    trainer.compute_metrics = None
    for split, name, prefix in (("validation", "eval", "eval_"), ("test", "predict", "")):
        if split in wanted:
            output = trainer.predict(inputs[split], metric_key_prefix=name)
            answers, odds = answers_of(split, output.predictions)
            metrics = score_answers(examples[split], answers, odds, data) | {"samples": len(examples[split])}
            metrics = output.metrics | {f"{name}_{key}": value for key, value in metrics.items()}
            trainer.log_metrics(name, metrics)
            trainer.save_metrics(name, metrics)
            if trainer.is_world_process_zero():
                write_answers(Path(training.output_dir), prefix, examples[split], answers, odds, data)
    finish(trainer, checkpoint, data, "question-answering")


if __name__ == "__main__":
    main()
