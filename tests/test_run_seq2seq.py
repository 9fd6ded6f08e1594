"""examples/run_seq2seq.py with tiny models: learns, writes from language tokens, measures, resumes, and its errors."""

import re

import numpy as np
import pytest
import torch
from datasets import Dataset
from huggingface_hub import ModelCard
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics import BLEU, CHRF
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, BartConfig, BartForConditionalGeneration, set_seed

from hf_paraphrase_lm import MargeConfig, MargeForConditionalGeneration, train_tokenizer

from .scripts import import_example, read_json, run_script, write_rows

PAIRS = {"red": ("rot", "rouge"), "green": ("grün", "vert"), "blue": ("blau", "bleu"), "white": ("weiß", "blanc")}
GERMAN = [{"source": word, "target": german, "lang": "de"} for word, (german, _) in PAIRS.items()]
FRENCH = [{"source": word, "target": french, "lang": "fr"} for word, (_, french) in PAIRS.items()]
SWITCHES = {"train": "do_train", "validation": "do_eval", "test": "do_predict"}
LEARN = {"num_train_epochs": 40, "per_device_train_batch_size": 4, "label_smoothing_factor": 0}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Models of two families, with one tokenizer."""
    set_seed(0)
    tokenizer = train_tokenizer([*PAIRS, *sum(PAIRS.values(), ())] * 2, 400, model_max_length=32, progress=False)
    room = {"vocab_size": len(tokenizer), "decoder_layers": 1, "encoder_layers": 1, "max_position_embeddings": 32}
    width = {"hidden_size": 32, "num_attention_heads": 2, "retrieval_layers": 1, "decoder_base_layers": 1}
    width |= {f"{name}_intermediate_size": 32 for name in ("encoder", "decoder", "decoder_base")}
    bart = {"d_model": 32, "encoder_attention_heads": 2, "decoder_attention_heads": 2, "init_std": 0.2}
    bart |= {"encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "pad_token_id": 1, "decoder_start_token_id": 2}
    models = {
        "marge": MargeForConditionalGeneration(MargeConfig(**room, **width, initializer_range=0.2)),
        "bart": BartForConditionalGeneration(BartConfig(**room, **bart, forced_eos_token_id=None)),
    }
    folders = {}
    for family, model in models.items():
        folders[family] = tmp_path_factory.mktemp(family)
        model.save_pretrained(folders[family])
        tokenizer.save_pretrained(folders[family])
    return folders


@pytest.fixture
def script(monkeypatch, repository):
    return import_example(monkeypatch, repository, "run_seq2seq")


@pytest.fixture
def run(script, monkeypatch, tmp_path, checkpoints):
    """Runs the script on rows for each split; returns its --output_dir."""

    def run(train=None, validation=None, test=None, **arguments):
        for split, rows in {"train": train, "validation": validation, "test": test}.items():
            if rows is not None:
                file = write_rows(tmp_path / f"{split}.parquet", rows)
                arguments |= {f"{split}_file": file, SWITCHES[split]: True}
        arguments = {"model_name_or_path": checkpoints["marge"], "max_target_length": 12, "num_beams": 2} | arguments
        return run_script(script, monkeypatch, tmp_path, **arguments)

    return run


def read_lines(folder):
    return (folder / "generated_predictions.txt").read_text(encoding="utf-8").splitlines()


def written(folder, sources, **settings):
    """What the saved model writes, each row by itself."""
    model, tokenizer = AutoModelForSeq2SeqLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    settings = {"num_beams": 2, "max_length": 13} | settings
    ids = [model.generate(**tokenizer(source, return_tensors="pt"), **settings)[0] for source in sources]
    return tokenizer.batch_decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("family", ["marge", "bart"])
def test_learns_and_writes(run, checkpoints, family):
    test = [{"source": word} for word in [*PAIRS][::-1]]
    folder = run(GERMAN, GERMAN, test, model_name_or_path=checkpoints[family], **LEARN)
    results = read_json(folder / "all_results.json")
    # Words by themselves have no 4-grams.
    assert results["eval_chrf"] == pytest.approx(100) and results["eval_bleu"] == 0
    assert [results[f"{split}_samples"] for split in ("train", "eval", "predict")] == [4, 4, 4]
    assert read_lines(folder) == written(folder, [*PAIRS][::-1]) == [row["target"] for row in GERMAN[::-1]]
    assert "predict_chrf" not in results and "predict_loss" not in results
    model, tokenizer = AutoModelForSeq2SeqLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer([row["source"] for row in GERMAN], padding=True, return_tensors="pt")
    labels = tokenizer([row["target"] for row in GERMAN], padding=True, return_tensors="pt")["input_ids"]
    labels[labels == tokenizer.pad_token_id] = -100
    assert results["eval_loss"] == pytest.approx(model(**inputs, labels=labels).loss.item(), rel=1e-4)
    card = ModelCard.load(folder / "README.md")
    assert card.data.pipeline_tag == "translation" and "| eval_chrf | 100 |" in card.content


def test_language_tokens_of_a_column(run, checkpoints):
    """One model, two languages in one batch; the test data asks for them in another order."""
    rows = GERMAN + FRENCH
    test = rows[::-1]
    arguments = {"target_language_token": "<{lang}>", "per_device_eval_batch_size": 8}
    folder = run(rows, rows, test, **LEARN | {"num_train_epochs": 120, "learning_rate": 5e-3}, **arguments)
    assert read_lines(folder) == [row["target"] for row in test]
    assert read_json(folder / "all_results.json")["eval_chrf"] == pytest.approx(100)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    old = len(AutoTokenizer.from_pretrained(checkpoints["marge"]))
    german, french = tokenizer.convert_tokens_to_ids(["<de>", "<fr>"])
    assert [german, french] == [old, old + 1]
    for language, pairs in ((german, GERMAN), (french, FRENCH)):
        start = torch.tensor([[2, language]])
        assert written(folder, PAIRS, decoder_input_ids=start) == [row["target"] for row in pairs]
    # Only predicted, by the saved model; a language that it does not know is refused.
    again = run(test=rows, **arguments, model_name_or_path=folder, output_dir=folder / "again")
    assert read_lines(again) == [row["target"] for row in rows]
    sentence = (
        "The tokenizer has no token '<it>', with which targets of the test data begin. Tokens are added only for the "
        "languages of the training data."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}$"):
        run(test=[{"source": "red", "lang": "it"}], **arguments, model_name_or_path=folder)


def test_one_language_token_is_written_by_the_saved_model(run):
    folder = run(FRENCH, test=FRENCH, target_language_token="<fr>", **LEARN)
    assert read_lines(folder) == written(folder, PAIRS) == [row["target"] for row in FRENCH]
    model = AutoModelForSeq2SeqLM.from_pretrained(folder)
    token = AutoTokenizer.from_pretrained(folder).convert_tokens_to_ids("<fr>")
    assert model.generation_config.forced_bos_token_id == token


def test_several_targets(run, script, checkpoints):
    """Each is learned; what is written is compared with all of them."""
    rows = [{"source": word, "target": list(targets)} for word, targets in PAIRS.items()]
    folder = run(rows, rows, rows, metric="rouge", **LEARN)
    results = read_json(folder / "all_results.json")
    assert results["train_samples"] == 8 and results["eval_samples"] == 4
    right = [line in row["target"] for line, row in zip(read_lines(folder), rows, strict=True)]
    assert results["predict_rouge1"] == results["predict_rougeL"] == 100 * sum(right) / 4 > 0
    assert ModelCard.load(folder / "README.md").data.pipeline_tag == "summarization"


def arguments(script, **settings):
    return script.TargetArguments(**settings)


TEXTS = ["the cat sat on the mat", "a dog", "one small bird sang all day"]
TARGETS = [["a cat sat on the mat", "the cat was on a mat"], ["the dog"], ["one bird sang", "a bird sang all day", "x"]]


def test_bleu_and_chrf(script):
    """As sacrebleu gives them with the references of each row, however many; by hand for the shares of n-grams."""
    scores = script.measure(TEXTS, TARGETS, arguments(script))
    stats = np.zeros((2, 4))
    for text, targets in zip(TEXTS, TARGETS, strict=True):
        words, references = text.split(), [target.split() for target in targets]
        for n in range(1, 5):
            grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
            for gram in set(grams):
                counts = [sum(tuple(r[i : i + n]) == gram for i in range(len(r))) for r in references]
                stats[0, n - 1] += min(grams.count(gram), max(counts))
            stats[1, n - 1] += len(grams)
    # Of each row the reference whose length is closest.
    closest = [
        min((abs(len(t.split()) - len(x.split())), len(t.split())) for t in ts)[1]
        for x, ts in zip(TEXTS, TARGETS, strict=True)
    ]
    length = sum(len(text.split()) for text in TEXTS)
    brevity = min(1, np.exp(1 - sum(closest) / length))
    assert scores["bleu"] == pytest.approx(100 * brevity * np.exp(np.log(stats[0] / stats[1]).mean()))
    rows = [CHRF().sentence_score(text, targets).score for text, targets in zip(TEXTS, TARGETS, strict=True)]
    assert min(rows) < scores["chrf"] < max(rows)
    assert (
        scores["chrf"]
        == CHRF()
        .corpus_score(
            TEXTS,
            [
                ["a cat sat on the mat", "the dog", "one bird sang"],
                ["the cat was on a mat", None, "a bird sang all day"],
                [None, None, "x"],
            ],
        )
        .score
    )
    chinese = script.measure(["我喜欢红色的花"], [["我喜欢红色的猫"]], arguments(script, bleu_tokenizer="zh"))
    assert chinese["bleu"] == BLEU(tokenize="zh").corpus_score(["我喜欢红色的花"], [["我喜欢红色的猫"]]).score > 50


def test_rouge(script):
    """In ASCII as rouge-score has it, the best reference of each row; words and characters of other scripts count."""
    scores = script.measure(TEXTS, TARGETS, arguments(script, metric="rouge"))
    for name in ("rouge1", "rouge2", "rougeL"):
        scorer = RougeScorer([name])
        best = [
            max(scorer.score(target, text)[name].fmeasure for target in targets)
            for text, targets in zip(TEXTS, TARGETS, strict=True)
        ]
        assert scores[name] == pytest.approx(100 * np.mean(best))
    words = script.Words().tokenize
    assert words("It's 2 Snake_case words.") == ["it", "s", "2", "snake", "case", "words"]
    assert words("L'été, ПРИВЕТ!") == ["l", "été", "привет"]
    assert words("हिन्दी में") == ["हिन्दी", "में"]
    assert words("Python是什么?") == ["python", "是", "什", "么"]


def test_line_breaks_are_escaped(script, run, monkeypatch):
    monkeypatch.setattr(script, "decode", lambda *_: ["a\nb", "c\\n", "d\r"])
    folder = run(test=[{"source": "red"}] * 3)
    assert read_lines(folder) == [r"a\nb", r"c\\n", r"d\r"]


def test_the_loss_is_a_mean_over_the_tokens_of_the_whole_batch(script):
    logits, labels = torch.randn(4, 3, 7), torch.randint(7, (4, 3))
    labels[1, 1:] = labels[3, 2:] = -100
    loss = script.loss_function(0.1)
    whole = loss({"logits": logits}, labels)
    parts = [loss({"logits": logits[i : i + 2]}, labels[i : i + 2], torch.tensor(9)) for i in (0, 2)]
    expected = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), label_smoothing=0.1)
    assert whole == pytest.approx(expected.item()) and sum(parts) == pytest.approx(expected.item())


def test_inputs(script, checkpoints):
    """Cut to length, with the tokens at both ends; a row for each target only in training."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoints["marge"])
    model = AutoModelForSeq2SeqLM.from_pretrained(checkpoints["marge"])
    data = arguments(script, max_source_length=4, max_target_length=5)

    def encode(is_training, languages=(9, 8), targets=(["rot", "rouge"], ["grün " * 5])):
        targets = targets and list(targets)
        languages = languages and list(languages)
        return script.encode(["red " * 4, "blue"], targets, languages, is_training, tokenizer, model, data)

    train, test = encode(True), encode(False)
    source = tokenizer(["red " * 4, "blue"], truncation=True, max_length=4)["input_ids"]
    target = tokenizer(["rot", "rouge", "grün " * 5], truncation=True, max_length=4)["input_ids"]
    assert train["input_ids"][:] == [source[0], source[0], source[1]] and len(source[0]) == 4
    assert train["labels"][:] == [[9, *target[0]], [9, *target[1]], [8, *target[2]]] and len(target[2]) == 4
    assert test["labels"][:] == [[9, *target[0]], [8, *target[2]]]
    assert test["decoder_prefix"][:] == [[2, 9], [2, 8]] and "decoder_prefix" not in train.column_names
    plain = encode(False, languages=None)
    assert plain["labels"][1] == tokenizer("grün " * 5, truncation=True, max_length=5)["input_ids"]
    assert encode(False, targets=None).column_names == ["input_ids", "attention_mask", "decoder_prefix"]


def test_goes_on_from_a_checkpoint(run, tmp_path):
    """To the same weights as an unbroken run, with new tokens in the vocabulary."""
    train = {"target_language_token": "<{lang}>", "save_strategy": "steps", "save_steps": 2, "num_train_epochs": 1}
    rows = GERMAN + FRENCH
    whole = run(rows, **train, per_device_train_batch_size=2, output_dir=tmp_path / "whole")
    for name in ("model.safetensors", "trainer_state.json"):
        (whole / name).rename(whole / f"first-{name}")
    for file in (whole / "checkpoint-4").iterdir():
        file.unlink()
    run(rows, **train, per_device_train_batch_size=2, output_dir=whole)
    first, again = load_file(whole / "first-model.safetensors"), load_file(whole / "model.safetensors")
    assert all(torch.equal(first[name], again[name]) for name in first) and first.keys() == again.keys()
    assert read_json(whole / "train_results.json")["train_resumed"]


def test_decode_leaves_out_rows_that_fill_up_batches(script, checkpoints):
    tokenizer = AutoTokenizer.from_pretrained(checkpoints["marge"])
    ids = tokenizer(["red", "blue", "red"], padding=True, return_tensors="np")["input_ids"]
    ids = np.concatenate([np.full((3, 1), 2), ids, np.full((3, 2), -100)], axis=1)
    assert script.decode(ids, tokenizer, 2, 1) == ["red", "blue"]


@pytest.mark.parametrize(
    ("column", "sentence"),
    [
        ({"target": [["a"], []]}, "a list of texts, in column 'target', but has []."),
        ({"target": ["a", None]}, "a list of texts, in column 'target', but has None."),
        ({"target": [1, 2]}, "a list of texts, in column 'target', but has 1."),
    ],
)
def test_targets_that_do_not_do(script, column, sentence):
    row = 0 if column["target"][0] == 1 else 1
    sentence = f"Row {row} of the test data must have a text, or {sentence}"
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}$"):
        script.read_targets(Dataset.from_dict(column), "test", "target")


def test_columns_that_are_missing(script):
    rows = Dataset.from_dict({"source": ["a"], "target": [None]})
    assert script.read_targets(rows, "test", "target") is script.read_targets(rows, "test", "other") is None
    has = "Its columns are 'source', 'target'."
    with pytest.raises(
        ValueError, match=f"^{re.escape(f'The train data has no column {chr(39)}other{chr(39)}. {has}')}$"
    ):
        script.read_targets(rows, "train", "other")
    with pytest.raises(
        ValueError, match=f"^{re.escape(f'The train data has no column {chr(39)}lang{chr(39)}. {has}')}$"
    ):
        script.read_languages(rows, "train", "<{lang}>")
    with pytest.raises(ValueError, match=r"^--num_beams must be at least 1, but got 0\.$"):
        script.TargetArguments(num_beams=0)
