"""examples/run_classification.py with tiny models: every kind of labels, what it writes, resuming, and its errors."""

import os
import re
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, List, Value
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, mean_squared_error
from torch.nn import functional as F
from transformers import AutoModelForSequenceClassification, AutoTokenizer, Trainer, set_seed

from .hub_server import TOKEN
from .scripts import import_example, make_checkpoint, read_json, run_script, write_rows

GOOD, BAD = ["a fine day", "warm and bright", "lovely food", "happy"], ["a grim day", "cold and dull", "awful food"]
SENTENCES = [(text, 1) for text in GOOD] + [(text, 0) for text in BAD]
ROWS = [{"text": text, "label": label} for text, label in SENTENCES]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    set_seed(0)
    return make_checkpoint(tmp_path_factory.mktemp("checkpoint"), [text for text, _ in SENTENCES] + ["None NA null"])


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    set_seed(0)
    return make_checkpoint(tmp_path_factory.mktemp("bert"), [text for text, _ in SENTENCES], family="bert")


@pytest.fixture
def script(monkeypatch, repository):
    return import_example(monkeypatch, repository, "run_classification")


@pytest.fixture
def run(script, monkeypatch, tmp_path, checkpoint):
    """Runs the script on rows for each split; returns its --output_dir."""

    def run(train=None, validation=None, test=None, kind="parquet", **arguments):
        for split, rows in {"train": train, "validation": validation, "test": test}.items():
            if rows is not None:
                file = write_rows(tmp_path / f"{split}.{kind}", rows)
                arguments |= {f"{split}_file": file, f"do_{SWITCHES[split]}": True}
        arguments = {"model_name_or_path": checkpoint} | arguments
        return run_script(script, monkeypatch, tmp_path, **arguments)

    return run


SWITCHES = {"train": "train", "validation": "eval", "test": "predict"}


def logits_of(folder, *texts):
    """Logits of the saved model, each row by itself."""
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        rows = [model(**tokenizer(*row, return_tensors="pt")).logits[0] for row in zip(*texts, strict=True)]
    return torch.stack(rows), model.config


def read_predictions(folder, file="predict_results.txt"):
    lines = [line.split("\t") for line in (folder / file).read_text(encoding="utf-8").splitlines()]
    assert [index for index, _ in lines[1:]] == [str(i) for i in range(len(lines) - 1)]
    return lines[0], [prediction for _, prediction in lines[1:]]


@pytest.mark.parametrize("family", ["cocolm", "bert"])
def test_classes(run, checkpoint, bert, family):
    """Learns them; metrics, predictions and files are right; texts of all lengths share batches, grouped by length."""
    model = {"cocolm": checkpoint, "bert": bert}[family]
    test = [{"text": text, "label": 1 - label if text == "happy" else label} for text, label in SENTENCES[::-1]]
    folder = run(
        ROWS,
        ROWS,
        test,
        model_name_or_path=model,
        num_train_epochs=25,
        per_device_eval_batch_size=3,
        train_sampling_strategy="group_by_length",
    )
    assert {file.name for file in folder.iterdir()} == {
        *("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "training_args.bin"),
        *("train_results.json", "eval_results.json", "predict_results.json", "all_results.json", "trainer_state.json"),
        *("predict_results.txt", "README.md", "arguments.json"),
    }
    logits, config = logits_of(folder, [row["text"] for row in test])
    assert config.id2label == {0: "0", 1: "1"} and config.problem_type == "single_label_classification"
    predictions, labels = logits.argmax(-1), torch.tensor([row["label"] for row in test])
    assert read_predictions(folder) == (["index", "label"], [str(i.item()) for i in predictions])
    results = read_json(folder / "all_results.json")
    assert results["eval_accuracy"] == results["eval_macro_f1"] == 1
    assert results["predict_accuracy"] == accuracy_score(labels, predictions) == 6 / 7
    assert results["predict_macro_f1"] == f1_score(labels, predictions, average="macro")
    assert results["predict_loss"] == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-4)
    assert [results[f"{split}_samples"] for split in ("train", "eval", "predict")] == [7, 7, 7]
    assert read_json(folder / "eval_results.json")["eval_accuracy"] == 1


def test_names_of_classes_and_pairs(run, checkpoint):
    """Strings; the order of the checkpoint is kept in more training, and used where there is none."""
    train = [{"a": text, "b": other, "y": label} for text, other, label in PAIRS]
    columns = {"text_column": "a", "text_pair_column": "b", "label_column": "y"}
    folder = run(train, kind="jsonl", num_train_epochs=30, **columns)
    config = AutoModelForSequenceClassification.from_pretrained(folder).config
    assert config.label2id == {"neither": 0, "no": 1, "yes": 2}
    # Of the test data nothing but the texts.
    test = [{"a": text, "b": other} for text, other, _ in PAIRS]
    config.id2label = {0: "no", 1: "yes", 2: "neither"}
    config.label2id = {"no": 0, "yes": 1, "neither": 2}
    config.save_pretrained(folder)
    logits, _ = logits_of(folder, [row["a"] for row in test], [row["b"] for row in test])
    settings = {"model_name_or_path": folder} | columns
    again = run(None, train[:1], test, kind="csv", output_dir=folder.parent / "again", **settings)
    assert read_predictions(again)[1] == [config.id2label[i] for i in logits.argmax(-1).tolist()]
    assert len(set(read_predictions(again)[1])) > 1
    # Nothing was trained, so there is no new card.
    assert not (again / "README.md").exists() and "predict_accuracy" not in read_json(again / "all_results.json")
    more = run(train, output_dir=folder.parent / "more", max_steps=1, **settings)
    assert AutoModelForSequenceClassification.from_pretrained(more).config.label2id == config.label2id


PAIRS = [("a fine day", "awful food", "no"), ("happy", "lovely food", "yes"), ("warm", "a day", "neither")]


def test_classes_with_names_in_the_data(run, checkpoint):
    """ClassLabel: its order, names that no row has, and test data whose labels are held back."""
    features = Features({"text": Value("string"), "label": ClassLabel(names=["ok", "bad", "odd"])})
    train = Dataset.from_list([{"text": text, "label": 1 - label} for text, label in SENTENCES], features=features)
    test = Dataset.from_list([{"text": "happy", "label": -1}, {"text": "awful", "label": -1}], features=features)
    folder = run(train, train, test, num_train_epochs=25)
    assert AutoModelForSequenceClassification.from_pretrained(folder).config.label2id == {"ok": 0, "bad": 1, "odd": 2}
    logits, _ = logits_of(folder, [*(text for text, _ in SENTENCES), "awful"])
    predictions = logits.argmax(-1)
    assert read_predictions(folder)[1] == [("ok", "bad", "odd")[i] for i in (predictions[3], predictions[7])]
    results = read_json(folder / "all_results.json")
    assert results["eval_accuracy"] == accuracy_score([0] * 4 + [1] * 3, predictions[:7]) > 0.8
    assert "predict_accuracy" not in results and "predict_loss" not in results


def test_rows_without_a_class(run, caplog):
    """As in SNLI: neither trained on nor measured, and those to predict keep their index."""
    features = Features({"text": Value("string"), "label": ClassLabel(names=["bad", "good"])})
    rows = [{"text": "of no kind", "label": -1}, *ROWS]
    rows = Dataset.from_list(rows[:3] + rows[:1] + rows[3:], features=features)
    folder = run(rows, rows, rows, num_train_epochs=25)
    results = read_json(folder / "all_results.json")
    assert [results[f"{split}_samples"] for split in ("train", "eval", "predict")] == [7, 7, 7]
    assert results["eval_accuracy"] == results["predict_accuracy"] > 0.8
    numbers = [1, 2, 4, 5, 6, 7, 8]
    predictions = logits_of(folder, [rows[i]["text"] for i in numbers])[0].argmax(-1).tolist()
    lines = [f"{i}\t{('bad', 'good')[label]}" for i, label in zip(numbers, predictions, strict=True)]
    assert (folder / "predict_results.txt").read_text().splitlines()[1:] == lines
    for split in ("train", "validation", "test"):
        assert f"2 of 9 rows of the {split} data are left out: their label is -1." in caplog.messages


def test_a_model_without_names_of_classes(run, checkpoint, tmp_path):
    """Its outputs are the labels by their number, in whatever order and however many of them the data has."""
    model = AutoModelForSequenceClassification.from_pretrained(checkpoint, num_labels=3)
    model.save_pretrained(tmp_path / "unnamed")
    AutoTokenizer.from_pretrained(checkpoint).save_pretrained(tmp_path / "unnamed")
    texts = [text for text, _ in SENTENCES]
    labels = logits_of(tmp_path / "unnamed", texts)[0].argmax(-1).tolist()
    rows = [{"text": text, "label": label} for text, label in zip(texts, labels, strict=True)]
    assert len(set(labels)) > 1
    folder = run(None, rows[::-1], model_name_or_path=tmp_path / "unnamed")
    assert read_json(folder / "eval_results.json")["eval_accuracy"] == 1
    folder = run(None, None, [{"text": text} for text in texts], model_name_or_path=tmp_path / "unnamed")
    assert read_predictions(folder)[1] == [str(label) for label in labels]


@pytest.mark.parametrize("named", [False, True])
def test_several_labels(run, named):
    labels = [["day", "fine"], ["warm"], [], ["food"], [], ["day"], ["cold"], ["food"]]
    rows = [{"text": text, "label": some} for (text, _), some in zip(SENTENCES, labels[:7], strict=True)]
    names = ["cold", "day", "fine", "food", "warm"]
    if named:
        names = names[::-1]
        label = List(ClassLabel(names=names))
        rows = Dataset.from_list(rows, features=Features({"text": Value("string"), "label": label}))
    folder = run(rows, rows, rows, kind="parquet" if named else "jsonl", num_train_epochs=60, learning_rate=2e-2)
    logits, config = logits_of(folder, [text for text, _ in SENTENCES])
    assert config.problem_type == "multi_label_classification" and list(config.id2label.values()) == names
    truth = torch.tensor([[float(name in some) for name in names] for some in labels[:7]])
    predictions = logits > 0
    results = read_json(folder / "all_results.json")
    assert results["eval_micro_f1"] == pytest.approx(f1_score(truth, predictions, average="micro")) and (
        results["eval_micro_f1"] > 0.9
    )
    assert results["eval_macro_f1"] == pytest.approx(f1_score(truth, predictions, average="macro", zero_division=0))
    loss = F.binary_cross_entropy_with_logits(logits, truth)
    assert results["eval_loss"] == pytest.approx(loss.item(), rel=1e-3)
    expected = [",".join(name for name, has in zip(names, row, strict=True) if has) for row in predictions]
    assert read_predictions(folder)[1] == expected


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_numbers(run, kind):
    scores = [4.5, 3.25, 3.0, 5.0, 1.5, 0.25, 0.0]
    rows = [{"text": text, "score": score} for (text, _), score in zip(SENTENCES, scores, strict=True)]
    folder = run(rows, rows, rows, kind=kind, label_column="score", num_train_epochs=60)
    logits, config = logits_of(folder, [row["text"] for row in rows])
    assert config.problem_type == "regression" and config.id2label == {0: "score"}
    predictions = logits[:, 0].double().numpy()
    results = read_json(folder / "all_results.json")
    assert results["eval_mse"] == pytest.approx(mean_squared_error(scores, predictions), rel=1e-3)
    assert results["eval_loss"] == pytest.approx(results["eval_mse"], rel=1e-4) and results["eval_mse"] < 1
    assert results["eval_pearson"] == pytest.approx(pearsonr(scores, predictions).statistic, rel=1e-5)
    assert results["predict_spearman"] == pytest.approx(spearmanr(scores, predictions).statistic, rel=1e-5)
    written = [float(number) for number in read_predictions(folder)[1]]
    assert written == pytest.approx(predictions.tolist(), rel=1e-4)


def test_problem_type_from_the_command_line(run):
    """Integers as numbers to learn; the one row to evaluate has no correlation."""
    folder = run(ROWS, ROWS[:1], problem_type="regression", max_steps=1)
    assert AutoModelForSequenceClassification.from_pretrained(folder).config.problem_type == "regression"
    results = read_json(folder / "eval_results.json")
    assert results["eval_pearson"] == results["eval_spearman"] == 0 and results["eval_mse"] > 0
    floats = [row | {"label": float(row["label"])} for row in ROWS]
    folder = run(floats, floats, problem_type="single_label_classification", max_steps=1, output_dir=folder / "floats")
    assert AutoModelForSequenceClassification.from_pretrained(folder).config.label2id == {"0.0": 0, "1.0": 1}


def test_words_that_mean_nothing_to_pandas(run):
    rows = [{"text": "None", "label": "NA"}, {"text": "null", "label": "x"}, {"text": "NA", "label": "NA"}]
    folder = run(rows, rows, kind="tsv", max_steps=1)
    assert AutoModelForSequenceClassification.from_pretrained(folder).config.label2id == {"NA": 0, "x": 1}
    assert read_json(folder / "all_results.json")["train_samples"] == 3


def weights_equal(one, other):
    one, other = (load_file(folder / "model.safetensors") for folder in (one, other))
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_an_interrupted_run_goes_on(run, monkeypatch, tmp_path, capsys):
    """Ctrl-C in update 4 of 9, dropout included: the same command ends with the weights of an unbroken run."""
    settings = {"max_steps": 9, "per_device_train_batch_size": 3, "save_strategy": "steps", "save_steps": 100}
    whole = run(ROWS, output_dir=tmp_path / "whole", **settings)
    step = Trainer.training_step

    def interrupted_step(self, *args, **kwargs):
        if self.state.global_step == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return step(self, *args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as error:
        patch.setattr(Trainer, "training_step", interrupted_step)
        run(ROWS, **settings)
    assert error.value.code == "Interrupted at update 4. The same command goes on from there."
    folder = tmp_path / "out"
    assert {file.name for file in folder.iterdir()} == {"checkpoint-4", "arguments.json"}
    # A later checkpoint that was not written to its end is passed over.
    (folder / "checkpoint-8").mkdir()
    (folder / "checkpoint-8" / "model.safetensors").write_bytes(b"")
    capsys.readouterr()
    run(ROWS, **settings)
    assert f"Going on from {folder / 'checkpoint-4'}." in capsys.readouterr().err
    assert weights_equal(whole, folder)
    assert read_json(folder / "trainer_state.json")["global_step"] == 9


@pytest.mark.parametrize("settings", [{"max_steps": 2}, {"num_train_epochs": 2}, {"max_steps": 4, "save_steps": 3}])
def test_a_run_that_is_done_is_not_trained_again(run, monkeypatch, capsys, settings):
    """Also in the middle of an epoch, or broken off after its last checkpoint; other arguments are refused."""
    settings = {"per_device_train_batch_size": 3, "save_strategy": "steps", "lr_scheduler_type": "constant"} | settings
    folder = run(ROWS, ROWS, ROWS, **settings)
    weights, results = load_file(folder / "model.safetensors"), read_json(folder / "all_results.json")
    state = read_json(folder / "trainer_state.json")
    monkeypatch.setattr(Trainer, "train", None)
    for crashed in (False, True):
        if crashed:
            for name in ("model.safetensors", "train_results.json", "trainer_state.json"):
                (folder / name).unlink()
        run(ROWS, ROWS, **settings)
        assert f"The run in {folder} is done." in capsys.readouterr().err
        again = load_file(folder / "model.safetensors")
        assert all(torch.equal(weights[name], again[name]) for name in weights)
        assert read_json(folder / "trainer_state.json")["global_step"] == state["global_step"]
        now = read_json(folder / "all_results.json")
        assert now["eval_loss"] == pytest.approx(results["eval_loss"], rel=1e-5)
        # What this command did not measure is not in its results.
        assert not [name for name in now if name.startswith("predict_")]
        assert "| predict_" not in (folder / "README.md").read_text() and not (folder / "predict_results.json").exists()
        if not crashed:
            assert {name: value for name, value in results.items() if name.startswith("train_")}.items() <= now.items()
    with pytest.raises(ValueError, match="had other arguments: --seed was 42 and is 7"):
        run(ROWS, ROWS, seed=7, **settings)


def test_a_new_run_in_an_old_folder(run):
    """Without a checkpoint it starts anew, and leaves no results of the other one."""
    folder = run(ROWS, ROWS, ROWS, max_steps=2)
    run(ROWS, max_steps=1, seed=7)
    results = read_json(folder / "all_results.json")
    assert not [name for name in results if name.startswith(("eval_", "predict_"))]
    assert read_json(folder / "trainer_state.json")["global_step"] == 1
    assert "| eval_" not in (folder / "README.md").read_text()


@pytest.mark.parametrize("family", ["cocolm", "bert"])
def test_gradient_accumulation_changes_nothing(run, checkpoint, bert, tmp_path, family):
    """Batches of 2, 2, 2 and 1 are one of 7, for models that know of it and for models that do not."""
    model = tmp_path / "model"
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    dropout |= {"cls_dropout_prob": 0.0} if family == "cocolm" else {}
    make_checkpoint(model, [text for text, _ in SENTENCES], family, **dropout)
    settings = {"model_name_or_path": model, "max_steps": 3, "optim": "sgd", "learning_rate": 0.1, "warmup_steps": 0}
    batches = [(7, 1), (2, 4)]
    one, four = (
        load_file(
            run(
                ROWS,
                per_device_train_batch_size=size,
                gradient_accumulation_steps=steps,
                output_dir=tmp_path / str(size),
                **settings,
            )
            / "model.safetensors"
        )
        for size, steps in batches
    )
    for name in one:
        torch.testing.assert_close(one[name], four[name], rtol=1e-5, atol=1e-6)


def test_the_best_checkpoint_is_kept(run, monkeypatch):
    """The learning rate is too high, so the first epoch is the best."""
    settings = {"num_train_epochs": 3, "learning_rate": 10, "warmup_steps": 0, "save_total_limit": 1}
    settings |= {"eval_strategy": "epoch", "save_strategy": "epoch", "load_best_model_at_end": True}
    folder = run(ROWS, ROWS, metric_for_best_model="accuracy", **settings)
    state = read_json(folder / "trainer_state.json")
    accuracies = [log["eval_accuracy"] for log in state["log_history"] if "eval_accuracy" in log]
    assert state["best_metric"] == max(accuracies) == read_json(folder / "eval_results.json")["eval_accuracy"]
    best = folder / os.path.basename(state["best_model_checkpoint"])
    assert weights_equal(folder, best)
    # It is the only one left, and not the last; the run is done nevertheless.
    assert list(folder.glob("checkpoint-*")) == [best] and state["global_step"] == 3
    monkeypatch.setattr(Trainer, "train", None)
    run(ROWS, ROWS, metric_for_best_model="accuracy", **settings)
    assert weights_equal(folder, best)


def test_random_weights_and_another_head(run, checkpoint, tmp_path):
    settings = {"random_weights": True, "max_steps": 1, "learning_rate": 0, "label_smoothing_factor": 0.1}
    folder = run(ROWS[::-1], ROWS, max_train_samples=4, max_eval_samples=2, **settings)
    given, random = (load_file(folder / "model.safetensors") for folder in (checkpoint, folder))
    assert not torch.equal(
        random["cocolm.embeddings.word_embeddings.weight"], given["embeddings.word_embeddings.weight"]
    )
    results = read_json(folder / "all_results.json")
    assert (results["train_samples"], results["eval_samples"]) == (4, 2)
    logits, _ = logits_of(folder, [row["text"] for row in ROWS[:2]])
    loss = F.cross_entropy(logits, torch.tensor([1, 1]), label_smoothing=0.1).item()
    assert results["eval_loss"] == pytest.approx(loss, rel=1e-4)
    three = [{"text": text, "label": i} for i, (text, _) in enumerate(SENTENCES[:3])]
    settings = {"model_name_or_path": folder, "output_dir": tmp_path / "three", "max_steps": 1}
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        run(three, **settings)
    run(three, ignore_mismatched_sizes=True, **settings)
    assert AutoModelForSequenceClassification.from_pretrained(tmp_path / "three").config.num_labels == 3


def test_long_texts_are_cut(run, script, monkeypatch):
    """To --max_length, and to what the tokenizer allows."""
    lengths = []
    collate = script.DataCollatorWithPadding.__call__

    def call(self, features):
        batch = collate(self, features)
        lengths.append(batch["input_ids"].shape[1])
        return batch

    monkeypatch.setattr(script.DataCollatorWithPadding, "__call__", call)
    rows = [{"text": "happy " * 200, "label": 0}, {"text": "a", "label": 1}]
    run(rows, max_steps=1)
    run(rows, max_steps=1, max_length=9)
    assert lengths == [64, 9]


def test_the_card(run, checkpoint, tmp_path):
    folder = run(ROWS, ROWS, ROWS[:2], max_steps=1)
    card = ModelCard.load(folder / "README.md")
    assert card.data.pipeline_tag == "text-classification" and card.data.library_name == "transformers"
    # A folder here is no model on the Hub.
    assert card.data.base_model is None and card.data.datasets is None
    results = read_json(folder / "all_results.json")
    assert f"`{checkpoint}`, fine-tuned for text classification on `{tmp_path / 'train.parquet'}`" in card.text
    assert f"| eval_accuracy | {results['eval_accuracy']:.6g} |" in card.text
    assert f"| predict_macro_f1 | {results['predict_macro_f1']:.6g} |" in card.text
    assert "runtime" not in card.text and "1 updates of 8 examples." in card.text
    assert f"python run_classification.py --output_dir={folder}" in card.text


def test_as_a_command(checkpoint, tmp_path, repository, loopback_hub):
    """From another folder, warnings being errors, with a model of the Hub, to which the result goes too."""
    loopback_hub.repositories["user/base"] = {"branches": {}, "commits": {}, "private": False}
    loopback_hub.commit("user/base", "main", {file.name: file.read_bytes() for file in checkpoint.iterdir()})
    write_rows(tmp_path / "data.csv", ROWS)
    (tmp_path / "arguments.yaml").write_text(
        "model_name_or_path: user/base\nvalidation_file: data.csv\ntrain_file: data.csv\noutput_dir: out\n"
        "do_train: true\ndo_eval: true\nmax_steps: 2\nlearning_rate: 1e-3\nuse_cpu: true\nreport_to: none\n"
        "push_to_hub: true\nhub_model_id: user/tuned\n"
    )
    environment = os.environ | {"PYTHONPATH": str(repository), "HF_HOME": str(tmp_path / "home")}
    environment |= {"HF_ENDPOINT": loopback_hub.endpoint, "HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "0"}
    environment |= {"HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1", "DISABLE_SAFETENSORS_CONVERSION": "1"}
    command = [sys.executable, "-W", "error", repository / "examples" / "run_classification.py", "arguments.yaml"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert read_json(tmp_path / "out" / "all_results.json")["eval_samples"] == 7
    pushed = loopback_hub.files("user/tuned")
    assert {"model.safetensors", "tokenizer.json", "config.json", "all_results.json"} <= pushed.keys()
    assert pushed["README.md"] == (tmp_path / "out" / "README.md").read_bytes()
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.base_model == "user/base" and "# user/tuned\n\n`user/base`, fine-tuned" in card.text


def refused(run, sentence, *rows, error=ValueError, **arguments):
    with pytest.raises(error, match=f"^{re.escape(sentence)}$"):
        run(*rows, **arguments)


def test_nothing_to_do(run, tmp_path):
    sentence = "There is nothing to do. Give --do_train, --do_eval or --do_predict, or several of them."
    refused(run, sentence, train_file=tmp_path / "train.csv")


def test_texts_that_do_not_do(run):
    refused(run, "The train data has no column 'review'. Its columns are 'text', 'label'.", ROWS, text_column="review")
    refused(
        run, "The validation data has no column 'b'. Its columns are 'text', 'label'.", None, ROWS, text_pair_column="b"
    )
    rows = [*ROWS, {"text": None, "label": 0}]
    refused(run, "Row 7 of the train data must have a text in column 'text', but has None.", rows)
    refused(run, "Row 1 of the test data must have a text in column 'text', but has None.", None, None, rows[-2:])
    rows = [{"text": "fine", "n": 5, "label": 0}]
    refused(run, "Row 0 of the train data must have a text in column 'n', but has 5.", rows, text_pair_column="n")
    refused(run, "The train data is empty.", ROWS, max_train_samples=0)


def test_labels_that_do_not_do(run):
    refused(run, "The train data has no column 'y'. Its columns are 'text', 'label'.", ROWS, label_column="y")
    gap = [*ROWS, {"text": "fine", "label": None}]
    sentence = "Row 7 of the train data has no label in column 'label'. Leave such rows out."
    refused(run, sentence, gap)
    sentence = "Row 2 of the {} data has the label '2', but the model only knows '0', '1'."
    other = [*ROWS[:2], {"text": "fine", "label": 2}]
    refused(run, sentence.format("validation"), ROWS, other)
    refused(run, sentence.format("test"), ROWS, None, other)
    same = "The train data must have two different labels or more in column 'label', but has ['1']."
    refused(run, same, ROWS[:4])
    words = [{"text": "fine", "label": "good"}, {"text": "dull", "label": "bad"}]
    sentence = "Row 0 of the train data must have a number as label for regression, but has 'good'."
    refused(run, sentence, words, problem_type="regression")
    sentence = "Row 1 of the train data must have a number as label for regression, but has inf."
    refused(run, sentence, [{"text": "fine", "label": 0.5}, {"text": "dull", "label": float("inf")}])
    sentence = "Row 0 of the train data must have a list of different labels for multi_label_classification, but has "
    refused(run, sentence + "'good'.", words, problem_type="multi_label_classification")
    refused(run, sentence + "[1, 0, 0].", [{"text": "fine", "label": [1, 0, 0]}, {"text": "dull", "label": [0, 0, 1]}])
    sentence = "Row 0 of the train data must have one label for single_label_classification, but has ['good']."
    lists = [row | {"label": [row["label"]]} for row in words]
    refused(run, sentence, lists, problem_type="single_label_classification")


def test_measure_without_variation(script):
    """Correlations of a constant, classes that nobody names: numbers, and no warnings."""
    constant, labels = np.ones(3), np.array([1.0, 2.0, 4.0])
    metrics = {"pearson": 0, "spearman": 0, "mse": pytest.approx(10 / 3)}
    assert script.measure_labels(constant, labels, "regression") == metrics
    nothing = np.zeros((2, 3), int)
    assert script.measure_labels(nothing, nothing, "multi_label_classification") == {"micro_f1": 0, "macro_f1": 0}
