"""Conversion of COCO-LM weights from the authors' fairseq code.

The authors' other form, a folder with `config.json` and `pytorch_model.bin`, needs no conversion: its names are ours.
"""

import re

import torch

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
_SHARED_NAMES = {
    "auxiliary.embeddings.word_embeddings.weight": "cocolm.embeddings.word_embeddings.weight",
    "auxiliary.embeddings.position_embeddings.weight": "cocolm.embeddings.position_embeddings.weight",
    "auxiliary.embeddings.LayerNorm.weight": "cocolm.embeddings.LayerNorm.weight",
    "auxiliary.embeddings.LayerNorm.bias": "cocolm.embeddings.LayerNorm.bias",
    "auxiliary_lm_head.decoder.weight": "cocolm.embeddings.word_embeddings.weight",
    "corrective_lm_head.weight": "cocolm.embeddings.word_embeddings.weight",
}


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
        shown = ", ".join(map(repr, sorted(unknown)[:5])) + (", ..." if len(unknown) > 5 else "")
        raise ValueError(
            f"{len(unknown)} of {len(state_dict)} names are not fairseq COCO-LM weights: {shown}. Give the 'model' "
            "entry of the checkpoint, without classification heads. A checkpoint with names like "
            "'embeddings.word_embeddings.weight' needs no conversion: from_pretrained loads it."
        )
    for copy, original in _SHARED_NAMES.items():
        if copy in converted and original in converted and not torch.equal(converted[copy], converted[original]):
            raise ValueError(
                f"{sources[copy]!r} must equal {sources[original]!r}, but they differ. COCO-LM shares this weight; the "
                "checkpoint is damaged or of a model with separate embeddings (generator_sample_mode 'zero-dropout')."
            )
    return converted


__all__ = ["convert_fairseq_state_dict"]
