"""Fine-tunes a model to write a text from a text: translations, summaries, paraphrases.

    python examples/run_seq2seq.py --model_name_or_path runs/marge --train_file train.parquet --source_column en \
        --target_column text --target_language_token '<{lang}>' --validation_file validation.parquet --do_train \
        --do_eval --output_dir runs/translation

    python examples/run_seq2seq.py --model_name_or_path runs/marge --dataset_name allenai/scitldr --metric rouge \
        --source_column source --target_column target --do_train --do_predict --output_dir runs/summaries

Any model of AutoModelForSeq2SeqLM will do; MARGE reads the source as its one evidence document. The column of targets
holds a text, or a list of texts that are all right: each is learned, and what is written is compared with all of them.

--target_language_token is the first token of every target, in training and in what is written. Names in braces are
columns: with '<{lang}>' one model learns the languages of the column `lang`. Tokens that the tokenizer lacks are added
in training. Where all targets begin with the same token, the saved model writes it by itself.

Metrics, from 0 to 100: `--metric bleu` gives BLEU (case:mixed|eff:no|tok:13a|smooth:exp, or another --bleu_tokenizer)
and chrF as sacrebleu computes them, `--metric rouge` the mean F1 of ROUGE-1, ROUGE-2 and ROUGE-L, of the best reference
of each row. ROUGE compares words in lower case, and single characters of the scripts that put no spaces between words
(our choice; in ASCII texts what rouge-score does without stemming).

Besides what all scripts leave in --output_dir (see `runs.py`), --do_predict writes there `generated_predictions.txt`:
a line for each row of the test data, with \\n for a line break in the text and \\\\ for a backslash.
"""

import logging
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Literal

import numpy as np
import regex
import torch
from datasets import Dataset
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics import BLEU, CHRF
from torch.nn import functional as F
from torch.utils.data import SequentialSampler
from transformers import (
    AutoModelForSeq2SeqLM,
    DataCollatorForSeq2Seq,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    set_seed,
)

from classification_data import check_columns, read_texts
from runs import DataArguments, ModelArguments, check_run, finish, load_splits, parse_arguments, train, wanted_splits

logger = logging.getLogger(__name__)

TASKS = {"bleu": "translation", "rouge": "summarization"}
ROUGES = ("rouge1", "rouge2", "rougeL")
UNSPACED = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}"
WORDS = regex.compile(rf"[{UNSPACED}]|[[\p{{L}}\p{{M}}\p{{N}}]--[{UNSPACED}]]+", regex.VERSION1)


@dataclass
class TargetArguments(DataArguments):
    """The texts, and how what is written is found and measured."""

    source_column: str = field(default="source", metadata={"help": "the column of texts that are read"})
    target_column: str = field(default="target", metadata={"help": "the column of texts, or lists of texts, to write"})
    target_language_token: str | None = field(
        default=None, metadata={"help": "first token of the targets; '<{lang}>' takes its name from the column lang"}
    )
    max_source_length: int = field(default=512, metadata={"help": "tokens in the longest source; longer ones are cut"})
    max_target_length: int = field(default=128, metadata={"help": "tokens in the longest target; longer ones are cut"})
    num_beams: int = field(default=4, metadata={"help": "beams of the search; 1: always the most likely token"})
    metric: Literal["bleu", "rouge"] = field(default="bleu", metadata={"help": "bleu (with chrF), or rouge"})
    bleu_tokenizer: Literal["13a", "intl", "zh", "char", "none"] = field(
        default="13a", metadata={"help": "how sacrebleu parts words; zh for Chinese, char for Japanese and others"}
    )

    def __post_init__(self):
        for name in ("max_source_length", "max_target_length", "num_beams"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} must be at least 1, but got {getattr(self, name)}.")


@dataclass
class WritingArguments(Seq2SeqTrainingArguments):
    """transformers.Seq2SeqTrainingArguments with other defaults, all our choice; the paper does not state its own."""

    learning_rate: float = field(default=1e-4, metadata={"help": "highest learning rate"})
    warmup_steps: float = field(default=0.1, metadata={"help": "updates, or if below 1 their share"})
    weight_decay: float = field(default=0.01, metadata={"help": "weight decay"})
    label_smoothing_factor: float = field(default=0.1, metadata={"help": "share of a label given to all tokens alike"})
    predict_with_generate: bool = field(default=True, metadata={"help": "measure texts that the model writes"})


class Words:
    """Parts a text for ROUGE, see the top of this file."""

    def tokenize(self, text: str) -> list[str]:
        return WORDS.findall(text.lower())


class CollatorWithPrefixes(DataCollatorForSeq2Seq):
    """Batches as usual and, where rows have it, `decoder_prefix`: int64 `(rows, 2)`, what the decoder starts from."""

    def __call__(self, features, return_tensors=None):
        prefixes = [row["decoder_prefix"] for row in features if "decoder_prefix" in row]
        batch = super().__call__([{k: v for k, v in row.items() if k != "decoder_prefix"} for row in features])
        # Without targets the labels are None, which Trainer would take for labels.
        batch = {name: value for name, value in batch.items() if value is not None}
        return batch | {"decoder_prefix": torch.tensor(prefixes)} if prefixes else batch


class WritingTrainer(Seq2SeqTrainer):
    """Writes the texts of rows in their order, each from its own `decoder_prefix`."""

    def _get_eval_sampler(self, eval_dataset):
        return SequentialSampler(eval_dataset)

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        settings = dict(self._gen_kwargs)
        if "decoder_prefix" in inputs:
            inputs = dict(inputs)
            settings["decoder_input_ids"] = self._prepare_input(inputs.pop("decoder_prefix"))
        return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys=ignore_keys, **settings)

    def create_model_card(self, **kwargs):
        """Does nothing: Trainer would put its own card in the place of that of `finish` whenever it pushes."""


def read_targets(rows: Dataset, split: str, column: str) -> list[list[str]] | None:
    """The right texts of each row, one or several. The test data may have none at all: then the result is None.

    Raises:
        ValueError: there is no such column, or a row without a right text.
    """
    if split == "test" and (column not in rows.column_names or all(not target for target in rows[column])):
        return None
    check_columns(rows, split, [column])
    targets = [[target] if isinstance(target, str) else target for target in rows[column]]
    for row, texts in enumerate(targets):
        if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
            raise ValueError(
                f"Row {row} of the {split} data must have a text, or a list of texts, in column {column!r}, but has "
                f"{rows[column][row]!r}."
            )
    return targets


def read_languages(rows: Dataset, split: str, template: str) -> list[str]:
    """The language token of each row.

    Raises:
        ValueError: the template names a column that is not there.
    """
    try:
        return [template.format_map(row) for row in rows]
    except KeyError as error:
        check_columns(rows, split, error.args)
        raise


def learn_languages(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, tokens: list[str]):
    """Adds the tokens that are not yet in the vocabulary."""
    known = tokenizer.get_vocab()
    if new := sorted(token for token in set(tokens) if token not in known):
        tokenizer.add_tokens(new, special_tokens=True)
        logger.warning("New tokens, without pre-training: %s.", ", ".join(new))
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)


def language_ids(tokenizer: PreTrainedTokenizerBase, split: str, tokens: list[str]) -> list[int]:
    """The ids of the language tokens.

    Raises:
        ValueError: the tokenizer does not have one.
    """
    known = tokenizer.get_vocab()
    if unknown := sorted(token for token in set(tokens) if token not in known):
        raise ValueError(
            f"The tokenizer has no token {unknown[0]!r}, with which targets of the {split} data begin. Tokens are "
            "added only for the languages of the training data."
        )
    return [known[token] for token in tokens]


def encode(
    sources: list[str],
    targets: list[list[str]] | None,
    languages: list[int] | None,
    is_training: bool,
    tokenizer: PreTrainedTokenizerBase,
    model: PreTrainedModel,
    data: TargetArguments,
) -> Dataset:
    """The inputs of a split: to train on, a row for each right text of a source; else a row for each source.

    Columns: `input_ids` and `attention_mask`, `labels` where there are targets (the first right text of each row, if
    it is not to train on), and `decoder_prefix`, the start token and the language token, if it is not to train on.
    """
    # Models with relative positions have no limit.
    limit = min(tokenizer.model_max_length, getattr(model.config, "max_position_embeddings", None) or 10**9)

    def read(batch):
        return tokenizer(batch["source"], truncation=True, max_length=min(data.max_source_length, limit))

    rows = []
    for i, source in enumerate(sources):
        texts = [""] if targets is None else targets[i] if is_training else targets[i][:1]
        rows += [{"source": source, "target": text, "language": languages[i] if languages else -1} for text in texts]

    def write(batch):
        inputs, length = read(batch), min(data.max_target_length, limit)
        if targets is not None and languages is None:
            inputs["labels"] = tokenizer(text_target=batch["target"], truncation=True, max_length=length)["input_ids"]
        elif targets is not None:
            labels = tokenizer(text_target=batch["target"], truncation=True, max_length=max(length - 1, 1))["input_ids"]
            inputs["labels"] = [[first, *ids] for first, ids in zip(batch["language"], labels, strict=True)]
        if languages is not None and not is_training:
            # The shift puts the start token in front, which some models take from the end of the labels.
            ends = torch.tensor([[first, tokenizer.eos_token_id] for first in batch["language"]])
            inputs["decoder_prefix"] = model.prepare_decoder_input_ids_from_labels(ends).tolist()
        return inputs

    inputs = Dataset.from_list(rows)
    return inputs.map(write, batched=True, remove_columns=inputs.column_names, desc="Tokens")


def measure(texts: list[str], targets: list[list[str]], data: TargetArguments) -> dict[str, float]:
    """The metrics, from 0 to 100, of texts with the right texts of each."""
    if data.metric == "rouge":
        scorer = RougeScorer(ROUGES, tokenizer=Words())
        scores = [scorer.score_multi(right, text) for text, right in zip(texts, targets, strict=True)]
        return {name: 100 * float(np.mean([score[name].fmeasure for score in scores])) for name in ROUGES}
    # A row without a second right text has None there.
    references = [list(column) for column in zip_longest(*targets)]
    metrics = {"bleu": BLEU(tokenize=data.bleu_tokenizer), "chrf": CHRF()}
    return {name: metric.corpus_score(texts, references).score for name, metric in metrics.items()}


def decode(predictions: np.ndarray, tokenizer: PreTrainedTokenizerBase, num_rows: int, prefix: int) -> list[str]:
    """Texts of generated ids `(rows, length)`, padded with -100, that begin with `prefix` tokens that are not text.

    Several processes write the first rows once more, to fill up their last batches.
    """
    ids = predictions[:num_rows, prefix:]
    ids = np.where(ids < 0, tokenizer.pad_token_id, ids)
    return [text.strip() for text in tokenizer.batch_decode(ids, skip_special_tokens=True)]


def loss_function(label_smoothing: float):
    """The mean loss over the tokens of the whole batch, which may be divided among processes and micro-batches.

    Most models of transformers return the mean over a micro-batch, which Trainer takes for a part of the mean over the
    whole batch: gradients would be as many times too large as there are micro-batches.
    """

    def loss(outputs, labels, num_items_in_batch=None):
        logits, labels = outputs["logits"].flatten(0, 1).float(), labels.flatten()
        total = F.cross_entropy(logits, labels, reduction="sum", label_smoothing=label_smoothing)
        return total / (labels.ne(-100).sum() if num_items_in_batch is None else num_items_in_batch)

    return loss


def main():
    checkpoint, data, training = parse_arguments(
        __doc__.splitlines()[0], ModelArguments, TargetArguments, WritingArguments
    )
    wanted = wanted_splits(training)
    check_run(training, checkpoint, data)
    set_seed(training.seed)
    rows = load_splits(data, *wanted)
    sources = {split: read_texts(rows[split], split, [data.source_column])[data.source_column][:] for split in wanted}
    targets = {split: read_targets(rows[split], split, data.target_column) for split in wanted}
    tokenizer = checkpoint.load_tokenizer()
    model = checkpoint.load(AutoModelForSeq2SeqLM, checkpoint.load_config())
    languages, prefix = dict.fromkeys(wanted), 1
    if data.target_language_token is not None:
        tokens = {split: read_languages(rows[split], split, data.target_language_token) for split in wanted}
        learn_languages(tokenizer, model, tokens.get("train", []))
        languages = {split: language_ids(tokenizer, split, tokens[split]) for split in wanted}
        prefix = 2
        if len(set(tokens.get("train", []))) == 1:
            model.generation_config.forced_bos_token_id = languages["train"][0]
    # The columns are the model's own and `decoder_prefix`, which Trainer would take away.
    training.remove_unused_columns = False
    training.generation_num_beams = data.num_beams
    limit = getattr(model.config, "max_position_embeddings", None) or data.max_target_length
    # The start token is no target.
    training.generation_max_length = min(data.max_target_length, limit) + 1
    with training.main_process_first(desc="tokenizing"):
        inputs = {
            split: encode(sources[split], targets[split], languages[split], split == "train", tokenizer, model, data)
            for split in wanted
        }

    def measure_validation(output):
        texts = decode(output.predictions, tokenizer, len(sources["validation"]), prefix)
        return measure(texts, targets["validation"], data)

    trainer = WritingTrainer(
        model=model,
        args=training,
        train_dataset=inputs.get("train"),
        eval_dataset=inputs.get("validation"),
        processing_class=tokenizer,
        data_collator=CollatorWithPrefixes(tokenizer, model=model),
        compute_loss_func=loss_function(training.label_smoothing_factor),
        compute_metrics=measure_validation,
    )
    if training.do_train:
        train(trainer)
    if training.do_eval:
        metrics = trainer.evaluate() | {"eval_samples": len(sources["validation"])}
        trainer.log_metrics("eval", metrics)
        trainer.save_metrics("eval", metrics)
    if training.do_predict:
        trainer.compute_metrics = None
        output = trainer.predict(inputs["test"], metric_key_prefix="predict")
        texts = decode(output.predictions, tokenizer, len(sources["test"]), prefix)
        scores = {} if targets["test"] is None else measure(texts, targets["test"], data)
        metrics = output.metrics | {f"predict_{name}": value for name, value in scores.items()}
        metrics["predict_samples"] = len(texts)
        trainer.log_metrics("predict", metrics)
        trainer.save_metrics("predict", metrics)
        if trainer.is_world_process_zero():
            lines = [text.replace("\\", r"\\").replace("\n", r"\n").replace("\r", r"\r") + "\n" for text in texts]
            file = Path(training.output_dir) / "generated_predictions.txt"
            file.write_text("".join(lines), encoding="utf-8")
    finish(trainer, checkpoint, data, TASKS[data.metric])


if __name__ == "__main__":
    main()
