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

    # any two encoders with one vocabulary under the same objective
    python examples/run_cocolm_pretraining.py --model_name_or_path answerdotai/ModernBERT-base \
        --auxiliary_name_or_path my-small-modernbert ...

    # several processes; batches, losses and their gradients are those of one process with the whole batch
    accelerate launch --num_processes 4 examples/run_cocolm_pretraining.py ...

Without --tokenizer_name and --model_name_or_path a tokenizer is trained on the corpus. All arguments may stand in one
JSON or YAML file instead. --help lists them all; those after --output_dir are transformers.TrainingArguments.
"""

import platform
import shlex
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
from huggingface_hub import ModelCard, ModelCardData
from transformers import AutoConfig, AutoModel, AutoTokenizer, Trainer, TrainingArguments, set_seed

from hf_paraphrase_lm import (
    CocoLMConfig,
    CocoLMForPretraining,
    DataCollatorForCorrectiveLM,
    LogComponentLossesCallback,
    __version__,
    chunk_documents,
    train_tokenizer,
)
from hf_paraphrase_lm.training import corrective_lm_metrics
from runs import DataArguments, load_splits, parse_arguments, train


@dataclass
class NetworkArguments:
    """The networks to train."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "checkpoint to go on from; without it, random weights"}
    )
    auxiliary_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "the auxiliary network, if --model_name_or_path is an encoder of another family than COCO-LM"
        },
    )
    tokenizer_name: str | None = field(default=None, metadata={"help": "tokenizer, if it is not the checkpoint's"})
    config_overrides: str | None = field(
        default=None, metadata={"help": "fields of CocoLMConfig, such as hidden_size=256,num_hidden_layers=4"}
    )
    discriminator_objective: str | None = field(
        default=None, metadata={"help": "'corrective_lm' (COCO-LM), 'replaced_token_detection' (ELECTRA), 'masked_lm'"}
    )
    attend_to_neighbors: float = field(
        default=0.0,
        metadata={"help": "start with this preference for the nearest tokens (4.0: much faster for small budgets)"},
    )
    attn_implementation: str | None = field(
        default=None, metadata={"help": "'sdpa', 'eager'; on a CPU with --bf16, 'eager' is the fastest for short texts"}
    )


@dataclass
class CorpusArguments(DataArguments):
    """The text, and how it is corrupted and cropped."""

    text_column: str = field(default="text", metadata={"help": "the column of texts"})
    max_length: int = field(default=512, metadata={"help": "tokens in the longest sequence"})
    vocab_size: int = field(default=32_768, metadata={"help": "size of a tokenizer trained on the corpus"})
    lowercase: bool = field(default=False, metadata={"help": "whether a tokenizer trained on the corpus is uncased"})
    mask_probability: float = field(default=0.15, metadata={"help": "share of the tokens that are masked"})
    whole_word_masking: bool = field(default=False, metadata={"help": "mask words instead of tokens"})
    span_ratio: float = field(default=0.9, metadata={"help": "length of the crop, as a share of the text's"})


@dataclass
class PretrainingArguments(TrainingArguments):
    """transformers.TrainingArguments with the settings of COCO-LM base (Meng et al. 2021, appendix B)."""

    output_dir: str = field(default="runs/cocolm", metadata={"help": "folder for checkpoints, model and results"})
    learning_rate: float = field(default=5e-4, metadata={"help": "highest learning rate"})
    adam_beta2: float = field(default=0.98, metadata={"help": "beta2 of Adam"})
    adam_epsilon: float = field(default=1e-6, metadata={"help": "epsilon of Adam"})
    weight_decay: float = field(default=0.01, metadata={"help": "weight decay"})
    max_grad_norm: float = field(default=2.0, metadata={"help": "gradients are clipped to this norm"})
    warmup_steps: float = field(default=0.08, metadata={"help": "updates, or if below 1 their share (10k of 125k)"})
    # The collator reads columns that are no arguments of forward, and predictions of a whole corpus fill the memory.
    remove_unused_columns: bool = field(default=False, metadata={"help": "must be false"})
    prediction_loss_only: bool = field(default=True, metadata={"help": "evaluate the loss only"})


def load_tokenizer(network: NetworkArguments, corpus: CorpusArguments, training: PretrainingArguments, texts):
    """The tokenizer that is named, that of the checkpoint, that of this run's last start, or one trained on texts."""
    if name := network.tokenizer_name or network.model_name_or_path:
        # A released folder does not say what kind of model it is.
        config = CocoLMConfig if network.auxiliary_name_or_path is None else AutoConfig
        config = None if network.tokenizer_name else config.from_pretrained(name)
        return AutoTokenizer.from_pretrained(name, config=config)
    with training.main_process_first(desc="training of the tokenizer"):
        if not (Path(training.output_dir) / "tokenizer.json").is_file():
            tokenizer = train_tokenizer(
                texts, corpus.vocab_size, corpus.text_column, corpus.lowercase, model_max_length=corpus.max_length
            )
            tokenizer.save_pretrained(training.output_dir)
    return AutoTokenizer.from_pretrained(training.output_dir)


def load_model(network: NetworkArguments, tokenizer) -> CocoLMForPretraining:
    """Both networks: from a checkpoint, from two, or with random weights."""
    if network.model_name_or_path is None:
        config = CocoLMConfig(vocab_size=len(tokenizer))
    elif network.auxiliary_name_or_path is None:
        config = CocoLMConfig.from_pretrained(network.model_name_or_path)
    else:
        main, auxiliary = map(AutoModel.from_pretrained, (network.model_name_or_path, network.auxiliary_name_or_path))
        config = CocoLMConfig(main_config=main.config, auxiliary_config=auxiliary.config)
    if network.config_overrides:
        config.update_from_string(network.config_overrides)
    if network.discriminator_objective:
        config.discriminator_objective = network.discriminator_objective
    if network.model_name_or_path is None:
        model = CocoLMForPretraining(config)
    elif network.auxiliary_name_or_path is None:
        model = CocoLMForPretraining.from_pretrained(network.model_name_or_path, config=config, dtype="float32")
    else:
        model = CocoLMForPretraining.from_encoders(main, auxiliary, config)
    if network.attend_to_neighbors:
        for encoder in (model.cocolm, model.auxiliary):
            encoder.attend_to_neighbors(network.attend_to_neighbors)
    if network.attn_implementation:
        model.set_attn_implementation(network.attn_implementation)
    return model


def write_model_card(trainer: Trainer, corpus: CorpusArguments, metrics: dict):
    """Fills the template `model_cards/cocolm.md` with what was run and measured."""
    folder = Path(trainer.args.output_dir)
    name = trainer.args.hub_model_id or folder.name
    processor = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{torch.get_num_threads()} CPU threads"
    baselines = {"eval_detection_accuracy": f"always 'original': {metrics.get('eval_majority_rate', 0):.4f}"}
    results = [
        {"metric": key, "value": f"{value:.4f}", "baseline": baselines.get(key, "")}
        for key, value in metrics.items()
        if key.startswith("eval_")
    ]
    card = ModelCard.from_template(
        ModelCardData(model_name=name),
        template_path=Path(__file__).parent.parent / "model_cards" / "cocolm.md",
        repo_id=name,
        version=__version__,
        parameters=f"{trainer.model.num_parameters():,}",
        corpus=corpus.dataset_name or corpus.train_file,
        steps=trainer.state.global_step,
        sequences_per_step=trainer.args.train_batch_size
        * trainer.args.gradient_accumulation_steps
        * trainer.args.world_size,
        hardware=f"{trainer.args.world_size} x {processor}, {platform.machine()}",
        duration=f"{metrics.get('train_runtime', 0) / 3600:.2f} h",
        command=shlex.join(["python", *sys.argv]),
        limits="Nothing but the losses above was measured; fine-tune it before you judge it.",
        results=results,
    )
    card.save(folder / "README.md")


def main():
    network, corpus, training = parse_arguments(__doc__, NetworkArguments, CorpusArguments, PretrainingArguments)
    set_seed(training.seed)
    splits = load_splits(
        corpus, *(["train"] if training.do_train else []), *(["validation"] if training.do_eval else [])
    )
    tokenizer = load_tokenizer(network, corpus, training, splits.get("train"))
    with training.main_process_first(desc="tokenizing"):
        chunks = {
            split: chunk_documents(texts, tokenizer, max_length=corpus.max_length, text_column=corpus.text_column)
            for split, texts in splits.items()
            if split != "test"
        }
    collator = DataCollatorForCorrectiveLM(
        tokenizer, corpus.mask_probability, corpus.span_ratio, whole_word_masking=corpus.whole_word_masking
    )
    trainer = Trainer(
        model=load_model(network, tokenizer),
        args=training,
        train_dataset=chunks.get("train"),
        eval_dataset=chunks.get("validation"),
        data_collator=collator,
        processing_class=tokenizer,
        callbacks=[LogComponentLossesCallback()],
    )
    metrics = {}
    if training.do_train:
        metrics |= train(trainer)
    if training.do_eval and trainer.is_world_process_zero():
        evaluation = corrective_lm_metrics(trainer.model, chunks["validation"], collator)
        evaluation = {f"eval_{name}": value for name, value in evaluation.items()}
        trainer.log_metrics("eval", evaluation)
        trainer.save_metrics("eval", evaluation)
        metrics |= evaluation
    if trainer.is_world_process_zero():
        write_model_card(trainer, corpus, metrics)
    if training.push_to_hub:
        trainer.push_to_hub()


if __name__ == "__main__":
    main()
