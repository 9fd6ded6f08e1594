"""What an index costs as the corpus grows: time and memory of building, saving, opening and searching it.

    python examples/benchmarks/bench_index.py --sizes 10000 100000 1000000 --output runs/bench_index

Embeddings are made up, a batch at a time, so that what is measured is the index and not a model: a document's vector,
of length 1, is in the direction of a sum of three Gaussian vectors, one of its cluster and two of larger tables. For
every row of the table one process builds and two search, with the vectors in memory and left on the disk ("mapped").

Peak memory is that of building ("VmHWM" of Linux), above what the process had before. Pages of mapped files count in
the memory of a process, but are given back where it is short; so for the mapped index the memory that is of no file
("RssAnon") is shown, too. Queries are documents, and are not to find themselves; recall@10 compares with an exact
search of all vectors.

`results.json` in `--output` has every number; what it has already is not measured again. A million documents of 768
numbers take 3 GB of disk for a moment. Linux only.
"""

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

CHILD = "--measure"
# Our choice: clusters as topics of a corpus, tables so that 16 million documents differ.
CLUSTERS, TABLE = 1024, 4093
HEADER = [
    *("factory", "documents", "build µs/document", "peak MB", "bytes/document", "disk bytes/document"),
    *("search ms/query", "recall@10", "mapped: open s", "private MB", "search ms/query", "largest process MB"),
]


def memory(name: str) -> float:
    """A line of /proc/self/status in MB: "VmHWM", the largest memory so far, or "RssAnon", that of no file."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(f"{name}:")).split()[1]) / 1000


def measure(task: str, size: int, dim: int, factory: str, nprobe: int, queries: int, folder: str) -> dict[str, float]:
    """Runs in a child process: builds and saves an index, or opens it and searches."""
    import datasets
    import faiss
    import numpy as np
    import torch

    from hf_paraphrase_lm import DocumentIndex

    class MadeUpEmbedder:
        """Gives a document, whose one token is its row, the vector that depends on it."""

        fingerprint = "made up"

        def __init__(self):
            draw = torch.Generator().manual_seed(0)
            self.clusters = torch.randn(CLUSTERS, dim, generator=draw)
            self.tables = [torch.randn(TABLE, dim, generator=draw) for _ in range(2)]

        def embed(self, input_ids, attention_mask=None):
            row = input_ids[:, 0]
            vectors = self.clusters[row % CLUSTERS] + self.tables[0][row % TABLE] + self.tables[1][row // TABLE % TABLE]
            return torch.nn.functional.normalize(vectors, dim=-1)

    datasets.disable_progress_bars()
    embedder, results, start = MadeUpEmbedder(), {}, time.perf_counter()

    def lap(name: str):
        nonlocal start
        results[name], start = time.perf_counter() - start, time.perf_counter()

    if task == "build":
        documents = datasets.Dataset.from_dict({"input_ids": np.arange(size, dtype=np.int32)[:, None]})
        results["base_mb"] = memory("VmHWM")
        lap("prepare_s")
        index = DocumentIndex.build(documents, embedder, 0, factory, batch_size=128, progress=False)
        lap("build_s")
        if factory.startswith("IVF"):
            faiss.ParameterSpace().set_index_parameters(index.faiss_index, f"nprobe={nprobe}")
        index.save(folder)
        lap("save_s")
        results["disk_mb"] = sum(path.stat().st_size for path in Path(folder).rglob("*.faiss")) / 1e6
    else:
        rows = np.random.default_rng(1).choice(size, min(queries, size), replace=False)
        vectors = embedder.embed(torch.from_numpy(rows)[:, None])
        results["base_mb"] = memory("VmHWM")
        lap("prepare_s")
        private = memory("RssAnon")
        index = DocumentIndex.load(folder, memory_map=task == "search_mapped", verify=task == "search")
        lap("open_s")
        index.search(vectors, 10, exclude=rows, batch_size=256, progress=False)
        lap("search_s")
        results["private_mb"] = memory("RssAnon") - private
        results["peak_mb"] = memory("VmHWM")
        if task == "search":
            results["recall@10"] = index.recall(vectors, 10, rows, embedder, 0, batch_size=256, progress=False)
    results.setdefault("peak_mb", memory("VmHWM"))
    return results


def main():
    if sys.argv[1:2] == [CHILD]:
        print(json.dumps(measure(**json.loads(sys.argv[2]))))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", type=int, default=[10_000, 100_000, 1_000_000], help="documents")
    parser.add_argument("--factories", nargs="+", default=["Flat", "IVF1024,SQ8"], help="strings for faiss")
    parser.add_argument("--dim", type=int, default=768, help="length of the vectors")
    parser.add_argument("--nprobe", type=int, default=32, help="clusters that a search in an IVF index visits")
    parser.add_argument("--queries", type=int, default=1000, help="searched in batches of 256")
    parser.add_argument("--output", type=Path, default=Path("runs/bench_index"), help="folder of results.json")
    args = parser.parse_args()

    args.output.mkdir(parents=True, exist_ok=True)
    file, folder = args.output / "results.json", args.output / "index"
    results = json.loads(file.read_text()) if file.is_file() else {}
    print(f"| {' | '.join(HEADER)} |\n|{'---|' * len(HEADER)}")
    for factory in args.factories:
        for size in args.sizes:
            case = {"size": size, "dim": args.dim, "factory": factory, "nprobe": args.nprobe, "queries": args.queries}
            key = json.dumps(case)
            if key not in results:
                measured = {}
                for task in ("build", "search", "search_mapped"):
                    child = json.dumps(case | {"task": task, "folder": str(folder)})
                    done = subprocess.run([sys.executable, __file__, CHILD, child], stdout=subprocess.PIPE, check=True)
                    measured[task] = json.loads(done.stdout.splitlines()[-1])
                shutil.rmtree(folder)
                results[key] = measured
                file.write_text(json.dumps(results, indent=1) + "\n")
            build, search, mapped = (results[key][task] for task in ("build", "search", "search_mapped"))
            above, number = build["peak_mb"] - build["base_mb"], min(args.queries, size)
            largest = max(each["peak_mb"] for each in results[key].values())
            cells = (
                f"{build['build_s'] / size * 1e6:.0f} | {above:.0f} | {above / size * 1e6:.0f}",
                f"{build['disk_mb'] / size * 1e6:.0f} | {search['search_s'] / number * 1e3:.2f}",
                f"{search['recall@10']:.3f} | {mapped['open_s']:.2f} | {mapped['private_mb']:.0f}",
                f"{mapped['search_s'] / number * 1e3:.2f} | {largest:.0f}",
            )
            print(f"| {factory} | {size} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
