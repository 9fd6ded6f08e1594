"""Pre-trains a small MARGE and a small COCO-LM on real text, reloads both, and shows what they have learned.

    python examples/quickstart.py                # about three minutes on two CPU cores, nothing is downloaded
    python examples/quickstart.py --seed 1 --output runs/seed1

The text is the documentation of the Python that runs this script: thousands of docstrings, and among them hundreds of
groups that describe one operation in several wordings (str.split and bytes.split, posixpath.join and
PurePath.joinpath). The models are not told these groups. They only tell how many paraphrases retrieval finds.

A tenth of the documents is held out of training; all losses and detection rates in the table are on these, with the
groups of evidence that each MARGE makes for itself. COCO-LM reads bytes here, MARGE parts of words. The numbers in the
column "trained" come from a second process, which loads both models with the Auto classes.
"""

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.neighbors import NearestNeighbors
from transformers import (
    AutoModelForPreTraining,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    ProgressCallback,
    Trainer,
    TrainingArguments,
    set_seed,
)

from hf_paraphrase_lm import (
    CocoLMConfig,
    CocoLMForPretraining,
    DataCollatorForCorrectiveLM,
    DataCollatorForParaphrasing,
    EvidenceDataset,
    LexicalEmbedder,
    LogComponentLossesCallback,
    MargeConfig,
    MargeForConditionalGeneration,
    RefreshIndexCallback,
    StopOnInterruptCallback,
    chunk_documents,
    train_tokenizer,
)
from hf_paraphrase_lm.data import load_python_docs
from hf_paraphrase_lm.retrieval import embed_documents
from hf_paraphrase_lm.training import corrective_lm_metrics, evidence_losses, recall_at_k
from plot_run import draw_runs
from pretraining import bf16_is_faster

MAX_LENGTH = 64
# Small networks: what two CPU cores can train in about a minute each.
MARGE_SIZES = {
    "hidden_size": 128,
    "num_attention_heads": 4,
    "encoder_layers": 4,
    "decoder_base_layers": 1,
    "decoder_layers": 3,
    "retrieval_layers": 2,
    "encoder_intermediate_size": 512,
    "decoder_base_intermediate_size": 512,
    "decoder_intermediate_size": 512,
    "max_position_embeddings": MAX_LENGTH,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    # 0.02 suits a width of 1024; narrower networks need larger weights.
    "initializer_range": 0.06,
}
# The layers that retrieve learn at this share of the learning rate: while the decoder does not yet copy from evidence,
# what the loss tells them about relevance is noise, and would undo the lexical overlap that random layers see.
SLOW = 0.02
MARGE_LEARNING_RATE = 1e-3
COCOLM_SIZES = {
    "hidden_size": 128,
    "num_attention_heads": 8,
    "num_hidden_layers": 2,
    "auxiliary_layers": 1,
    "intermediate_size": 256,
    "max_position_embeddings": MAX_LENGTH,
    "rel_pos_bins": 32,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "auxiliary_sampling": "zero_dropout",
    "initializer_range": 0.1,
}
# Fewest tokens that train_tokenizer makes: bytes. Which letter is wrong can be learned in a minute, which word cannot.
BYTES = 261


class Corpus:
    """The documentation in chunks: to train on, held out, and the first chunk of each document with its group."""

    def __init__(self, texts: Dataset, tokenizer):
        chunks = chunk_documents(texts, tokenizer, max_length=MAX_LENGTH)
        document, groups = np.array(chunks["document"]), np.array(texts["group"])
        # Whole groups of paraphrases are held out; a document without a group is one by itself.
        keys = np.where(groups >= 0, groups, len(texts) + np.arange(len(texts)))
        distinct = np.unique(keys)
        held_out = np.random.default_rng(0).choice(distinct, len(distinct) // 10, replace=False)
        is_held_out = np.isin(keys, held_out)[document]
        self.training = chunks.select(np.flatnonzero(~is_held_out))
        self.held_out = chunks.select(np.flatnonzero(is_held_out))
        self.first_chunks = chunks.select(np.flatnonzero(np.array(chunks["chunk"]) == 0))
        self.texts = texts
        self.groups = groups[np.array(self.first_chunks["document"])]

    def recall(self, model, tokenizer) -> float:
        """Share of the documents with a known paraphrase whose nearest other document is one."""
        return recall_at_k(embed_documents(self.first_chunks, model, tokenizer.pad_token_id), self.groups)

    def lexical_recall(self) -> float:
        """The same by TF-IDF over the words of the whole texts."""
        words = TfidfVectorizer(sublinear_tf=True).fit_transform(self.texts["text"])
        nearest = NearestNeighbors(metric="cosine").fit(words).kneighbors(n_neighbors=1, return_distance=False)[:, 0]
        groups = np.array(self.texts["group"])
        return float((groups[nearest] == groups)[groups >= 0].mean())


def evaluate_marge(model, corpus: Corpus, tokenizer) -> dict[str, float]:
    groups = EvidenceDataset(corpus.held_out, num_targets=4, num_evidence=4)
    groups.rebuild(model, tokenizer.pad_token_id)
    losses = evidence_losses(model, groups, DataCollatorForParaphrasing(tokenizer), max_groups=100)
    return losses | {"recall": corpus.recall(model, tokenizer)}


def evaluate_cocolm(model, corpus: Corpus, tokenizer) -> dict[str, float]:
    sample = corpus.held_out.shuffle(seed=0).select(range(1000))
    return corrective_lm_metrics(model, sample, DataCollatorForCorrectiveLM(tokenizer))


def reconstruct(marge, corpus: Corpus, tokenizer) -> dict[str, str]:
    """A held-out target, the evidence that the model finds most relevant, and what it generates from all of it."""
    groups = EvidenceDataset(corpus.held_out, num_targets=1, num_evidence=4, strategy="neighbors")
    groups.rebuild(marge, tokenizer.pad_token_id, progress=False)
    items = [groups[i] for i in range(groups.num_groups)]
    batch = DataCollatorForParaphrasing(tokenizer)(items)
    with torch.no_grad():
        target = marge.embed(batch["labels"].clamp(min=0), batch["labels"] >= 0)
        evidence = marge.embed(batch["input_ids"], batch["attention_mask"])
        scores = (evidence @ target.unsqueeze(-1)).squeeze(-1)
    # A chunk may stand in two documents word for word; rebuilding that would show nothing.
    is_copy = torch.tensor([[ids == item["labels"][0] for ids in item["input_ids"]] for item in items])
    best = int(scores.masked_fill(is_copy, -1.0).max(dim=1).values.argmax())
    ids = marge.generate(
        batch["input_ids"][best : best + 1],
        attention_mask=batch["attention_mask"][best : best + 1],
        relevance_scores=scores[best : best + 1],
        max_new_tokens=MAX_LENGTH - 1,
        num_beams=4,
    )

    def text(row):
        return " ".join(tokenizer.decode(row, skip_special_tokens=True).split())

    return {
        "target": text(items[best]["labels"][0]),
        "evidence": text(items[best]["input_ids"][int(scores[best].argmax())]),
        "rebuilt": text(ids[0]),
    }


class ProgressBar(ProgressCallback):
    """Trainer's progress bar without a line for each log: the losses are drawn at the end."""

    def on_log(self, args, state, control, **kwargs):
        pass


def pre_train(model, parameters, dataset, collator, tokenizer, folder: Path, callbacks, **settings) -> list[dict]:
    """Plain Trainer; saves model and tokenizer, and returns what was logged."""
    # On a CPU, fused attention in bfloat16 has a slow backward pass; at this length the plain one is faster.
    model.set_attn_implementation("eager")
    arguments = TrainingArguments(
        output_dir=str(folder),
        use_cpu=True,
        bf16=bf16_is_faster(use_cpu=True),
        logging_steps=10,
        save_strategy="no",
        report_to="none",
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        **settings,
    )
    stop = StopOnInterruptCallback()
    trainer = Trainer(
        model=model,
        optimizers=(torch.optim.Adam(parameters, arguments.learning_rate, (0.9, 0.98), 1e-6, fused=True), None),
        args=arguments,
        train_dataset=dataset,
        data_collator=collator,
        processing_class=tokenizer,
        callbacks=[*callbacks, stop, ProgressBar()],
    )
    trainer.remove_callback(ProgressCallback)
    trainer.train()
    if stop.interrupted:
        sys.exit(f"Interrupted at update {trainer.state.global_step}: this model was not saved. Run me again.")
    # Written beside its place and then moved there, so that no half of a model is ever found in it.
    partial = folder.with_name(f"{folder.name}.partial")
    trainer.save_model(str(partial))
    trainer.state.save_to_json(str(partial / "trainer_state.json"))
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
    return trainer.state.log_history


def pre_train_marge(model, corpus: Corpus, tokenizer, folder: Path, args) -> list[dict]:
    groups = EvidenceDataset(corpus.training, num_targets=4, num_evidence=4, seed=args.seed)
    # The first groups share rare words. From the first refresh on, the model retrieves for itself.
    groups.rebuild(LexicalEmbedder(corpus.training), tokenizer.pad_token_id)
    retrieval = list(model.model.encoder.layers[: model.config.retrieval_layers].parameters())
    others = [p for p in model.parameters() if not any(p is q for q in retrieval)]
    return pre_train(
        model,
        [{"params": others}, {"params": retrieval, "lr": SLOW * MARGE_LEARNING_RATE}],
        groups,
        DataCollatorForParaphrasing(tokenizer),
        tokenizer,
        folder,
        [RefreshIndexCallback(groups, refresh_steps=args.marge_steps // 4)],
        seed=args.seed,
        max_steps=args.marge_steps,
        per_device_train_batch_size=4,
        learning_rate=MARGE_LEARNING_RATE,
        warmup_steps=30,
    )


def pre_train_cocolm(model, corpus: Corpus, tokenizer, folder: Path, args) -> list[dict]:
    # Finding out that neighbors matter takes thousands of updates, for which the demo has not the time.
    model.cocolm.attend_to_neighbors()
    return pre_train(
        model,
        model.parameters(),
        corpus.training,
        DataCollatorForCorrectiveLM(tokenizer),
        tokenizer,
        folder,
        [LogComponentLossesCallback()],
        seed=args.seed,
        max_steps=args.cocolm_steps,
        per_device_train_batch_size=16,
        learning_rate=2e-3,
        warmup_steps=0.1,
        max_grad_norm=2.0,
    )


def print_table(before: dict, after: dict, lexical_recall: float):
    """Untrained and trained side by side; every row says what it should be compared with."""
    rows = [("held-out documents, losses in nats", "untrained", "trained", "")]
    for kind in ("retrieved", "random", "none"):
        title = f"MARGE loss, {'no' if kind == 'none' else kind} evidence"
        rows.append((title, before["marge"][kind], after["marge"][kind], "lower is better"))
    note = f"TF-IDF of words: {lexical_recall:.3f}"
    rows.append(("MARGE recall@1 of known paraphrases", before["marge"]["recall"], after["marge"]["recall"], note))
    for name in ("mlm", "copy", "corrective_lm", "contrastive"):
        title = f"COCO-LM {name.replace('_lm', ' LM')} loss"
        rows.append((title, before["cocolm"][f"{name}_loss"], after["cocolm"][f"{name}_loss"], "lower is better"))
    old, new = before["cocolm"], after["cocolm"]
    note = f"always 'original': {new['majority_rate']:.4f}"
    rows.append(
        ("COCO-LM replaced-token detection, accuracy", old["detection_accuracy"], new["detection_accuracy"], note)
    )
    rows.append(
        ("COCO-LM replaced-token detection, F1", old["detection_f1"], new["detection_f1"], "of replaced tokens")
    )
    print()
    for number, (title, *values, note) in enumerate(rows):
        cells = [value if isinstance(value, str) else f"{value:.4f}" for value in values]
        print(f"{title:<44}{cells[0]:>11}{cells[1]:>11}   {note}".rstrip())
        if number == 0:
            print("-" * 90)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/quickstart"), help="folder for models and curves")
    parser.add_argument("--seed", type=int, default=0, help="of the weights, of masks and of the order of the data")
    parser.add_argument("--marge-steps", type=int, default=400, help="updates of MARGE; evidence is refreshed 3 times")
    parser.add_argument("--cocolm-steps", type=int, default=700, help="updates of COCO-LM")
    parser.add_argument("--evaluate", action="store_true", help="only load the saved models and write their numbers")
    args = parser.parse_args()
    folders = {"marge": args.output / "marge", "cocolm": args.output / "cocolm"}

    texts = load_python_docs()
    if args.evaluate:
        # What comes now is all that a user of the saved models needs: their folders and the Auto classes.
        marge = AutoModelForSeq2SeqLM.from_pretrained(folders["marge"])
        cocolm = AutoModelForPreTraining.from_pretrained(folders["cocolm"])
        words, letters = (AutoTokenizer.from_pretrained(folder) for folder in folders.values())
        corpus = Corpus(texts, words)
        results = {
            "marge": evaluate_marge(marge, corpus, words),
            "cocolm": evaluate_cocolm(cocolm, Corpus(texts, letters), letters),
            "example": reconstruct(marge, corpus, words),
        }
        (args.output / "results.json").write_text(json.dumps(results, indent=2))
        return

    began = time.perf_counter()
    set_seed(args.seed)
    words, letters = (train_tokenizer(texts, vocab_size=size, model_max_length=MAX_LENGTH) for size in (4096, BYTES))
    documents, spellings = Corpus(texts, words), Corpus(texts, letters)
    print(f"{len(texts)} documents; {len(documents.training)} chunks to train on, {len(documents.held_out)} held out")
    marge = MargeForConditionalGeneration(MargeConfig(vocab_size=len(words), **MARGE_SIZES))
    cocolm = CocoLMForPretraining(CocoLMConfig(vocab_size=len(letters), **COCOLM_SIZES))
    before = {
        "marge": evaluate_marge(marge, documents, words),
        "cocolm": evaluate_cocolm(cocolm, spellings, letters),
    }

    print("\nMARGE learns to rebuild documents from the ones it retrieves.")
    logs = {"marge": pre_train_marge(marge, documents, words, folders["marge"], args)}
    print("\nCOCO-LM learns to find and correct replaced tokens.")
    logs["cocolm"] = pre_train_cocolm(cocolm, spellings, letters, folders["cocolm"], args)
    # The sum of COCO-LM's losses has a scale of its own; its parts are drawn.
    logs["cocolm"] = [{name: value for name, value in log.items() if name != "loss"} for log in logs["cocolm"]]
    draw_runs(logs).savefig(args.output / "curves.png", dpi=120)

    print("\nA new process loads both models and evaluates them.")
    command = [sys.executable, __file__, "--evaluate", "--output", str(args.output), "--seed", str(args.seed)]
    subprocess.run(command, check=True)
    after = json.loads((args.output / "results.json").read_text())
    print_table(before, after, documents.lexical_recall())
    for name, text in after["example"].items():
        print(f"\n{name}: {text}")
    print(f"\nDone in {time.perf_counter() - began:.0f} s. Saved:")
    for path in (*folders.values(), args.output / "curves.png", args.output / "results.json"):
        print(f"  {path}")


if __name__ == "__main__":
    main()
