"""Question answering: windows, the search for answers, the metrics of SQuAD, and the script with tiny models."""

import importlib
import json
import re
import shutil
import sys
from itertools import pairwise
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from transformers import AutoModelForQuestionAnswering, AutoTokenizer, BertConfig, BertModel, BertTokenizer

from hf_paraphrase_lm import CocoLMConfig, CocoLMModel, CocoLMTokenizer, train_tokenizer

from .reference.squad import best_mean, search

RELEASED = Path(__file__).parent / "fixtures" / "cocolm_tokenizer"
CONTEXTS = [
    "Anna lives in Oslo with two cats and a parrot.",
    "  İpek's  Zürich office (opened 1999) paid £1,250.50 —\tabout “a third” — to Łódź, 東京都 and Αθήνα.\n\nThe end. ",
    "The river Ob flows north. In 1905 its valley had 12 villages; each village had one mill, and every mill one owner "
    "who lived upstream of the dam, near the old bridge that the Tsar had ordered in 1871 for his soldiers and horses.",
]
QUESTIONS = ["Where does Anna live?", "  Which\nfoo? ", "What did the Tsar order?"]


@pytest.fixture(scope="module")
def examples(repository):
    """Imports a module of the folder `examples`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(repository / "examples")
        yield importlib.import_module


@pytest.fixture(scope="module")
def run_qa(examples):
    return examples("run_qa")


@pytest.fixture(scope="module")
def squad_windows(examples):
    return examples("squad_windows")


@pytest.fixture(scope="module")
def squad_metrics(examples):
    return examples("squad_metrics")


def make_tokenizer(kind):
    if kind == "wordpiece":
        characters = {c for text in CONTEXTS + QUESTIONS for c in text.lower() if not c.isspace()}
        pieces = [
            "[PAD]",
            "[UNK]",
            "[CLS]",
            "[SEP]",
            "[MASK]",
            *sorted(characters),
            *("##" + c for c in sorted(characters)),
        ]
        return BertTokenizer(vocab={piece: i for i, piece in enumerate(pieces)})
    if kind == "released":
        return CocoLMTokenizer.from_pretrained(RELEASED)
    return train_tokenizer(CONTEXTS + QUESTIONS, vocab_size=330, lowercase=kind == "uncased", progress=False)


TOKENIZERS = ("cased", "uncased", "wordpiece", "released")


def windows_of(squad_windows, tokenizer, rows, max_length=32, doc_stride=8, training=False):
    """The windows of rows of (question, context, texts, start)."""
    names = ("question", "context", "texts", "start")
    columns = {name: [row[i] for row in rows] for i, name in enumerate(names)}
    tokenizer.padding_side = tokenizer.truncation_side = "right"
    return squad_windows.make_windows(
        columns, list(range(len(rows))), tokenizer, max_length=max_length, doc_stride=doc_stride, training=training
    )


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_positions_are_those_of_the_answers(squad_windows, kind):
    """Of every word and every two words, also where white space and punctuation are around them."""
    tokenizer = make_tokenizer(kind)
    rows = []
    for context in CONTEXTS:
        words = list(re.finditer(r"\w+", context))
        for word, follower in pairwise(words):
            for start, end in ((word.start(), word.end()), (word.start(), follower.end())):
                rows.append(("Who is it?", context, [context[start:end], "never read"], start))
        rows.append(("Who is it?", context, ["  " + words[0][0] + " "], words[0].start() - 2))
    windows = windows_of(squad_windows, tokenizer, rows)
    assert max(map(len, windows["input_ids"])) == 32
    seen = [[] for _ in rows]
    for i, number in enumerate(windows["question"]):
        _, context, texts, start = rows[number]
        cls, position = windows["cls_position"][i], windows["context_position"][i]
        starts, ends = windows["starts"][i], windows["ends"][i]
        assert windows["input_ids"][i][cls] == tokenizer.cls_token_id
        first, last = windows["start_positions"][i], windows["end_positions"][i]
        start += len(texts[0]) - len(texts[0].lstrip())
        end = start + len(texts[0].strip())
        if (first, last) == (cls, cls):
            # Some character of the answer is before or after this window.
            assert start < starts[0] or end > ends[-1]
            continue
        inside = [k for k in range(len(starts)) if starts[k] < end and ends[k] > start]
        assert (first - position, last - position) == (inside[0], inside[-1])
        # The small released vocabulary has unknown tokens of punctuation and letters together.
        if tokenizer.unk_token_id not in windows["input_ids"][i]:
            assert context[starts[inside[0]] : ends[inside[-1]]].strip() == context[start:end]
        seen[number].append(i)
    assert max(map(len, seen)) > 1
    for (_, context, texts, start), found in zip(rows, seen, strict=True):
        offsets = tokenizer(context, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        tokens = [i for i, (a, b) in enumerate(offsets) if a < start + len(texts[0]) and b > start]
        # Two windows share 8 tokens, so one of them has any answer of 8 tokens whole.
        assert found or tokens[-1] - tokens[0] >= 8


def test_an_answer_inside_tokens_has_the_tokens_around_it(squad_windows):
    tokenizer = make_tokenizer("cased")
    context = "Anna lives in Oslo."
    windows = windows_of(squad_windows, tokenizer, [("Q", context, ["nna liv"], 1)])
    window = {name: values[0] for name, values in windows.items()}
    first, last = (window[name] - window["context_position"] for name in ("start_positions", "end_positions"))
    starts, ends = window["starts"], window["ends"]
    assert starts[first] <= 1 < ends[first] and starts[last] < 8 <= ends[last]


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_windows_cover_the_context_and_overlap(squad_windows, kind):
    tokenizer = make_tokenizer(kind)
    windows = windows_of(squad_windows, tokenizer, [("Who?", context, [], -1) for context in CONTEXTS])
    assert set(windows["question"]) == {0, 1, 2} and len(windows["question"]) > 6
    for number, context in enumerate(CONTEXTS):
        ids = []
        for i in [i for i, n in enumerate(windows["question"]) if n == number]:
            position, length = windows["context_position"][i], len(windows["starts"][i])
            inside = windows["input_ids"][i][position : position + length]
            assert ids[-8:] == inside[:8] or not ids
            ids += inside[8:] if ids else inside
            # A question without an answer points to [CLS].
            assert windows["start_positions"][i] == windows["end_positions"][i] == windows["cls_position"][i]
        assert ids == tokenizer(context, add_special_tokens=False)["input_ids"]


def test_windows_to_train_on_have_the_inputs_only(squad_windows):
    tokenizer = make_tokenizer("wordpiece")
    windows = windows_of(squad_windows, tokenizer, [("Who?", CONTEXTS[0], ["Anna"], 0)], training=True)
    assert set(windows) == {*tokenizer.model_input_names, "start_positions", "end_positions"}


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize(("n_best_size", "max_answer_length"), [(20, 30), (3, 2), (1, 1)])
def test_find_answers_equals_the_naive_search(squad_windows, kind, n_best_size, max_answer_length):
    """With windows in any order."""
    windows = windows_of(squad_windows, make_tokenizer(kind), [("Who?", context, [], -1) for context in CONTEXTS])
    windows = Dataset.from_dict(windows).shuffle(seed=1)
    logits = np.random.default_rng(0).normal(size=(2, len(windows), 40)).astype(np.float32)
    answers, odds = squad_windows.find_answers(CONTEXTS, windows, tuple(logits), n_best_size, max_answer_length)
    naive_answers, naive_odds = search(CONTEXTS, windows, *logits, n_best_size, max_answer_length)
    np.testing.assert_allclose(odds, naive_odds, atol=1e-6)
    for found, naive in zip(answers, naive_answers, strict=True):
        assert [text for text, _ in found] == [text for text, _ in naive] and "" not in dict(found)
        np.testing.assert_allclose([s for _, s in found], [s for _, s in naive], atol=1e-6)


def test_find_answers_without_a_readable_token(squad_windows):
    """The tokenizer drops control characters; the answer is then empty."""
    windows = Dataset.from_dict(
        windows_of(squad_windows, make_tokenizer("wordpiece"), [("Who?", "\u200e\x01", [], -1)])
    )
    assert windows["starts"][:] == [[]]
    logits = np.ones((1, 16), dtype=np.float32)
    assert squad_windows.find_answers(["\u200e\x01"], windows, (logits, logits), 20, 30) == ([[("", 2.0)]], [0.0])


def test_logits_that_are_nan(squad_windows):
    windows = Dataset.from_dict(windows_of(squad_windows, make_tokenizer("cased"), [("Who?", "Anna", [], -1)]))
    logits = np.full((1, 16), np.nan, dtype=np.float32)
    sentence = "The model's logits are NaN, which point to no answer. Its training diverged or its weights are damaged."
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}$"):
        squad_windows.find_answers(["Anna"], windows, (logits, logits), 20, 30)


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("The  Cat's\tmat.", "cats mat"),
        ("A.N. other theory", "other theory"),
        ("an a the", ""),
        ("thea, Atheist & co", "thea atheist co"),
        ("“Łódź” — 3.5%", "“łódź” — 35"),
    ],
)
def test_normalize_answer(squad_metrics, text, normal):
    assert squad_metrics.normalize_answer(text) == normal


def test_metrics_of_version_1(squad_metrics):
    predictions = ["The cat!", "cat cat sat", "dog", "a"]
    # Of "cat cat sat" two of three words are right, and two of four are found: 2 * 2/3 * 1/2 / (2/3 + 1/2) = 4/7.
    # "A" is no word once it is normalised: the same, but without a word in common.
    answers = [["dog", "cat"], ["sat cat on mat", "x"], ["cat"], ["A"]]
    metrics = squad_metrics.squad_metrics(predictions, answers)
    assert metrics == pytest.approx({"exact_match": 50, "f1": 100 * (1 + 4 / 7) / 4})


def test_metrics_of_version_2(squad_metrics):
    predictions = ["cat", "", "", "dog", "the", "red cat"]
    answers = [["cat"], ["cat"], [], [], ["The"], ["cat", "big red dog"]]
    # Right: "cat" of "cat", no answer twice ("the" and "The" are none either). Half right: "red cat", 2 * 1/2 / (3/2).
    metrics = squad_metrics.squad_metrics(predictions, answers, version_2=True)
    with_answers = {"HasAns_exact": 50, "HasAns_f1": 100 * (2 + 2 / 3) / 4, "HasAns_total": 4}
    without = {"NoAns_exact": 50, "NoAns_f1": 50, "NoAns_total": 2}
    overall = {"exact": 50, "f1": 100 * (3 + 2 / 3) / 6, "total": 6}
    assert metrics == pytest.approx(overall | with_answers | without)
    only = squad_metrics.squad_metrics(predictions[:2], answers[:2], version_2=True)
    assert set(only) == {"exact", "f1", "total", "HasAns_exact", "HasAns_f1", "HasAns_total"}


def test_best_thresholds(squad_metrics):
    """By hand: answering the first two of these, by their odds, is best for both; then F1 gains by the fourth too."""
    predictions, odds = ["cat", "dog", "cow", "red cat", "pig"], [-2.0, -1.0, 0.5, 1.0, 7.0]
    answers = [["cat"], ["dog"], [], ["cat"], []]
    metrics = squad_metrics.best_thresholds(predictions, odds, answers)
    expected = {"best_exact": 80, "best_exact_thresh": -1, "best_f1": 80, "best_f1_thresh": -1}
    assert metrics == pytest.approx(expected)
    # Without a question that has no answer, all are answered.
    metrics = squad_metrics.best_thresholds(predictions[:2], odds[:2], answers[:2])
    assert metrics == {"best_exact": 100, "best_exact_thresh": -1, "best_f1": 100, "best_f1_thresh": -1}
    # Without one that has an answer, the threshold is below all odds.
    metrics = squad_metrics.best_thresholds(["x", "y"], [-3.0, -2.0], [[], []])
    assert metrics["best_f1"] == 100 and -3.001 < metrics["best_f1_thresh"] < -3
    assert squad_metrics.best_thresholds(["x", "y"], [0.5, 0.7], [[], []])["best_f1_thresh"] == 0


def test_best_thresholds_equal_the_naive_search(squad_metrics):
    """With equal odds, between which no threshold can tell."""
    random = np.random.default_rng(0)
    words = ["cat", "red cat", "dog", "the red dog"]
    for _ in range(50):
        predictions = random.choice(words, 12).tolist()
        answers = [random.choice(words, n).tolist() for n in random.integers(0, 3, 12)]
        odds = random.integers(-4, 4, 12).astype(float).tolist()
        metrics = squad_metrics.best_thresholds(predictions, odds, answers)
        answered, unanswered = (
            squad_metrics.question_scores(given, answers, version_2=True).T for given in (predictions, [""] * 12)
        )
        for name, yes, no in zip(("exact", "f1"), answered, unanswered, strict=True):
            best, thresholds = best_mean(yes, no, odds)
            assert metrics[f"best_{name}"] == pytest.approx(best)
            # Below all odds a threshold may be anywhere.
            assert metrics[f"best_{name}_thresh"] in thresholds or min(odds) - 1 in thresholds


def test_scores_of_questions_that_do_not_fit(squad_metrics):
    with pytest.raises(ValueError, match=r"^There must be one prediction for each question, but got 1 for 2\.$"):
        squad_metrics.question_scores(["x"], [["x"], ["y"]], version_2=False)
    with pytest.raises(ValueError, match=r"^A question has no answer\. This is known in version 2 of SQuAD only\.$"):
        squad_metrics.question_scores(["x"], [[]], version_2=False)


# One answer each, the last question unanswerable.
TRAINING = [
    ("q1", "Who lives in Oslo?", CONTEXTS[0], ["Anna"], [0]),
    ("q2", "Where does Anna live?", CONTEXTS[0], ["Oslo", "in Oslo"], [14, 11]),
    ("q3", "How many cats?", CONTEXTS[0], ["two"], [24]),
    ("q4", "What flows north?", CONTEXTS[2], ["river Ob"], [4]),
    ("q5", "How many villages?", CONTEXTS[2], ["12"], [CONTEXTS[2].index("12")]),
    ("q6", "Who ordered it?", CONTEXTS[2], ["Tsar"], [CONTEXTS[2].index("Tsar")]),
    ("q7", "Who is the king?", CONTEXTS[0], [], []),
]
COLUMNS = ("id", "question", "context")


def rows_of(questions, answered=True):
    rows = [dict(zip(COLUMNS, row[:3], strict=True)) for row in questions]
    for row, (*_, texts, starts) in zip(rows, questions, strict=True):
        if answered:
            row["answers"] = {"text": texts, "answer_start": starts}
    return rows


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A tiny COCO-LM and its tokenizer."""
    folder = tmp_path_factory.mktemp("checkpoint")
    texts = [*CONTEXTS, *(row[1] for row in TRAINING)] * 2
    tokenizer = train_tokenizer(texts, vocab_size=400, lowercase=True, progress=False)
    sizes = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}
    # Large initial weights and no dropout, to learn in few updates.
    settings = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "initializer_range": 0.2}
    config = CocoLMConfig(vocab_size=len(tokenizer), **sizes, **settings)
    CocoLMModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def run(run_qa, tmp_path, checkpoint, monkeypatch):
    """Runs the script on questions; returns its folder. `files` are rows or text for each split."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")

    def run(output="out", arguments=None, **files):
        command = {
            "model_name_or_path": checkpoint,
            "output_dir": tmp_path / output,
            "max_length": 64,
            "doc_stride": 16,
            "learning_rate": 3e-3,
            "per_device_train_batch_size": 8,
            "save_strategy": "no",
            "dataloader_pin_memory": False,
            "disable_tqdm": True,
            "report_to": "none",
        }
        for split, rows in files.items():
            file = tmp_path / f"{split}.parquet" if isinstance(rows, list) else rows
            if isinstance(rows, list):
                Dataset.from_list(rows).to_parquet(file)
            command[f"{split}_file"] = file
        command |= arguments or {}
        words = [f"--{name}={value}" for name, value in command.items()]
        monkeypatch.setattr(sys, "argv", ["run_qa.py", *words])
        run_qa.main()
        return tmp_path / output

    return run


def read(file):
    return json.loads(file.read_text(encoding="utf-8"))


def test_version_1_learns_its_questions(run, checkpoint):
    """Also with windows grouped by length, and evaluated in training as at its end."""
    questions = TRAINING[:6]
    folder = run(
        train=rows_of(questions),
        validation=rows_of(questions),
        test=rows_of(questions[:0:-1], answered=False),
        arguments={
            "do_train": True,
            "do_predict": True,
            "max_steps": 60,
            "eval_strategy": "steps",
            "eval_steps": 30,
            "train_sampling_strategy": "group_by_length",
            "per_device_eval_batch_size": 2,
            "logging_steps": 30,
        },
    )
    results = read(folder / "all_results.json")
    assert results["eval_exact_match"] == results["eval_f1"] == 100
    assert results["eval_samples"] == 6 and results["predict_samples"] == 5 and results["eval_loss"] < 0.5
    assert results["train_samples"] > 6 and "predict_f1" not in results and "predict_loss" not in results
    history = [logs for logs in read(folder / "trainer_state.json")["log_history"] if "eval_f1" in logs]
    assert [logs["step"] for logs in history] == [30, 60] and history[-1]["eval_exact_match"] == 100
    assert history[-1]["eval_loss"] == pytest.approx(results["eval_loss"], abs=1e-5)

    answers = {row[0]: row[3][0] for row in questions}
    assert read(folder / "eval_predictions.json") == answers
    predictions = read(folder / "predictions.json")
    assert list(predictions.items()) == [(row[0], row[3][0]) for row in questions[:0:-1]]
    for name, best in read(folder / "nbest_predictions.json").items():
        assert best[0]["text"] == answers[name] and len(best) == 20
        assert sum(text["probability"] for text in best) == pytest.approx(1)
        assert [text["score"] for text in best] == sorted((text["score"] for text in best), reverse=True)
    assert not (folder / "null_odds.json").exists()
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert "pipeline_tag: question-answering" in card and "| eval_f1 | 100 |" in card
    AutoModelForQuestionAnswering.from_pretrained(folder)
    assert AutoTokenizer.from_pretrained(folder)("Anna")["input_ids"][0] == 0


def test_version_2_learns_what_has_no_answer(run):
    arguments = {"version_2_with_negative": True, "do_train": True, "do_eval": True, "max_steps": 120}
    folder = run(train=rows_of(TRAINING), validation=rows_of(TRAINING), arguments=arguments)
    results = read(folder / "eval_results.json")
    for name in ("exact", "f1", "HasAns_exact", "NoAns_f1", "best_exact", "best_f1"):
        assert results[f"eval_{name}"] == 100, name
    assert (results["eval_HasAns_total"], results["eval_NoAns_total"], results["eval_total"]) == (6, 1, 7)
    odds, predictions = read(folder / "eval_null_odds.json"), read(folder / "eval_predictions.json")
    assert {name for name in odds if odds[name] > 0} == {"q7"} == {name for name in odds if not predictions[name]}
    # The best texts with that of no answer among them.
    for name, best in read(folder / "eval_nbest_predictions.json").items():
        (null,) = [text["score"] for text in best if not text["text"]]
        assert null - max(text["score"] for text in best if text["text"]) == pytest.approx(odds[name], abs=1e-4)

    # A trained checkpoint is evaluated alone; below all odds nothing is answered.
    arguments = {"model_name_or_path": folder, "null_score_diff_threshold": min(odds.values()) - 1, "do_eval": True}
    silent = run("silent", validation=rows_of(TRAINING), arguments=arguments | {"version_2_with_negative": True})
    assert set(read(silent / "eval_predictions.json").values()) == {""}
    results = read(silent / "eval_results.json")
    assert results["eval_HasAns_exact"] == 0 and results["eval_NoAns_exact"] == results["eval_best_exact"] == 100


def test_a_run_goes_on_where_it_ended(run):
    arguments = {"do_train": True, "save_strategy": "steps", "save_steps": 2, "lr_scheduler_type": "constant"}
    arguments |= {"per_device_train_batch_size": 2, "warmup_steps": 0}
    files = {"train": rows_of(TRAINING[:6])}
    whole = run("whole", arguments=arguments | {"max_steps": 6}, **files)
    shutil.copytree(whole / "checkpoint-4", whole.parent / "parts" / "checkpoint-4")
    parts = run("parts", arguments=arguments | {"max_steps": 6}, **files)
    whole, parts = load_file(whole / "model.safetensors"), load_file(parts / "model.safetensors")
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


@pytest.mark.parametrize("kind", ["json", "yaml"])
def test_arguments_from_a_file(run_qa, tmp_path, checkpoint, monkeypatch, kind):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    with (tmp_path / "data.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows_of(TRAINING))
    arguments = {
        "model_name_or_path": str(checkpoint),
        "random_weights": True,
        "output_dir": str(tmp_path / "out"),
        "validation_file": str(tmp_path / "data.jsonl"),
        "version_2_with_negative": True,
        "do_eval": True,
        "max_eval_samples": 5,
        "dataloader_pin_memory": False,
        "report_to": "none",
    }
    file = tmp_path / f"arguments.{kind}"
    lines = (
        json.dumps(arguments) if kind == "json" else "\n".join(f"{n}: {json.dumps(v)}" for n, v in arguments.items())
    )
    file.write_text(lines, encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["run_qa.py", str(file)])
    run_qa.main()
    assert read(tmp_path / "out" / "eval_results.json")["eval_total"] == 5


def test_another_model_and_the_official_files(run, tmp_path):
    """BERT, from random weights; its inputs have token types."""
    tokenizer = make_tokenizer("wordpiece")
    settings = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    BertModel(BertConfig(vocab_size=len(tokenizer), **settings)).save_pretrained(tmp_path / "bert")
    tokenizer.save_pretrained(tmp_path / "bert")
    questions = [
        {
            "id": name,
            "question": question,
            "answers": [{"text": t, "answer_start": s} for t, s in zip(texts, starts, strict=True)],
        }
        for name, question, _, texts, starts in TRAINING
    ]
    questions[6] |= {"is_impossible": True, "plausible_answers": [{"text": "Anna", "answer_start": 0}]}
    context = [row[2] for row in TRAINING]
    paragraphs = [
        {"context": c, "qas": [q for q, own in zip(questions, context, strict=True) if own == c]} for c in CONTEXTS
    ]
    file = tmp_path / "dev-v2.0.json"
    data = [{"title": "One", "paragraphs": paragraphs[:1]}, {"title": "Two", "paragraphs": paragraphs[1:]}]
    file.write_text(json.dumps({"version": "v2.0", "data": data}), encoding="utf-8")
    arguments = {"model_name_or_path": tmp_path / "bert", "random_weights": True, "version_2_with_negative": True}
    arguments |= {"do_train": True, "do_eval": True, "max_steps": 2, "max_eval_samples": 6}
    folder = run(train=file, validation=file, arguments=arguments)
    results = read(folder / "all_results.json")
    assert results["train_samples"] > 7 and results["eval_total"] == 6
    assert list(read(folder / "eval_predictions.json")) == ["q1", "q2", "q3", "q7", "q4", "q5"]
    assert AutoModelForQuestionAnswering.from_pretrained(folder).config.model_type == "bert"


def test_questions_that_are_too_long_are_cut(run_qa, caplog):
    tokenizer = make_tokenizer("cased")
    rows = [{"id": i, "question": q, "context": CONTEXTS[2]} for i, q in enumerate(["Who?", "Why " * 300])]
    # What the tokenizer says of the model is the limit too.
    tokenizer.model_max_length = 64
    data = run_qa.QuestionArguments(doc_stride=16)
    windows = run_qa.prepare(Dataset.from_list(rows), "test", tokenizer, data)
    assert [record.getMessage() for record in caplog.records][-1] == "1 of 2 questions are cut after 22 tokens."
    assert max(map(len, windows["input_ids"])) == 64 and set(windows["question"]) == {0, 1}
    lengths = list(map(len, windows["input_ids"]))
    assert lengths == sorted(lengths, reverse=True)
    decoded = tokenizer.decode(windows[list(windows["question"]).index(1)]["input_ids"])
    assert decoded.startswith("[CLS]Why Why Why Why Why Why Why Wh[SEP][SEP]The river")


def test_answers_that_are_not_there_are_not_trained_on(run_qa, caplog):
    rows = [
        {"id": str(i), "question": "Who?", "context": "Anna is Anna.", "answers": answers}
        for i, answers in enumerate(
            [
                {"text": ["Anna"], "answer_start": [8]},
                {"text": ["Anna"], "answer_start": [7]},
                {"text": ["Anna", "is"], "answer_start": [99, 5]},
                {"text": ["."], "answer_start": [-1]},
                {"text": [" "], "answer_start": [4]},
                {"text": [], "answer_start": []},
                None,
            ]
        )
    ]
    questions = run_qa.read_questions(Dataset.from_list(rows), "train", True, None)
    assert questions["id"][:] == ["0", "5", "6"] and questions["texts"][:] == [["Anna"], [], []]
    assert caplog.messages == ["4 of 7 questions are left out: their answer is not at its answer_start."]
    # To evaluate, where an answer is does not matter.
    assert len(run_qa.read_questions(Dataset.from_list(rows), "validation", True, None)) == 7


ROW = {"id": "a", "question": "Who?", "context": "Anna", "answers": {"text": ["Anna"], "answer_start": [0]}}


@pytest.mark.parametrize(
    ("split", "rows", "sentence"),
    [
        ("train", [{"id": "a", "question": "Who?"}], "The train data has no column 'context', only id, question."),
        (
            "validation",
            [{name: ROW[name] for name in COLUMNS}],
            "The validation data has no column 'answers', only id, question, context.",
        ),
        (
            "train",
            [ROW | {"answers": "Anna"}],
            "The column 'answers' of the train data must hold dictionaries of two lists, text and answer_start, but it "
            "holds Value('string').",
        ),
        ("train", [ROW, ROW], "Each question must have an id of its own, but two of the train data have the same."),
        ("test", [ROW | {"context": " \n"}], "The context of question 'a' of the test data is empty."),
        (
            "validation",
            [ROW, ROW | {"id": "b", "answers": {"text": [], "answer_start": []}}],
            "1 of 2 questions of the validation data have no answer. If their contexts do not hold one, give "
            "--version_2_with_negative.",
        ),
        (
            "train",
            [ROW | {"answers": {"text": ["Bob"], "answer_start": [0]}}],
            "There is no question in the train data.",
        ),
    ],
)
def test_data_that_does_not_do(run_qa, split, rows, sentence):
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}$"):
        run_qa.read_questions(Dataset.from_list(rows), split, version_2=False, limit=None)


def test_a_slow_tokenizer(run_qa):
    class SlowTokenizer:
        is_fast = False

    sentence = "Answers need the offsets of a fast tokenizer, but got a SlowTokenizer."
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}$"):
        run_qa.prepare(Dataset.from_list([ROW]), "test", SlowTokenizer(), run_qa.QuestionArguments())


def test_arguments_that_do_not_do(run_qa, run):
    with pytest.raises(ValueError, match=r"^There is nothing to do\. Give --do_train, --do_eval or --do_predict, or "):
        run(train=[ROW])
    with pytest.raises(ValueError, match=r"^--n_best_size must be at least 1, but got 0\.$"):
        run_qa.QuestionArguments(n_best_size=0)
    sentence = (
        "--doc_stride must be at most 58 in windows of 64 tokens, but got 64. There must be room for a question and "
        "for what is new in a window."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}$"):
        run(validation=[ROW], arguments={"do_eval": True, "doc_stride": 64})
