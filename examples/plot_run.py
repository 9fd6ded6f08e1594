"""Draws what a training run has logged, or several runs in the same diagrams for comparison.

    python examples/plot_run.py runs/marge --output curves.png
    python examples/plot_run.py runs/marge runs/marge-fast runs/marge-slow --output comparison.svg
    python examples/plot_run.py runs/cocolm-small

A run is the --output_dir of a script: of any that trains with `Trainer`, whose values are in `trainer_state.json` (of
the newest checkpoint or of the folder, whichever has come further, so that a run can be watched while it trains), or of
one with a training loop of its own, which writes `log.jsonl`. A checkpoint is a run that ends there.

Drawn is what has been logged, over the number of updates:
  losses            in training and evaluation; of COCO-LM also each part (LogComponentLossesCallback)
  evidence          on held-out groups, the loss with retrieved, random and no evidence; the utility of retrieval is the
                    loss without evidence less that with it: it should rise above 0
  recall            share of the documents whose nearest other document is a known paraphrase
  evidence in use   how varied and how multilingual the evidence of the current groups is
  spread            of f, the cosine of two documents; without it retrieval tells nothing apart
  relevance weight  how much f counts in each layer of the decoder: "beta" in the paper
Most of these come from LogEvidenceCallback and RefreshIndexCallback. Dotted vertical lines are refreshes of the
evidence; a thick dashed one is where retrieval was found to have collapsed.

One run has a color for each value; several runs have a color each, and a line style for each value.
"""

import argparse
import json
from itertools import pairwise
from pathlib import Path

LAYER = "evidence/relevance_weight_"
# Title, unit, and of each value its name in the logs and in the legend.
PANELS = [
    ("loss", "nats", {"loss": "training", "eval_loss": "evaluation"}),
    (
        "held-out loss by evidence",
        "nats a token",
        {f"evidence/loss_{kind}": kind for kind in ("retrieved", "random", "none")},
    ),
    ("utility of retrieval", "nats a token", {"evidence/utility": "none - retrieved"}),
    (
        "recall of known paraphrases",
        "recall@1",
        {"evidence/recall_at_1": "any language", "evidence/cross_language_recall_at_1": "other languages"},
    ),
    (
        "evidence in use",
        "share",
        {
            "evidence/distinct_share": "distinct documents",
            "evidence/largest_share": "of the 1% most used",
            "evidence/evenness": "evenness",
            "evidence/cross_language_share": "other language",
            "evidence/target_share": "documents that are targets",
        },
    ),
    (
        "spread of similarity",
        "standard deviation of f",
        {"evidence/relevance_std": "sample", "refresh/relevance_std": "shards refreshed"},
    ),
    ("relevance weight of each layer", "beta", {}),
    ("distillation", "nats", {"distillation_loss": "distillation"}),
    ("language models", "nats", {"mlm_loss": "auxiliary MLM", "corrective_lm_loss": "corrective LM"}),
    ("detection and contrast", "nats", {"copy_loss": "copy", "contrastive_loss": "contrastive"}),
]
STYLES = ("-", "--", ":", "-.", (0, (5, 1, 1, 1, 1, 1)))


def read_log(folder: Path) -> list[dict]:
    """What a run has logged: dictionaries of values, each with its "step".

    Raises:
        FileNotFoundError: the folder is not there, or has no log.
        ValueError: none of its logs can be read.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no folder {folder}: give the --output_dir of a run.")
    checkpoints = folder.glob("checkpoint-*/trainer_state.json")
    # Longer numbers are larger.
    files = sorted(checkpoints, key=lambda file: (len(file.parent.name), file.parent.name), reverse=True)
    states = (state for file in files if (state := read_state(file)))
    # While a run writes a checkpoint, it is not whole; then there may be an older one.
    found = [state for state in (read_state(folder / "trainer_state.json"), next(states, None)) if state]
    if found:
        return max(found, key=lambda state: state["global_step"])["log_history"]
    if files or (folder / "trainer_state.json").exists():
        raise ValueError(f"Every trainer_state.json of {folder} is damaged, or none of Trainer: there is none to read.")
    file = folder / "log.jsonl"
    if not file.is_file():
        raise FileNotFoundError(
            f"{folder} has neither a trainer_state.json, in itself or in a checkpoint, nor a log.jsonl. A run has one "
            "once it has saved a checkpoint; without checkpoints, call trainer.save_state() after trainer.train()."
        )
    lines = file.read_text(encoding="utf-8").splitlines()
    # The last line may be half written.
    return [json.loads(line) for line in lines if line.endswith("}")]


def read_state(file: Path) -> dict | None:
    """The state of a Trainer; None if it is not there, or not whole."""
    try:
        state = json.loads(file.read_text(encoding="utf-8"))
        return state if {"global_step", "log_history"} <= state.keys() else None
    except (OSError, ValueError, AttributeError):
        return None


def points(log: list[dict], name: str) -> list[tuple[int, float]]:
    """(step, value) of one name, in order; of a step that was taken again, after a run was resumed, the last."""
    return sorted({entry["step"]: entry[name] for entry in log if isinstance(entry.get(name), int | float)}.items())


def collapses(log: list[dict]) -> list[int]:
    """The steps at which retrieval was found to have collapsed, having been sound before."""
    flags = [(0, 0.0), *points(log, "evidence/collapsed")]
    return [step for (_, before), (step, now) in pairwise(flags) if now and not before]


def find_panels(runs: dict[str, list[dict]]) -> list[tuple[str, str, dict[str, str]]]:
    """The panels that have something to show, each with the names that some run has logged."""
    logged = {name for log in runs.values() for entry in log for name in entry}
    layers = sorted(int(name.removeprefix(LAYER)) for name in logged if name.startswith(LAYER))
    panels = []
    for title, unit, names in PANELS:
        names = names or {f"{LAYER}{layer}": f"layer {layer}" for layer in layers}
        found = {name: label for name, label in names.items() if any(points(log, name) for log in runs.values())}
        if found:
            panels.append((title, unit, found))
    return panels


def draw_runs(runs: dict[str, list[dict]]):
    """A `matplotlib.figure.Figure` of the logs of runs, by their names; its `savefig` needs no display."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    panels = find_panels(runs)
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(4.8 * columns, 3.4 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for axis, (title, unit, names) in zip(axes, panels, strict=False):
        for number, (run, log) in enumerate(runs.items()):
            if not any(points(log, name) for name in names):
                continue
            run_color = f"C{number % 10}"
            for order, (name, label) in enumerate(names.items()):
                values = points(log, name)
                if not values:
                    continue
                # Layers are an order, so their colors are one, too; the first and the last are named.
                is_layer = name.startswith(LAYER)
                color = colormaps["viridis"](order / len(names)) if is_layer else f"C{order}"
                is_named = not is_layer or order in (0, len(names) - 1)
                axis.plot(
                    *zip(*values, strict=True),
                    color=color if len(runs) == 1 else run_color,
                    linestyle="-" if len(runs) == 1 else STYLES[order % len(STYLES)],
                    # A single point makes no line.
                    marker="." if len(values) < 30 else None,
                    label=(label if len(runs) == 1 else f"{run}: {label}") if is_named else None,
                )
            for step, _ in points(log, "refresh/groups"):
                axis.axvline(step, color="grey" if len(runs) == 1 else run_color, linewidth=0.7, linestyle=":")
            for step in collapses(log):
                axis.axvline(step, color="red" if len(runs) == 1 else run_color, linewidth=2, linestyle="--")
        axis.set(title=title, xlabel="updates", ylabel=unit)
        axis.legend(fontsize="small" if len(runs) == 1 else "x-small")
    for axis in axes[len(panels) :]:
        axis.remove()
    return figure


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="output folders of runs")
    parser.add_argument("--output", type=Path, default=Path("curves.png"), help="the drawing: .png, .svg or .pdf")
    args = parser.parse_args()
    if args.output.suffix not in (".png", ".svg", ".pdf"):
        parser.error(f"--output must end in .png, .svg or .pdf, but got {args.output}.")
    logs = {}
    has_short_names = len({folder.name for folder in args.runs} - {""}) == len(args.runs)
    for folder in args.runs:
        try:
            log = logs[folder.name if has_short_names else str(folder)] = read_log(folder)
        except (FileNotFoundError, ValueError) as error:
            parser.error(str(error))
        if not find_panels({"": log}):
            names = sorted({name for entry in log for name in entry}) or ["nothing"]
            parser.error(
                f"{folder} has logged none of the values that are drawn, only {', '.join(names)}. Losses are logged "
                "every --logging_steps updates; a run that is shorter has none."
            )
    args.output.parent.mkdir(parents=True, exist_ok=True)
    draw_runs(logs).savefig(args.output, dpi=120)
    for name, log in logs.items():
        steps = ", ".join(map(str, collapses(log)))
        collapsed = f"; retrieval collapsed at {steps}" if steps else ""
        print(f"{name}: {max(entry['step'] for entry in log)} updates{collapsed}")
    print(f"Saved: {args.output}")


if __name__ == "__main__":
    main()
