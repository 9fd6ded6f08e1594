"""examples/benchmarks/bench_finetuning.py with a tiny model: the table, and which results it uses again."""

import importlib
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

    def bench(checkpoint):
        """The commands that were run, and the last row of the table."""
        command = ["bench_finetuning.py", f"--checkpoint={checkpoint}", f"--data={tmp_path / 'data'}", "--seeds=0"]
        command += ["--tasks=sent_polarity", f"--output={tmp_path / 'out'}", "--device=--use_cpu --max_steps=1"]
        monkeypatch.setattr(sys, "argv", command)
        script.main()
        *commands, _, _, row = capsys.readouterr().out.splitlines()
        return commands, row

    commands, row = bench(one)
    scores = [
        f"{100 * read_json(tmp_path / 'out' / f'{kind}-sent_polarity-0' / 'all_results.json')['predict_accuracy']:.1f}"
        for kind in ("random", "pretrained")
    ]
    assert row == f"| sent_polarity | accuracy | {scores[0]} ± 0.0 | {scores[1]} ± 0.0 |"
    assert ["--random_weights" in command for command in commands] == [False, True]
    assert bench(one) == ([], row)

    def broken_run(command, check):
        raise KeyboardInterrupt

    def quick_run(command, check):
        folder = Path(command[command.index("--output_dir") + 1])
        (folder / "all_results.json").write_text('{"predict_accuracy": 0.125}')

    monkeypatch.setattr(script.subprocess, "run", broken_run)
    for checkpoint in (two, two, one):
        with pytest.raises(KeyboardInterrupt):
            bench(checkpoint)
    monkeypatch.setattr(script.subprocess, "run", quick_run)
    # Not used after a run that broke off; used again; not used for new weights.
    capsys.readouterr()
    for checkpoint, number in ((two, 2), (two, 0)):
        commands, row = bench(checkpoint)
        assert len(commands) == number and row == "| sent_polarity | accuracy | 12.5 ± 0.0 | 12.5 ± 0.0 |"
    make_checkpoint(two, ["other words"])
    assert len(bench(two)[0]) == 2
