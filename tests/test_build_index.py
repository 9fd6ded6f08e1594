"""examples/build_index.py and search.py with a tiny MARGE: from files to what is printed, and the benchmark's rows."""

import io
import json
import re
import subprocess
import sys

import datasets
import pytest
from transformers import set_seed

from hf_paraphrase_lm import DocumentIndex, MargeConfig, MargeModel, train_tokenizer

from .scripts import import_example, make_checkpoint, read_json, write_rows

WORDS = ["tide", "moon", "harbor", "bread", "oven", "flour", "violin", "string", "concert", "river", "bridge", "stone"]
TEXTS = [" ".join(WORDS[(i + j * (1 + i // 12)) % 12] for j in range(3 + i % 5)) for i in range(40)]
SIZES = {
    "hidden_size": 32,
    "encoder_layers": 2,
    "decoder_base_layers": 1,
    "decoder_layers": 1,
    "num_attention_heads": 2,
    "encoder_intermediate_size": 32,
    "decoder_base_intermediate_size": 32,
    "decoder_intermediate_size": 32,
    "retrieval_layers": 1,
    "max_position_embeddings": 32,
    "initializer_range": 0.5,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model with its tokenizer in `model`, and documents in two files of other kinds."""
    set_seed(0)
    folder = tmp_path_factory.mktemp("build_index")
    tokenizer = train_tokenizer(TEXTS * 2, vocab_size=300, model_max_length=32, progress=False)
    MargeModel(MargeConfig(vocab_size=len(tokenizer), **SIZES)).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    rows = [{"text": text, "lang": "en" if i % 2 else "de"} for i, text in enumerate(TEXTS)]
    write_rows(folder / "a.jsonl", rows[:25])
    write_rows(folder / "b.parquet", rows[25:])
    return folder


@pytest.fixture
def run(monkeypatch, repository, folder, capsys):
    """Runs a script with arguments as on the command line and returns what it printed."""

    def run(name, *arguments):
        script = import_example(monkeypatch, repository, name)
        monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", folder / "cache")
        model = f"--model_name_or_path={folder / 'model'}"
        monkeypatch.setattr(sys, "argv", [f"{name}.py", model, *map(str, arguments)])
        script.main()
        return capsys.readouterr().out

    return run


def files(folder):
    return "--files", folder / "a.jsonl", folder / "b.parquet"


@pytest.fixture(scope="module")
def index_folder(folder, repository):
    with pytest.MonkeyPatch.context() as patch:
        script = import_example(patch, repository, "build_index")
        patch.setattr("datasets.config.HF_DATASETS_CACHE", folder / "cache")
        command = ["--model_name_or_path", folder / "model", "--output_dir", folder / "index", *files(folder)]
        patch.setattr(sys, "argv", ["build_index.py", *map(str, command), "--language_column", "lang"])
        script.main()
    return folder / "index"


def test_documents_find_themselves(run, index_folder, tmp_path):
    (tmp_path / "queries.txt").write_text(f"{TEXTS[30]}\n\n{TEXTS[3]}\n")
    arguments = "--index", index_folder, "--queries", TEXTS[7], "--queries_file", tmp_path / "queries.txt"
    answers = [
        json.loads(line) for line in run("search", *arguments, "--json", "--k", 2, "--batch_size", 2).splitlines()
    ]
    assert [answer["query"] for answer in answers] == [TEXTS[7], TEXTS[30], TEXTS[3]]
    for answer, row in zip(answers, (7, 30, 3), strict=True):
        best, second = answer["results"]
        assert best["score"] == pytest.approx(1, abs=1e-5) and best["score"] >= second["score"]
        assert list(best) == ["score", "row", "document", "chunk", "language", "text"]
        assert TEXTS[best["document"]] == TEXTS[row] == best["text"]
        assert best["language"] == ("en" if best["document"] % 2 else "de")
    printed = run("search", *arguments[:4], "--k", 1, "--max_characters", 5, "--verify", "--in_memory")
    assert re.fullmatch(rf"\n{TEXTS[7]}\n 1\.0000  document \d+ \[(en|de)\]: {TEXTS[7][:5]}…\n", printed)


def test_queries_typed_in(run, index_folder, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{TEXTS[1]}\n\n{TEXTS[2]}\n"))
    lines = run("search", "--index", index_folder, "--k", 1, "--json").splitlines()
    assert [json.loads(line)["query"] for line in lines] == [TEXTS[1], TEXTS[2]]


@pytest.mark.parametrize("factory", ["IVF4,Flat", "IVF4,SQ8"])
def test_approximate_indices_report_their_recall(run, folder, tmp_path, factory):
    arguments = *files(folder), "--factory", factory, "--output_dir", tmp_path / "index", "--max_length", 6
    low, high = (
        json.loads(run("build_index", *arguments, "--recall_k", 3, "--search_parameters", f"nprobe={nprobe}"))
        for nprobe in (1, 4)
    )
    assert low["documents"] == 40 and low["chunks"] == high["chunks"] > 40 and low["dim"] == 32
    assert low["recall@3"] < high["recall@3"]
    assert factory != "IVF4,Flat" or high["recall@3"] == 1
    # The index keeps its parameters.
    assert DocumentIndex.load(tmp_path / "index").faiss_index.nprobe == 4
    assert "recall@3" not in json.loads(run("build_index", *arguments, "--recall_queries", 0))


def test_wrong_arguments_are_refused(run, folder, tmp_path, monkeypatch, index_folder):
    out = "--output_dir", tmp_path / "index"
    with pytest.raises(ValueError, match=r"^Give either --files or --dataset_name\.$"):
        run("build_index", *out)
    with pytest.raises(FileNotFoundError, match=r"^--files: there is no file none\.txt\.$"):
        run("build_index", *out, "--files", "none.txt")
    with pytest.raises(ValueError, match=r"^--files must be of the kinds \.csv, .+, but got 'a\.doc'\.$"):
        run("build_index", *out, "--files", "a.doc")
    with pytest.raises(RuntimeError, match="nprob"):
        run("build_index", *out, *files(folder), "--search_parameters", "nprob=3")
    assert not (tmp_path / "index").exists()
    # Before anything is embedded.
    with pytest.raises(FileExistsError, match="exists and is not a DocumentIndex, so nothing was written"):
        run("build_index", *files(folder), "--output_dir", folder, "--search_parameters", "nprob=3")
    other = make_checkpoint(tmp_path / "other", TEXTS)
    message = (
        f"{other} is a CocoLMModel, which has no embed(input_ids, attention_mask). Give a model that embeds documents, "
        "such as MARGE."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        run("build_index", *out, *files(folder), "--model_name_or_path", other)
    MargeModel(MargeConfig(vocab_size=300, **SIZES)).save_pretrained(tmp_path / "marge")
    with pytest.raises(ValueError, match="was built with another model than the MargeModel given"):
        run("search", "--index", index_folder, "--queries", "tide", "--model_name_or_path", tmp_path / "marge",
            "--tokenizer_name", folder / "model")  # fmt: skip


def test_benchmark(tmp_path, repository, monkeypatch, capsys):
    bench = import_example(monkeypatch, repository, "benchmarks.bench_index")
    children = []

    def run_here(command, **options):
        children.append(command)
        monkeypatch.setattr(sys, "argv", command[1:])
        bench.main()
        return subprocess.CompletedProcess(command, 0, stdout=capsys.readouterr().out)

    monkeypatch.setattr(bench.subprocess, "run", run_here)
    arguments = ["bench_index.py", "--sizes", "300", "--factories", "IVF4,SQ8", "--dim", "16", "--nprobe", "2"]
    arguments += ["--queries", "20", "--output", str(tmp_path)]
    try:
        for _ in range(2):
            monkeypatch.setattr(sys, "argv", arguments)
            bench.main()
    finally:
        datasets.enable_progress_bars()
    # The second time it takes the results that are there.
    assert len(children) == 3
    row = capsys.readouterr().out.splitlines()[-1].strip("| ").split(" | ")
    assert len(row) == len(bench.HEADER) and row[:2] == ["IVF4,SQ8", "300"] and 0.3 < float(row[7]) <= 1
    (measured,) = read_json(tmp_path / "results.json").values()
    assert set(measured) == {"build", "search", "search_mapped"}
    assert not (tmp_path / "index").exists()
