"""COCO-LM: what is said of settings, checkpoints and inputs that are wrong, and what is not said of right ones."""

import copy
import json
import os
import pickle
import re
from dataclasses import fields

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, BertConfig, BertModel, PreTrainedConfig

from hf_paraphrase_lm import hub
from hf_paraphrase_lm.models.cocolm import (
    CocoLMConfig,
    CocoLMForMaskedLM,
    CocoLMForMultipleChoice,
    CocoLMForPretraining,
    CocoLMForQuestionAnswering,
    CocoLMForSequenceClassification,
    CocoLMForTokenClassification,
    CocoLMModel,
    configuration_cocolm,
    modeling_cocolm,
)

from .test_modeling_cocolm import PAD, assert_same_weights, head_cases, pretraining_batch, texts, tiny_config

HEADS = {
    CocoLMForMaskedLM: "lm_head",
    CocoLMForMultipleChoice: "classifier",
    CocoLMForPretraining: "auxiliary, auxiliary_lm_head, contrastive_head, copy_head, corrective_lm_head",
    CocoLMForQuestionAnswering: "qa_outputs",
    CocoLMForSequenceClassification: "classifier",
    CocoLMForTokenClassification: "classifier",
}
DENSE = "encoder.layer.1.output.dense.bias"


def save(folder, weights, **settings):
    """A folder in the released form: no model_type, no architectures, no special ids."""
    folder.mkdir(exist_ok=True)
    names = [field.name for field in fields(CocoLMConfig) if field.name not in PreTrainedConfig.__dataclass_fields__]
    released = {
        name: value for name, value in tiny_config().to_dict().items() if name in names and "_token_id" not in name
    }
    (folder / "config.json").write_text(json.dumps(released | settings))
    torch.save(weights, folder / "pytorch_model.bin")
    return folder


def prefixed(weights):
    return {f"cocolm.{name}": tensor for name, tensor in weights.items()}


def said(caplog, module=modeling_cocolm):
    return [record.getMessage() for record in caplog.records if record.name == module.__name__]


def refuses(model_class, source, problems, **options):
    message = (
        f"The weights of {source} do not fit {model_class.__name__}. {problems}. Either the checkpoint is damaged, or "
        "its config.json is missing or of another model."
    )
    with pytest.raises(RuntimeError, match=f"^{re.escape(message)}$"):
        model_class.from_pretrained(source, **options)


@pytest.fixture
def model():
    return CocoLMModel(tiny_config()).eval()


@pytest.fixture
def weights(model):
    return model.state_dict()


# Settings


def own_fields():
    return [field.name for field in fields(CocoLMConfig) if field.name not in PreTrainedConfig.__dataclass_fields__]


@pytest.mark.parametrize("field", own_fields())
def test_a_misspelt_field_is_refused(field):
    misspelt = {field[:i] + field[i + 1 :] for i in range(len(field))}
    misspelt |= {field[:i] + field[i + 1] + field[i] + field[i + 2 :] for i in range(len(field) - 1)}
    misspelt |= {field + "s", field.title(), field.replace("_", "-"), field.replace("_", "", 1)}
    for key in misspelt - {field}:
        with pytest.raises(ValueError, match=rf"^CocoLMConfig has no field '{key}', but has '\w+'\. Correct"):
            CocoLMConfig(**{key: 1})


@pytest.mark.parametrize(
    ("key", "field"),
    [
        ("hiden_size", "hidden_size"),
        ("layer_norm_epsilon", "layer_norm_eps"),
        ("attention_probs_dropout", "attention_probs_dropout_prob"),
        ("num_label", "num_labels"),
    ],
)
def test_a_misspelt_field_is_refused_with_the_field_that_was_meant(tmp_path, weights, key, field):
    message = (
        f"CocoLMConfig has no field {key!r}, but has {field!r}. Correct the spelling, in config.json if it stands "
        "there."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        CocoLMConfig(**{key: 3})
    save(tmp_path, weights, **{key: 3})
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        CocoLMForTokenClassification.from_pretrained(tmp_path)


def test_keys_that_are_written_by_transformers_are_not_mentioned(caplog):
    keys = {
        "_attn_implementation": "eager",
        "_attn_implementation_internal": "eager",
        "_commit_hash": None,
        "_name_or_path": "somewhere",
        "architectures": ["CocoLMModel"],
        "attn_implementation": "eager",
        "auto_map": {"AutoModel": "modeling_cocolm.CocoLMModel"},
        "dtype": "float16",
        "id2label": {"0": "no", "1": "yes", "2": "maybe"},
        "label2id": {"no": 0, "yes": 1, "maybe": 2},
        "max_length": 20,
        "model_type": "cocolm",
        "name_or_path": "somewhere",
        "num_labels": 3,
        "output_attentions": False,
        "problem_type": "regression",
        "quantization_config": {"quant_method": "none"},
        "return_dict": True,
        "torch_dtype": "float16",
        "transformers_version": "4.11.0",
    }
    config = CocoLMConfig(**keys)
    assert (config.num_labels, config.dtype, config.auto_map) == (3, torch.float16, keys["auto_map"])
    CocoLMConfig(**config.to_dict())
    assert said(caplog, configuration_cocolm) == []


def test_other_keys_are_kept_and_mentioned(tmp_path, caplog, weights):
    # The authors' code writes the first three.
    keys = {"embedding_size": 128, "summary_type": "first", "fix_word_embedding": None, "classifier_dropout": 0.3}
    config = CocoLMModel.from_pretrained(save(tmp_path, weights, **keys)).config
    assert {key: getattr(config, key) for key in keys} == keys
    message = (
        "CocoLMConfig does not know 'embedding_size', 'summary_type', 'fix_word_embedding', 'classifier_dropout': "
        "kept, but not read by any model of this package."
    )
    assert said(caplog, configuration_cocolm) == [message]


def test_attributes_that_are_attached_later_survive(tmp_path):
    config = tiny_config()
    config.trained_with = {"r": 8}
    for other in (copy.deepcopy(config), pickle.loads(pickle.dumps(config)), CocoLMConfig(**config.to_dict())):
        assert other.trained_with == {"r": 8}
    CocoLMModel(config).save_pretrained(tmp_path)
    assert CocoLMModel.from_pretrained(tmp_path).config.trained_with == {"r": 8}


def test_fields_of_a_subclass_are_known(caplog):
    class WithField(CocoLMConfig):
        routing_size: int = 3

    class WithArgument(CocoLMConfig):
        def __init__(self, routing_size=3, **kwargs):
            self.routing_size = routing_size
            super().__init__(**kwargs)

    for config_class in (WithField, WithArgument):
        assert config_class(routing_size=4, hidden_size=24).routing_size == 4
    assert said(caplog, configuration_cocolm) == []
    with pytest.raises(ValueError, match=r"^WithField has no field 'routing_sizes', but has 'routing_size'\."):
        WithField(routing_sizes=4)


# Weights that do not fit


@pytest.mark.parametrize("model_class", [CocoLMModel, *HEADS])
@pytest.mark.parametrize("in_file", [dict, prefixed])
def test_a_wrong_weight_of_the_encoder_is_refused_by_every_class(tmp_path, weights, model_class, in_file):
    prefix = "" if model_class is CocoLMModel else "cocolm."
    partial = {name: tensor for name, tensor in weights.items() if name != DENSE}
    refuses(model_class, save(tmp_path, in_file(partial)), f"1 missing: {prefix}{DENSE}")

    thirteenth = in_file({"encoder.layer.2.output.dense.bias": weights[DENSE]})
    save(tmp_path, in_file(weights) | thirteenth)
    refuses(model_class, tmp_path, f"1 not in the model: {next(iter(thirteenth))}")

    save(tmp_path, in_file(weights | {DENSE: torch.zeros(17)}))
    option = "which ignore_mismatched_sizes=True would initialise"
    refuses(model_class, tmp_path, f"1 of another shape, {option}: {prefix}{DENSE} (17,) instead of (16,)")

    for value in (float("nan"), float("inf"), -float("inf")):
        broken = weights[DENSE].clone()
        broken[3] = value
        save(tmp_path, in_file(weights | {DENSE: broken}))
        refuses(model_class, tmp_path, f"1 NaN or infinite: {prefix}{DENSE}")


def test_all_that_is_wrong_is_said_at_once(tmp_path, weights):
    # As many layers as the configuration has not.
    first, broken = "encoder.layer.0.intermediate.dense.bias", torch.full((32,), float("nan"))
    renamed = {name.replace("layer.1.", "layer.2."): tensor for name, tensor in weights.items()}
    save(tmp_path, renamed | {first: broken, "relative_attention_bias.weight": torch.zeros(12, 3)})
    some = "encoder.layer.{0}.attention.LayerNorm.bias, encoder.layer.{0}.attention.LayerNorm.weight, "
    some += "encoder.layer.{0}.attention.self_attn.in_proj.bias, encoder.layer.{0}.attention.self_attn.in_proj.weight, "
    some += "encoder.layer.{0}.attention.self_attn.out_proj.bias, ..."
    refuses(
        CocoLMModel,
        tmp_path,
        f"12 missing: {some.format(1)}; 12 not in the model: {some.format(2)}; 1 of another shape, which "
        "ignore_mismatched_sizes=True would initialise: relative_attention_bias.weight (12, 3) instead of (12, 2); "
        f"1 NaN or infinite: {first}",
    )


def test_weights_of_another_model_are_refused(tmp_path, weights):
    save(tmp_path, {f"roberta.{name}": tensor for name, tensor in weights.items()})
    with pytest.raises(RuntimeError, match=r"do not fit CocoLMForMaskedLM\. 29 missing: cocolm\.embeddings\.LayerNorm"):
        CocoLMForMaskedLM.from_pretrained(tmp_path)
    renamed = CocoLMModel.from_pretrained(tmp_path, key_mapping={"^roberta\\.": ""})
    assert_same_weights(CocoLMModel.from_pretrained(None, config=tiny_config(), state_dict=weights), renamed)


def test_a_table_of_positions_that_the_configuration_has_not_is_refused(tmp_path, weights):
    save(tmp_path, weights, rel_pos_bins=0)
    refuses(CocoLMModel, tmp_path, "1 not in the model: relative_attention_bias.weight")


def test_a_buffer_of_earlier_encoders_is_no_weight(tmp_path, caplog, weights):
    for in_file in (dict, prefixed):
        save(tmp_path, in_file(weights | {"embeddings.position_ids": torch.arange(24)[None]}))
        CocoLMModel.from_pretrained(tmp_path)
    assert said(caplog) == []


def test_a_state_dict_is_checked_too(weights):
    del weights[DENSE]
    message = "The weights of the state dict do not fit CocoLMModel. 1 missing: "
    with pytest.raises(RuntimeError, match=f"^{re.escape(message + DENSE)}\\."):
        CocoLMModel.from_pretrained(None, config=tiny_config(), state_dict=weights)


def test_half_of_a_head_or_of_the_auxiliary_network_is_refused(tmp_path):
    weights = CocoLMForPretraining(tiny_config(auxiliary_layers=2)).state_dict()
    for name in ("contrastive_head.dense.bias", "auxiliary.encoder.layer.1.output.dense.bias"):
        save(tmp_path, {key: tensor for key, tensor in weights.items() if key != name}, auxiliary_layers=2)
        refuses(CocoLMForPretraining, tmp_path, f"1 missing: {name}")
    save(tmp_path, weights, auxiliary_layers=1)
    with pytest.raises(RuntimeError, match=r"12 not in the model: auxiliary\.encoder\.layer\.1\."):
        CocoLMForPretraining.from_pretrained(tmp_path)


def test_weights_of_other_encoders_are_checked(tmp_path):
    sizes = {"vocab_size": 50, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32}
    encoders = [BertModel(BertConfig(**sizes, num_hidden_layers=layers)) for layers in (2, 1)]
    CocoLMForPretraining.from_encoders(*encoders).save_pretrained(tmp_path)
    name = f"cocolm.{DENSE}"
    saved = load_file(tmp_path / "model.safetensors")
    broken = torch.full_like(saved.pop(name), float("nan"))
    save_file(saved, tmp_path / "model.safetensors", metadata={"format": "pt"})
    refuses(CocoLMForPretraining, tmp_path, f"1 missing: {name}")
    save_file(saved | {name: broken}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    refuses(CocoLMForPretraining, tmp_path, f"1 NaN or infinite: {name}")


@pytest.mark.parametrize(("dtype", "value"), [(torch.float32, 3e38), (torch.float16, 6e4), (torch.bfloat16, 3e38)])
def test_large_weights_are_no_infinite_ones(tmp_path, model, dtype, value):
    torch.nn.init.constant_(model.embeddings.word_embeddings.weight, value)
    model.to(dtype).save_pretrained(tmp_path)
    assert CocoLMModel.from_pretrained(tmp_path).dtype == dtype


# What is new after loading


@pytest.mark.parametrize("in_file", [dict, prefixed])
@pytest.mark.parametrize("model_class", HEADS)
def test_what_is_new_is_said_in_one_line(tmp_path, caplog, weights, model_class, in_file):
    save(tmp_path, in_file(weights))
    loaded = model_class.from_pretrained(tmp_path)
    assert said(caplog) == [
        f"{model_class.__name__} from {tmp_path}: initialised anew, because the checkpoint does not have them in this "
        f"form: {HEADS[model_class]}. Train them before use."
    ]
    assert all(torch.equal(tensor, weights[name]) for name, tensor in loaded.base_model.state_dict().items())
    assert all(parameter.isfinite().all() for parameter in loaded.parameters())

    loaded.save_pretrained(tmp_path)
    caplog.clear()
    again, loading = model_class.from_pretrained(tmp_path, output_loading_info=True)
    assert said(caplog) == []
    assert not any(loading.values())
    assert_same_weights(loaded, again)


def test_nothing_is_said_where_nothing_is_new(tmp_path, caplog, weights):
    for in_file in (dict, prefixed):
        CocoLMModel.from_pretrained(save(tmp_path, in_file(weights)))
    pretraining = CocoLMForPretraining(tiny_config())
    pretraining.save_pretrained(tmp_path / "shards", max_shard_size="8KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 3
    assert_same_weights(pretraining, CocoLMForPretraining.from_pretrained(tmp_path / "shards"))
    assert_same_weights(pretraining.cocolm, CocoLMModel.from_pretrained(tmp_path / "shards"))
    assert said(caplog) == []


@pytest.mark.parametrize(
    "model_class", [model_class for model_class in HEADS if model_class is not CocoLMForPretraining]
)
def test_what_pretraining_leaves_behind_is_not_mentioned(tmp_path, model_class):
    pretraining = CocoLMForPretraining(tiny_config())
    pretraining.save_pretrained(tmp_path)
    for loaded_class in (CocoLMModel, model_class):
        loaded, loading = loaded_class.from_pretrained(tmp_path, output_loading_info=True)
        assert loading["unexpected_keys"] == set()
        assert_same_weights(loaded.base_model, pretraining.cocolm)


def test_a_head_of_another_task_is_left_out(tmp_path, caplog):
    model = CocoLMForSequenceClassification(tiny_config(num_labels=3))
    model.save_pretrained(tmp_path)
    loaded = CocoLMForTokenClassification.from_pretrained(tmp_path)
    assert_same_weights(model.cocolm, loaded.cocolm)
    assert [line.split("form: ")[1] for line in said(caplog)] == ["classifier. Train them before use."]


def test_a_head_of_another_size_is_new_on_demand(tmp_path, caplog):
    model = CocoLMForSequenceClassification(tiny_config(num_labels=3))
    model.save_pretrained(tmp_path)
    shapes = "classifier.out_proj.bias (3,) instead of (2,), classifier.out_proj.weight (3, 16) instead of (2, 16)"
    problem = f"2 of another shape, which ignore_mismatched_sizes=True would initialise: {shapes}"
    refuses(CocoLMForSequenceClassification, tmp_path, problem, num_labels=2)
    loaded, loading = CocoLMForSequenceClassification.from_pretrained(
        tmp_path, num_labels=2, ignore_mismatched_sizes=True, output_loading_info=True
    )
    assert {name for name, *_ in loading["mismatched_keys"]} == {
        "classifier.out_proj.bias",
        "classifier.out_proj.weight",
    }
    assert torch.equal(loaded.classifier.dense.weight, model.classifier.dense.weight)
    assert said(caplog) == [
        f"CocoLMForSequenceClassification from {tmp_path}: initialised anew, because the checkpoint does not have them "
        "in this form: classifier.out_proj.bias, classifier.out_proj.weight. Train them before use."
    ]


def test_a_model_that_is_partly_on_the_disk_loads(tmp_path, model):
    model.save_pretrained(tmp_path)
    devices = {"embeddings": "cpu", "relative_attention_bias": "cpu", "encoder": "disk"}
    loaded = CocoLMModel.from_pretrained(tmp_path, device_map=devices, offload_folder=str(tmp_path / "offload"))
    input_ids, attention_mask = texts()
    expected = model(input_ids, attention_mask).last_hidden_state
    torch.testing.assert_close(loaded(input_ids, attention_mask).last_hidden_state, expected)


REMOTE = """
import sys

from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification

complete, damaged = sys.argv[1:]
AutoModelForSequenceClassification.from_pretrained(complete, trust_remote_code=True)
AutoModelForTokenClassification.from_pretrained(complete, trust_remote_code=True)
try:
    AutoModelForTokenClassification.from_pretrained(damaged, trust_remote_code=True)
except RuntimeError as error:
    print(error)
"""


def test_code_in_the_checkpoint_says_the_same(tmp_path, run_python):
    model = CocoLMForSequenceClassification(tiny_config())
    hub.save_with_code(model, tmp_path / "complete")
    torch.nn.init.constant_(model.get_parameter(f"cocolm.{DENSE}"), float("nan"))
    hub.save_with_code(model, tmp_path / "damaged")
    printed = run_python(REMOTE, tmp_path / "complete", tmp_path / "damaged", package=False)
    assert printed.startswith(f"The weights of {tmp_path / 'damaged'} do not fit CocoLMForTokenClassification. 1 NaN")


# Files that cannot be read


def refuses_file(file, model_class=CocoLMModel, folder=None, **options):
    message = (
        f"{file} ({file.stat().st_size} bytes) cannot be read as weights. It may be cut off: compare its size and copy "
        "it again, as a whole. Or it holds more than tensors by their names, which could run code and is not loaded: "
        "convert_microsoft_cocolm.py converts checkpoints of fairseq."
    )
    with pytest.raises(RuntimeError, match=f"^{re.escape(message)}$"):
        model_class.from_pretrained(folder or file.parent, **options)


@pytest.mark.parametrize("size", [0, 1, 100, 15_000, -1])
@pytest.mark.parametrize("form", ["zip", "before torch 1.6", "safetensors"])
def test_a_truncated_file(tmp_path, model, form, size):
    file = save(tmp_path, {}) / "pytorch_model.bin"
    torch.save(model.state_dict(), file, _use_new_zipfile_serialization=form == "zip")
    if form == "safetensors":
        file.unlink()
        model.save_pretrained(tmp_path)
        file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:size])
    refuses_file(file, CocoLMForQuestionAnswering)


def test_a_truncated_shard_and_a_folder_in_the_folder(tmp_path, model):
    model.save_pretrained(tmp_path / "inner", max_shard_size="8KB")
    file = sorted((tmp_path / "inner").glob("*.safetensors"))[2]
    file.write_bytes(file.read_bytes()[:-1])
    refuses_file(file, folder=tmp_path, subfolder="inner")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors"])
def test_a_pointer_in_place_of_the_file(tmp_path, name):
    (save(tmp_path, {}) / "pytorch_model.bin").unlink()
    (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 538407936\n")
    refuses_file(tmp_path / name)


def test_other_things_than_weights(tmp_path, weights):
    for content in ({"model": weights, "args": None}, {"model": weights}, [weights], torch.zeros(3)):
        refuses_file(save(tmp_path, content) / "pytorch_model.bin")


class Exploit:
    def __reduce__(self):
        return os.mkdir, (os.environ["EXPLOITED"],)


@pytest.mark.parametrize("options", [{}, {"weights_only": False}])
@pytest.mark.parametrize("form", ["zip", "before torch 1.6"])
def test_no_code_in_a_checkpoint_runs(tmp_path, weights, monkeypatch, options, form):
    monkeypatch.setenv("EXPLOITED", str(tmp_path / "exploited"))
    file = save(tmp_path, {}) / "pytorch_model.bin"
    torch.save(weights | {"exploit": Exploit()}, file, _use_new_zipfile_serialization=form == "zip")
    refuses_file(file, **options)
    assert not (tmp_path / "exploited").exists()


def test_a_file_that_is_missing_is_named_by_transformers(tmp_path, weights):
    (save(tmp_path, weights) / "pytorch_model.bin").unlink()
    with pytest.raises(OSError, match=r"^Error no file named .*pytorch_model\.bin"):
        CocoLMModel.from_pretrained(tmp_path)
    with pytest.raises(OSError, match="nowhere"):
        CocoLMModel.from_pretrained(tmp_path / "nowhere")


@pytest.mark.parametrize("name", ["model", "pytorch_model"])
def test_files_that_are_not_loaded_are_not_blamed(tmp_path, model, name):
    model.save_pretrained(tmp_path, max_shard_size="8KB")
    for leftover in ("pytorch_model_extra.bin", "model_old.safetensors", "model-00001-of-00099.safetensors"):
        (tmp_path / leftover).write_text("no weights")
    if name == "model":
        model.save_pretrained(tmp_path / "variant", variant="fp16")
        (tmp_path / "variant" / "model.safetensors").write_text("no weights")
        with pytest.raises(ValueError, match="Flash Attention 2"):
            CocoLMModel.from_pretrained(tmp_path / "variant", variant="fp16", attn_implementation="flash_attention_2")
    else:
        for file in tmp_path.glob("*.safetensors*"):
            file.unlink()
        torch.save(model.state_dict() | {"epoch": 3}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="Flash Attention 2"):
        CocoLMModel.from_pretrained(tmp_path, attn_implementation="flash_attention_2")


def test_a_truncated_shard_of_the_former_form(tmp_path, weights):
    save(tmp_path, weights).joinpath("pytorch_model.bin").unlink()
    names = [f"pytorch_model-0000{i}-of-00002.bin" for i in (1, 2)]
    index = {"metadata": {}, "weight_map": {name: names[i % 2] for i, name in enumerate(weights)}}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    for i, name in enumerate(names):
        torch.save({key: weights[key] for key in list(weights)[i::2]}, tmp_path / name)
    assert_same_weights(CocoLMModel.from_pretrained(tmp_path), CocoLMModel.from_pretrained(tmp_path))
    file = tmp_path / names[1]
    file.write_bytes(file.read_bytes()[:100])
    refuses_file(file)


def test_a_failure_of_another_kind_is_not_hidden(tmp_path, weights):
    save(tmp_path, weights)
    # A pickle that Trainer writes, which no one loads.
    torch.save(Exploit, tmp_path / "training_args.bin")
    with pytest.raises(TypeError, match="number_of_labels"):
        AutoModelForSequenceClassification.from_pretrained(tmp_path, config=tiny_config(), number_of_labels=3)


# Input


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("rows", [slice(1), slice(None)])
@pytest.mark.parametrize("case", range(6))
def test_rows_of_padding_give_no_nan(case, rows, autocast, attention):
    model_class, batch = head_cases()[case]
    model = model_class(tiny_config(num_labels=3))
    model.set_attn_implementation(attention)
    for name, tensor in batch.items():
        if "attention_mask" in name:
            tensor[rows] = 0
        elif name == "labels" and tensor.ndim == 2:
            tensor[rows] = -100
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        output = model(**batch)
    assert all(value.isfinite().all() for value in output.values())
    output.loss.backward()
    assert all(weight.grad.isfinite().all() for weight in model.parameters() if weight.grad is not None)


@pytest.mark.parametrize("rows", [slice(1), slice(None)])
def test_one_text_without_masks_gives_gradients(rows):
    model = CocoLMForPretraining(tiny_config())
    batch = {name: tensor[rows] for name, tensor in pretraining_batch(corrupted=False).items()}
    batch["input_ids"] = batch["labels"].masked_fill(batch["labels"] == -100, PAD)
    output = model(**batch)
    assert output.mlm_loss == output.corrective_lm_loss == 0
    assert (output.contrastive_loss == 0) == (rows == slice(1))
    output.loss.backward()
    assert all(weight.grad.isfinite().all() for weight in model.parameters() if weight.grad is not None)
    assert model.copy_head.weight.grad.abs().max() > 0


@pytest.mark.parametrize("model_class", [CocoLMModel, *HEADS])
def test_more_tokens_than_positions_are_refused_by_every_class(model_class):
    model = model_class(tiny_config(max_position_embeddings=512, num_hidden_layers=1))
    shape = (1, 2, 513) if model_class is CocoLMForMultipleChoice else (1, 513)
    message = (
        "The input must have at most 512 tokens, for which there are position embeddings, but has 513. Truncate it "
        "when you tokenize."
    )
    for name, tensor in {"input_ids": torch.full(shape, 7), "inputs_embeds": torch.zeros(*shape, 16)}.items():
        if name == "input_ids" or model_class is not CocoLMForPretraining:
            with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
                model(**{name: tensor})
