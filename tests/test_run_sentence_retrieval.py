"""examples/run_sentence_retrieval.py: against naive loops, with models of three families, and its errors."""

import re
import sys

import datasets
import numpy as np
import pytest
import torch
from datasets import Dataset
from tqdm.auto import tqdm
from transformers import AutoModel, AutoTokenizer, set_seed

from hf_paraphrase_lm import MargeConfig, MargeForConditionalGeneration, train_tokenizer

from .reference import sentence_retrieval as naive
from .scripts import import_example, make_checkpoint, read_json, write_rows

WORDS = ["sun", "moon", "star", "tree", "bird", "fish", "rain", "snow", "wind", "fire"]
TEXTS = [" ".join(WORDS[i:] + WORDS[:i])[: 9 + 5 * i] for i in range(10)]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    set_seed(0)
    folders = {family: tmp_path_factory.mktemp(family) for family in ("marge", "cocolm", "bert")}
    for family in ("cocolm", "bert"):
        make_checkpoint(folders[family], TEXTS, family, num_hidden_layers=3)
    tokenizer = train_tokenizer(TEXTS * 2, vocab_size=400, model_max_length=64, progress=False)
    room = {f"{name}_intermediate_size": 32 for name in ("encoder", "decoder", "decoder_base")}
    room |= {"hidden_size": 32, "num_attention_heads": 2, "encoder_layers": 3, "decoder_layers": 1}
    room |= {"decoder_base_layers": 1, "retrieval_layers": 2, "max_position_embeddings": 16}
    # With its head, and in the mode of training: what is saved by pre-training.
    model = MargeForConditionalGeneration(MargeConfig(vocab_size=len(tokenizer), initializer_range=0.2, **room))
    model.save_pretrained(folders["marge"])
    tokenizer.save_pretrained(folders["marge"])
    return folders


@pytest.fixture
def script(monkeypatch, repository):
    return import_example(monkeypatch, repository, "run_sentence_retrieval")


@pytest.fixture
def run(script, monkeypatch, tmp_path, checkpoints):
    """Runs the script on rows for each split; returns `results.json`."""

    def run(test, validation=None, family="marge", **arguments):
        defaults = {"model_name_or_path": checkpoints[family], "output_dir": tmp_path / "out", "use_cpu": True}
        for split, rows in {"test": test, "validation": validation}.items():
            if rows is not None:
                defaults[f"{split}_file"] = write_rows(tmp_path / f"{split}.parquet", rows)
        command = [f"--{name}={value}" for name, value in (defaults | arguments).items() if not isinstance(value, list)]
        for name, value in arguments.items():
            command += [f"--{name}", *map(str, value)] if isinstance(value, list) else []
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
        monkeypatch.setattr(sys, "argv", ["run_sentence_retrieval.py", *command])
        script.main()
        return read_json(tmp_path / "out" / "results.json")

    return run


def vectors(num_sources, num_targets, seed=0):
    """Unit vectors of two sides; those of a row are close to each other, and all have a part in common."""
    random = np.random.default_rng(seed)
    sides = random.normal(size=(2, max(num_sources, num_targets), 8))
    sides[1] = sides[0] + 0.9 * sides[1]
    sides += 0.7
    sides = (sides / np.linalg.norm(sides, axis=-1, keepdims=True)).astype(np.float32)
    return sides[0][:num_sources], sides[1][:num_targets]


@pytest.mark.parametrize(("num_rows", "k"), [(30, 4), (12, 1), (3, 4)])
def test_accuracies(script, num_rows, k):
    source, target = vectors(num_rows, num_rows)
    scores = script.accuracies(source, target, k)
    for by in ("cosine", "margin"):
        forward = naive.accuracy(source, target, k, by)
        backward = naive.accuracy(target, source, k, by)
        assert scores[f"source_to_target_{by}"] == forward and scores[f"target_to_source_{by}"] == backward
        assert scores[f"mean_{by}"] == (forward + backward) / 2
    assert num_rows < 30 or len(set(scores.values())) > 2


@pytest.mark.parametrize(("num_sources", "num_targets", "k"), [(25, 18, 4), (7, 20, 2), (3, 2, 4)])
def test_mining(script, num_sources, num_targets, k):
    source, target = vectors(num_sources, num_targets)
    found, expected = script.mine(source, target, k), naive.mine(source, target, k)
    assert [pair for _, *pair in found] == [pair for _, *pair in expected]
    np.testing.assert_allclose([score for score, *_ in found], [score for score, *_ in expected], rtol=1e-5)


def test_thresholds(script):
    """The best F1 of all, half-way between two candidates; those with equal scores are taken together."""
    random = np.random.default_rng(0)
    for _ in range(30):
        scores = np.sort(random.integers(1, 6, size=8) / 4)[::-1].tolist()
        candidates = [(score, i, i) for i, score in enumerate(scores)]
        gold = {(i, i + int(random.integers(2))) for i in range(9)}
        threshold, f1 = script.best_threshold(candidates, gold)
        assert f1 == pytest.approx(naive.best_f1(candidates, gold))
        taken = [(i, j) for score, i, j in candidates if score >= threshold]
        again = script.scores_of(len(gold.intersection(taken)), len(taken), len(gold))
        assert again["f1"] == pytest.approx(f1) and (threshold == scores[-1] or threshold not in scores)
    threshold, f1 = script.best_threshold([(1.5, 0, 0), (1.2, 1, 1)], {(0, 1)})
    assert f1 == 0 and 1.5 < threshold < 1.501
    assert script.best_threshold([(1.5, 0, 0), (1.2, 1, 1)], {(0, 0)}) == (1.35, 100)
    assert script.scores_of(1, 2, 4) == {"precision": 50, "recall": 25, "f1": pytest.approx(100 / 3)}
    assert script.scores_of(0, 0, 4) == {"precision": 0, "recall": 0, "f1": 0}


@pytest.mark.parametrize("family", ["marge", "cocolm", "bert"])
def test_embeddings(script, checkpoints, family):
    """Those of each sentence by itself, in any order and batch; cut to the longest that the model takes."""
    model, tokenizer = (auto.from_pretrained(checkpoints[family]) for auto in (AutoModel, AutoTokenizer))
    model.train()
    data = script.RetrievalArguments(batch_size=3)
    found = script.embed_sentences(TEXTS, model, tokenizer, [0, 2, 3], data, tqdm(disable=True))
    assert found.shape == (3, 10, 32) and found.dtype == np.float32
    encoder = (model.get_encoder() if family == "marge" else model).eval()
    for row, text in enumerate(TEXTS):
        ids = tokenizer(text, truncation=True, max_length=16 if family == "marge" else 64, return_tensors="pt")
        with torch.no_grad():
            states = encoder(ids["input_ids"], output_hidden_states=True).hidden_states
        for place, layer in enumerate((0, 2, 3)):
            mean = states[layer][0].mean(0)
            np.testing.assert_allclose(found[place, row], mean / mean.norm(), atol=2e-6)


def test_model_embed(script, checkpoints):
    model, tokenizer = (auto.from_pretrained(checkpoints["marge"]) for auto in (AutoModel, AutoTokenizer))
    data = script.RetrievalArguments(representation="embed")
    found = script.embed_sentences(TEXTS[:3], model, tokenizer, [-1], data, tqdm(disable=True))
    rows = [model.embed(tokenizer(text, return_tensors="pt")["input_ids"]).detach() for text in TEXTS[:3]]
    np.testing.assert_allclose(found[0], torch.cat(rows), atol=2e-6)


def rows_of(language, texts, translations):
    return [{"text": a, "en": b, "lang": language} for a, b in zip(texts, translations, strict=True)]


COLUMNS = {"source_column": "text", "target_column": "en", "language_column": "lang"}


@pytest.mark.parametrize("family", ["marge", "cocolm", "bert"])
def test_tatoeba(run, script, checkpoints, capsys, family):
    """Each language by itself; the layer is the best on the development language, which is left out of the mean."""
    same = rows_of("same", TEXTS, TEXTS)
    other = rows_of("other", TEXTS[:5], [text[2:] for text in TEXTS[:5]])
    shifted = rows_of("shifted", TEXTS[:4], TEXTS[1:4] + TEXTS[:1])
    rows = [row for trio in zip(same[:4], other[:4], shifted, strict=True) for row in trio] + same[4:] + other[4:]
    results = run(rows, family=family, development_languages=["other"], **COLUMNS)
    assert set(results["languages"]) == {"same", "shifted"} and set(results["development"]) == {"1", "2", "3"}
    assert results["languages"]["same"] == {
        "sentences": 10,
        **{f"{way}_{by}": 100 for way in script.WAYS for by in script.BY},
        **{"mean_cosine": 100, "mean_margin": 100},
    }
    assert results["languages"]["shifted"]["mean_cosine"] == 0 and results["mean"]["mean_cosine"] == 50
    model, tokenizer = (auto.from_pretrained(checkpoints[family]) for auto in (AutoModel, AutoTokenizer))
    data = script.RetrievalArguments()
    for layer, score in results["development"].items():
        sides = [
            script.embed_sentences(
                [row[name] for row in other], model, tokenizer, [int(layer)], data, tqdm(disable=True)
            )
            for name in ("text", "en")
        ]
        pair = [side[0] for side in sides]
        assert score == (naive.accuracy(*pair, 4, "cosine") + naive.accuracy(*pair[::-1], 4, "cosine")) / 2
    best = max(results["development"], key=results["development"].get)
    assert results["layer"] == int(best) and results["protocol"] == "tatoeba"
    printed = capsys.readouterr().out
    assert printed.startswith(f"tatoeba, layer {best} of {checkpoints[family]}, in percent\n\n| language | sentences |")
    assert "| same | 10 | 100.0 |" in printed and "| mean |  | 50.0 |" in printed


def test_one_layer_needs_no_development_data(run):
    results = run([{"source": text, "target": text} for text in TEXTS], layers=[2])
    assert results["development"] == {} and results["layer"] == 2
    assert results["languages"]["all"]["mean_margin"] == results["mean"]["mean_margin"] == 100
    results = run([{"source": text, "target": text} for text in TEXTS], representation="embed")
    assert results["layer"] is None and results["mean"]["mean_cosine"] == 100


def test_bucc(run, script, checkpoints, capsys):
    """Sentences without translation are distractors, repeated ones count once; thresholds are of the same language."""
    paired = [{"source": text, "target": text} for text in TEXTS[:4]]
    alone = [{"source": text, "target": None} for text in TEXTS[4:7]] + [{"source": "", "target": TEXTS[8]}]
    test = paired + alone + paired[:2] + [{"source": TEXTS[0], "target": TEXTS[9]}]
    results = run(test, paired + alone, protocol="bucc", layers=[1, 3])
    found = results["languages"]["all"]
    assert found.pop("sentences") == 7
    model, tokenizer = (auto.from_pretrained(checkpoints["marge"]) for auto in (AutoModel, AutoTokenizer))
    data, mined = script.RetrievalArguments(), {}
    for name, rows in (("validation", paired + alone), ("test", test)):
        sides = [sorted({row[side] for row in rows if row[side]}) for side in ("source", "target")]
        gold = {
            (sides[0].index(row["source"]), sides[1].index(row["target"]))
            for row in rows
            if row["source"] and row["target"]
        }
        for place, layer in enumerate((1, 3)):
            embedded = [
                script.embed_sentences(side, model, tokenizer, [1, 3], data, tqdm(disable=True))[place]
                for side in sides
            ]
            mined[name, layer] = naive.mine(*embedded, 4), gold
    best = {str(layer): pytest.approx(naive.best_f1(*mined["validation", layer])) for layer in (1, 3)}
    assert results["development"] == best
    candidates, gold = mined["test", results["layer"]]
    taken = {(i, j) for score, i, j in candidates if score >= found["threshold"]}
    assert found["precision"] == 100 * len(taken & gold) / len(taken) and len(gold) == 5
    assert found["recall"] == 100 * len(taken & gold) / len(gold)
    assert results["mean"] == {name: found[name] for name in ("precision", "recall", "f1")}
    assert "| language | sentences | precision | recall | f1 | threshold |" in capsys.readouterr().out


def refused(sentence, function, *arguments, **settings):
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}$"):
        function(*arguments, **settings)


def test_data_that_does_not_do(script):
    rows = Dataset.from_list([{"source": "a", "target": "b"}, {"source": "a", "target": " "}])
    tatoeba, bucc = script.RetrievalArguments(), script.RetrievalArguments(protocol="bucc")
    has = "must have a sentence and its translation, but has ['a', None]."
    refused(f"Row 1 of the test data {has}", script.read_pairs, rows, "test", tatoeba)
    assert script.read_pairs(rows, "test", bucc) == {"all": (["a", "a"], ["b", None])}
    rows = Dataset.from_list([{"source": None, "target": ""}])
    has = "must have at least one sentence, but has [None, None]."
    refused(f"Row 0 of the test data {has}", script.read_pairs, rows, "test", bucc)
    missing = "The test data has no column 'lang'. Its columns are 'source', 'target'."
    refused(missing, script.read_pairs, rows, "test", script.RetrievalArguments(language_column="lang"))
    refused("--batch_size must be at least 1, but got 0.", script.RetrievalArguments, batch_size=0)


def test_development_data_that_does_not_do(script):
    group, split = (["a"], ["b"]), script.split_development
    chosen = script.RetrievalArguments(development_languages=["de"])
    refused("--development_languages: the test data has no 'de', only fr.", split, chosen, {"test": {"fr": group}})
    everything = "All languages of the test data are --development_languages, so there is nothing to test."
    refused(everything, split, chosen, {"test": {"de": group}})
    twice = "Give development data or --development_languages, not both."
    refused(twice, split, chosen, {"test": {"de": group}, "validation": {"de": group}})
    bucc = script.RetrievalArguments(protocol="bucc")
    threshold = (
        "The threshold of 'fr' is tuned on development data of this language, but there is none. "
        "Give it as --validation_file."
    )
    refused(threshold, split, bucc, {"test": {"de": group, "fr": group}, "validation": {"de": group}})


def test_models_and_layers_that_do_not_do(script, run, checkpoints):
    rows = [{"source": text, "target": text} for text in TEXTS]
    sentence = (
        "Layers 1 to 3 can be chosen from only with development data: give --validation_file or "
        "--development_languages, or one layer as --layers."
    )
    refused(sentence, run, rows)
    refused("--layers must be between 0 and 3, the layers of the encoder, but got 4.", run, rows, layers=[4])
    sentence = "--representation embed needs a model with a method embed, but got BertModel."
    refused(sentence, run, rows, family="bert", representation="embed")
    sentence = "The data of 'all' has no sentence with its translation, so there is nothing to find."
    alone = [{"source": "a", "target": None}, {"source": None, "target": "b"}]
    refused(sentence, run, rows, alone, protocol="bucc")
