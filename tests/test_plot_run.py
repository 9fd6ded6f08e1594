"""examples/plot_run.py: what it reads, what it draws from it, and its errors."""

import json
import re
import sys

import pytest
from matplotlib.colors import to_rgba

from .scripts import import_example

RED = to_rgba("red")


@pytest.fixture
def script(monkeypatch, repository):
    return import_example(monkeypatch, repository, "plot_run")


@pytest.fixture
def run(script, monkeypatch, tmp_path):
    """Runs the script in an empty folder."""

    def run(*arguments):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["plot_run.py", *map(str, arguments)])
        script.main()

    return run


def log_of_marge(steps=(1, 10, 20, 30), **others):
    """A log with a refresh at every second entry, and a collapse at step 20."""
    log = []
    for i, step in enumerate(steps):
        log.append({"step": step, "epoch": 0.1, "loss": 8.0 - i, "evidence/collapsed": float(i >= 2)} | others)
        log[-1] |= {f"evidence/relevance_weight_{layer}": 1 + i * layer for layer in (9, 10, 11)}
        log[-1] |= {"evidence/loss_retrieved": 5.0 - i, "evidence/loss_random": 6.0, "evidence/loss_none": 7.0}
        log[-1] |= {"evidence/utility": 2.0 + i, "evidence/recall_at_1": 0.1 * i, "evidence/distinct_share": 0.5}
        if i % 2 == 0:
            log[-1] |= {"refresh/groups": 5, "refresh/relevance_std": 0.1}
    return [*log, {"step": steps[-1], "train_runtime": 3.0, "train_loss": 7.0}]


COCOLM = [
    {
        "step": 5 * i,
        "loss": 20.0 - i,
        "mlm_loss": 8.0,
        "corrective_lm_loss": 9.0,
        "copy_loss": 0.4,
        "contrastive_loss": 3.0,
    }
    for i in range(1, 4)
]


def save_state(folder, log, global_step=None):
    folder.mkdir(parents=True, exist_ok=True)
    state = {"global_step": log[-1]["step"] if global_step is None else global_step, "log_history": log}
    (folder / "trainer_state.json").write_text(json.dumps(state))
    return folder


def marks(axis):
    """Steps of dotted and of dashed vertical lines."""
    vertical = [
        line for line in axis.lines if line.get_xdata()[0] == line.get_xdata()[-1] and len(line.get_xdata()) == 2
    ]
    return tuple([line.get_xdata()[0] for line in vertical if line.get_linestyle() == style] for style in (":", "--"))


def curves(axis):
    """{label in the legend: [(step, value)]}"""
    return {
        line.get_label(): list(zip(line.get_xdata().tolist(), line.get_ydata().tolist(), strict=True))
        for line in axis.lines
        if not line.get_label().startswith("_")
    }


def test_one_run(script):
    axes = {axis.get_title(): axis for axis in script.draw_runs({"a": log_of_marge()}).axes}
    assert list(axes) == [
        "loss",
        "held-out loss by evidence",
        "utility of retrieval",
        "recall of known paraphrases",
        "evidence in use",
        "spread of similarity",
        "relevance weight of each layer",
    ]
    assert curves(axes["loss"]) == {"training": [(1, 8), (10, 7), (20, 6), (30, 5)]}
    assert list(curves(axes["held-out loss by evidence"])) == ["retrieved", "random", "none"]
    assert curves(axes["held-out loss by evidence"])["retrieved"] == [(1, 5), (10, 4), (20, 3), (30, 2)]
    assert curves(axes["spread of similarity"]) == {"shards refreshed": [(1, 0.1), (20, 0.1)]}
    for axis in axes.values():
        assert marks(axis) == ([1, 20], [20])
        assert axis.get_xlabel() == "updates"
    # All layers are drawn, the first and the last named, in the order of their numbers.
    layers = axes["relevance weight of each layer"]
    assert curves(layers) == {
        "layer 9": [(1, 1), (10, 10), (20, 19), (30, 28)],
        "layer 11": [(1, 1), (10, 12), (20, 23), (30, 34)],
    }
    assert [line.get_ydata()[-1] for line in layers.lines[:3]] == [28, 31, 34]
    assert len({line.get_color() for line in layers.lines[:3]}) == 3


def test_several_runs_have_a_color_each(script):
    healthy = [entry | {"evidence/collapsed": 0.0} for entry in log_of_marge((5, 15))]
    axes = {axis.get_title(): axis for axis in script.draw_runs({"a": log_of_marge(), "b": healthy}).axes}
    held_out = axes["held-out loss by evidence"]
    assert list(curves(held_out)) == [f"{run}: {kind}" for run in "ab" for kind in ("retrieved", "random", "none")]
    drawn = {line.get_label(): line for line in held_out.lines}
    assert drawn["a: random"].get_color() == drawn["a: none"].get_color() != drawn["b: none"].get_color()
    assert drawn["a: random"].get_linestyle() == drawn["b: random"].get_linestyle() != drawn["a: none"].get_linestyle()
    assert marks(held_out) == ([1, 20, 5], [20])
    (collapse,) = (line for line in held_out.lines if line.get_linewidth() == 2)
    assert to_rgba(collapse.get_color()) == to_rgba(drawn["a: none"].get_color()) != RED


def test_only_what_was_logged_is_drawn(script):
    axes = {axis.get_title(): axis for axis in script.draw_runs({"c": COCOLM}).axes}
    assert list(axes) == ["loss", "language models", "detection and contrast"]
    assert list(curves(axes["language models"])) == ["auxiliary MLM", "corrective LM"]
    assert marks(axes["loss"]) == ([], [])
    # A run of each family: each is drawn where it has values.
    axes = {axis.get_title(): axis for axis in script.draw_runs({"c": COCOLM, "m": log_of_marge()}).axes}
    assert list(curves(axes["loss"])) == ["c: training", "m: training"]
    assert list(curves(axes["utility of retrieval"])) == ["m: none - retrieved"]
    assert marks(axes["loss"]) == ([1, 20], [20]) and marks(axes["language models"]) == ([], [])
    # Infinite and missing values leave gaps.
    script.draw_runs(
        {"x": [{"step": 1, "loss": float("nan")}, {"step": 2, "loss": float("inf")}, {"step": 3, "loss": 1.0}]}
    )


def test_a_collapse_is_marked_where_it_begins(script):
    flags = [0.0, 1.0, 1.0, 0.0, 1.0]
    assert script.collapses([{"step": i, "evidence/collapsed": flag} for i, flag in enumerate(flags, 1)]) == [2, 5]
    assert script.collapses([{"step": 1, "evidence/collapsed": 1.0}]) == [1]
    assert script.collapses(COCOLM) == []


def test_the_log_that_has_come_furthest_is_read(script, tmp_path):
    save_state(tmp_path / "checkpoint-900", log_of_marge((1, 900)))
    # By number, not by name.
    save_state(tmp_path / "checkpoint-1000", log_of_marge((1, 1000)))
    assert script.read_log(tmp_path)[-1]["step"] == 1000
    # Of a finished run that went on afterwards, and of one that is done.
    save_state(tmp_path, log_of_marge((1, 800)))
    assert script.read_log(tmp_path)[-1]["step"] == 1000
    save_state(tmp_path, [*log_of_marge((1, 1000)), {"step": 1000, "eval_loss": 1.0}])
    assert script.read_log(tmp_path)[-1] == {"step": 1000, "eval_loss": 1.0}
    # A checkpoint is a run, too, and one that is being written is no obstacle.
    assert script.read_log(tmp_path / "checkpoint-900")[-1]["step"] == 900
    save_state(tmp_path / "checkpoint-2000", log_of_marge((1, 2000)))
    whole = (tmp_path / "checkpoint-2000" / "trainer_state.json").read_text()
    (tmp_path / "checkpoint-2000" / "trainer_state.json").write_text(whole[:-9])
    (tmp_path / "checkpoint-3000").mkdir()
    assert script.read_log(tmp_path)[-1]["step"] == 1000


def test_the_log_of_a_loop_of_ones_own(script, tmp_path):
    lines = [{"step": 5, "loss": 3.0}, {"step": 10, "loss": 2.5}, {"step": 10, "loss": 2.0}, {"step": 15, "loss": 1.0}]
    text = "\n".join(map(json.dumps, lines))
    # The run was killed, took its last steps again, and is writing.
    (tmp_path / "log.jsonl").write_text(f'{text}\n{{"step": 20, "lo')
    assert script.points(script.read_log(tmp_path), "loss") == [(5, 3.0), (10, 2.0), (15, 1.0)]


def test_the_command_writes_a_picture(run, tmp_path, capsys):
    save_state(tmp_path / "a", log_of_marge())
    save_state(tmp_path / "b" / "checkpoint-15", COCOLM)
    run("a")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert capsys.readouterr().out == "a: 30 updates; retrieval collapsed at 20\nSaved: curves.png\n"
    run("a", tmp_path / "b", "--output", "new/folder/both.svg")
    picture = (tmp_path / "new/folder/both.svg").read_text()
    assert "<svg" in picture and "a: training" in picture
    assert "\nb: 15 updates\n" in capsys.readouterr().out
    # Names that are not unique are whole.
    save_state(tmp_path / "c" / "checkpoint-15", COCOLM)
    run("b/checkpoint-15", "c/checkpoint-15")
    assert "b/checkpoint-15: 15 updates\nc/checkpoint-15: 15 updates\n" in capsys.readouterr().out


def test_help_teaches(run, capsys):
    with pytest.raises(SystemExit):
        run("--help")
    printed = capsys.readouterr().out
    for part in (
        "runs/marge --output curves.png",
        "LogEvidenceCallback",
        "should rise above 0",
        "Dotted vertical lines",
    ):
        assert part in printed


def test_nothing_is_imported_before_it_is_needed(run_python, repository):
    code = "import sys; sys.path.insert(0, sys.argv[1]); import plot_run; print('matplotlib' in sys.modules)"
    assert run_python(code, repository / "examples") == "False\n"


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (None, "There is no folder run: give the --output_dir of a run."),
        (
            {},
            "run has neither a trainer_state.json, in itself or in a checkpoint, nor a log.jsonl. A run has one once "
            "it has saved a checkpoint; without checkpoints, call trainer.save_state() after trainer.train().",
        ),
        (
            {"trainer_state.json": "{"},
            "Every trainer_state.json of run is damaged, or none of Trainer: there is none to read.",
        ),
        (
            {"trainer_state.json": "[]"},
            "Every trainer_state.json of run is damaged, or none of Trainer: there is none to read.",
        ),
        (
            {"trainer_state.json": '{"global_step": 3, "log_history": [{"step": 3, "train_runtime": 1.0}]}'},
            "run has logged none of the values that are drawn, only step, train_runtime. Losses are logged every "
            "--logging_steps updates; a run that is shorter has none.",
        ),
        (
            {"log.jsonl": ""},
            "run has logged none of the values that are drawn, only nothing. Losses are logged every --logging_steps "
            "updates; a run that is shorter has none.",
        ),
    ],
)
def test_errors(run, tmp_path, capsys, files, message):
    if files is not None:
        (tmp_path / "run").mkdir()
        for name, text in files.items():
            (tmp_path / "run" / name).write_text(text)
    save_state(tmp_path / "other", COCOLM)
    with pytest.raises(SystemExit):
        run("other", "run")
    assert re.search(rf"^plot_run.py: error: {re.escape(message)}$", capsys.readouterr().err, re.MULTILINE)
    assert not (tmp_path / "curves.png").exists()


def test_other_formats_are_refused(run, capsys):
    with pytest.raises(SystemExit):
        run("run", "--output=curves.xyz")
    message = "plot_run.py: error: --output must end in .png, .svg or .pdf, but got curves.xyz."
    assert message in capsys.readouterr().err
