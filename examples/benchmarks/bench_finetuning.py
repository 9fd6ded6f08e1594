"""What is pre-training worth? Fine-tunes a checkpoint, and its architecture with random weights, on six tasks.

    python examples/benchmarks/bench_finetuning.py --checkpoint runs/cocolm-small --data data --seeds 0 1 2

`--data` holds a folder for each task with train.parquet, validation.parquet and test.parquet. Every run is one command
of run_classification.py or run_qa.py, with the same settings for both; it is printed first, and left out if results of
the same command and the same weights are there already. Of the same few learning rates, each of the two gets that whose
mean over the seeds is best for it on the validation data of a task. The table at the end is of the test data: mean and
standard deviation over the seeds.

Random weights are those that the configuration draws, as in a model that nobody trained. A checkpoint that began with
--attend_to_neighbors has besides its training the preference for near tokens, which random weights here have not.
"""

import argparse
import hashlib
import json
import shlex
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

# Script and arguments of each task, and its metric. Of SQuAD 2.0 it is the F1 with the best threshold for no answer, as
# the official evaluation has it.
PAIR = "run_classification.py --num_train_epochs {} --text_column {} --text_pair_column {}"
QA = "run_qa.py --max_length 128 --doc_stride 32 --num_train_epochs 2"
TASKS = {
    "sent_polarity": ("run_classification.py --num_train_epochs 3 --text_column text", "accuracy"),
    "mrpc": (PAIR.format(5, "sentence1", "sentence2"), "accuracy"),
    "snli_small": (PAIR.format(3, "sentence1", "sentence2"), "accuracy"),
    "qnli_from_squad": (PAIR.format(3, "question", "sentence") + " --max_length 128", "accuracy"),
    "squad": (QA, "f1"),
    "squad2": (QA + " --version_2_with_negative", "best_f1"),
}
# Our choice for small networks: with dropout, whatever pre-training had.
SETTINGS = "--max_grad_norm 1.0 --train_sampling_strategy group_by_length"
SETTINGS += " --config_overrides hidden_dropout_prob=0.1,attention_probs_dropout_prob=0.1"
SETTINGS += " --do_train --do_eval --do_predict --save_strategy no --report_to none --logging_steps 200"
# On a CPU, plain attention is the fastest for short texts.
ON_CPU = "--use_cpu --attn_implementation eager"


class Run(NamedTuple):
    """One fine-tuning."""

    task: str
    is_random: bool
    rate: str
    seed: int


def command(args, run: Run, output: Path) -> list[str]:
    script, *arguments = TASKS[run.task][0].split()
    arguments += [*SETTINGS.split(), *args.device.split(), "--learning_rate", run.rate, "--seed", str(run.seed)]
    arguments += ["--output_dir", str(output), "--model_name_or_path", str(args.checkpoint)]
    arguments += ["--random_weights"] if run.is_random else []
    for split in ("train", "validation", "test"):
        arguments += [f"--{split}_file", str(args.data / run.task / f"{split}.parquet")]
    return [sys.executable, str(Path(__file__).parent.parent / script), *arguments]


def measure(args, run: Run) -> tuple[float, float]:
    """The scores of one run on the validation and test data, in percent. It is left out if its results are there."""
    output = args.output / f"{'random' if run.is_random else 'pretrained'}-{run.task}-{run.rate}-{run.seed}"
    words, results, note = command(args, run, output), output / "all_results.json", output / "run.txt"
    # Another model may have come to the same folder.
    names = ("config.json", "tokenizer.json") + (() if run.is_random else ("model.safetensors",))
    digests = [hashlib.sha256((args.checkpoint / name).read_bytes()).hexdigest() for name in names]
    text, metric = "\n".join([shlex.join(words), *digests]), TASKS[run.task][1]
    is_done = results.exists() and note.exists() and note.read_text() == text
    if not is_done or f"predict_{metric}" not in json.loads(results.read_text()):
        print(shlex.join(words), flush=True)
        output.mkdir(parents=True, exist_ok=True)
        results.unlink(missing_ok=True)
        note.write_text(text)
        subprocess.run(words, check=True)
    # Accuracies are shares, F1 of answers is in percent.
    scale, scores = 1 if metric.endswith("f1") else 100, json.loads(results.read_text())
    return scores[f"eval_{metric}"] * scale, scores[f"predict_{metric}"] * scale


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True, help="folder of a pre-trained model")
    parser.add_argument("--data", type=Path, required=True, help="folder with a folder for each task")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=TASKS, help="only these")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="a run for each")
    parser.add_argument("--learning_rates", nargs="+", default=["3e-4", "1e-3"], help="to choose from")
    parser.add_argument("--processes", type=int, default=1, help="runs at once; set OMP_NUM_THREADS to their cores")
    parser.add_argument("--device", default=ON_CPU, help=f"arguments for the device, by default '{ON_CPU}'")
    parser.add_argument("--output", type=Path, default=Path("runs/finetuned"), help="folder of the runs")
    args = parser.parse_args()

    arms = [(task, is_random) for task in args.tasks for is_random in (False, True)]
    runs = [Run(*arm, rate, seed) for arm in arms for rate in args.learning_rates for seed in args.seeds]
    with ThreadPoolExecutor(args.processes) as pool:
        scores = dict(zip(runs, pool.map(lambda run: measure(args, run), runs), strict=True))

    def validation_score(arm: tuple[str, bool], rate: str) -> float:
        return statistics.mean(scores[Run(*arm, rate, seed)][0] for seed in args.seeds)

    best = {arm: max(args.learning_rates, key=lambda rate: validation_score(arm, rate)) for arm in arms}
    print("| task | metric | random weights | pre-trained | learning rates |\n|---|---|---|---|---|")
    for task in args.tasks:
        cells = []
        for is_random in (True, False):
            values = [scores[Run(task, is_random, best[task, is_random], seed)][1] for seed in args.seeds]
            cells.append(f"{statistics.mean(values):.1f} ± {statistics.stdev(values) if len(values) > 1 else 0:.1f}")
        cells.append(f"{best[task, True]}, {best[task, False]}")
        print(f"| {task} | {TASKS[task][1]} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
