"""How many documents a second are embedded for the index? Ours and marge-pytorch side by side, on the same documents.

    pip install 'hf-paraphrase-lm[bench]' && pip install --no-deps marge-pytorch==0.2.9
    python examples/benchmarks/bench_embedding.py --output runs/bench_embedding
    python examples/benchmarks/bench_embedding.py --sides ours   # without that package

Both sides put each document through the retrieval layers alone and normalise the state of the first token. Ours
(`embed_documents`, for `DocumentIndex` and `EvidenceDataset`) sorts documents by length and pads a batch to its
longest. marge-pytorch (`TrainingWrapper.reindex`) reads rows of one width from a memory map, padded and without a mask;
what is measured is that loop up to the vectors, without index and search. By default ours embeds 64 documents at once
and marge-pytorch 4.

A round is one pass over all documents; `measuring.py` tells how the sides take turns, `originals.py` what is changed in
marge-pytorch, `bench_training.py` what the columns mean. FLOP/s are of the retrieval layers for real tokens.
"""

import argparse
import sys
from collections.abc import Callable

import numpy as np
import torch

import flops
import measuring
import originals
from bench_training import marge_config
from hf_paraphrase_lm import MargeForConditionalGeneration
from hf_paraphrase_lm.retrieval import embed_documents

SIDES = ["ours", "marge-pytorch"]


def prepare(case, mark_base) -> tuple[dict, Callable]:
    """What is known of a case, and its round; see `measuring.serve`."""
    documents, tokenizer = measuring.load_corpus(case.output, case.max_length)
    config = marge_config(case, tokenizer)
    lengths = [len(ids) for ids in documents["input_ids"]]
    if case.side == "marge-pytorch":
        file = f"{case.output}/documents-{case.dtype}-{case.batch_size}.dat"
        rows = originals.write_rows(file, documents["input_ids"], case.max_length, tokenizer.pad_token_id)
        mark_base()
        model = originals.make_marge(config, case.max_length, case.device)
        if case.compile:
            model.encoder.compile()

        @torch.no_grad()
        def work():
            vectors = []
            with measuring.autocast(case):
                for first in range(0, len(rows), case.batch_size):
                    batch = torch.from_numpy(rows[first : first + case.batch_size]).to(case.device).long()
                    vectors.append(model.get_embeds(batch, batch_size=case.batch_size).cpu().numpy())
            return np.concatenate(vectors)

    else:
        mark_base()
        model = MargeForConditionalGeneration(config).to(case.device)
        # Without a backward pass fused attention is the faster one; in bfloat16 on a CPU the model has its own.
        model.set_attn_implementation(case.attn_implementation or "sdpa")
        if case.compile:
            model.embed = torch.compile(model.embed)

        def work():
            with measuring.autocast(case):
                return embed_documents(documents, model, tokenizer.pad_token_id, case.batch_size, progress=False)

    facts = {"documents": len(documents), "tokens": sum(lengths), "parameters": measuring.num_parameters(model)}
    return facts | {"flops": sum(flops.embedding(config, n) for n in lengths)}, work


def main():
    if sys.argv[1:2] == [measuring.CHILD]:
        measuring.serve(prepare)
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sides", nargs="+", default=SIDES, choices=SIDES, help="only these")
    parser.add_argument("--batch_sizes", nargs="+", type=int, default=[4, 8, 16, 32, 64], help="documents at once")
    measuring.marge_arguments(parser)
    measuring.common_arguments(parser, "runs/bench_embedding")
    parser.set_defaults(documents=1000)
    args = parser.parse_args()

    measuring.check_installed(args.sides)
    measuring.make_corpus(args, args.max_length)
    peaks = {dtype: measuring.matmul_peak(dtype, args.device) for dtype in args.dtypes}
    cases = [
        {"side": side, "dtype": dtype, "batch_size": size}
        for size in args.batch_sizes
        for side in args.sides
        for dtype in args.dtypes
    ]
    results = measuring.take_turns(__file__, [vars(args) | case for case in cases], args.rounds)
    rows = [case | result for case, result in zip(cases, results, strict=True)]
    measuring.check_parameters({row["side"]: row["parameters"] for row in rows})
    for row in rows:
        row["documents_per_second"] = row["documents"] / row["median_seconds"]
    measuring.add_rates(rows, peaks, "side", "batch_size")
    measuring.write_results(args, peak_flops_per_second=peaks, rows=rows)
    header = ["side", "batch", "type", "parameters", "documents/s", "tokens/s", "peak MB", "GFLOP/s", "of peak"]
    cells = [
        [
            *(row["side"], row["batch_size"], row["dtype"] + " (best)" * row["is_best"], f"{row['parameters']:,}"),
            *(f"{row['documents_per_second']:.0f}", *measuring.cells_of_rates(row)),
        ]
        for row in rows
    ]
    measuring.print_table(header, cells)


if __name__ == "__main__":
    main()
