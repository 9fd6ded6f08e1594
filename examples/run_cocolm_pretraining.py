"""Pre-trains COCO-LM on your own text, from random weights or from a checkpoint.

    # a small model on a text file, one paragraph a line
    python examples/run_cocolm_pretraining.py --train_file corpus.txt --output_dir runs/small \
        --config_overrides hidden_size=256,num_attention_heads=4,num_hidden_layers=4,intermediate_size=1024 \
        --do_train --num_train_epochs 1 --per_device_train_batch_size 32 --learning_rate 1e-3

    # continued pre-training: of a released, a pre-trained or a fine-tuned checkpoint
    python examples/run_cocolm_pretraining.py --model_name_or_path microsoft/cocolm-base ...

    # the paper's ablations: ELECTRA, or plain masked language modelling
    python examples/run_cocolm_pretraining.py --discriminator_objective replaced_token_detection ...
    python examples/run_cocolm_pretraining.py --discriminator_objective masked_lm ...

    # any two encoders with one vocabulary under the same objective; the main one is saved in OUTPUT_DIR/main, too
    python examples/run_cocolm_pretraining.py --model_name_or_path answerdotai/ModernBERT-base \
        --auxiliary_name_or_path my-small-modernbert ...

    # Muon for the matrices of the layers and AdamW for the rest, with one learning rate; not in the paper
    python examples/run_cocolm_pretraining.py --use_muon --learning_rate 2e-3 ...

    # several processes; batches, losses and their gradients are those of one process with the whole batch
    accelerate launch --num_processes 4 examples/run_cocolm_pretraining.py ...

Without --tokenizer_name and --model_name_or_path a tokenizer is trained on the corpus. All arguments may stand in one
JSON or YAML file instead. --help lists them all; those after --output_dir are transformers.TrainingArguments.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from transformers import AutoModel, set_seed

from hf_paraphrase_lm import (
    CocoLMConfig,
    CocoLMForPretraining,
    CorrectiveLMTrainer,
    DataCollatorForCorrectiveLM,
    LogComponentLossesCallback,
    MuonWithAdamW,
    NewMasksCallback,
    chunk_documents,
)
from hf_paraphrase_lm.training import corrective_lm_metrics
from pretraining import PretrainingArguments, check_length, load_tokenizer, pretraining_card
from runs import (
    DataArguments,
    ModelArguments,
    OrderedTrainer,
    check_run,
    last_checkpoint,
    load_splits,
    override,
    parse_arguments,
    train,
    wanted_splits,
)

# What the main network learns, for the model card.
OBJECTIVES = {
    "corrective_lm": "to tell which tokens of a text a smaller network replaced, and to restore the original ones",
    "replaced_token_detection": "to tell which tokens of a text a smaller network replaced (the objective of ELECTRA)",
    "masked_lm": "to fill the masks in a text",
}


@dataclass
class NetworkArguments:
    """The networks to train."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "checkpoint to go on from; without it, random weights"}
    )
    auxiliary_name_or_path: str | None = field(
        default=None,
        metadata={"help": "the auxiliary network, if --model_name_or_path is an encoder of its own, such as BERT"},
    )
    tokenizer_name: str | None = field(default=None, metadata={"help": "tokenizer, if it is not the checkpoint's"})
    config_overrides: str | None = field(
        default=None, metadata={"help": "fields of CocoLMConfig, such as hidden_size=256,num_hidden_layers=4"}
    )
    discriminator_objective: Literal["corrective_lm", "replaced_token_detection", "masked_lm"] | None = field(
        default=None, metadata={"help": "what the main network learns; by default as before, or as in COCO-LM"}
    )
    attend_to_neighbors: float = field(
        default=0.0,
        metadata={"help": "random weights prefer the nearest tokens by so much (4.0: faster for small budgets)"},
    )
    attn_implementation: str | None = field(
        default=None, metadata={"help": "'sdpa', 'eager'; on a CPU with --bf16, 'eager' is the fastest for short texts"}
    )


@dataclass
class CorpusArguments(DataArguments):
    """The text, and how it is corrupted and cropped."""

    text_column: str = field(default="text", metadata={"help": "the column of texts"})
    max_length: int = field(default=512, metadata={"help": "longest sequence, in tokens; the tokenizer may say less"})
    vocab_size: int = field(default=32_768, metadata={"help": "size of a tokenizer trained on the corpus"})
    lowercase: bool = field(default=False, metadata={"help": "whether a tokenizer trained on the corpus is uncased"})
    mask_probability: float = field(default=0.15, metadata={"help": "share of the tokens that are masked"})
    whole_word_masking: bool = field(default=False, metadata={"help": "mask words instead of tokens"})
    span_ratio: float = field(default=0.9, metadata={"help": "length of the crop, as a share of the text's"})


@dataclass
class CocoLMTrainingArguments(PretrainingArguments):
    """transformers.TrainingArguments with the optimiser's settings in the authors' code.

    COCO-LM base was trained for 125,000 updates of 2048 sequences of 512 tokens. That its highest learning rate was
    5e-4 is not confirmed by a source.
    """

    output_dir: str = field(default="runs/cocolm", metadata={"help": "folder for checkpoints, model and results"})
    learning_rate: float = field(default=5e-4, metadata={"help": "highest learning rate"})
    max_grad_norm: float = field(default=2.0, metadata={"help": "gradients are clipped to this norm"})
    warmup_steps: float = field(default=0.08, metadata={"help": "updates, or if below 1 their share (10k of 125k)"})
    use_muon: bool = field(
        default=False, metadata={"help": "Muon for the layers' matrices and AdamW for the rest, in place of --optim"}
    )
    per_device_eval_batch_size: int = field(default=32, metadata={"help": "texts in a batch of evaluation"})
    # Predictions of a whole corpus fill the memory.
    prediction_loss_only: bool = field(default=True, metadata={"help": "evaluate the loss only"})


def longest_text(corpus: CorpusArguments, tokenizer, model: CocoLMForPretraining) -> int:
    """Tokens in the longest text: as many as `--max_length` and the tokenizer allow.

    Raises:
        ValueError: they are more than a network takes.
    """
    length = min(corpus.max_length, tokenizer.model_max_length)
    for network in (model.base_model, model.auxiliary):
        # Some networks of other families take any length.
        check_length(length, getattr(network.config, "max_position_embeddings", length))
    return length


def load_model(network: NetworkArguments, tokenizer) -> CocoLMForPretraining:
    """Both networks: from a checkpoint, from two, or with random weights.

    Raises:
        ValueError: only one of two encoders of other families is named, or `--attend_to_neighbors` does not apply.
        huggingface_hub.errors.StrictDataclassError: a setting is not one of COCO-LM; see [`CocoLMConfig`].
    """
    names = [name for name in (network.model_name_or_path, network.auxiliary_name_or_path) if name]
    checkpoints = [ModelArguments(name) for name in names]
    configs = [checkpoint.load_config() for checkpoint in checkpoints]
    if network.attend_to_neighbors and names:
        raise ValueError("--attend_to_neighbors is for random weights. Leave it out with --model_name_or_path.")
    if network.auxiliary_name_or_path and not network.model_name_or_path:
        raise ValueError("--auxiliary_name_or_path goes with the main network. Give --model_name_or_path, too.")
    if len(names) == 1 and not isinstance(configs[0], CocoLMConfig):
        raise ValueError(
            f"--model_name_or_path is of the family {configs[0].model_type!r}. Give with --auxiliary_name_or_path a "
            "smaller network of the same vocabulary, which replaces tokens for it."
        )
    config = configs[0] if len(names) == 1 else CocoLMConfig(vocab_size=len(tokenizer))
    if network.discriminator_objective:
        config.discriminator_objective = network.discriminator_objective
    override(config, network.config_overrides)
    if not names:
        model = CocoLMForPretraining(config)
    elif len(names) == 1:
        model = checkpoints[0].load(CocoLMForPretraining, config)
    else:
        encoders = (checkpoint.load(AutoModel, own) for checkpoint, own in zip(checkpoints, configs, strict=True))
        model = CocoLMForPretraining.from_encoders(*encoders, config)
    if network.attend_to_neighbors:
        for encoder in (model.cocolm, model.auxiliary):
            encoder.attend_to_neighbors(network.attend_to_neighbors)
    if network.attn_implementation:
        model.set_attn_implementation(network.attn_implementation)
    return model


def make_muon(model: CocoLMForPretraining, training: CocoLMTrainingArguments) -> MuonWithAdamW:
    betas = (training.adam_beta1, training.adam_beta2)
    return MuonWithAdamW(model, training.learning_rate, training.weight_decay, betas, training.adam_epsilon)


class PretrainingTrainer(OrderedTrainer, CorrectiveLMTrainer):
    """Leaves the model card to this script."""


def evaluate(model: CocoLMForPretraining, texts, collator, batch_size: int) -> dict[str, float]:
    """Metrics of the validation data, without losses that are not part of the objective."""
    measured = corrective_lm_metrics(model, texts, collator, batch_size)
    return {f"eval_{name}": value for name, value in measured.items() if value or not name.endswith("_loss")}


def save_main_encoder(model: CocoLMForPretraining, tokenizer, folder: Path):
    """Saves an encoder of another family once more in `folder/main`, as a checkpoint of its own class."""
    if model.config.main_config is not None:
        model.base_model.save_pretrained(folder / "main")
        tokenizer.save_pretrained(folder / "main")


def write_model_card(
    folder: Path,
    model: CocoLMForPretraining,
    network: NetworkArguments,
    corpus: CorpusArguments,
    metrics: dict,
    steps: int,
    sequences_per_step: int,
    num_processes: int,
    name: str | None = None,
):
    """Fills the template `model_cards/cocolm.md` with what was run and measured."""
    config = model.config
    baselines = {"eval_detection_accuracy": f'{metrics.get("eval_majority_rate", 0):.4f} (always "original")'}
    contrast = ", and to recognise a crop of the same text"
    measured = f" but losses, in nats, and shares on `{corpus.dataset_name or corpus.validation_file}`"
    rows = {name: value for name, value in metrics.items() if name.startswith("eval_") and name != "eval_majority_rate"}
    card = pretraining_card(
        "cocolm.md",
        folder,
        network.model_name_or_path,
        corpus,
        metrics,
        model.device,
        num_processes,
        name,
        family=model.base_model.config.model_type,
        other_encoder=config.main_config is not None,
        parameters=f"{model.num_parameters():,} ({model.base_model.num_parameters():,} in the encoder)",
        objective=OBJECTIVES[config.discriminator_objective] + (contrast if config.contrastive_loss_weight else ""),
        steps=steps,
        sequences_per_step=sequences_per_step,
        limits=f"Nothing was measured{measured if rows else ''}. Fine-tune it before you judge it.",
        results=[{"metric": n, "value": f"{value:.4f}", "baseline": baselines.get(n, "")} for n, value in rows.items()],
    )
    card.save(folder / "README.md")


def main():
    network, corpus, training = parse_arguments(
        __doc__.splitlines()[0], NetworkArguments, CorpusArguments, CocoLMTrainingArguments
    )
    wanted = wanted_splits(training)
    check_run(training, network, corpus)
    set_seed(training.seed)
    splits = load_splits(corpus, *wanted)
    resumed = last_checkpoint(Path(training.output_dir)) is not None
    with training.main_process_first(desc="training of the tokenizer"):
        # The tokens of a run that goes on stay as they are.
        is_to_train = training.local_process_index == 0 and not resumed
        texts = splits["train"] if training.do_train else None
        tokenizer = load_tokenizer(CocoLMConfig, network, corpus, texts, Path(training.output_dir), is_to_train)
    model = load_model(network, tokenizer)
    length = longest_text(corpus, tokenizer, model)
    with training.main_process_first(desc="tokenizing"):
        chunks = {split: chunk_documents(splits[split], tokenizer, length, corpus.text_column) for split in wanted}
    collator = DataCollatorForCorrectiveLM(
        tokenizer, corpus.mask_probability, corpus.span_ratio, whole_word_masking=corpus.whole_word_masking
    )
    trainer = PretrainingTrainer(
        model=model,
        args=training,
        optimizers=(make_muon(model, training) if training.use_muon else None, None),
        train_dataset=chunks.get("train"),
        eval_dataset=chunks.get("validation"),
        data_collator=collator,
        processing_class=tokenizer,
        callbacks=[LogComponentLossesCallback(), NewMasksCallback(collator)],
    )
    metrics = {}
    if training.do_train:
        metrics |= train(trainer)
    if training.do_eval and trainer.is_world_process_zero():
        measured = evaluate(model, chunks["validation"], collator, training.per_device_eval_batch_size)
        trainer.log_metrics("eval", measured)
        trainer.save_metrics("eval", measured)
        metrics |= measured
    if training.do_train and trainer.is_world_process_zero():
        save_main_encoder(model, tokenizer, Path(training.output_dir))
        write_model_card(
            Path(training.output_dir),
            model,
            network,
            corpus,
            metrics,
            steps=trainer.state.global_step,
            sequences_per_step=training.train_batch_size * training.gradient_accumulation_steps * training.world_size,
            num_processes=training.world_size,
            name=trainer.hub_model_id,
        )
    if training.do_train and training.push_to_hub:
        trainer.push_to_hub()


if __name__ == "__main__":
    main()
