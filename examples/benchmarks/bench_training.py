"""How fast does training go? Ours, the packages that came before, and transformers' ELECTRA as the floor, side by side.

    pip install 'hf-paraphrase-lm[bench]' && pip install --no-deps marge-pytorch==0.2.9
    python examples/benchmarks/bench_training.py --output runs/bench_training
    python examples/benchmarks/bench_training.py --growth --output runs/bench_growth
    python examples/benchmarks/bench_training.py --models cocolm --sides ours electra   # without the other packages

marge-pytorch asks for faiss-gpu, which no index has for today's Python, hence --no-deps. `originals.py` tells what is
changed in these packages so that they run, and how they get our number of parameters, which is checked.

All sides do the same updates on the same documents in turns: zero gradients, loss, gradients, one step of the same
AdamW, without dropout. On a CPU ours keep the memory of large tensors, as our scripts do. A round is one pass over the
same few batches; the table has the median of the rounds. The sides:

    marge   ours                each group of targets shares its evidence, as in the paper
            ours-own-evidence   each target has evidence of its own: the same tensors as marge-pytorch
            marge-pytorch       knows no other way
    cocolm  ours                masks are drawn within the update, as coco-lm-pytorch does
            coco-lm-pytorch     no corrective language model, no attention mask: it also reads padding
            electra             the floor: ElectraForPreTraining of the main network's size, neither auxiliary
                                network nor crop nor logits over the vocabulary

Tokens are those of targets and evidence, without padding; target tokens are those that are learned to be rebuilt.
FLOP/s are those of the matrix products that a model has to do for these tokens (`flops.py`), beside the fastest
product of large square matrices in the same type. The best type of a side is marked. Peak memory is that of the
process above what it had with all data and without a model; on CUDA, all that PyTorch had allocated. Linux only.

--growth measures ours alone, in the first of --dtypes: an update by the evidence of one group, by the length of its
documents (here the longest ones of the corpus) and by the number of groups; and a refresh,
`EvidenceDataset.find_groups`, by the size of the corpus. The last columns are the time over that which is proportional
to the size, by the first row: tokens are the size of an update, documents that of a refresh; and of an update over that
which is proportional to its FLOPs, of which a token takes the more, the more tokens it attends to.
"""

import argparse
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from transformers import ElectraConfig, ElectraForPreTraining

import flops
import measuring
import originals
from hf_paraphrase_lm import (
    CocoLMConfig,
    CocoLMForPretraining,
    DataCollatorForCorrectiveLM,
    DataCollatorForParaphrasing,
    EvidenceDataset,
    MargeConfig,
    MargeForConditionalGeneration,
)

SIDES = {
    "marge": ["ours", "ours-own-evidence", "marge-pytorch"],
    "cocolm": ["ours", "coco-lm-pytorch", "electra"],
}
GROWTH = {
    "num_evidence": [2, 4, 8, 16],
    "max_length": [64, 128, 256, 512],
    "batch_size": [1, 2, 4, 8],
}
# Parts of the corpus.
REFRESH = [4, 2, 1]
# marge-pytorch has eight heads whatever its arguments say; 64 numbers a head are those of COCO-LM base.
MARGE_HEADS, COCOLM_HEAD_SIZE = 8, 64


@dataclass
class Side:
    """One model with its batches: `loss(batch)` is what is trained."""

    model: torch.nn.Module
    batches: list
    loss: Callable


def marge_config(case, tokenizer) -> MargeConfig:
    """Feed-forward layers of the widths that give layer by layer the parameters of marge-pytorch's."""
    h = case.hidden_size
    return MargeConfig(
        vocab_size=len(tokenizer),
        hidden_size=h,
        encoder_layers=case.encoder_layers,
        decoder_base_layers=originals.BASE_LAYERS,
        decoder_layers=case.decoder_layers - originals.BASE_LAYERS,
        retrieval_layers=case.retrieval_layers,
        num_attention_heads=MARGE_HEADS,
        encoder_intermediate_size=3 * h,
        decoder_base_intermediate_size=3 * h,
        # It has two feed-forward layers there.
        decoder_intermediate_size=18 * h,
        max_position_embeddings=case.max_length,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        pad_token_id=tokenizer.pad_token_id,
    )


def cocolm_config(case, tokenizer) -> CocoLMConfig:
    return CocoLMConfig(
        vocab_size=len(tokenizer),
        hidden_size=case.hidden_size,
        num_hidden_layers=case.main_layers,
        auxiliary_layers=case.auxiliary_layers,
        num_attention_heads=case.hidden_size // COCOLM_HEAD_SIZE,
        intermediate_size=4 * case.hidden_size,
        # A crop may have one more token, the [CLS] in front.
        max_position_embeddings=case.text_length + 1,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        # Without dropout the logits of the loss are those of a pass without it.
        auxiliary_sampling="train",
        pad_token_id=tokenizer.pad_token_id,
    )


def draw(case, chunks, count: int) -> list[list[list[int]]]:
    """For each batch, the token ids of `count` chunks."""
    rows = np.arange(len(chunks))
    if case.longest:
        rows = np.argsort([-len(ids) for ids in chunks["input_ids"]], kind="stable")[: case.batches * count]
    rows = np.random.default_rng(case.seed).choice(rows, (case.batches, count))
    return [[chunks[int(row)]["input_ids"] for row in batch] for batch in rows]


def batched(texts: list, size: int) -> list[list]:
    return [texts[first : first + size] for first in range(0, len(texts), size)]


def draw_groups(case, chunks) -> list[list[dict]]:
    """For each batch, its groups; with evidence of its own, each target is one."""
    targets, evidence, batches = case.num_targets, case.num_evidence, []
    for texts in draw(case, chunks, case.batch_size * targets * (1 + evidence)):
        groups = []
        for group in batched(texts, targets * (1 + evidence)):
            labels, documents = group[:targets], batched(group[targets:], evidence)
            if case.side == "ours":
                groups.append({"labels": labels, "input_ids": documents[0]})
            else:
                groups += [{"labels": [x], "input_ids": own} for x, own in zip(labels, documents, strict=True)]
        batches.append(groups)
    return batches


def prepare_marge(case, mark_base) -> tuple[dict, Side]:
    chunks, tokenizer = measuring.load_corpus(case.output, case.max_length)
    config, collator = marge_config(case, tokenizer), DataCollatorForParaphrasing(tokenizer)
    drawn = draw_groups(case, chunks)
    batches = [{name: tensor.to(case.device) for name, tensor in collator(groups).items()} for groups in drawn]
    mark_base()
    if case.side == "marge-pytorch":
        model = originals.make_marge(config, case.max_length, case.device)

        def loss(batch):
            is_target = batch["labels"] != -100
            targets = batch["labels"].masked_fill(~is_target, config.pad_token_id)
            embeds = model.get_embeds(targets, masks=is_target)
            is_evidence = batch["attention_mask"].bool()
            return model(batch["input_ids"], targets, embeds, src_mask=is_evidence, tgt_mask=is_target)
    else:
        model = MargeForConditionalGeneration(config).to(case.device)
        model.set_attn_implementation(measuring.attention_of(case))

        def loss(batch):
            return model(**batch).loss

    lengths = [
        ([len(ids) for ids in group["labels"]], [len(ids) for ids in group["input_ids"]])
        for groups in drawn
        for group in groups
    ]
    facts = {
        "tokens": sum(sum(targets) + sum(evidence) for targets, evidence in lengths),
        "target_tokens": sum(sum(targets) for targets, _ in lengths),
        "flops": flops.UPDATE * sum(flops.marge(config, *pair) for pair in lengths),
    }
    return facts, Side(model, batches, loss)


def prepare_cocolm(case, mark_base) -> tuple[dict, Side]:
    chunks, tokenizer = measuring.load_corpus(case.output, case.text_length)
    config, collator = cocolm_config(case, tokenizer), DataCollatorForCorrectiveLM(tokenizer)
    drawn = draw(case, chunks, case.text_batch_size)
    lengths = [len(ids) for batch in drawn for ids in batch]
    mark_base()

    def collate(texts):
        batch = collator([{"input_ids": ids} for ids in texts])
        return {name: tensor.to(case.device) for name, tensor in batch.items()}

    if case.side == "coco-lm-pytorch":
        model = originals.make_coco(config, tokenizer.mask_token_id, measuring.attention_of(case), case.device)
        # It puts [CLS] in front and takes away the last token.
        batches = [
            torch.nn.functional.pad(ids[:, 1:], (0, 1), value=config.pad_token_id)
            for ids in (
                batch["labels"].masked_fill(batch["attention_mask"] == 0, config.pad_token_id)
                for batch in map(collate, drawn)
            )
        ]

        def loss(batch):
            with torch.device(case.device) if case.device == "cuda" else nullcontext():
                return model(batch)

        work = [flops.cocolm(config, n, corrects=False) for n in lengths]
    elif case.side == "electra":
        same = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
        settings = {name: getattr(config, name) for name in (*same, "max_position_embeddings", "pad_token_id")}
        settings |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        model = ElectraForPreTraining(ElectraConfig(embedding_size=config.hidden_size, **settings)).to(case.device)
        model.set_attn_implementation(measuring.attention_of(case))
        batches = [collate(texts) for texts in drawn]

        def loss(batch):
            labels = (batch["input_ids"] != batch["labels"]).long()
            return model(batch["input_ids"], batch["attention_mask"], labels=labels).loss

        work = [flops.electra(config, n) for n in lengths]
    else:
        model = CocoLMForPretraining(config).to(case.device)
        # On a CPU no fused attention gives a gradient to the position bias.
        is_plain = case.device == "cpu" and case.attn_implementation is None
        model.set_attn_implementation("eager" if is_plain else measuring.attention_of(case))
        batches = drawn

        def loss(texts):
            return model(**collate(texts)).loss

        work = [flops.cocolm(config, n) for n in lengths]
    return {"tokens": sum(lengths), "flops": flops.UPDATE * sum(work)}, Side(model, batches, loss)


def prepare_refresh(case, mark_base) -> tuple[dict, Callable]:
    chunks, tokenizer = measuring.load_corpus(case.output, case.max_length)
    documents = chunks.shuffle(seed=case.seed).select(range(len(chunks) // case.part))
    mark_base()
    dataset = EvidenceDataset(documents, case.num_targets, case.num_evidence, seed=case.seed)
    model = MargeForConditionalGeneration(marge_config(case, tokenizer)).to(case.device)
    model.set_attn_implementation(measuring.attention_of(case))

    def work():
        with measuring.autocast(case):
            dataset.find_groups(model, tokenizer.pad_token_id, progress=False)

    return {"documents": len(documents)}, work


def prepare(case, mark_base) -> tuple[dict, Callable]:
    """What is known of a case, and its round; see `measuring.serve`."""
    if case.model == "refresh":
        return prepare_refresh(case, mark_base)
    facts, side = {"marge": prepare_marge, "cocolm": prepare_cocolm}[case.model](case, mark_base)
    side.model.train()
    if case.compile:
        side.model.compile()
    optimizer = torch.optim.AdamW(side.model.parameters(), lr=1e-4, fused=True)

    def work():
        for batch in side.batches:
            optimizer.zero_grad()
            with measuring.autocast(case):
                loss = side.loss(batch)
            loss.backward()
            optimizer.step()

    return facts | {"parameters": measuring.num_parameters(side.model)}, work


def compare(args, settings: dict):
    """The table of all sides."""
    peaks = {dtype: measuring.matmul_peak(dtype, args.device) for dtype in args.dtypes}
    rows = []
    for model in args.models:
        cases = [
            {"model": model, "side": side, "dtype": dtype}
            for side in SIDES[model]
            for dtype in args.dtypes
            if args.sides is None or side in args.sides
        ]
        results = measuring.take_turns(__file__, [settings | case for case in cases], args.rounds)
        own = [case | result for case, result in zip(cases, results, strict=True)]
        measuring.check_parameters({row["side"]: row["parameters"] for row in own if row["side"] != "electra"})
        measuring.add_rates(own, peaks, "side")
        rows += own
    measuring.write_results(args, peak_flops_per_second=peaks, rows=rows)
    header = ["model", "side", "type", "parameters", "target tokens/s", "tokens/s", "peak MB", "GFLOP/s", "of peak"]
    cells = []
    for row in rows:
        of_targets = f"{row['target_tokens'] / row['median_seconds']:.0f}" if "target_tokens" in row else ""
        line = [row["model"], row["side"], row["dtype"] + " (best)" * row["is_best"], f"{row['parameters']:,}"]
        cells.append([*line, of_targets, *measuring.cells_of_rates(row)])
    measuring.print_table(header, cells)
    print("\nMatrix products: " + ", ".join(f"{peak / 1e9:.0f} GFLOP/s in {dtype}" for dtype, peak in peaks.items()))


def grow(args, settings: dict):
    """The table of ours by size."""
    rows = []
    same = {"model": "marge", "side": "ours", "dtype": args.dtypes[0], "longest": True, "batch_size": 1}
    series = {name: [same | {name: value} for value in values] for name, values in GROWTH.items()}
    series["refresh"] = [same | {"model": "refresh", "part": part} for part in REFRESH]
    for name, cases in series.items():
        results = measuring.take_turns(__file__, [settings | case for case in cases], args.rounds)
        unit = "documents" if name == "refresh" else "tokens"
        for case, result in zip(cases, results, strict=True):
            grown = result[unit] / results[0][unit]
            value = result["documents"] if name == "refresh" else case[name]
            row = {"size": name, "value": value, "per_second": result[unit] / result["median_seconds"]}
            slower = result["median_seconds"] / results[0]["median_seconds"]
            row["over_proportional"] = slower / grown
            if "flops" in result:
                row["over_flops"] = slower / (result["flops"] / results[0]["flops"])
            rows.append(row | result)
    measuring.write_results(args, rows=rows)
    titles = {"num_evidence": "evidence of a group", "max_length": "length", "batch_size": "groups"}
    cells = [
        [
            *(titles.get(row["size"], "refresh, documents"), row["value"], row.get("tokens", "")),
            *(f"{row['median_seconds']:.2f}", f"{row['per_second']:.0f}", f"{row['peak_mb']:.0f}"),
            *(f"{row['over_proportional']:.2f}", f"{row['over_flops']:.2f}" if "over_flops" in row else ""),
        ]
        for row in rows
    ]
    header = ["what grows", "to", "tokens", "seconds", "tokens (documents)/s", "peak MB"]
    header += ["time over proportional", "over FLOPs"]
    measuring.print_table(header, cells)


def main():
    if sys.argv[1:2] == [measuring.CHILD]:
        measuring.serve(prepare)
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    all_sides = list(dict.fromkeys(side for sides in SIDES.values() for side in sides))
    parser.add_argument("--models", nargs="+", default=list(SIDES), choices=SIDES, help="only these")
    parser.add_argument("--sides", nargs="+", choices=all_sides, help="only these")
    parser.add_argument("--growth", action="store_true", help="ours by size, instead of all sides")
    measuring.marge_arguments(parser)
    parser.add_argument("--num_targets", type=int, default=4, help="targets of a group")
    parser.add_argument("--num_evidence", type=int, default=4, help="evidence documents of a group, or of a target")
    parser.add_argument("--batch_size", type=int, default=4, help="groups in a batch")
    parser.add_argument("--main_layers", type=int, default=4, help="of COCO-LM's main network")
    parser.add_argument("--auxiliary_layers", type=int, default=1, help="of COCO-LM's auxiliary network")
    parser.add_argument("--text_length", type=int, default=128, help="longest text of COCO-LM, in tokens")
    parser.add_argument("--text_batch_size", type=int, default=32, help="texts in a batch of COCO-LM")
    parser.add_argument("--batches", type=int, default=4, help="batches in a round")
    measuring.common_arguments(parser, "runs/bench_training")
    args = parser.parse_args()

    settings = vars(args) | {"longest": False}
    lengths = [args.max_length, args.text_length]
    if args.growth:
        lengths = [args.max_length, *GROWTH["max_length"]]
    else:
        chosen = [side for model in args.models for side in SIDES[model] if args.sides is None or side in args.sides]
        measuring.check_installed(chosen)
    measuring.make_corpus(args, *lengths)
    (grow if args.growth else compare)(args, settings)


if __name__ == "__main__":
    main()
