"""examples/run_glue.py with tiny models: all tasks, their metrics, the files of a submission, and MNLI's two genres."""

import re

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from huggingface_hub import ModelCard
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef
from transformers import AutoModelForSequenceClassification, AutoTokenizer, set_seed

from .scripts import import_example, make_checkpoint, read_json, run_script, write_rows

WORDS = ["a", "fine", "grim", "day", "awful", "food", "lovely", "cold", "warm", "and", "dull", "bright"]
# What huggingface.co/datasets/nyu-mll/glue has, and what gluebenchmark.com wants: names in the order of their numbers.
COLUMNS = {
    "cola": ["sentence"],
    "sst2": ["sentence"],
    "mrpc": ["sentence1", "sentence2"],
    "stsb": ["sentence1", "sentence2"],
    "qqp": ["question1", "question2"],
    "mnli": ["premise", "hypothesis"],
    "qnli": ["question", "sentence"],
    "rte": ["sentence1", "sentence2"],
    "wnli": ["sentence1", "sentence2"],
    "ax": ["premise", "hypothesis"],
}
LABELS = {
    "cola": ["unacceptable", "acceptable"],
    "sst2": ["negative", "positive"],
    "mrpc": ["not_equivalent", "equivalent"],
    "qqp": ["not_duplicate", "duplicate"],
    "mnli": ["entailment", "neutral", "contradiction"],
    "qnli": ["entailment", "not_entailment"],
    "rte": ["entailment", "not_entailment"],
    "wnli": ["not_entailment", "entailment"],
    "ax": ["entailment", "neutral", "contradiction"],
}
SUBMITTED = {task: ["0", "1"] for task in ("cola", "sst2", "mrpc", "qqp", "wnli")}
SUBMITTED |= {task: LABELS[task] for task in ("mnli", "qnli", "rte", "ax")}
FILES = {"cola": "CoLA", "sst2": "SST-2", "mrpc": "MRPC", "stsb": "STS-B", "qqp": "QQP", "mnli": "MNLI-m"}
FILES |= {"qnli": "QNLI", "rte": "RTE", "wnli": "WNLI", "ax": "AX"}


def make_rows(task, number=12, seed=0, names=False, hidden=False):
    """Random rows of a task; with `names`, labels by their names; if `hidden`, -1 in their place."""
    random = np.random.default_rng(seed)
    rows = []
    for i in range(number):
        row = {column: " ".join(random.choice(WORDS, 1 + random.integers(6))) for column in COLUMNS[task]}
        score = round(float(random.uniform(0, 5)), 2)
        label = score if task == "stsb" else i % len(LABELS[task])
        label = -1 if hidden else LABELS[task][label] if names else label
        rows.append(row | {"label": float(label) if task == "stsb" else label, "idx": i})
    return rows


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    set_seed(0)
    return make_checkpoint(tmp_path_factory.mktemp("checkpoint"), WORDS)


@pytest.fixture
def script(monkeypatch, repository):
    return import_example(monkeypatch, repository, "run_glue")


@pytest.fixture
def run(script, monkeypatch, tmp_path, checkpoint):
    """Runs the script on a task with rows for each file, in Parquet; returns its --output_dir."""

    def run(task, files, **arguments):
        files = {f"{name}_file": write_rows(tmp_path / f"{name}.parquet", rows) for name, rows in files.items()}
        arguments = {"model_name_or_path": checkpoint, "task_name": task, "max_steps": 3} | files | arguments
        return run_script(script, monkeypatch, tmp_path, **arguments)

    return run


def logits_of(folder, task, rows):
    """Logits of the saved model, each row by itself."""
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        texts = ([row[column] for column in COLUMNS[task]] for row in rows)
        return torch.cat([model(**tokenizer(*text, return_tensors="pt")).logits for text in texts]).numpy()


def read_submission(file):
    header, *lines = file.read_text(encoding="utf-8").splitlines()
    assert header == "index\tprediction"
    index, predictions = zip(*(line.split("\t") for line in lines), strict=True)
    assert list(index) == [str(i) for i in range(len(lines))]
    return list(predictions)


@pytest.mark.parametrize("task", [task for task in COLUMNS if task != "ax"])
def test_a_task(run, task):
    """Numbers as labels in one file, names in another; test data without labels, as on the Hub."""
    train, validation = make_rows(task), make_rows(task, seed=1, names=task != "stsb")
    test = make_rows(task, 9, seed=2, hidden=True)
    files = {"train": train, "validation": validation, "test": test}
    folder = run(task, files, do_train=True, do_eval=True, do_predict=True, per_device_eval_batch_size=5)
    logits = logits_of(folder, task, validation)
    results = read_json(folder / "all_results.json")
    metrics = {name for name in results if name.startswith("eval_")} - {
        *("eval_loss", "eval_runtime", "eval_samples", "eval_samples_per_second", "eval_steps_per_second")
    }
    config = AutoModelForSequenceClassification.from_pretrained(folder).config
    assert (folder / "eval_results.json").exists() and ModelCard.load(folder / "README.md").data.pipeline_tag
    submitted = read_submission(folder / f"{FILES[task]}.tsv")
    assert [file.name for file in folder.glob("*.tsv")] == [f"{FILES[task]}.tsv"]
    if task == "stsb":
        scores, labels = logits[:, 0], [row["label"] for row in validation]
        assert metrics == {"eval_pearson", "eval_spearman"}
        assert results["eval_pearson"] == pytest.approx(pearsonr(scores, labels).statistic, abs=1e-5)
        assert results["eval_spearman"] == pytest.approx(spearmanr(scores, labels).statistic, abs=1e-5)
        for number, logit in zip(submitted, logits_of(folder, task, test)[:, 0], strict=True):
            assert re.fullmatch(r"[0-5]\.\d{3}", number) and float(number) == pytest.approx(
                min(max(logit, 0), 5), abs=1e-3
            )
        return
    assert list(config.id2label.values()) == LABELS[task]
    predictions, labels = logits.argmax(-1), np.array([LABELS[task].index(row["label"]) for row in validation])
    expected = {"eval_accuracy": accuracy_score(labels, predictions)}
    if task == "cola":
        expected = {"eval_matthews_correlation": matthews_corrcoef(labels, predictions)}
    if task in ("mrpc", "qqp"):
        expected["eval_f1"] = f1_score(labels, predictions)
    assert metrics == expected.keys()
    assert {name: results[name] for name in expected} == pytest.approx(expected)
    assert submitted == [SUBMITTED[task][i] for i in logits_of(folder, task, test).argmax(-1)]


def test_scores_are_cut(script):
    scores = np.array([-0.2, 0.0004, 2.71828, 5.0004, 7.0])
    assert script.submitted_predictions(script.TASKS["stsb"], scores, ["score"]) == [
        "0.000",
        "0.000",
        "2.718",
        "5.000",
        "5.000",
    ]


def test_both_genres_and_the_diagnostic_data(run, checkpoint, tmp_path):
    """Of a model that was trained elsewhere, with the classes in another order and in capitals."""
    model = AutoModelForSequenceClassification.from_pretrained(
        checkpoint, id2label={0: "CONTRADICTION", 1: "ENTAILMENT", 2: "NEUTRAL"}
    )
    for folder in (model, AutoTokenizer.from_pretrained(checkpoint)):
        folder.save_pretrained(tmp_path / "mnli")
    order = ["contradiction", "entailment", "neutral"]
    rows = {name: make_rows("mnli", seed=i) for i, name in enumerate(("validation", "validation_mismatched"))}
    rows |= {name: make_rows("mnli", seed=i, hidden=True) for i, name in enumerate(("test", "test_mismatched"), 7)}
    folder = run("mnli", rows, do_eval=True, do_predict=True, model_name_or_path=tmp_path / "mnli")
    results = read_json(folder / "all_results.json")
    for split, metric in {"validation": "eval_accuracy", "validation_mismatched": "eval_mismatched_accuracy"}.items():
        predictions = logits_of(tmp_path / "mnli", "mnli", rows[split]).argmax(-1)
        right = [order[i] == LABELS["mnli"][row["label"]] for i, row in zip(predictions, rows[split], strict=True)]
        assert results[metric] == pytest.approx(np.mean(right)) and 0 < np.mean(right) < 1
    for split, file in {"test": "MNLI-m.tsv", "test_mismatched": "MNLI-mm.tsv"}.items():
        predictions = logits_of(tmp_path / "mnli", "mnli", rows[split]).argmax(-1)
        assert read_submission(folder / file) == [order[i] for i in predictions] and len(set(predictions)) > 1
    assert not (folder / "README.md").exists()

    test = make_rows("ax", seed=9, hidden=True)
    folder = run("ax", {"test": test}, do_predict=True, model_name_or_path=tmp_path / "mnli")
    predictions = logits_of(tmp_path / "mnli", "mnli", test).argmax(-1)
    assert read_submission(folder / "AX.tsv") == [order[i] for i in predictions]
    # More training keeps the order of its classes.
    folder = run("mnli", {"train": rows["validation"]}, do_train=True, model_name_or_path=tmp_path / "mnli")
    assert list(AutoModelForSequenceClassification.from_pretrained(folder).config.id2label.values()) == order


def test_metrics_with_classes_in_another_order(script):
    labels, predictions = np.array([0, 1, 1, 0, 0]), np.array([0, 1, 0, 0, 1])
    metrics = script.measure_task("mrpc", predictions, labels, ["equivalent", "not_equivalent"])
    assert metrics == {"accuracy": 0.6, "f1": f1_score(labels, predictions, pos_label=0)}
    wnli = script.TASKS["wnli"]
    assert script.submitted_predictions(wnli, predictions, ["entailment", "not_entailment"]) == [
        "1",
        "0",
        "1",
        "1",
        "0",
    ]


def test_columns_of_other_names(run):
    rows = [{"q": row["question"], "s": row["sentence"], "y": row["label"]} for row in make_rows("qnli")]
    settings = {"sentence1_key": "q", "sentence2_key": "s", "label_column": "y"}
    folder = run("qnli", {"train": rows, "validation": rows}, do_train=True, do_eval=True, **settings)
    assert read_json(folder / "all_results.json")["eval_samples"] == 12
    # A single text needs no second column.
    rows = [{"q": row["sentence"], "label": row["label"]} for row in make_rows("cola")]
    run("cola", {"train": rows}, do_train=True, sentence1_key="q", output_dir=folder / "cola")


@pytest.mark.parametrize("task", ["mnli", "rte"])
def test_data_of_the_hub(run, monkeypatch, task):
    """Without files: the name and the splits that nyu-mll/glue has, with named classes."""
    asked = []
    feature = ClassLabel(names=LABELS[task])
    features = Features(
        {column: Value("string") for column in COLUMNS[task]} | {"label": feature, "idx": Value("int32")}
    )
    kinds = ["_matched", "_mismatched"] if task == "mnli" else [""]
    names = ["train", *(split + kind for split in ("validation", "test") for kind in kinds)]

    def load_dataset(*name):
        asked.append(name)
        rows = {split: make_rows(task, seed=i, hidden="test" in split) for i, split in enumerate(names)}
        return DatasetDict({split: Dataset.from_list(some, features=features) for split, some in rows.items()})

    monkeypatch.setattr("runs.load_dataset", load_dataset)
    limits = {"max_train_samples": 8, "max_eval_samples": 6, "max_predict_samples": 5}
    folder = run(task, {}, do_train=True, do_eval=True, do_predict=True, **limits)
    assert asked == [("nyu-mll/glue", task)]
    results = read_json(folder / "all_results.json")
    assert {name: number for name, number in results.items() if name.endswith("_samples")} == {
        "train_samples": 8,
        **{f"{split}{kind}_samples": n for split, n in (("eval", 6), ("predict", 5)) for kind in ("", *kinds[1:])},
    }
    card = ModelCard.load(folder / "README.md")
    assert card.data.datasets == "nyu-mll/glue" and f"on `nyu-mll/glue` `{task}` with" in card.text


def test_the_settings_of_the_authors(script, tmp_path):
    """run_glue.sh and the table of best settings of github.com/microsoft/COCO-LM, folder fairseq."""
    settings = script.GlueTrainingArguments(str(tmp_path), use_cpu=True)
    assert (settings.adam_beta1, settings.adam_beta2, settings.adam_epsilon) == (0.9, 0.98, 1e-6)
    assert (settings.weight_decay, settings.max_grad_norm) == (0.01, 0)
    assert (settings.learning_rate, settings.per_device_train_batch_size) == (2e-5, 32)
    assert settings.get_warmup_steps(1600) == 100 and settings.lr_scheduler_type == "linear"


def refused(run, sentence, *arguments, **settings):
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}$"):
        run(*arguments, **settings)


def test_what_does_not_do(run, capsys):
    rows = make_rows("mrpc")
    sentence = "The task ax has only test data: give --do_predict alone, and a model of the task mnli."
    refused(run, sentence, "ax", {}, do_train=True, do_predict=True)
    refused(
        run,
        "The model must know the labels entailment, neutral, contradiction of ax, but it knows LABEL_0, LABEL_1.",
        *("ax", {"test": make_rows("ax")}),
        do_predict=True,
    )
    columns = "'sentence1', 'sentence2', 'label', 'idx'"
    sentence = f"The train data has no column 'question1'. Its columns are {columns}."
    refused(run, sentence, "qqp", {"train": rows}, do_train=True)
    sentence = "Row 0 of the train data has the label '2', but the model only knows 'not_equivalent', 'equivalent'."
    refused(run, sentence, "mrpc", {"train": [rows[0] | {"label": 2}]}, do_train=True)
    sentence = "There is no split 'validation', only train."
    refused(run, sentence, "mrpc", {"train": rows}, do_train=True, do_eval=True)
    with pytest.raises(SystemExit):
        run("snli", {"train": rows}, do_train=True)
    assert "argument --task_name/--task-name: invalid choice: 'snli'" in capsys.readouterr().err
