"""examples/benchmarks/bench_training.py and bench_embedding.py, ours and the floor alone, with tiny models."""

import argparse
import importlib
import json
import re
import sys

import datasets
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from hf_paraphrase_lm import CocoLMForPretraining, MargeForConditionalGeneration
from hf_paraphrase_lm.models.cocolm import modeling_cocolm

from .scripts import read_json, write_rows

TIDE = "the tide comes in twice a day and the boats that lie on the sand float again while gulls look for fish"
WORDS = TIDE.split()
TEXTS = [" ".join(WORDS[i % 7 :: i % 3 + 1] * (i % 4 + 1)) for i in range(40)]
SIZES = ["--hidden_size=64", "--vocab_size=300", "--rounds=1", "--max_length=32", "--dtypes", "fp32", "bf16"]


@pytest.fixture
def load(monkeypatch, repository, tmp_path):
    """Imports a benchmark whose main() gets arguments; peaks are of small matrices."""
    monkeypatch.syspath_prepend(repository / "examples" / "benchmarks")
    monkeypatch.setenv("PYTHONPATH", str(repository))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setitem(importlib.import_module("measuring").PEAK_SIZE, "cpu", 64)
    data = write_rows(tmp_path / "documents.parquet", [{"text": text} for text in TEXTS])

    def load(name):
        script = importlib.import_module(name)

        def run(*arguments):
            command = [f"{name}.py", f"--data={data}", f"--output={tmp_path / 'out'}", *SIZES, *arguments]
            monkeypatch.setattr(sys, "argv", command)
            script.main()
            return read_json(tmp_path / "out" / "results.json")

        return script, run

    yield load
    datasets.enable_progress_bars()


@pytest.fixture
def one_process(monkeypatch, load):
    """Rounds in this process instead of children: function of a benchmark."""

    def replace(script):
        class Child:
            def __init__(self, path, case):
                assert path == script.__file__
                case = argparse.Namespace(**json.loads(json.dumps(case, default=str)))
                self.facts, self.work = script.prepare(case, lambda: None)

            def round(self):
                self.work()
                return {"seconds": 0.5, "peak_mb": 1.0}

            def end(self):
                pass

        monkeypatch.setattr(importlib.import_module("measuring"), "Child", Child)

    return replace


def check_rates(row, peaks):
    seconds = row["median_seconds"]
    assert row["tokens_per_second"] == row["tokens"] / seconds
    assert row["flops_per_second"] == row["flops"] / seconds
    assert row["share_of_peak"] == row["flops_per_second"] / peaks[row["dtype"]] > 0


def test_sides_take_turns_in_processes_of_their_own(load, capsys):
    _, run = load("bench_training")
    results = run("--models=cocolm", "--sides", "ours", "electra", "--dtypes=fp32", "--rounds=3", "--batches=1",
                  "--main_layers=1", "--text_length=32", "--text_batch_size=4")  # fmt: skip
    ours, floor = results["rows"]
    assert [ours["side"], floor["side"]] == ["ours", "electra"]
    assert ours["tokens"] == floor["tokens"] and ours["flops"] > floor["flops"]
    for row in results["rows"]:
        assert len(row["seconds"]) == 3 and row["median_seconds"] == sorted(row["seconds"])[1] > 0
        assert row["peak_mb"] > 0 and row["is_best"] and row["parameters"] > 64 * 261
        check_rates(row, results["peak_flops_per_second"])
    assert results["settings"]["hidden_size"] == 64 and results["machine"]["torch"]
    *table, _, peaks = capsys.readouterr().out.splitlines()
    assert [len(row.split("|")) for row in table] == [len(table[0].split("|"))] * 4
    assert peaks.startswith("Matrix products: ") and peaks.endswith("GFLOP/s in fp32")


def test_marge_with_shared_and_with_own_evidence(load, one_process):
    script, run = load("bench_training")
    one_process(script)
    results = run("--models=marge", "--sides", "ours", "ours-own-evidence", "--num_targets=3",
                  "--num_evidence=2", "--batches=2")  # fmt: skip
    rows = {(row["side"], row["dtype"]): row for row in results["rows"]}
    shared, own = rows["ours", "fp32"], rows["ours-own-evidence", "fp32"]
    assert len(rows) == 4 and shared["parameters"] == own["parameters"]
    # The same targets; three times as much evidence, that of the first target included.
    assert shared["target_tokens"] == own["target_tokens"]
    assert shared["tokens"] < own["tokens"] and shared["flops"] < own["flops"]
    for row in results["rows"]:
        check_rates(row, results["peak_flops_per_second"])


def test_growth(load, one_process, monkeypatch):
    script, run = load("bench_training")
    one_process(script)
    grown = {"num_evidence": [1, 2], "max_length": [16, 32], "batch_size": [1, 2]}
    monkeypatch.setattr(script, "GROWTH", grown)
    rows = run("--growth", "--num_targets=2", "--num_evidence=2", "--batches=1")["rows"]
    assert [row["size"] for row in rows] == [name for name in (*grown, "refresh") for _ in grown.get(name, "abc")]
    refresh = rows[6:]
    assert refresh[2]["documents"] >= 40 and refresh[0]["documents"] == refresh[2]["documents"] // 4
    for name, unit in (*((name, "tokens") for name in grown), ("refresh", "documents")):
        first, *others = (row for row in rows if row["size"] == name)
        assert first["over_proportional"] == 1
        for row in others:
            # All rounds take half a second here.
            assert row[unit] > first[unit] and row["over_proportional"] == pytest.approx(first[unit] / row[unit])
            if unit == "tokens":
                assert row["flops"] > first["flops"]
                assert row["over_flops"] == pytest.approx(first["flops"] / row["flops"])


def test_embedding(load, one_process, capsys):
    script, run = load("bench_embedding")
    one_process(script)
    results = run("--sides=ours", "--batch_sizes", "4", "8", "--documents=20")
    assert [(row["batch_size"], row["dtype"]) for row in results["rows"]] == [
        (size, dtype) for size in (4, 8) for dtype in ("fp32", "bf16")
    ]
    for row in results["rows"]:
        assert row["documents"] >= 20 and row["documents_per_second"] == row["documents"] / row["median_seconds"]
        check_rates(row, results["peak_flops_per_second"])
    assert len(capsys.readouterr().out.splitlines()) == 6


def test_flops_are_those_that_torch_counts(load, monkeypatch):
    script, _ = load("bench_training")
    flops = importlib.import_module("flops")
    case = argparse.Namespace(hidden_size=128, encoder_layers=3, decoder_layers=6, retrieval_layers=2, max_length=20)
    case.main_layers, case.auxiliary_layers, case.text_length = 2, 1, 20
    tokenizer = script.measuring.train_tokenizer(TEXTS, 300, model_max_length=32, progress=False)
    ids = list(range(5, 25))
    config = script.marge_config(case, tokenizer)
    model = MargeForConditionalGeneration(config)
    # It counts no fused attention on a CPU.
    model.set_attn_implementation("eager")
    batch = script.DataCollatorForParaphrasing(tokenizer)([{"labels": [ids] * 2, "input_ids": [ids] * 3}])
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(**batch)
    # Targets share the pass of the evidence, where the last layer is computed for all their tokens.
    whole = config.retrieval_layers * flops.layer(20, config.hidden_size, config.encoder_intermediate_size)
    needed = flops.marge(config, [20] * 2, [20] * 3)
    # Causal attention is computed as a whole here.
    done = needed + 2 * (whole - flops.embedding(config, 20))
    assert done == pytest.approx(counter.get_total_flops(), rel=0.03)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.embed(batch["labels"])
    assert 2 * flops.embedding(config, 20) == pytest.approx(counter.get_total_flops(), rel=1e-6)

    config = script.cocolm_config(case, tokenizer)
    batch = script.DataCollatorForCorrectiveLM(tokenizer)([{"input_ids": ids}] * 4)
    model = CocoLMForPretraining(config)
    model.set_attn_implementation("eager")
    # Rows that only fill up are not counted.
    monkeypatch.setattr(modeling_cocolm, "filling", lambda rows: 0)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(**batch)
    assert 4 * flops.cocolm(config, 20) == pytest.approx(counter.get_total_flops(), rel=0.03)


@pytest.mark.parametrize("name", ["bench_training", "bench_embedding"])
def test_packages_that_are_missing_are_named_first(load, monkeypatch, name):
    _, run = load(name)
    monkeypatch.setitem(sys.modules, "marge_pytorch", None)
    message = (
        "The package marge-pytorch, which ours is compared with, is not installed. Install it (pip install "
        "'hf-paraphrase-lm[bench]' && pip install --no-deps marge-pytorch==0.2.9), or leave this side out with --sides "
        "where there is that option."
    )
    with pytest.raises(ModuleNotFoundError, match=f"^{re.escape(message)}$"):
        run("--sides=marge-pytorch")


def test_sides_of_other_sizes_are_refused(load):
    script, _ = load("bench_training")
    script.measuring.check_parameters({"ours": 1000, "marge-pytorch": 1030})
    message = (
        "All sides must have the same number of parameters, within 3%, but have: ours 1,000, marge-pytorch 1,031. "
        "Choose other sizes; with many layers of little width the small parts count more."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        script.measuring.check_parameters({"ours": 1000, "marge-pytorch": 1031})
