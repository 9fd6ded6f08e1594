"""Makes a searchable index of documents, with a model that embeds them.

    python examples/build_index.py --model_name_or_path runs/marge --files a.jsonl b.parquet --output_dir runs/index
    python examples/build_index.py --model_name_or_path runs/marge --dataset_name user/news --factory IVF1024,SQ8 \
        --search_parameters nprobe=16 --output_dir runs/index --push_to_hub user/news-index

Documents come from files (CSV, TSV, JSON, JSON lines, Parquet, plain text with one document a line) or from the Hub.
They are cut into chunks, and a row of the index is a chunk. The model is one with `embed`, such as MARGE, and the index
is searched with the same one: `python examples/search.py --index runs/index --model_name_or_path runs/marge`.

--factory is a string for `faiss.index_factory`; for n chunks of d numbers each:

    Flat          exact; 4 d bytes a chunk, time of a search grows with n
    IVF1024,Flat  1024 clusters, of which a search visits nprobe; 4 d bytes. About 4 to 16 sqrt(n) clusters are usual
    IVF1024,SQ8   the same with a byte a number: d bytes
    IVF1024,PQ64  64 bytes a chunk, coarse; d must be a multiple of 64
    HNSW32        a graph, fast to search and slow to build; 4 d + 256 bytes

Of all but Flat the recall is reported: the share of the chunks nearest to one by exact search that the index finds. If
it is low, give a larger nprobe or efSearch with --search_parameters; the index keeps them. Where the factory compresses
vectors, the documents are embedded twice for it, so that the loss counts (--recall_queries 0: recall is not measured).
"""

import json
import re
from dataclasses import dataclass, field
from pathlib import Path

import faiss
import numpy as np
from datasets import Dataset, concatenate_datasets, load_dataset
from torch import nn
from transformers import AutoModel

from hf_paraphrase_lm import DocumentIndex, chunk_documents
from hf_paraphrase_lm.retrieval import embed_documents
from hf_paraphrase_lm.retrieval.index_files import check_target
from runs import BUILDERS, ModelArguments, load_file, parse_arguments

# Indices that hold the vectors as the model gives them.
UNCOMPRESSED = re.compile(r"(IVF\d+(_HNSW\d+)?,)?Flat|HNSW\d*(,Flat)?")


@dataclass
class IndexArguments:
    """The documents, and the index made of them."""

    output_dir: str = field(metadata={"help": "folder of the index; an index that is there is replaced"})
    files: list[str] = field(default_factory=list, metadata={"help": "files of documents, with the same columns"})
    dataset_name: str | None = field(default=None, metadata={"help": "data set on the Hub, in place of files"})
    dataset_config_name: str | None = field(default=None, metadata={"help": "its configuration"})
    split: str = field(default="train", metadata={"help": "its split; 'train[:1000]' takes the first 1000 rows"})
    text_column: str = field(default="text", metadata={"help": "column of the documents"})
    language_column: str | None = field(default=None, metadata={"help": "column of their languages; search shows them"})
    max_length: int | None = field(default=None, metadata={"help": "longest chunk in tokens; default: the model's"})
    factory: str = field(
        default="Flat",
        metadata={
            "help": "string for faiss.index_factory: 'Flat' is exact, 'IVF1024,Flat' faster, 'IVF1024,SQ8' and "
            "'IVF1024,PQ64' smaller too, 'HNSW32' the fastest to search; see the top of the file"
        },
    )
    search_parameters: str | None = field(default=None, metadata={"help": "such as 'nprobe=16' or 'efSearch=64'"})
    batch_size: int = field(default=64, metadata={"help": "chunks that are embedded at once"})
    recall_queries: int = field(default=1000, metadata={"help": "chunks taken at random to measure recall; 0: none"})
    recall_k: int = field(default=10, metadata={"help": "how many nearest chunks count in recall"})
    device: str = field(default="cpu", metadata={"help": "where the model runs, such as 'cuda'"})
    push_to_hub: str | None = field(default=None, metadata={"help": "dataset repository to upload the index to"})
    seed: int = field(default=0, metadata={"help": "of the samples"})


def load_embedder(checkpoint: ModelArguments, device: str) -> nn.Module:
    """The model in evaluation mode; raises a ValueError if it has no `embed`."""
    model = checkpoint.load(AutoModel, checkpoint.load_config())
    if not callable(getattr(model, "embed", None)):
        raise ValueError(
            f"{checkpoint.model_name_or_path} is a {type(model).__name__}, which has no embed(input_ids, "
            "attention_mask). Give a model that embeds documents, such as MARGE."
        )
    return model.to(device).eval()


def load_documents(args: IndexArguments) -> Dataset:
    """One row a document; raises a ValueError or FileNotFoundError unless the arguments name one source of them."""
    if bool(args.files) == (args.dataset_name is not None):
        raise ValueError("Give either --files or --dataset_name.")
    if args.dataset_name is not None:
        return load_dataset(args.dataset_name, args.dataset_config_name, split=args.split)
    for file in map(Path, args.files):
        if file.suffix not in BUILDERS:
            raise ValueError(f"--files must be of the kinds {', '.join(BUILDERS)}, but got {str(file)!r}.")
        if not file.is_file():
            raise FileNotFoundError(f"--files: there is no file {file}.")
    return concatenate_datasets([load_file(Path(file)) for file in args.files])


def measure_recall(index: DocumentIndex, model: nn.Module, pad_token_id: int, args: IndexArguments) -> float:
    """Recall for chunks of the index taken at random, which are to find others than themselves."""
    number = min(args.recall_queries, len(index))
    rows = np.random.default_rng(args.seed).choice(len(index), number, replace=False)
    queries = embed_documents(index.documents, model, pad_token_id, args.batch_size, rows, progress=False)
    embedder = None if UNCOMPRESSED.fullmatch(args.factory) else model
    return index.recall(queries, args.recall_k, rows, embedder, pad_token_id, batch_size=args.batch_size)


def main():
    checkpoint, args = parse_arguments(__doc__.splitlines()[0], ModelArguments, IndexArguments)
    # Before the long part.
    check_target(Path(args.output_dir))
    tokenizer, model = checkpoint.load_tokenizer(), load_embedder(checkpoint, args.device)
    longest = min(tokenizer.model_max_length, getattr(model.config, "max_position_embeddings", 512))
    documents = load_documents(args)
    chunks = chunk_documents(
        documents,
        tokenizer,
        max_length=args.max_length or longest,
        text_column=args.text_column,
        language_column=args.language_column,
    )
    pad = tokenizer.pad_token_id
    if args.search_parameters:
        # A wrong one is to fail at once, too.
        dim = embed_documents(chunks, model, pad, rows=np.array([0]), progress=False).shape[1]
        empty = faiss.index_factory(dim, args.factory, faiss.METRIC_INNER_PRODUCT)
        faiss.ParameterSpace().set_index_parameters(empty, args.search_parameters)
    index = DocumentIndex.build(chunks, model, pad, args.factory, args.batch_size, args.seed)
    if args.search_parameters:
        faiss.ParameterSpace().set_index_parameters(index.faiss_index, args.search_parameters)
    index.save(args.output_dir)
    results = {"documents": len(documents), "chunks": len(index), "dim": index.dim, "factory": args.factory}
    if args.factory != "Flat" and args.recall_queries and len(index) > 1:
        args.recall_k = min(args.recall_k, len(index) - 1)
        results[f"recall@{args.recall_k}"] = measure_recall(index, model, pad, args)
    print(json.dumps(results))
    if args.push_to_hub:
        print(index.push_to_hub(args.push_to_hub).commit_url)


if __name__ == "__main__":
    main()
