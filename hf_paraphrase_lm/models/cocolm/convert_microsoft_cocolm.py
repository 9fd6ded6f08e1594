"""Conversion of the COCO-LM checkpoints that its authors released, to folders that the Auto classes load.

    python -m hf_paraphrase_lm.models.cocolm.convert_microsoft_cocolm SOURCE TARGET

There are two forms. A folder with `config.json` and `pytorch_model.bin` has our names of weights, so `from_pretrained`
of every COCO-LM class loads it unconverted, too. A file of the authors' fairseq code has names of its own.
"""

import argparse
import logging
import re
import tempfile
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError

from .configuration_cocolm import CocoLMConfig
from .modeling_cocolm import (
    CocoLMForPretraining,
    CocoLMForQuestionAnswering,
    CocoLMForSequenceClassification,
    CocoLMModel,
    CocoLMPreTrainedModel,
)
from .tokenization_cocolm import CocoLMTokenizer

logger = logging.getLogger(__name__)

# Patterns of whole fairseq names, the pre-training heads and the auxiliary network included, and their names here.
_ENCODER_NAMES = {
    r"embed_tokens\.weight": r"embeddings.word_embeddings.weight",
    r"embed_positions\.weight": r"embeddings.position_embeddings.weight",
    r"emb_layer_norm\.(weight|bias)": r"embeddings.LayerNorm.\1",
    r"relative_attention_bias\.weight": r"relative_attention_bias.weight",
    r"layers\.(\d+)\.self_attn\.(in_proj|out_proj)\.(weight|bias)": r"encoder.layer.\1.attention.self_attn.\2.\3",
    r"layers\.(\d+)\.self_attn_layer_norm\.(weight|bias)": r"encoder.layer.\1.attention.LayerNorm.\2",
    r"layers\.(\d+)\.fc1\.(weight|bias)": r"encoder.layer.\1.intermediate.dense.\2",
    r"layers\.(\d+)\.fc2\.(weight|bias)": r"encoder.layer.\1.output.dense.\2",
    r"layers\.(\d+)\.final_layer_norm\.(weight|bias)": r"encoder.layer.\1.output.LayerNorm.\2",
}
_NAMES = {
    **{rf"(?:en|de)coder\.sentence_encoder\.{old}": f"cocolm.{new}" for old, new in _ENCODER_NAMES.items()},
    **{rf"auxiliary\.sentence_encoder\.{old}": f"auxiliary.{new}" for old, new in _ENCODER_NAMES.items()},
    r"auxiliary\.lm_head\.dense\.(weight|bias)": r"auxiliary_lm_head.dense.\1",
    r"auxiliary\.lm_head\.layer_norm\.(weight|bias)": r"auxiliary_lm_head.LayerNorm.\1",
    r"auxiliary\.lm_head\.(weight|bias)": r"auxiliary_lm_head.decoder.\1",
    r"(?:en|de)coder\.lm_head\.(weight|bias)": r"corrective_lm_head.\1",
    r"(?:en|de)coder\.binary_head\.out_proj\.(weight|bias)": r"copy_head.\1",
    r"(?:en|de)coder\.seq_head\.dense\.(weight|bias)": r"contrastive_head.dense.\1",
    r"(?:en|de)coder\.seq_head\.layer_norm\.(weight|bias)": r"contrastive_head.LayerNorm.\1",
}
# Arguments of fairseq, and the settings here that they are. What they do not say has fairseq's default, which is ours
# or stands in `_read_fairseq`.
_SETTINGS = {
    "encoder_layers": "num_hidden_layers",
    "encoder_embed_dim": "hidden_size",
    "encoder_ffn_embed_dim": "intermediate_size",
    "encoder_attention_heads": "num_attention_heads",
    "generator_layers": "auxiliary_layers",
    "activation_fn": "hidden_act",
    "dropout": "hidden_dropout_prob",
    "attention_dropout": "attention_probs_dropout_prob",
    "rel_pos_bins": "rel_pos_bins",
    "max_rel_pos": "max_rel_pos",
    "binary_loss_weight": "copy_loss_weight",
    "scl_loss_weight": "contrastive_loss_weight",
    "temperature": "contrastive_temperature",
    "seq_contrast_dim": "contrastive_embedding_size",
}
# Heads that the authors' code fine-tunes in the folder form.
_HEADS = {"classifier": CocoLMForSequenceClassification, "qa_outputs": CocoLMForQuestionAnswering}


def convert_fairseq_state_dict(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    r"""Renames the weights of a fairseq COCO-LM model to those of [`CocoLMForPretraining`].

    Args:
        state_dict: Weights under fairseq's names, what `torch.load(checkpoint)["model"]` holds: the main network alone
            or with the auxiliary network and the pre-training heads. No tensor is copied or changed.

    Returns:
        The same tensors under names of [`CocoLMForPretraining`]: `CocoLMForPretraining.from_pretrained(None,
        config=config, state_dict=...)` and every other COCO-LM class load them.

    Raises:
        ValueError: If a name is unknown, two names become one, or weights that COCO-LM shares differ.
    """
    converted, sources, unknown = {}, {}, []
    for name, tensor in state_dict.items():
        matches = ((re.fullmatch(old, name), new) for old, new in _NAMES.items())
        new_name = next((match.expand(new) for match, new in matches if match), None)
        if new_name is None:
            unknown.append(name)
            continue
        if new_name in converted:
            raise ValueError(f"{sources[new_name]!r} and {name!r} are the same weight, {new_name!r}; give only one.")
        converted[new_name], sources[new_name] = tensor, name
    if unknown:
        raise ValueError(
            f"{len(unknown)} of {len(state_dict)} names are not fairseq COCO-LM weights: "
            f"{', '.join(map(repr, sorted(unknown)[:5]))}{', ...' if len(unknown) > 5 else ''}. Give the 'model' entry "
            "of the checkpoint, without classification heads. A checkpoint with names like "
            "'embeddings.word_embeddings.weight' needs no conversion: from_pretrained loads it."
        )
    heads = ("auxiliary_lm_head.decoder.weight", "corrective_lm_head.weight")
    shared = dict.fromkeys(heads, "cocolm.embeddings.word_embeddings.weight")
    shared |= {name: name.replace("auxiliary", "cocolm") for name in converted if name.startswith("auxiliary.embed")}
    for copy, original in shared.items():
        if copy in converted and original in converted and not torch.equal(converted[copy], converted[original]):
            raise ValueError(
                f"{sources[copy]!r} must equal {sources[original]!r}, but they differ. COCO-LM shares this weight; the "
                "checkpoint is damaged or of a model with separate embeddings (generator_sample_mode 'zero-dropout')."
            )
    return converted


def convert_checkpoint(source: str | Path, target: str | Path) -> Path:
    """Converts a released checkpoint to a folder with config.json, model.safetensors and tokenizer.json.

    Only weights and settings are read, so no code in the checkpoint runs. `target` appears when all of it is written.

    Args:
        source: A folder with config.json, pytorch_model.bin, sp.model and dict.txt, the encoder alone or fine-tuned for
            classification or question answering; or a checkpoint of fairseq, with or without sp.model and dict.txt
            beside it. Without these two no tokenizer is written, which is logged.
        target: The folder to make.

    Returns:
        `target` as a path.

    Raises:
        FileExistsError: If `target` exists.
        OSError: If `source`, config.json or the weights are missing.
        ValueError: If a setting or the name of a weight is unknown, or a file is of another kind.
        huggingface_hub.errors.StrictDataclassError: If a setting is not one of COCO-LM; see [`CocoLMConfig`].
        RuntimeError: If a file is damaged, or the weights do not fit the settings; see `from_pretrained`.
    """
    source, target = Path(source), Path(target)
    if target.exists():
        raise FileExistsError(f"{target} exists. Nothing is overwritten: name another folder, or remove it first.")
    if not source.exists():
        raise FileNotFoundError(f"There is no checkpoint {source}.")
    folder = source if source.is_dir() else source.parent
    model, weights = _read_released(source) if source.is_dir() else _read_fairseq(source)
    files = {"vocab_file": folder / "sp.model", "dict_file": folder / "dict.txt"}
    files = {name: str(file) for name, file in files.items() if file.exists()}
    tokenizer = CocoLMTokenizer(**files, model_max_length=model.config.max_position_embeddings) if files else None
    if tokenizer is None:
        logger.warning(f"{folder} has no sp.model and dict.txt, so no tokenizer is written.")
    elif len(tokenizer) > model.config.vocab_size:
        logger.warning(
            f"{folder / 'dict.txt'} has {len(tokenizer)} tokens, but the model has embeddings for "
            f"{model.config.vocab_size}: it cannot read the last ones."
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as scratch:
        unfinished = Path(scratch) / "checkpoint"
        model.save_pretrained(unfinished, state_dict=weights)
        if tokenizer is not None:
            tokenizer.save_pretrained(unfinished)
        unfinished.rename(target)
    return target


def _read_released(folder: Path) -> tuple[CocoLMPreTrainedModel, dict[str, torch.Tensor]]:
    """Model and weights of a folder in the released form."""
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} has no config.json. A released folder has it beside the weights.")
    model, loading = CocoLMModel.from_pretrained(folder, output_loading_info=True)
    heads = {name.split(".")[0] for name in loading["unexpected_keys"]}
    if len(heads) == 1 and heads <= _HEADS.keys():
        model = _HEADS[heads.pop()].from_pretrained(folder)
    elif heads:
        raise ValueError(
            f"{folder} has weights besides the encoder: {', '.join(sorted(heads))}. Load it with the class that they "
            "belong to, and save it again."
        )
    return model, model.state_dict()


def _read_fairseq(file: Path) -> tuple[CocoLMPreTrainedModel, dict[str, torch.Tensor]]:
    """Model and weights of a checkpoint of fairseq; the weights only those that the checkpoint has."""
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            checkpoint = torch.load(file, map_location="cpu", weights_only=True)
    # A damaged file ends in any error.
    except Exception as error:
        raise RuntimeError(
            f"{file} ({file.stat().st_size} bytes) cannot be read. It may be cut off: compare its size and copy it "
            "again, as a whole. Or it holds more than weights and settings, which could run code and is not loaded: "
            "where you trust it, save its 'model' and vars(args) alone."
        ) from error
    checkpoint = checkpoint if isinstance(checkpoint, dict) else {}
    arguments = checkpoint.get("args") or (checkpoint.get("cfg") or {}).get("model")
    if arguments is None or not isinstance(checkpoint.get("model"), dict):
        raise ValueError(
            f"{file} is no checkpoint of fairseq: it must hold 'model', the weights, and the settings as 'args' or as "
            "'model' in 'cfg'."
        )
    arguments = arguments if isinstance(arguments, dict) else vars(arguments)
    arguments = {name: value for name, value in arguments.items() if value is not None}
    weights = convert_fairseq_state_dict(checkpoint["model"])
    settings = {"rel_pos_bins": 32, "contrastive_embedding_size": 768}
    settings |= {ours: arguments[theirs] for theirs, ours in _SETTINGS.items() if theirs in arguments}
    for name, table in {"vocab_size": "word", "max_position_embeddings": "position"}.items():
        if (weight := weights.get(f"cocolm.embeddings.{table}_embeddings.weight")) is None:
            raise ValueError(f"{file} has no {table} embeddings of the main network.")
        settings[name] = len(weight)
    settings["auxiliary_sampling"] = arguments.get("generator_sample_mode", "eval").replace("-", "_")
    if not arguments.get("rel_pos", 1):
        settings["rel_pos_bins"] = 0
    if not arguments.get("seq_contrast", False):
        settings |= {"contrastive_loss_weight": 0, "contrastive_embedding_size": None}
    is_encoder = all(name.startswith("cocolm.") for name in weights)
    model_class = CocoLMModel if is_encoder else CocoLMForPretraining
    model, loading = model_class.from_pretrained(
        None, config=CocoLMConfig(**settings), state_dict=weights, output_loading_info=True
    )
    # What the checkpoint does not have is not written either, so that loading says that it is new.
    return model, {name: weight for name, weight in model.state_dict().items() if name not in loading["missing_keys"]}


def main(arguments: list[str] | None = None) -> None:
    """The command; `arguments` are those of the command line if `None`."""
    parser = argparse.ArgumentParser(
        prog="python -m hf_paraphrase_lm.models.cocolm.convert_microsoft_cocolm",
        description="Convert a COCO-LM checkpoint of its authors to a folder that the Auto classes load: config.json, "
        "model.safetensors and tokenizer.json.",
        epilog="""examples:
  the released folder (microsoft/cocolm-base or -large on the Hub), or one fine-tuned from it
    %(prog)s cocolm-base-released cocolm-base

  a checkpoint of the authors' fairseq code: all it has of the main network, the auxiliary network and the
  pre-training heads; with sp.model and dict.txt beside it, the tokenizer as well
    %(prog)s cocolm_base/model.pt cocolm-base

then, in Python:
    import hf_paraphrase_lm
    from transformers import AutoModelForSequenceClassification, AutoTokenizer
    tokenizer = AutoTokenizer.from_pretrained("cocolm-base")
    model = AutoModelForSequenceClassification.from_pretrained("cocolm-base")
""",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", type=Path, help="released folder, or checkpoint file of fairseq")
    parser.add_argument("target", type=Path, help="folder to make; must not exist")
    options = parser.parse_args(arguments)
    try:
        target = convert_checkpoint(options.source, options.target)
    except (OSError, RuntimeError, ValueError, StrictDataclassError) as error:
        parser.exit(1, f"{parser.prog.split('.')[-1]}: error: {error}\n")
    print(f"Wrote {target}: {', '.join(sorted(file.name for file in target.iterdir()))}")


__all__ = ["convert_checkpoint", "convert_fairseq_state_dict"]


if __name__ == "__main__":
    main()
