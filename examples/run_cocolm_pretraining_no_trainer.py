"""Pre-trains COCO-LM on your own text with Accelerate and a plain loop: copy it and change what you like.

    python examples/run_cocolm_pretraining_no_trainer.py --train_file corpus.txt --output_dir runs/small \
        --config_overrides hidden_size=256,num_attention_heads=4,num_hidden_layers=4,intermediate_size=1024 \
        --num_train_epochs 1 --per_device_train_batch_size 32 --learning_rate 1e-3

    # several GPUs; losses and gradients of an update are those of one process with the whole batch
    accelerate launch --num_processes 4 examples/run_cocolm_pretraining_no_trainer.py ...

    # several processes on a CPU
    torchrun --nproc_per_node 2 examples/run_cocolm_pretraining_no_trainer.py --use_cpu ...

Arguments are named as in run_cocolm_pretraining.py and may stand in one JSON or YAML file; --help lists them. The same
command goes on from the last checkpoint (Ctrl-C saves one), on a CPU to the very weights of an unbroken run. The folder
--output_dir gets checkpoints, `log.jsonl`, the model with its tokenizer, `all_results.json` and a model card.
"""

import json
import math
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch.utils.data import DataLoader
from tqdm import tqdm

import pretraining
from hf_paraphrase_lm import CocoLMConfig, DataCollatorForCorrectiveLM, chunk_documents
from hf_paraphrase_lm.training import global_batch
from pretraining import (
    delayed_interrupt,
    find_checkpoints,
    load_checkpoint,
    load_tokenizer,
    make_accelerator,
    make_optimizer,
    make_scheduler,
    read_updates,
    save_checkpoint,
)
from run_cocolm_pretraining import (
    CorpusArguments,
    NetworkArguments,
    evaluate,
    load_model,
    longest_text,
    save_main_encoder,
    write_model_card,
)
from runs import load_splits, note_arguments, parse_arguments

LOSSES = ("loss", "mlm_loss", "copy_loss", "corrective_lm_loss", "contrastive_loss")


@dataclass
class LoopArguments(pretraining.LoopArguments):
    """The training, by default with the optimiser's settings in the authors' code.

    COCO-LM base was trained for 125,000 updates of 2048 sequences of 512 tokens. That its highest learning rate was
    5e-4 is not confirmed by a source.
    """

    output_dir: str = field(default="runs/cocolm", metadata={"help": "folder for checkpoints, model and results"})
    per_device_train_batch_size: int = field(default=8, metadata={"help": "texts in a batch, on each device"})
    learning_rate: float = field(default=5e-4, metadata={"help": "highest learning rate"})
    warmup_steps: float = field(default=0.08, metadata={"help": "updates, or if below 1 their share (10k of 125k)"})
    max_grad_norm: float = field(default=2.0, metadata={"help": "gradients are clipped to this norm; 0: not at all"})


def train_step(accelerator: Accelerator, model, optimizer, batches: list[dict], max_grad_norm: float) -> torch.Tensor:
    """One update. Returns its LOSSES `(5,)`, those of all batches of all processes."""
    model.train()
    losses = torch.zeros(len(LOSSES), device=accelerator.device)
    for number, batch in enumerate(global_batch(accelerator.unwrap_model(model), batches, accelerator), start=1):
        # The processes average their gradients once, after the last batch.
        with accelerator.no_sync(model) if number < len(batches) else nullcontext():
            output = model(**batch)
            accelerator.backward(output.loss / len(batches))
        losses += torch.stack([output[name].detach() for name in LOSSES]) / len(batches)
    if max_grad_norm:
        accelerator.clip_grad_norm_(model.parameters(), max_grad_norm)
    optimizer.step()
    optimizer.zero_grad()
    return accelerator.reduce(losses, "mean")


def main():
    network, corpus, args = parse_arguments(__doc__.splitlines()[0], NetworkArguments, CorpusArguments, LoopArguments)
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    accelerator = make_accelerator(args)
    checkpoint = next(reversed(find_checkpoints(folder)), None)
    note_arguments(checkpoint is not None, accelerator.is_main_process, args, network, corpus)
    set_seed(args.seed)
    splits = load_splits(corpus, "train")
    with accelerator.local_main_process_first():
        # The tokens of a run that goes on stay as they are.
        is_to_train = accelerator.is_local_main_process and checkpoint is None
        tokenizer = load_tokenizer(CocoLMConfig, network, corpus, splits["train"], folder, is_to_train)
    model = load_model(network, tokenizer)
    length = longest_text(corpus, tokenizer, model)
    splits.pop("test", None)
    with accelerator.local_main_process_first():
        chunks = {name: chunk_documents(split, tokenizer, length, corpus.text_column) for name, split in splits.items()}
    collator = DataCollatorForCorrectiveLM(
        tokenizer, corpus.mask_probability, corpus.span_ratio, whole_word_masking=corpus.whole_word_masking
    )
    settings = {"collate_fn": collator, "num_workers": args.dataloader_num_workers}
    # With a generator of its own it leaves the global one to dropout and samples.
    settings |= {"shuffle": True, "generator": torch.Generator()}
    loader = accelerator.prepare(DataLoader(chunks["train"], args.per_device_train_batch_size, **settings))
    updates_per_epoch = math.ceil(len(loader) / args.gradient_accumulation_steps)
    total = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * updates_per_epoch)
    optimizer = make_optimizer(model, args)
    scheduler = make_scheduler(optimizer, args, total)
    model, optimizer = accelerator.prepare(model, optimizer)
    # A prepared scheduler would take as many steps at a time as there are processes.
    accelerator.register_for_checkpointing(scheduler)
    given = {name: value for name, value in (vars(network) | vars(corpus) | vars(args)).items() if value is not None}
    accelerator.init_trackers("cocolm", given)

    # Processes differ in their dropout and samples.
    set_seed(args.seed, device_specific=True)
    if checkpoint is None and accelerator.is_main_process:
        (folder / "log.jsonl").write_text("")
        (folder / "all_results.json").unlink(missing_ok=True)
    step = start = last_log = 0 if checkpoint is None else load_checkpoint(accelerator, checkpoint)
    losses, begin, stops = 0, time.time(), False

    def new_masks(epoch: int):
        # Masks and crops follow from this and the text, so it does not matter what a run had read ahead.
        collator.seed = args.seed + epoch

    bar = tqdm(total=total, initial=start, disable=args.disable_tqdm or not accelerator.is_main_process)
    with bar, delayed_interrupt() as pressed:
        updates = read_updates(loader, args.gradient_accumulation_steps, start, new_masks)
        for step, batches in zip(range(start + 1, total + 1), updates, strict=False):
            losses += train_step(accelerator, model, optimizer, batches, args.max_grad_norm)
            if not accelerator.optimizer_step_was_skipped:
                scheduler.step()
            bar.update()
            # The processes stop together.
            stops = bool(accelerator.reduce(torch.tensor(len(pressed), device=accelerator.device)))
            saves = stops or step == total or step % args.checkpointing_steps == 0
            if saves or step % args.logging_steps == 0:
                means = dict(zip(LOSSES, (losses / (step - last_log)).tolist(), strict=True))
                means |= {"learning_rate": scheduler.get_last_lr()[0], "epoch": step / updates_per_epoch}
                losses, last_log = 0, step
                bar.set_postfix(loss=means["loss"])
                accelerator.log(means, step)
                if accelerator.is_main_process:
                    with (folder / "log.jsonl").open("a") as log:
                        print(json.dumps({"step": step} | means), file=log)
            if saves:
                save_checkpoint(accelerator, folder, step, model)
            if stops:
                break
    metrics = {"train_runtime": time.time() - begin, "train_resumed": checkpoint is not None}
    metrics["train_samples"] = len(chunks["train"])
    results = folder / "all_results.json"
    if start >= total and results.is_file():
        # The run was done already.
        known = json.loads(results.read_text())
        metrics = {name: known.get(name, value) for name, value in metrics.items()}
    if accelerator.is_main_process and not stops:
        model = accelerator.unwrap_model(model)
        if "validation" in chunks:
            measured = evaluate(model, chunks["validation"], collator, batch_size=32)
            accelerator.log(measured, step)
            metrics |= measured
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        save_main_encoder(model, tokenizer, folder)
        results.write_text(json.dumps(metrics, indent=4))
        batch, ranks = loader.total_batch_size * args.gradient_accumulation_steps, accelerator.num_processes
        write_model_card(folder, model, network, corpus, metrics, step, batch, ranks)
    accelerator.end_training()
    if stops:
        sentence = f"Interrupted at update {step}. The same command goes on from there."
        sys.exit(sentence if accelerator.is_main_process else 1)


if __name__ == "__main__":
    main()
