"""examples/benchmarks/bench_finetuning.py with a tiny model: the table, and which results it uses again."""

import importlib
import json
import sys
from pathlib import Path

import pytest

from .scripts import make_checkpoint, read_json, write_rows

ROWS = [{"text": text, "label": i % 2} for i, text in enumerate(("a fine day", "a grim day", "lovely food", "awful"))]


def test_results_are_those_of_the_command(monkeypatch, repository, tmp_path, capsys):
    """They are used again for the same checkpoint only, not for another one or other weights in its folder."""
    monkeypatch.syspath_prepend(repository / "examples" / "benchmarks")
    script = importlib.import_module("bench_finetuning")
    monkeypatch.setenv("PYTHONPATH", str(repository))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    (tmp_path / "data" / "sent_polarity").mkdir(parents=True)
    for split in ("train", "validation", "test"):
        write_rows(tmp_path / "data" / "sent_polarity" / f"{split}.parquet", ROWS)
    one, two = (make_checkpoint(tmp_path / name, [row["text"] for row in ROWS]) for name in ("one", "two"))

    def bench(checkpoint, *rates, seeds=("0",)):
        """The commands that were run, and the last row of the table."""
        command = [
            "bench_finetuning.py",
            f"--checkpoint={checkpoint}",
            f"--data={tmp_path / 'data'}",
            "--seeds",
            *seeds,
        ]
        command += ["--tasks=sent_polarity", f"--output={tmp_path / 'out'}", "--device=--use_cpu --max_steps=1"]
        command += ["--learning_rates", *rates]
        monkeypatch.setattr(sys, "argv", command)
        script.main()
        *commands, _, _, row = capsys.readouterr().out.splitlines()
        return commands, row

    commands, row = bench(one, "1e-3")
    folders = [tmp_path / "out" / f"{kind}-sent_polarity-1e-3-0" for kind in ("random", "pretrained")]
    scores = [f"{100 * read_json(folder / 'all_results.json')['predict_accuracy']:.1f}" for folder in folders]
    assert row == f"| sent_polarity | accuracy | {scores[0]} ± 0.0 | {scores[1]} ± 0.0 | 1e-3, 1e-3 |"
    assert ["--random_weights" in command for command in commands] == [False, True]
    assert bench(one, "1e-3") == ([], row)

    def broken_run(command, check):
        raise KeyboardInterrupt

    def quick_run(command, check):
        folder = Path(command[command.index("--output_dir") + 1])
        (folder / "all_results.json").write_text('{"eval_accuracy": 0.5, "predict_accuracy": 0.125}')

    monkeypatch.setattr(script.subprocess, "run", broken_run)
    for checkpoint in (two, two, one):
        with pytest.raises(KeyboardInterrupt):
            bench(checkpoint, "1e-3")
    monkeypatch.setattr(script.subprocess, "run", quick_run)
    # Not used after a run that broke off; used again; not used for new weights.
    capsys.readouterr()
    for checkpoint, number in ((two, 2), (two, 0)):
        commands, row = bench(checkpoint, "1e-3")
        assert len(commands) == number and row == "| sent_polarity | accuracy | 12.5 ± 0.0 | 12.5 ± 0.0 | 1e-3, 1e-3 |"
    make_checkpoint(two, ["other words"])
    assert len(bench(two, "1e-3")[0]) == 2

    # The validation data choose the rate of each, by the mean over the seeds; the test data say how good it is.
    def run_of_a_rate(command, check):
        value = {name: command[command.index(f"--{name}") + 1] for name in ("output_dir", "learning_rate", "seed")}
        is_best = value["learning_rate"] == ("1e-4" if "--random_weights" in command else "2e-3")
        scores = {"eval_accuracy": 0.6 if is_best else 0.5, "predict_accuracy": (0.2, 0.3)[int(value["seed"])]}
        if not is_best:
            scores["predict_accuracy"] = 0.9
        # The largest rate looks best with the first seed only.
        if value["learning_rate"] == "1e-2" and value["seed"] == "0":
            scores["eval_accuracy"] = 0.65
        (Path(value["output_dir"]) / "all_results.json").write_text(json.dumps(scores))

    monkeypatch.setattr(script.subprocess, "run", run_of_a_rate)
    commands, row = bench(two, "1e-4", "2e-3", "1e-2", seeds=("0", "1"))
    assert row == "| sent_polarity | accuracy | 25.0 ± 7.1 | 25.0 ± 7.1 | 1e-4, 2e-3 |" and len(commands) == 12
