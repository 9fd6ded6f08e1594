"""Pre-trains MARGE: documents are rebuilt from related ones that it retrieves.

    # a small model on documents in several languages, one a line with its text and language; in the held-out ones the
    # column `group` tells which documents are known to be related, so that retrieval can be measured
    python examples/run_marge_pretraining.py --train_file corpus.jsonl --validation_file held_out.jsonl \
        --language_column language --group_column group --max_length 128 --num_targets 4 --num_evidence 4 \
        --config_overrides hidden_size=256,num_attention_heads=4,encoder_layers=4,decoder_base_layers=1,\
decoder_layers=3,encoder_intermediate_size=1024,decoder_base_intermediate_size=1024,decoder_intermediate_size=1024,\
retrieval_layers=2,initializer_range=0.05,hidden_dropout_prob=0,attention_probs_dropout_prob=0 \
        --learning_rate 1e-3 --retrieval_learning_rate_factor 0.02 --refresh_steps 500 --eval_steps 100 \
        --do_train --do_eval --max_steps 2000 --output_dir runs/small
    python examples/plot_run.py runs/small

    # translations among documents of many languages, those of one article in one shard (examples/README.md has results)
    python examples/run_marge_pretraining.py --train_file articles.parquet --shard_column article \
        --language_column language --other_languages_only --center_languages --pairs_per_target 1 \
        --contrastive_loss_weight 1 --per_device_train_batch_size 16 --num_targets 2 --num_evidence 2 ...

    # languages that share few words: the layers that embed documents first, all of the model then
    python examples/run_marge_pretraining.py --reconstruction_loss_weight 0 --contrastive_loss_weight 1 \
        --num_targets 1 --num_evidence 1 --per_device_train_batch_size 32 --pairs_per_target .25 --output_dir runs/1 ...
    python examples/run_marge_pretraining.py --model_name_or_path runs/1 --reconstruction_loss_weight 1 \
        --first_groups model --output_dir runs/2 ...

    # continued pre-training, on news by day: evidence is of the same day, and articles begin with what they are about
    python examples/run_marge_pretraining.py --model_name_or_path runs/small --train_file news.parquet \
        --shard_column date --shards_per_refresh 100 --first_chunks_only ...

    # every target with its own nearest documents, from another corpus
    python examples/run_marge_pretraining.py --strategy neighbors --evidence_file encyclopedia.parquet ...

    # several processes share the shards; batches, groups and losses are those of one process with the whole batch
    accelerate launch --num_processes 4 examples/run_marge_pretraining.py ...
    torchrun --nproc_per_node 2 examples/run_marge_pretraining.py --use_cpu ...

A batch holds groups of targets that share their evidence. The first groups have rare words in common; every
--refresh_steps updates the model makes new ones. Does retrieval help? `evidence/utility`, the held-out loss without
evidence less that with it, should rise above 0. If it does not, or a warning says that retrieval collapses, lower
--retrieval_learning_rate_factor or hold the first groups for longer (--hold_first_groups); or let relevance learn to
tell a target's evidence from that of the other groups in its batch (--contrastive_loss_weight, not in the paper).

Without --tokenizer_name and --model_name_or_path a tokenizer is trained on the corpus. All arguments may stand in one
JSON or YAML file instead. --help lists them all; those after --output_dir are transformers.TrainingArguments.
"""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from transformers import set_seed

from hf_paraphrase_lm import (
    DataCollatorForParaphrasing,
    EvidenceDataset,
    LexicalEmbedder,
    LogComponentLossesCallback,
    LogEvidenceCallback,
    MargeConfig,
    MargeForConditionalGeneration,
    RefreshIndexCallback,
)
from hf_paraphrase_lm.data.documents import special_token_id
from hf_paraphrase_lm.retrieval import embed_documents
from hf_paraphrase_lm.training import evidence_losses, recall_at_k
from marge_data import CorpusArguments, EvidenceArguments, known_documents, load_documents, make_chunks
from pretraining import PretrainingArguments, load_tokenizer, pretraining_card
from runs import (
    ModelArguments,
    OrderedTrainer,
    check_run,
    last_checkpoint,
    override,
    parse_arguments,
    train,
    wanted_splits,
)


@dataclass
class NetworkArguments:
    """The model to train."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "checkpoint to go on from; without it, random weights"}
    )
    tokenizer_name: str | None = field(default=None, metadata={"help": "tokenizer, if it is not the checkpoint's"})
    config_overrides: str | None = field(
        default=None, metadata={"help": "fields of MargeConfig, such as hidden_size=256,encoder_layers=4"}
    )
    distillation_loss_weight: float | None = field(
        default=None,
        metadata={"help": "how much relevance also learns from what the decoder reads"},
    )
    reconstruction_loss_weight: float | None = field(
        default=None, metadata={"help": "0: train by contrast only those layers that embed documents, in little time"}
    )
    contrastive_loss_weight: float | None = field(
        default=None,
        metadata={"help": "how much relevance also learns to tell what is of one group from what is of others"},
    )
    attn_implementation: str | None = field(
        default=None, metadata={"help": "'sdpa', 'eager'; on a CPU with --bf16, 'eager' is the fastest for short texts"}
    )


@dataclass
class MargeTrainingArguments(PretrainingArguments):
    """transformers.TrainingArguments with other defaults, which are our choice."""

    output_dir: str = field(default="runs/marge", metadata={"help": "folder for checkpoints, model and results"})
    per_device_train_batch_size: int = field(default=1, metadata={"help": "groups in a batch, on each device"})
    learning_rate: float = field(default=1e-4, metadata={"help": "highest learning rate; small models: 1e-3"})
    warmup_steps: float = field(default=0.1, metadata={"help": "updates, or if below 1 their share"})
    eval_steps: int = field(default=500, metadata={"help": "updates between measurements of retrieval"})

    def __post_init__(self):
        super().__post_init__()
        if self.eval_strategy != "no":
            raise ValueError(
                f"--eval_strategy must be no, but got {self.eval_strategy.value}. Held-out groups are measured every "
                "--eval_steps updates in any case, where there is a --validation_file."
            )
        if self.n_gpu > 1:
            raise ValueError(
                f"Every GPU needs a process, but this one has {self.n_gpu}. Start the script with `accelerate launch "
                f"--num_processes {self.n_gpu}`, or show it one GPU with CUDA_VISIBLE_DEVICES=0."
            )


class HeldGroups(RefreshIndexCallback):
    """Refreshes after the first groups have been held for `hold_steps` updates."""

    def __init__(self, *args, hold_steps: int, **kwargs):
        super().__init__(*args, **kwargs)
        self.hold_steps = hold_steps

    def _refresh(self, step: int, *args):
        if step == 0 or step >= self.hold_steps:
            super()._refresh(step, *args)


class PretrainingTrainer(OrderedTrainer):
    """The layers that embed documents have a learning rate of their own; the model card is left to this script."""

    def __init__(self, *args, retrieval_learning_rate_factor: float, **kwargs):
        super().__init__(*args, **kwargs)
        self.retrieval_learning_rate_factor = retrieval_learning_rate_factor

    def create_optimizer(self, *args):
        if self.optimizer is None:
            super().create_optimizer(*args)
            scale_retrieval(self.optimizer, self.model, self.retrieval_learning_rate_factor)
        return self.optimizer


def scale_retrieval(optimizer, model: MargeForConditionalGeneration, factor: float):
    """Multiplies the learning rate of the layers that embed documents, before the first update.

    While the decoder does not yet copy from evidence, what the loss tells these layers about relevance is noise. The
    token embeddings below them serve the decoder too, and are left as they are.
    """
    layers = model.model.encoder.layers[: model.config.retrieval_layers]
    own = {id(weight) for weight in layers.parameters()}
    for group in list(optimizer.param_groups):
        moved = [weight for weight in group["params"] if id(weight) in own]
        group["params"] = [weight for weight in group["params"] if id(weight) not in own]
        optimizer.add_param_group(group | {"params": moved, "lr": factor * group["lr"]})


def load_model(network: NetworkArguments, tokenizer) -> MargeForConditionalGeneration:
    """From a checkpoint, or with random weights.

    Raises:
        ValueError: the checkpoint is of another family.
        huggingface_hub.errors.StrictDataclassError: a setting is not one of MARGE; see [`MargeConfig`].
    """
    name = network.model_name_or_path
    if name:
        config = ModelArguments(name).load_config()
    else:
        end = special_token_id(tokenizer, "sep", "eos")
        tokens = {"bos": special_token_id(tokenizer, "cls", "bos"), "pad": tokenizer.pad_token_id, "eos": end}
        tokens = {f"{token}_token_id": number for token, number in tokens.items()}
        config = MargeConfig(vocab_size=len(tokenizer), decoder_start_token_id=end, **tokens)
    if not isinstance(config, MargeConfig):
        raise ValueError(
            f"--model_name_or_path must be a MARGE checkpoint, but is of the family {config.model_type!r}."
        )
    for weight in ("distillation_loss_weight", "reconstruction_loss_weight", "contrastive_loss_weight"):
        if getattr(network, weight) is not None:
            setattr(config, weight, getattr(network, weight))
    override(config, network.config_overrides)
    if name:
        model = ModelArguments(name).load(MargeForConditionalGeneration, config)
    else:
        model = MargeForConditionalGeneration(config)
    if network.attn_implementation:
        model.set_attn_implementation(network.attn_implementation)
    if config.reconstruction_loss_weight == 0:
        # The others get no gradient, which DistributedDataParallel would wait for.
        encoder = model.model.encoder
        model.requires_grad_(False)
        for module in (encoder.embed_tokens, encoder.embed_positions, encoder.layers[: config.retrieval_layers]):
            module.requires_grad_(True)
    return model


def recall(embedder, known, pad_token_id: int, batch_size: int, progress: bool) -> dict[str, float]:
    """Share of the known documents whose nearest other one is related; also of another language, where there are some.

    Args:
        known: what `known_documents` returns.
    """
    documents, groups = known
    vectors = embed_documents(documents, embedder, pad_token_id, batch_size, progress=progress)
    metrics = {"recall_at_1": recall_at_k(vectors, groups)}
    languages = np.array(documents["language"])
    if any(len(set(languages[groups == group]) - {""}) > 1 for group in set(groups) - {-1}):
        metrics["cross_language_recall_at_1"] = recall_at_k(vectors, groups, languages=languages)
    return metrics


def evaluate(model, held_out: EvidenceDataset, known, collator, evidence: EvidenceArguments, progress: bool) -> dict:
    """Losses on held-out groups with retrieved, random and no evidence; recall, and for comparison that by TF-IDF.

    Args:
        known: what `known_documents` returns, or None.
    """
    pad_token_id, batch_size = collator.tokenizer.pad_token_id, evidence.refresh_batch_size
    held_out.install(held_out.find_groups(model, pad_token_id, None, batch_size, progress, number=0)[0])
    losses = evidence_losses(model, held_out, collator, max_groups=evidence.eval_groups, progress=progress)
    metrics = {f"eval_loss_{kind}": loss for kind, loss in losses.items()}
    metrics["eval_utility"] = losses["none"] - losses["retrieved"]
    if known is not None:
        for kind, embedder in (("", model), ("lexical_", LexicalEmbedder(known[0], progress=progress))):
            found = recall(embedder, known, pad_token_id, batch_size, progress)
            metrics |= {f"eval_{kind}{name}": value for name, value in found.items()}
    return metrics


def write_model_card(
    folder: Path,
    model: MargeForConditionalGeneration,
    network: NetworkArguments,
    corpus: CorpusArguments,
    evidence: EvidenceArguments,
    metrics: dict,
    steps: int,
    groups_per_step: int,
    num_processes: int,
    name: str | None = None,
):
    """Fills the template `model_cards/marge.md` with what was run and measured."""
    values = {name: f"{value:.4f}" for name, value in metrics.items() if name.startswith("eval_")}
    words = {name: f"{value} by words in common (TF-IDF)" for name, value in values.items() if "lexical" in name}
    baselines = {name.replace("lexical_", ""): value for name, value in words.items()}
    if values:
        others = f"{values['eval_loss_random']} with random, {values['eval_loss_none']} with no evidence"
        baselines["eval_loss_retrieved"] = others
    rows = [name for name in values if name not in {*words, "eval_loss_random", "eval_loss_none"}]
    measured = f" but losses, in nats a token, and recall on `{corpus.dataset_name or corpus.validation_file}`"
    card = pretraining_card(
        "marge.md",
        folder,
        network.model_name_or_path,
        corpus,
        metrics,
        model.device,
        num_processes,
        name,
        parameters=f"{model.num_parameters():,}",
        steps=steps,
        targets_per_step=groups_per_step * evidence.num_targets,
        num_evidence=evidence.num_evidence,
        refresh_steps=evidence.refresh_steps,
        limits=f"Nothing was measured{measured if rows else ''}. Fine-tune it before you judge it.",
        results=[{"metric": name, "value": values[name], "baseline": baselines.get(name, "")} for name in rows],
    )
    card.save(folder / "README.md")


def main():
    network, corpus, evidence, training = parse_arguments(
        __doc__.splitlines()[0], NetworkArguments, CorpusArguments, EvidenceArguments, MargeTrainingArguments
    )
    wanted = wanted_splits(training)
    check_run(training, network, corpus, evidence)
    set_seed(training.seed)
    documents = load_documents(corpus, *wanted)
    folder = Path(training.output_dir)
    goes_on = last_checkpoint(folder) is not None
    with training.main_process_first(desc="training of the tokenizer"):
        # The tokens of a run that goes on stay as they are.
        is_to_train = training.local_process_index == 0 and not goes_on
        texts = documents.get("train")
        tokenizer = load_tokenizer(MargeConfig, network, corpus, texts, folder, is_to_train)
    model = load_model(network, tokenizer)
    with training.main_process_first(desc="tokenizing"):
        chunks = make_chunks(documents, corpus, tokenizer, model)
    collator = DataCollatorForParaphrasing(tokenizer)
    seed = training.seed if training.data_seed is None else training.data_seed
    groups = {split: evidence.make_dataset(chunks[split], chunks.get("evidence"), seed) for split in wanted}
    dataset, held_out = groups.get("train"), groups.get("validation")
    known = None
    if training.do_eval and corpus.group_column:
        known = known_documents(documents["validation"], chunks["validation"], corpus.group_column)
    progress = not training.disable_tqdm and training.process_index == 0
    callbacks = [LogComponentLossesCallback()]
    if training.do_train:
        refresh = {"batch_size": evidence.refresh_batch_size, "progress": progress, "mode": evidence.refresh_mode}
        refresh |= {"shards_per_refresh": evidence.shards_per_refresh, "hold_steps": evidence.hold_first_groups}
        callbacks.append(HeldGroups(dataset, evidence.refresh_steps, **refresh))
        watch = {"max_groups": evidence.eval_groups, "batch_size": evidence.refresh_batch_size}
        if known is not None:
            watch |= {"known_documents": known[0], "known_groups": known[1]}
        callbacks.append(LogEvidenceCallback(dataset, training.eval_steps, held_out, collator, **watch))
    trainer = PretrainingTrainer(
        model=model,
        args=training,
        train_dataset=dataset,
        data_collator=collator,
        processing_class=tokenizer,
        callbacks=callbacks,
        retrieval_learning_rate_factor=evidence.retrieval_learning_rate_factor,
    )
    metrics = {}
    if training.do_train:
        if evidence.first_groups == "lexical" and not goes_on:
            embedder = LexicalEmbedder(dataset.evidence, progress=progress)
            dataset.rebuild(embedder, tokenizer.pad_token_id, None, evidence.refresh_batch_size, progress)
        metrics |= train(trainer)
    if training.do_eval:
        measured = evaluate(model, held_out, known, collator, evidence, progress)
        trainer.log_metrics("eval", measured)
        trainer.save_metrics("eval", measured)
        metrics |= measured
    if training.do_train and trainer.is_world_process_zero():
        write_model_card(
            folder,
            model,
            network,
            corpus,
            evidence,
            metrics,
            steps=trainer.state.global_step,
            groups_per_step=training.train_batch_size * training.gradient_accumulation_steps * training.world_size,
            num_processes=training.world_size,
            name=trainer.hub_model_id,
        )
    if training.do_train and training.push_to_hub:
        trainer.push_to_hub()


if __name__ == "__main__":
    main()
