"""COCO-LM against numbers that the authors' code computed with random weights, in float32 on the CPU.

`fixtures/cocolm_encoder.safetensors`: their transformers encoder. `fixtures/cocolm_pretraining.safetensors`: their
fairseq model with the criterion that they posted, on a full batch and on a padded one; the weights that the model
shares are stored once.
"""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hf_paraphrase_lm.models.cocolm import (
    CocoLMConfig,
    CocoLMForPretraining,
    CocoLMForSequenceClassification,
    CocoLMModel,
)
from hf_paraphrase_lm.models.cocolm.convert_microsoft_cocolm import convert_fairseq_state_dict
from hf_paraphrase_lm.models.cocolm.modeling_cocolm import relative_position_bucket

FIXTURES = Path(__file__).parent / "fixtures"
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}
# As released: no model_type, no architectures, no special ids.
RELEASED_CONFIG = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 20,
    "type_vocab_size": 0,
    "vocab_size": 99,
    "rel_pos_bins": 32,
    "max_rel_pos": 128,
    "layer_norm_type": "post",
    "layer_norm_eps": 1e-05,
    "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.1,
    "cls_dropout_prob": 0.1,
    "hidden_act": "gelu",
    "initializer_range": 0.02,
}
SHARED = {
    "auxiliary.sentence_encoder.embed_tokens.weight": "encoder.sentence_encoder.embed_tokens.weight",
    "auxiliary.sentence_encoder.embed_positions.weight": "encoder.sentence_encoder.embed_positions.weight",
    "auxiliary.sentence_encoder.emb_layer_norm.weight": "encoder.sentence_encoder.emb_layer_norm.weight",
    "auxiliary.sentence_encoder.emb_layer_norm.bias": "encoder.sentence_encoder.emb_layer_norm.bias",
    "auxiliary.lm_head.weight": "encoder.sentence_encoder.embed_tokens.weight",
    "encoder.lm_head.weight": "encoder.sentence_encoder.embed_tokens.weight",
}


def load_fixture(name):
    tensors = load_file(FIXTURES / name)
    return {name: tensor.long() if tensor.dtype == torch.int16 else tensor for name, tensor in tensors.items()}


def part(tensors, prefix):
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


@pytest.fixture(scope="module")
def encoder():
    return load_fixture("cocolm_encoder.safetensors")


@pytest.fixture(scope="module")
def pretraining():
    return load_fixture("cocolm_pretraining.safetensors")


@pytest.fixture
def released_folder(tmp_path, encoder):
    (tmp_path / "config.json").write_text(json.dumps(RELEASED_CONFIG))
    torch.save(part(encoder, "weights/"), tmp_path / "pytorch_model.bin")
    return tmp_path


def fairseq_weights(pretraining):
    weights = part(pretraining, "weights/")
    return weights | {copy: weights[original] for copy, original in SHARED.items()}


def pretraining_config(**changes):
    sizes = {"vocab_size": 101, "max_position_embeddings": 64, "auxiliary_layers": 2}
    no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return CocoLMConfig(**RELEASED_CONFIG | sizes | no_dropout | changes)


def pretraining_inputs(expected):
    is_token = expected["target"] != 1
    return {
        "input_ids": expected["src_tokens"],
        "attention_mask": is_token.long(),
        "labels": expected["target"].masked_fill(~is_token, -100),
        "span_input_ids": expected["span_tokens"],
        "span_attention_mask": (expected["span_tokens"] != 1).long(),
        "corrupted_input_ids": expected["corrupted_tokens"],
    }


def test_buckets_of_the_released_sizes(encoder):
    buckets = relative_position_bucket(torch.arange(-511, 512), num_buckets=64, max_distance=128)
    assert torch.equal(buckets - buckets.min(), encoder["released_buckets"])


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_encoder(released_folder, encoder, attention):
    model, loading = CocoLMModel.from_pretrained(
        released_folder, attn_implementation=attention, output_loading_info=True
    )
    assert not any(loading.values())
    input_ids, attention_mask = encoder["input_ids"], encoder["attention_mask"]
    is_token = attention_mask.bool()

    output = model(input_ids, attention_mask, output_hidden_states=True)
    assert len(output.hidden_states) == 4
    for index, states in enumerate(output.hidden_states):
        torch.testing.assert_close(states[is_token], encoder[f"hidden_states/{index}"][is_token], **TOLERANCE)
    torch.testing.assert_close(output.last_hidden_state, output.hidden_states[-1], rtol=0, atol=0)

    unmasked = model(input_ids).last_hidden_state
    torch.testing.assert_close(unmasked, encoder["last_hidden_state_nomask"], **TOLERANCE)
    is_token = encoder["attention_mask_empty_row"].bool()
    states = model(input_ids, encoder["attention_mask_empty_row"]).last_hidden_state
    torch.testing.assert_close(states[is_token], encoder["last_hidden_state_empty_row"][is_token], **TOLERANCE)
    assert states.isfinite().all()

    bias = model.attention_bias(states, attention_mask=None)
    torch.testing.assert_close(bias[0], encoder["rel_pos_bias"], rtol=0, atol=0)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_encoder_gradients(released_folder, encoder, attention):
    model = CocoLMModel.from_pretrained(released_folder, attn_implementation=attention)
    states = model(encoder["input_ids"], encoder["attention_mask"]).last_hidden_state
    (states * encoder["grad_weight"] * encoder["attention_mask"][:, :, None]).sum().backward()
    for name, expected in part(encoder, "grads/").items():
        gradient = model.get_parameter(name).grad
        if name == "embeddings.word_embeddings.weight":
            # The authors' folder takes id 0, which is [CLS], for padding and freezes it.
            assert gradient[0].abs().max() > 0.1
            gradient, expected = gradient[1:], expected[1:]
        torch.testing.assert_close(gradient, expected, **TOLERANCE)


@pytest.mark.parametrize("prefix", ["", "cocolm."])
def test_released_folder_loads_into_every_class(tmp_path, encoder, prefix):
    (tmp_path / "config.json").write_text(json.dumps(RELEASED_CONFIG))
    weights = part(encoder, "weights/")
    torch.save({prefix + name: tensor for name, tensor in weights.items()}, tmp_path / "pytorch_model.bin")
    for model_class in (CocoLMModel, CocoLMForSequenceClassification, CocoLMForPretraining):
        model, loading = model_class.from_pretrained(tmp_path, output_loading_info=True)
        assert not loading["unexpected_keys"]
        assert not any("cocolm." in name for name in loading["missing_keys"])
        for name, tensor in model.base_model.state_dict().items():
            assert torch.equal(tensor, weights[name]), name


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("case", ["full", "padded"])
def test_pretraining(pretraining, case, attention):
    expected = part(pretraining, f"{case}/")
    model = CocoLMForPretraining(pretraining_config())
    model.set_attn_implementation(attention)
    model.load_state_dict(convert_fairseq_state_dict(fairseq_weights(pretraining)))
    inputs = pretraining_inputs(expected)

    output = model(**inputs, output_logits=True)
    losses = part(expected, "losses_per_masked_token/")
    torch.testing.assert_close(output.mlm_loss, losses["mlm"], **TOLERANCE)
    torch.testing.assert_close(output.copy_loss, losses["rtd"], **TOLERANCE)
    torch.testing.assert_close(output.corrective_lm_loss, losses["lm"], **TOLERANCE)
    torch.testing.assert_close(output.contrastive_loss, losses["scl"], **TOLERANCE)
    torch.testing.assert_close(output.loss, losses["total"], **TOLERANCE)
    is_token = inputs["attention_mask"].bool()
    torch.testing.assert_close(output.auxiliary_logits, expected["gen_logits"], **TOLERANCE)
    torch.testing.assert_close(output.corrective_lm_logits, expected["clm_outputs"], **TOLERANCE)
    torch.testing.assert_close(output.copy_logits[is_token], expected["binary_output"], **TOLERANCE)
    torch.testing.assert_close(output.contrastive_embeddings, expected["seq_emb"], **TOLERANCE)
    torch.testing.assert_close(output.span_embeddings, expected["span_seq_emb"], **TOLERANCE)
    is_original = output.corrupted_input_ids == expected["target"]
    assert torch.equal(is_original[is_token], expected["binary_target"])

    output.loss.backward()
    gradients = convert_fairseq_state_dict(part(expected, "grads_of_total/"))
    assert len(gradients) == (0 if case == "full" else 42)
    for name, gradient in gradients.items():
        torch.testing.assert_close(model.get_parameter(name).grad, gradient, **TOLERANCE)


@pytest.mark.parametrize("case", ["full", "padded"])
def test_paper_form_of_the_corrective_loss(pretraining, case):
    expected = part(pretraining, f"{case}/")
    config = pretraining_config(corrective_lm_form="paper")
    model = CocoLMForPretraining.from_pretrained(
        None, config=config, state_dict=convert_fairseq_state_dict(fairseq_weights(pretraining))
    )
    loss = model(**pretraining_inputs(expected)).corrective_lm_loss
    torch.testing.assert_close(loss, expected["losses_per_masked_token/paper_lm"], **TOLERANCE)


def test_converted_weights_are_saved_and_loaded(tmp_path, pretraining):
    weights = fairseq_weights(pretraining)
    converted = convert_fairseq_state_dict(weights)
    assert len(converted) == len(weights)
    model, loading = CocoLMForPretraining.from_pretrained(
        None, config=pretraining_config(), state_dict=converted, output_loading_info=True
    )
    assert not any(loading.values())
    model.save_pretrained(tmp_path)
    encoder = CocoLMModel.from_pretrained(tmp_path)
    assert torch.equal(
        encoder.embeddings.word_embeddings.weight, weights["encoder.sentence_encoder.embed_tokens.weight"]
    )


def test_conversion_accepts_the_encoder_alone_and_its_old_name(pretraining):
    weights = part(part(pretraining, "weights/"), "encoder.")
    weights = {f"decoder.{name}": tensor for name, tensor in weights.items() if name.startswith("sentence_encoder.")}
    model = CocoLMModel(pretraining_config())
    converted = convert_fairseq_state_dict(weights)
    model.load_state_dict({name.removeprefix("cocolm."): tensor for name, tensor in converted.items()})


def test_conversion_refuses_what_it_does_not_know(pretraining):
    weights = fairseq_weights(pretraining)
    wrong = weights | {"classification_heads.mnli.dense.bias": torch.zeros(32)}
    message = (
        f"1 of {len(weights) + 1} names are not fairseq COCO-LM weights: 'classification_heads.mnli.dense.bias'. Give "
        "the 'model' entry of the checkpoint, without classification heads. A checkpoint with names like "
        "'embeddings.word_embeddings.weight' needs no conversion: from_pretrained loads it."
    )
    with pytest.raises(ValueError, match=re.escape(message) + "$"):
        convert_fairseq_state_dict(wrong)

    wrong = weights | {"decoder.lm_head.bias": torch.zeros(101)}
    message = (
        "'encoder.lm_head.bias' and 'decoder.lm_head.bias' are the same weight, 'corrective_lm_head.bias'; give only "
        "one."
    )
    with pytest.raises(ValueError, match=re.escape(message) + "$"):
        convert_fairseq_state_dict(wrong)

    wrong = weights | {"auxiliary.lm_head.weight": weights["auxiliary.lm_head.weight"] + 1}
    message = (
        "'auxiliary.lm_head.weight' must equal 'encoder.sentence_encoder.embed_tokens.weight', but they differ. "
        "COCO-LM shares this weight; the checkpoint is damaged or of a model with separate embeddings "
        "(generator_sample_mode 'zero-dropout')."
    )
    with pytest.raises(ValueError, match=re.escape(message) + "$"):
        convert_fairseq_state_dict(wrong)
