"""What the benchmarks of training and embedding share: processes that take turns, peaks, the corpus, the table.

Each side is measured in a process of its own, so that peak memory is its own. The processes live side by side, but
only the one whose turn it is computes: warm-up first, then round after round, in alternating order. What disturbs the
machine for a while thus disturbs all sides.
"""

import argparse
import importlib.util
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path

import torch
from datasets import Dataset, disable_progress_bars, load_from_disk
from tqdm import tqdm
from transformers import AutoTokenizer

from hf_paraphrase_lm import chunk_documents, keep_freed_memory, train_tokenizer
from hf_paraphrase_lm.data import load_python_docs

CHILD = "--measure"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# Of the number of parameters. Our choice: biases and small heads differ, layers must not.
TOLERANCE = 0.03
# Square matrices that keep every core, or the GPU, busy. Our choice.
PEAK_SIZE = {"cpu": 2048, "cuda": 8192}
# marge-pytorch asks for faiss-gpu, which no index has for today's Python.
ORIGINALS = {"marge-pytorch": "marge_pytorch", "coco-lm-pytorch": "coco_lm_pytorch"}
INSTALL = "pip install 'hf-paraphrase-lm[bench]' && pip install --no-deps marge-pytorch==0.2.9"


def common_arguments(parser: argparse.ArgumentParser, output: str):
    parser.add_argument("--data", type=Path, help="Parquet file with a column `text`; by default the docs of Python")
    parser.add_argument("--documents", type=int, help="use so many of the documents; by default all")
    parser.add_argument("--vocab_size", type=int, default=16_384, help="of the tokenizer trained on the documents")
    parser.add_argument("--hidden_size", type=int, default=256, help="width of every layer")
    parser.add_argument("--dtypes", nargs="+", default=["fp32", "bf16"], choices=DTYPES, help="bf16 is autocast")
    parser.add_argument("--device", default="cpu", choices=PEAK_SIZE, help="where the models are")
    parser.add_argument("--compile", action="store_true", help="torch.compile the models of all sides")
    parser.add_argument("--attn_implementation", help="by default sdpa, but for training in bf16 on a CPU eager")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds of each side, after one to warm up")
    parser.add_argument("--seed", type=int, default=0, help="of the weights, and of which documents are drawn")
    parser.add_argument("--output", type=Path, default=Path(output), help="folder of results.json and of the corpus")


def marge_arguments(parser: argparse.ArgumentParser):
    parser.add_argument("--encoder_layers", type=int, default=6, help="of MARGE, more than --retrieval_layers")
    parser.add_argument("--decoder_layers", type=int, default=6, help="of MARGE; only those above four read evidence")
    parser.add_argument("--retrieval_layers", type=int, default=4, help="of MARGE, those that embed a document")
    parser.add_argument("--max_length", type=int, default=256, help="longest document of MARGE, in tokens")


def check_installed(sides: list[str]):
    """Raises a ModuleNotFoundError if a side is a package that is not there."""
    for name in sides:
        if name in ORIGINALS and importlib.util.find_spec(ORIGINALS[name]) is None:
            raise ModuleNotFoundError(
                f"The package {name}, which ours is compared with, is not installed. Install it ({INSTALL}), or leave "
                "this side out with --sides where there is that option."
            )


def make_corpus(args, *lengths: int):
    """Writes the documents in chunks of each length, and a tokenizer trained on them, to `args.output`/corpus."""
    disable_progress_bars()
    if args.data is None:
        texts = load_python_docs(args.documents, progress=False)
    else:
        texts = Dataset.from_parquet(str(args.data))
        texts = texts.shuffle(seed=args.seed).select(range(min(args.documents or len(texts), len(texts))))
    tokenizer = train_tokenizer(texts, args.vocab_size, model_max_length=max(lengths), progress=False)
    folder = args.output / "corpus"
    tokenizer.save_pretrained(folder)
    for length in set(lengths):
        chunk_documents(texts, tokenizer, length).save_to_disk(folder / str(length))


def load_corpus(output: str, length: int):
    """Chunks of this length, and the tokenizer."""
    folder = Path(output) / "corpus"
    return load_from_disk(str(folder / str(length))), AutoTokenizer.from_pretrained(folder)


def attention_of(case) -> str:
    """On a CPU, fused attention in bfloat16 has a slow backward pass, so plain attention is the default there.

    It is that of x-transformers, too: fused with "sdpa", else plain. marge-pytorch has only plain attention.
    """
    return case.attn_implementation or ("eager" if (case.device, case.dtype) == ("cpu", "bf16") else "sdpa")


def autocast(case) -> torch.autocast:
    return torch.autocast(case.device, torch.bfloat16, enabled=case.dtype == "bf16")


def num_parameters(model: torch.nn.Module) -> int:
    """Shared ones count once."""
    return sum(weight.numel() for weight in model.parameters())


def check_parameters(numbers: dict[str, int]):
    """Raises a ValueError if sides differ by more than `TOLERANCE` in their number of parameters."""
    if max(numbers.values(), default=0) > (1 + TOLERANCE) * min(numbers.values(), default=0):
        named = ", ".join(f"{name} {number:,}" for name, number in numbers.items())
        raise ValueError(
            f"All sides must have the same number of parameters, within {TOLERANCE:.0%}, but have: {named}. Choose "
            "other sizes; with many layers of little width the small parts count more."
        )


def memory() -> float:
    """Largest memory of this process so far, in MB ("VmHWM" of Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM:")).split()[1]) / 1000


def synchronize(device: str):
    if device == "cuda":
        torch.cuda.synchronize()


def matmul_peak(dtype: str, device: str) -> float:
    """FLOP/s of the fastest of 10 products of large square matrices."""
    size, seconds = PEAK_SIZE[device], []
    matrix = torch.randn(size, size, device=device).to(DTYPES[dtype])
    for _ in range(10):
        synchronize(device)
        began = time.perf_counter()
        matrix @ matrix
        synchronize(device)
        seconds.append(time.perf_counter() - began)
    return 2 * size**3 / min(seconds)


def serve(prepare: Callable[[argparse.Namespace, Callable], tuple[dict, Callable]]):
    """The process of one side: answers each line on stdin with the seconds of a round and the peak memory so far.

    Args:
        prepare: `prepare(case, mark_base)` returns what is known of the case, such as the tokens of a round, and a
            function that does a round. It calls `mark_base()` once the data is there and before there is a model: the
            memory above that counts.
    """
    case, answers, base = argparse.Namespace(**json.loads(sys.argv[2])), sys.stdout, [0.0]
    torch.manual_seed(case.seed)
    # As our scripts do, and the other packages do not.
    if case.device == "cpu" and case.side.startswith("ours"):
        keep_freed_memory()
    disable_progress_bars()

    def mark_base():
        if case.device == "cpu":
            base[0] = memory()

    def peak_mb() -> float:
        return torch.cuda.max_memory_allocated() / 1e6 if case.device == "cuda" else memory() - base[0]

    # Packages print what they do.
    with redirect_stdout(sys.stderr):
        facts, work = prepare(case, mark_base)
        work()
        synchronize(case.device)
        print(json.dumps(facts), file=answers, flush=True)
        for _ in sys.stdin:
            began = time.perf_counter()
            work()
            synchronize(case.device)
            answer = {"seconds": time.perf_counter() - began, "peak_mb": peak_mb()}
            print(json.dumps(answer), file=answers, flush=True)


class Child:
    """A process that computes only when it is asked to; `facts` are what `serve` told first."""

    def __init__(self, script: str, case: dict):
        command = [sys.executable, script, CHILD, json.dumps(case, default=str)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.facts = self._answer()

    def round(self) -> dict[str, float]:
        print(file=self.process.stdin, flush=True)
        return self._answer()

    def _answer(self) -> dict:
        if not (line := self.process.stdout.readline()):
            raise RuntimeError(f"A process ended with status {self.process.wait()}; its message is above.")
        return json.loads(line)

    def end(self):
        self.process.kill()
        self.process.communicate()


def take_turns(script: str, cases: list[dict], rounds: int) -> list[dict]:
    """Measures each case in its own process, in turns.

    Returns:
        For each case its facts with `seconds` (all rounds), `median_seconds` and `peak_mb`.
    """
    children = []
    bar = tqdm(total=len(cases) * (1 + rounds), desc="warm-ups and rounds", leave=False)
    try:
        for case in cases:
            children.append(Child(script, case))
            bar.update()
        answers = [[] for _ in cases]
        for number in range(rounds):
            order = range(len(cases)) if number % 2 == 0 else reversed(range(len(cases)))
            for i in order:
                answers[i].append(children[i].round())
                bar.update()
    finally:
        bar.close()
        for child in children:
            child.end()
    results = []
    for child, own in zip(children, answers, strict=True):
        seconds = [answer["seconds"] for answer in own]
        measured = {"seconds": seconds, "median_seconds": statistics.median(seconds), "peak_mb": own[-1]["peak_mb"]}
        results.append(child.facts | measured)
    return results


def add_rates(rows: list[dict], peaks: dict[str, float], *keys: str):
    """Adds what follows from the median: tokens and FLOP/s; and `is_best` to the fastest of those of the same keys."""
    for row in rows:
        row["tokens_per_second"] = row["tokens"] / row["median_seconds"]
        row["flops_per_second"] = row["flops"] / row["median_seconds"]
        row["share_of_peak"] = row["flops_per_second"] / peaks[row["dtype"]]
        same = [other for other in rows if all(other[key] == row[key] for key in keys)]
        row["is_best"] = row["median_seconds"] == min(other["median_seconds"] for other in same)


def cells_of_rates(row: dict) -> list[str]:
    """What `add_rates` added, and peak memory: tokens/s, peak MB, GFLOP/s, share of the peak."""
    rates = f"{row['flops_per_second'] / 1e9:.1f}", f"{row['share_of_peak']:.0%}"
    return [f"{row['tokens_per_second']:.0f}", f"{row['peak_mb']:.0f}", *rates]


def print_table(header: list[str], rows: list[list]):
    """Prints a Markdown table."""
    print(f"| {' | '.join(header)} |\n|{'---|' * len(header)}")
    for row in rows:
        print(f"| {' | '.join(map(str, row))} |", flush=True)


def write_results(args, **results):
    """Writes `results.json`, with the settings and the machine."""
    device = torch.cuda.get_device_name() if args.device == "cuda" else platform.machine()
    machine = {"device": device, "threads": torch.get_num_threads(), "python": platform.python_version()}
    machine |= {"torch": torch.__version__, "system": platform.platform()}
    text = json.dumps({"machine": machine, "settings": vars(args), **results}, indent=1, default=str)
    (args.output / "results.json").write_text(text + "\n")
