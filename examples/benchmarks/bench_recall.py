"""Does marge-pytorch learn to find translations? Trains it for some minutes, beside a run of run_marge_pretraining.py.

    pip install 'hf-paraphrase-lm[bench]' && pip install --no-deps marge-pytorch==0.2.9
    python examples/benchmarks/bench_recall.py --train_file train.parquet --validation_file validation.parquet \
        --tokenizer_name runs/marge-small --minutes 60 --max_length 128 --output runs/bench_recall

The files have the columns `text`, `lang` and `group_id`, which is the same for translations of each other.
--tokenizer_name is the folder of our run, with its tokenizer and its config.json: marge-pytorch gets the documents in
the same chunks, the same vocabulary, the same numbers of layers (at least five in the decoder, at least one above the
retrieval layers) and, within 3 %, the same number of parameters, to which its own output matrix comes on top.

It trains in its own way: `TrainingWrapper` embeds all documents (in training mode and without masks), finds the nearest
ones of each by exact search, and does so anew every --reindex_steps updates, which counts in the minutes. The learning
rate rises for --warmup_steps updates and then falls to 0 with the minutes. `originals.py` tells what is changed in it.

The table has the recall@1 of held-out translations as run_marge_pretraining.py measures it
(`eval_cross_language_recall_at_1`): of the first chunks of documents that have a translation, the share whose nearest
document in another language is one. Embeddings are made in evaluation mode, with masks, which is how marge-pytorch
embeds a target in training; and without masks, as in its index.
"""

import argparse
import itertools
import json
import time
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from transformers import AutoConfig, AutoTokenizer

import measuring
import originals
from hf_paraphrase_lm import MargeConfig, chunk_documents
from hf_paraphrase_lm.training import recall_at_k


def read_chunks(file: Path, tokenizer, max_length: int) -> Dataset:
    """Chunks of the documents of a file; `shard` is their group."""
    texts = Dataset.from_parquet(str(file))
    return chunk_documents(texts, tokenizer, max_length, shard_column="group_id", language_column="lang")


def write_memory_maps(folder: Path, name: str, chunks: Dataset, length: int, pad_token_id: int) -> list[Path]:
    """The files of token ids and of masks."""
    files = [folder / f"{name}.dat", folder / f"{name}-masks.dat"]
    rows = originals.write_rows(files[0], chunks["input_ids"], length, pad_token_id)
    masks = np.memmap(files[1], np.bool_, mode="w+", shape=rows.shape)
    masks[:] = np.arange(length) < np.array([len(ids) for ids in chunks["input_ids"]])[:, None]
    masks.flush()
    return files


@torch.no_grad()
def recall(model, chunks: Dataset, rows: torch.Tensor, masks: torch.Tensor) -> dict[str, float]:
    """Recall@1 of translations, with masks and without."""
    numbers = {name: number for number, name in enumerate(dict.fromkeys(chunks["shard"]))}
    groups, is_training = [numbers[name] for name in chunks["shard"]], model.training
    model.eval()
    vectors = {"with_masks": model.get_embeds(rows, masks=masks), "without_masks": model.get_embeds(rows)}
    model.train(is_training)
    return {name: recall_at_k(found.cpu(), groups, languages=chunks["language"]) for name, found in vectors.items()}


def train(trainer, args) -> dict[str, float]:
    """Trains for `args.minutes`; returns the number of updates and the mean loss of the last hundred."""
    optimizer = torch.optim.AdamW(trainer.parameters(), lr=0.0, betas=(0.9, 0.98), eps=1e-6, fused=True)
    loader = torch.utils.data.DataLoader(trainer.get_dataset(), args.batch_size, shuffle=True, drop_last=True)
    began, losses = time.perf_counter(), []
    for batch in itertools.chain.from_iterable(itertools.repeat(loader)):
        passed = (time.perf_counter() - began) / (60 * args.minutes)
        if passed >= 1:
            break
        for group in optimizer.param_groups:
            group["lr"] = args.learning_rate * min((len(losses) + 1) / args.warmup_steps, 1 - passed)
        optimizer.zero_grad()
        with measuring.autocast(args):
            loss = trainer(batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trainer.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        if len(losses) % args.reindex_steps == 0:
            with measuring.autocast(args):
                trainer.reindex()
        if len(losses) % args.logging_steps == 0:
            mean = np.mean(losses[-args.logging_steps :])
            print(f"{60 * args.minutes * passed:.0f} s, update {len(losses)}: loss {mean:.3f}", flush=True)
    return {"updates": len(losses), "loss": float(np.mean(losses[-100:]))}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train_file", type=Path, required=True, help="Parquet file with text, lang and group_id")
    parser.add_argument("--validation_file", type=Path, required=True, help="the same, held out")
    parser.add_argument("--tokenizer_name", required=True, help="folder of our run: tokenizer and config.json")
    parser.add_argument("--minutes", type=float, default=15, help="training time, with re-indexing")
    parser.add_argument("--max_length", type=int, default=128, help="longest chunk of a document, in tokens")
    parser.add_argument("--num_evidence", type=int, default=4, help="evidence documents of a target")
    parser.add_argument("--batch_size", type=int, default=4, help="targets in a batch, each with its evidence")
    parser.add_argument("--learning_rate", type=float, default=3e-4, help="highest learning rate of AdamW")
    parser.add_argument("--warmup_steps", type=int, default=200, help="updates until then")
    parser.add_argument("--reindex_steps", type=int, default=500, help="updates from one re-indexing to the next")
    parser.add_argument("--reindex_batch_size", type=int, default=64, help="documents embedded at once")
    parser.add_argument("--dtype", default="fp32", choices=measuring.DTYPES, help="bf16 is autocast")
    parser.add_argument("--device", default="cpu", choices=measuring.PEAK_SIZE, help="where the model is")
    parser.add_argument("--logging_steps", type=int, default=100, help="updates between logs of their mean loss")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and of the order of documents")
    parser.add_argument("--output", type=Path, default=Path("runs/bench_recall"), help="folder of results.json")
    args = parser.parse_args()

    measuring.check_installed(["marge-pytorch"])
    torch.manual_seed(args.seed)
    args.output.mkdir(parents=True, exist_ok=True)
    config = AutoConfig.from_pretrained(args.tokenizer_name)
    if not isinstance(config, MargeConfig):
        raise ValueError(f"--tokenizer_name must be the folder of a MARGE, but is of a {config.model_type!r}.")
    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer_name)
    chunks = read_chunks(args.train_file, tokenizer, args.max_length)
    held_out = read_chunks(args.validation_file, tokenizer, args.max_length)
    held_out = held_out.select(np.flatnonzero(np.array(held_out["chunk"]) == 0))
    pad = tokenizer.pad_token_id
    documents, masks = write_memory_maps(args.output, "train", chunks, args.max_length, pad)
    files = write_memory_maps(args.output, "validation", held_out, args.max_length, pad)
    known = [
        torch.from_numpy(np.fromfile(file, dtype).reshape(-1, args.max_length)).to(args.device)
        for file, dtype in zip(files, (np.int32, np.bool_), strict=True)
    ]

    model = originals.make_marge(config, args.max_length, args.device, is_tied=False)
    output_matrix = model.decoder.net.to_logits.weight.numel()
    parameters = {"ours": originals.marge_parameters(config)}
    parameters["marge-pytorch"] = measuring.num_parameters(model) - output_matrix
    print(f"parameters: {parameters}, and {output_matrix:,} in the output matrix of marge-pytorch", flush=True)
    measuring.check_parameters(parameters)
    before = recall(model, held_out, *known)
    with measuring.autocast(args):
        trainer = originals.import_marge_pytorch(args.device).TrainingWrapper(
            model,
            num_documents=len(chunks),
            doc_seq_len=args.max_length,
            documents_memmap_path=str(documents),
            masks_memmap_path=str(masks),
            num_evidence=args.num_evidence,
            reindex_batch_size=args.reindex_batch_size,
        )
    training = train(trainer, args)
    after = recall(model, held_out, *known)

    measuring.write_results(
        args, parameters=parameters, output_matrix=output_matrix, before=before, after=after, **training
    )
    print(json.dumps(training))
    header = ["marge-pytorch, recall@1 of translations", "untrained", "trained"]
    rows = [[name.replace("_", " "), f"{before[name]:.4f}", f"{after[name]:.4f}"] for name in before]
    measuring.print_table(header, rows)


if __name__ == "__main__":
    main()
