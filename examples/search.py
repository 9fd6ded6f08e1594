"""Searches an index made by build_index.py, for texts on the command line, in a file, or typed in.

    python examples/search.py --index runs/index --model_name_or_path runs/marge --queries "how tides work" "the moon"
    python examples/search.py --index user/news-index --model_name_or_path user/marge --queries_file queries.txt --json
    python examples/search.py --index runs/index --model_name_or_path runs/marge

The model must be the one that the index was built with; it is checked. An index that is not a folder is taken from the
Hub. Without queries they are read line by line until the end of input (Ctrl-D). For each the best chunks of documents
are printed, the score first: the cosine of the embeddings. With --json, each query is a line
`{"query": ..., "results": [{"score": ..., "row": ..., "document": ..., "chunk": ..., "language": ..., "text": ...}]}`,
where `document` is the row in the data that the index was built from.
"""

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import faiss
import numpy as np
from datasets import Dataset

from build_index import load_embedder
from hf_paraphrase_lm import DocumentIndex
from hf_paraphrase_lm.retrieval import embed_documents
from runs import ModelArguments, parse_arguments


@dataclass
class SearchArguments:
    """The index, and what is searched for."""

    index: str = field(metadata={"help": "folder of the index, or dataset repository on the Hub"})
    queries: list[str] = field(default_factory=list, metadata={"help": "texts to search for"})
    queries_file: str | None = field(
        default=None, metadata={"help": "file with a query a line; empty lines are left out"}
    )
    k: int = field(default=5, metadata={"help": "how many chunks a query"})
    search_parameters: str | None = field(
        default=None, metadata={"help": "such as 'nprobe=64' or 'efSearch=128', in place of those of the index"}
    )
    in_memory: bool = field(default=False, metadata={"help": "read all vectors first; else they stay on the disk"})
    verify: bool = field(default=False, metadata={"help": "compare every file of the index with its hash first"})
    batch_size: int = field(default=64, metadata={"help": "queries that are embedded and searched at once"})
    max_characters: int = field(default=200, metadata={"help": "of a text to print; 0: all, as with --json"})
    json: bool = field(default=False, metadata={"help": "print JSON lines"})
    device: str = field(default="cpu", metadata={"help": "where the model runs, such as 'cuda'"})


def open_index(args: SearchArguments, model) -> DocumentIndex:
    """The index in a folder or else on the Hub, which must have been built with the model."""
    load = DocumentIndex.load if Path(args.index).is_dir() else DocumentIndex.from_hub
    index = load(args.index, embedder=model, memory_map=not args.in_memory, verify=args.verify)
    if args.search_parameters:
        faiss.ParameterSpace().set_index_parameters(index.faiss_index, args.search_parameters)
    return index


def batches(args: SearchArguments) -> Iterator[list[str]]:
    """Queries, at most `batch_size` at a time; typed in, one at a time."""
    queries = list(args.queries)
    if args.queries_file is not None:
        lines = Path(args.queries_file).read_text(encoding="utf-8").splitlines()
        queries += [line for line in lines if line.strip()]
    for start in range(0, len(queries), args.batch_size):
        yield queries[start : start + args.batch_size]
    if args.queries or args.queries_file is not None:
        return
    if sys.stdin.isatty():
        print("Query:", file=sys.stderr)
    yield from ([line.strip()] for line in sys.stdin if line.strip())


def search(queries: list[str], index: DocumentIndex, model, tokenizer, args: SearchArguments) -> list[dict]:
    """What is found for each query, in the form that --json prints."""
    longest = min(tokenizer.model_max_length, getattr(model.config, "max_position_embeddings", 512))
    ids = tokenizer(queries, truncation=True, max_length=longest)["input_ids"]
    embeddings = embed_documents(
        Dataset.from_dict({"input_ids": ids}), model, tokenizer.pad_token_id, args.batch_size, progress=False
    )
    scores, rows = index.search(embeddings, min(args.k, len(index)), progress=False)
    found = index.documents.with_format(None)[np.unique(rows).tolist()]
    places = {row: place for place, row in enumerate(np.unique(rows).tolist())}
    texts = tokenizer.batch_decode(found["input_ids"], skip_special_tokens=True)
    answers = []
    for query, query_scores, query_rows in zip(queries, scores.tolist(), rows.tolist(), strict=True):
        results = [
            {"score": score, "row": row}
            | {name: found[name][places[row]] for name in ("document", "chunk", "language") if name in found}
            | {"text": texts[places[row]]}
            for score, row in zip(query_scores, query_rows, strict=True)
        ]
        answers.append({"query": query, "results": results})
    return answers


def main():
    checkpoint, args = parse_arguments(__doc__.splitlines()[0], ModelArguments, SearchArguments)
    tokenizer, model = checkpoint.load_tokenizer(), load_embedder(checkpoint, args.device)
    index = open_index(args, model)
    for queries in batches(args):
        for answer in search(queries, index, model, tokenizer, args):
            if args.json:
                print(json.dumps(answer, ensure_ascii=False), flush=True)
                continue
            print(f"\n{answer['query']}")
            for result in answer["results"]:
                text, limit = " ".join(result["text"].split()), args.max_characters
                text = f"{text[:limit]}…" if 0 < limit < len(text) else text
                language = f" [{result['language']}]" if result.get("language") else ""
                print(f"{result['score']:7.4f}  document {result['document']}{language}: {text}", flush=True)


if __name__ == "__main__":
    main()
