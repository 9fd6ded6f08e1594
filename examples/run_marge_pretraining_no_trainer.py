"""Pre-trains MARGE on your own text with Accelerate and a plain loop: copy it and change what you like.

    python examples/run_marge_pretraining_no_trainer.py --train_file corpus.jsonl --validation_file held_out.jsonl \
        --language_column language --group_column group --max_length 128 --num_targets 4 --num_evidence 4 \
        --config_overrides hidden_size=256,num_attention_heads=4,encoder_layers=4,decoder_base_layers=1,\
decoder_layers=3,encoder_intermediate_size=1024,decoder_base_intermediate_size=1024,decoder_intermediate_size=1024,\
retrieval_layers=2,initializer_range=0.05,hidden_dropout_prob=0,attention_probs_dropout_prob=0 \
        --learning_rate 1e-3 --retrieval_learning_rate_factor 0.02 --refresh_steps 500 --eval_steps 100 \
        --max_steps 2000 --output_dir runs/small

    # several GPUs share the shards; groups, losses and gradients are those of one process with the whole batch
    accelerate launch --num_processes 4 examples/run_marge_pretraining_no_trainer.py ...

    # several processes on a CPU
    torchrun --nproc_per_node 2 examples/run_marge_pretraining_no_trainer.py --use_cpu ...

Arguments are named as in run_marge_pretraining.py and may stand in one JSON or YAML file; --help lists them. The same
command goes on from the last checkpoint (Ctrl-C saves one), on a CPU to the very weights of an unbroken run. The folder
--output_dir gets checkpoints, `log.jsonl`, the model with its tokenizer, `all_results.json` and a model card.
"""

import json
import math
import sys
import time
from concurrent.futures import Future
from contextlib import closing, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import TrainerControl, TrainerState

import pretraining
from hf_paraphrase_lm import (
    DataCollatorForParaphrasing,
    EvidenceDataset,
    LexicalEmbedder,
    LogEvidenceCallback,
    MargeConfig,
)
from hf_paraphrase_lm.training.background_search import BackgroundSearch
from marge_data import CorpusArguments, EvidenceArguments, known_documents, load_documents, make_chunks
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
from run_marge_pretraining import NetworkArguments, evaluate, load_model, scale_retrieval, write_model_card
from runs import note_arguments, parse_arguments


@dataclass
class LoopArguments(pretraining.LoopArguments):
    """The training; its defaults are our choice."""

    output_dir: str = field(default="runs/marge", metadata={"help": "folder for checkpoints, model and results"})
    per_device_train_batch_size: int = field(default=1, metadata={"help": "groups in a batch, on each device"})
    learning_rate: float = field(default=1e-4, metadata={"help": "highest learning rate; small models: 1e-3"})
    eval_steps: int = field(default=500, metadata={"help": "updates between measurements of retrieval"})


class Refresh:
    """New groups from the model's embeddings, at once or by a thread beside the training; it is saved with the run.

    What a thread finds is put to use at the next refresh, however fast it is: so a run can be repeated, and the
    processes change over together.
    """

    def __init__(
        self, dataset: EvidenceDataset, evidence: EvidenceArguments, num_updates: int, pad_token_id: int, progress: bool
    ):
        self.dataset, self.evidence, self.num_updates = dataset, evidence, num_updates
        self.is_async = evidence.refresh_mode == "async"
        self.search: BackgroundSearch | None = None
        self.options = {"pad_token_id": pad_token_id, "batch_size": evidence.refresh_batch_size}
        self.options["progress"] = progress and not self.is_async
        if self.is_async and torch.distributed.is_initialized():
            # The messages of the thread must not meet those of the training.
            self.options["group"] = torch.distributed.new_group(backend="gloo")

    def is_due(self, step: int) -> bool:
        """Whether groups are to be made after this update."""
        return step > 0 and step >= self.evidence.hold_first_groups and step % self.evidence.refresh_steps == 0

    def __call__(self, model, step: int) -> dict[str, float]:
        """Installs new groups, made now or since the last refresh. Returns what there is to log about them."""
        found, begun = None, step
        if not self.is_async:
            found = self.dataset.find_groups(model, shards=self.sample(step), **self.options)
        elif self.search is not None:
            found, begun, self.search = self.search.result(), self.search.step, None
        if found is not None:
            self.dataset.install(found[0])
        if self.is_async and step + self.evidence.refresh_steps < self.num_updates:
            find = partial(self.dataset.find_groups, shards=self.sample(step), **self.options)
            self.search = BackgroundSearch.start(step, model, partial(find, number=self.dataset.num_rebuilds))
        if found is None:
            return {}
        return {f"refresh/{name}": value for name, value in found[1].items()} | {"refresh/staleness": step - begun}

    def sample(self, step: int) -> list | None:
        """The shards of this refresh."""
        if self.evidence.shards_per_refresh is None:
            return None
        return self.dataset.sample_shards(self.evidence.shards_per_refresh, step)

    def state_dict(self) -> dict:
        search = None if self.search is None else (self.search.step, self.search.result())
        return {"dataset": self.dataset.state_dict(), "search": search}

    def load_state_dict(self, state: dict):
        self.dataset.load_state_dict(state["dataset"])
        if state["search"] is not None:
            step, found = state["search"]
            self.search = BackgroundSearch(step, Future())
            self.search.future.set_result(found)

    def close(self):
        if self.search is not None:
            self.search.stop()


def train_step(accelerator: Accelerator, model, optimizer, batches: list[dict], max_grad_norm: float) -> torch.Tensor:
    """One update. Returns its loss, a mean over the target tokens of all batches of all processes."""
    model.train()
    num_tokens = accelerator.reduce(torch.stack([(batch["labels"] != -100).sum() for batch in batches]).sum())
    losses = []
    for number, batch in enumerate(batches, start=1):
        # The processes average their gradients once, after the last batch.
        with accelerator.no_sync(model) if number < len(batches) else nullcontext():
            loss = model(**batch, num_items_in_batch=num_tokens).loss
            accelerator.backward(loss * accelerator.num_processes)
        losses.append(loss.detach())
    if max_grad_norm:
        accelerator.clip_grad_norm_(model.parameters(), max_grad_norm)
    optimizer.step()
    optimizer.zero_grad()
    return accelerator.reduce(torch.stack(losses).sum())


def main():
    network, corpus, evidence, args = parse_arguments(
        __doc__.splitlines()[0], NetworkArguments, CorpusArguments, EvidenceArguments, LoopArguments
    )
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    accelerator = make_accelerator(args)
    checkpoint = next(reversed(find_checkpoints(folder)), None)
    note_arguments(checkpoint is not None, accelerator.is_main_process, args, network, corpus, evidence)
    set_seed(args.seed)
    documents = load_documents(corpus, "train", optional=("validation", "evidence"))
    with accelerator.local_main_process_first():
        # The tokens of a run that goes on stay as they are.
        is_to_train = accelerator.is_local_main_process and checkpoint is None
        tokenizer = load_tokenizer(MargeConfig, network, corpus, documents["train"], folder, is_to_train)
    model = load_model(network, tokenizer)
    with accelerator.local_main_process_first():
        chunks = make_chunks(documents, corpus, tokenizer, model)
    collator = DataCollatorForParaphrasing(tokenizer)
    dataset = evidence.make_dataset(chunks["train"], chunks.get("evidence"), args.seed)
    held_out = known = None
    if "validation" in chunks:
        held_out = evidence.make_dataset(chunks["validation"], chunks.get("evidence"), args.seed)
        if corpus.group_column:
            known = known_documents(documents["validation"], chunks["validation"], corpus.group_column)
    settings = {"collate_fn": collator, "num_workers": args.dataloader_num_workers}
    # With a generator of its own it leaves the global one to dropout.
    settings |= {"shuffle": True, "generator": torch.Generator()}
    loader = accelerator.prepare(DataLoader(dataset, args.per_device_train_batch_size, **settings))
    updates_per_epoch = math.ceil(len(loader) / args.gradient_accumulation_steps)
    total = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * updates_per_epoch)
    optimizer = make_optimizer(model, args)
    scale_retrieval(optimizer, model, evidence.retrieval_learning_rate_factor)
    scheduler = make_scheduler(optimizer, args, total)
    model, optimizer = accelerator.prepare(model, optimizer)
    marge = accelerator.unwrap_model(model)
    progress = accelerator.is_main_process and not args.disable_tqdm
    refresh = Refresh(dataset, evidence, total, tokenizer.pad_token_id, progress)
    # A prepared scheduler would take as many steps at a time as there are processes.
    accelerator.register_for_checkpointing(scheduler, refresh)
    given = (vars(network) | vars(corpus) | vars(evidence) | vars(args)).items()
    accelerator.init_trackers("marge", {name: value for name, value in given if value is not None})

    # Processes differ in their dropout.
    set_seed(args.seed, device_specific=True)
    if checkpoint is None:
        embedder = marge if evidence.first_groups == "model" else LexicalEmbedder(dataset.evidence, progress=progress)
        dataset.rebuild(embedder, tokenizer.pad_token_id, None, evidence.refresh_batch_size, progress)
        if accelerator.is_main_process:
            (folder / "log.jsonl").write_text("")
            (folder / "all_results.json").unlink(missing_ok=True)
    step = start = last_log = 0 if checkpoint is None else load_checkpoint(accelerator, checkpoint)
    accelerator.wait_for_everyone()
    # Called as Trainer calls it, it measures retrieval and warns when it collapses.
    watch = {"max_groups": evidence.eval_groups, "batch_size": evidence.refresh_batch_size}
    if known:
        watch |= {"known_documents": known[0], "known_groups": known[1]}
    watch = LogEvidenceCallback(dataset, args.eval_steps, held_out, collator, **watch)
    state, control = TrainerState(max_steps=total, global_step=start), TrainerControl()
    state.is_world_process_zero = accelerator.is_main_process
    state.log_history = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    event = {"args": SimpleNamespace(logging_strategy="steps"), "state": state, "control": control}
    event |= {"model": marge, "processing_class": tokenizer}
    watch.on_train_begin(**event)
    # The groups that a run begins or goes on with are not new to it.
    watch.on_step_begin(**event)
    loss, news, updates, begin, stops = 0, {}, None, time.time(), False
    bar = tqdm(total=total, initial=start, disable=not progress)
    with bar, closing(refresh), delayed_interrupt() as pressed:
        for step in range(start + 1, total + 1):
            if refresh.is_due(step - 1):
                news |= refresh(marge, step - 1)
                updates = None
            if updates is None:
                # Anew after a refresh: what was read ahead holds the groups from before.
                updates = read_updates(loader, args.gradient_accumulation_steps, step - 1)
            watch.on_step_begin(**event)
            loss += train_step(accelerator, model, optimizer, next(updates), args.max_grad_norm)
            if not accelerator.optimizer_step_was_skipped:
                scheduler.step()
            bar.update()
            state.global_step, control.should_log = step, step % args.logging_steps == 0
            watch.on_step_end(**event)
            # The processes stop together.
            stops = bool(accelerator.reduce(torch.tensor(len(pressed), device=accelerator.device)))
            saves = stops or step == total or step % args.checkpointing_steps == 0
            if saves or control.should_log:
                log = {"step": step, "loss": (loss / (step - last_log)).item(), "epoch": step / updates_per_epoch}
                log |= {"learning_rate": scheduler.get_last_lr()[0]} | news
                state.log_history.append(log)
                watch.on_log(**event, logs=log)
                loss, last_log, news = 0, step, {}
                bar.set_postfix(loss=log["loss"])
                accelerator.log(log, step)
                if accelerator.is_main_process:
                    with (folder / "log.jsonl").open("a") as file:
                        print(json.dumps(log), file=file)
            if saves:
                save_checkpoint(accelerator, folder, step, model)
            if stops:
                break
    metrics = {"train_runtime": time.time() - begin, "train_resumed": checkpoint is not None}
    metrics["train_samples"] = len(dataset)
    results = folder / "all_results.json"
    if start >= total and results.is_file():
        # The run was done already.
        known_metrics = json.loads(results.read_text())
        metrics = {name: known_metrics.get(name, value) for name, value in metrics.items()}
    if held_out and not stops:
        measured = evaluate(marge, held_out, known, collator, evidence, progress)
        accelerator.log(measured, step)
        metrics |= measured
    if accelerator.is_main_process and not stops:
        marge.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        results.write_text(json.dumps(metrics, indent=4))
        batch, ranks = loader.total_batch_size * args.gradient_accumulation_steps, accelerator.num_processes
        write_model_card(folder, marge, network, corpus, evidence, metrics, step, batch, ranks)
    accelerator.end_training()
    if stops:
        sentence = f"Interrupted at update {step}. The same command goes on from there."
        sys.exit(sentence if accelerator.is_main_process else 1)


if __name__ == "__main__":
    main()
