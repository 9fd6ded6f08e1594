"""The conversion of released checkpoints, and what it does with damaged ones."""

import argparse
import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForPreTraining,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from hf_paraphrase_lm import (
    CocoLMConfig,
    CocoLMForMaskedLM,
    CocoLMForPretraining,
    CocoLMForQuestionAnswering,
    CocoLMForSequenceClassification,
    CocoLMForTokenClassification,
    CocoLMModel,
    CocoLMTokenizer,
)
from hf_paraphrase_lm.models.cocolm import convert_microsoft_cocolm as conversion
from hf_paraphrase_lm.models.cocolm.convert_microsoft_cocolm import convert_checkpoint, convert_fairseq_state_dict

from .test_cocolm_parity import SHARED

FIXTURES = Path(__file__).parent / "fixtures"
SIZES = {
    "vocab_size": 92,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 40,
    "rel_pos_bins": 32,
    "max_rel_pos": 64,
}
# As released: no model_type, no architectures, no special ids.
SETTINGS = SIZES | {"type_vocab_size": 0, "layer_norm_type": "post", "cls_dropout_prob": 0.1}
# What fairseq was told when the weights of the fixture were made.
ARGUMENTS = {
    "task": "cocolm",
    "max_positions": 64,
    "encoder_layers": 3,
    "encoder_embed_dim": 32,
    "encoder_ffn_embed_dim": 64,
    "encoder_attention_heads": 4,
    "generator_layers": 2,
    "activation_fn": "gelu",
    "dropout": 0.0,
    "attention_dropout": 0.0,
    "rel_pos": 1,
    "rel_pos_bins": 32,
    "max_rel_pos": 128,
    "seq_contrast": True,
    "seq_contrast_dim": 32,
    "temperature": 0.5,
    "binary_loss_weight": 40,
    "scl_loss_weight": 2,
    "generator_sample_mode": "train",
    "encoder_layers_to_keep": None,
}
IDS = torch.tensor([[0, 5, 6, 7, 2]])


def copy_tokenizer(folder):
    for name in ("sp.model", "dict.txt"):
        shutil.copyfile(FIXTURES / "cocolm_tokenizer" / name, folder / name)


@pytest.fixture
def model():
    return CocoLMModel(CocoLMConfig(**SIZES)).eval()


@pytest.fixture
def released(tmp_path, model):
    folder = tmp_path / "released"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(SETTINGS))
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    copy_tokenizer(folder)
    return folder


@pytest.fixture
def fairseq_weights():
    tensors = load_file(FIXTURES / "cocolm_pretraining.safetensors")
    weights = {name.removeprefix("weights/"): tensor for name, tensor in tensors.items() if name.startswith("weights/")}
    return weights | {copy: weights[original] for copy, original in SHARED.items()}


def refuses(source, target, message, error=ValueError):
    before = sorted(target.parent.iterdir())
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        convert_checkpoint(source, target)
    # Nothing is left behind.
    assert sorted(target.parent.iterdir()) == before


def said(caplog):
    return [record.getMessage() for record in caplog.records if record.name == conversion.__name__]


def save_fairseq(file, weights, **changes):
    torch.save({"args": argparse.Namespace(**ARGUMENTS | changes), "model": weights}, file)


# The released folder


@pytest.mark.parametrize("prefix", ["", "cocolm."])
def test_a_released_folder_loads_with_the_auto_classes(released, tmp_path, model, prefix):
    weights = {prefix + name: tensor for name, tensor in model.state_dict().items()}
    torch.save(weights, released / "pytorch_model.bin")
    target = convert_checkpoint(released, tmp_path / "runs" / "converted")
    assert target == tmp_path / "runs" / "converted"
    assert sorted(file.name for file in target.iterdir()) == [
        *["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
    ]
    assert [file.name for file in target.parent.iterdir()] == ["converted"]
    config = json.loads((target / "config.json").read_text())
    assert (config["model_type"], config["architectures"]) == ("cocolm", ["CocoLMModel"])
    assert config.items() >= SETTINGS.items()
    assert type(AutoConfig.from_pretrained(target)) is CocoLMConfig

    loaded, loading = AutoModel.from_pretrained(target, output_loading_info=True)
    assert type(loaded) is CocoLMModel and not any(loading.values())
    torch.testing.assert_close(loaded.eval()(IDS).last_hidden_state, model(IDS).last_hidden_state, rtol=0, atol=0)
    heads = {
        AutoModelForPreTraining: CocoLMForPretraining,
        AutoModelForMaskedLM: CocoLMForMaskedLM,
        AutoModelForSequenceClassification: CocoLMForSequenceClassification,
    }
    for auto_class, head_class in heads.items():
        head = auto_class.from_pretrained(target)
        assert type(head) is head_class
        for name, tensor in model.state_dict().items():
            assert torch.equal(head.cocolm.state_dict()[name], tensor)
    tokenizer = AutoTokenizer.from_pretrained(target)
    assert type(tokenizer) is CocoLMTokenizer and tokenizer.model_max_length == 40
    direct = CocoLMTokenizer.from_pretrained(released)
    assert tokenizer("isn't it?", "(a)") == direct("isn't it?", "(a)")


@pytest.mark.parametrize(
    ("auto_class", "model_class", "outputs"),
    [
        (AutoModelForSequenceClassification, CocoLMForSequenceClassification, ["logits"]),
        (AutoModelForQuestionAnswering, CocoLMForQuestionAnswering, ["start_logits", "end_logits"]),
    ],
)
def test_a_fine_tuned_folder_keeps_its_head(released, tmp_path, auto_class, model_class, outputs):
    model = model_class(CocoLMConfig(**SIZES, num_labels=3)).eval()
    (released / "config.json").write_text(json.dumps(SETTINGS | {"num_labels": 3}))
    torch.save(model.state_dict(), released / "pytorch_model.bin")
    target = convert_checkpoint(released, tmp_path / "converted")
    loaded, loading = auto_class.from_pretrained(target, output_loading_info=True)
    assert type(loaded) is model_class and not any(loading.values())
    # In the file weights lie at any address, and the address decides in which order a kernel adds up.
    for weight in loaded.parameters():
        weight.data = weight.data.clone()
    for name in outputs:
        torch.testing.assert_close(loaded(IDS)[name], model(IDS)[name], rtol=0, atol=0)


def test_a_head_of_another_kind_is_refused(released, tmp_path):
    model = CocoLMForTokenClassification(CocoLMConfig(**SIZES))
    weights = {name.replace("classifier", "tagger"): tensor for name, tensor in model.state_dict().items()}
    torch.save(weights, released / "pytorch_model.bin")
    message = (
        f"{released} has weights besides the encoder: tagger. Load it with the class that they belong to, and save it "
        "again."
    )
    refuses(released, tmp_path / "converted", message)


@pytest.mark.parametrize("form", ["released", "fairseq"])
def test_the_type_of_weights_is_kept(released, tmp_path, model, fairseq_weights, form):
    torch.save(model.half().state_dict(), released / "pytorch_model.bin")
    save_fairseq(tmp_path / "model.pt", {name: tensor.half() for name, tensor in fairseq_weights.items()})
    source = released if form == "released" else tmp_path / "model.pt"
    target = convert_checkpoint(source, tmp_path / "converted")
    assert json.loads((target / "config.json").read_text())["dtype"] == "float16"
    assert {tensor.dtype for tensor in load_file(target / "model.safetensors").values()} == {torch.float16}
    assert AutoModel.from_pretrained(target).dtype == torch.float16


def test_files_of_torch_before_1_6_are_read(released, tmp_path, model):
    torch.save(model.state_dict(), released / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    loaded = AutoModel.from_pretrained(convert_checkpoint(released, tmp_path / "converted"))
    assert torch.equal(loaded.embeddings.word_embeddings.weight, model.embeddings.word_embeddings.weight)


# A checkpoint of fairseq


@pytest.mark.parametrize("form", ["args", "cfg", "dictionary"])
def test_a_fairseq_checkpoint_becomes_a_pretraining_checkpoint(tmp_path, fairseq_weights, form):
    settings = argparse.Namespace(**ARGUMENTS)
    entries = {
        "args": {"args": settings, "cfg": None},
        "cfg": {"args": None, "cfg": {"model": settings, "common": {"seed": 1}}},
        "dictionary": {"args": ARGUMENTS},
    }
    extra = {"extra_state": {"epoch": 3}, "last_optimizer_state": {"state": {0: {"step": 1, "m": torch.zeros(2)}}}}
    torch.save(entries[form] | extra | {"model": fairseq_weights}, tmp_path / "model.pt")
    target = convert_checkpoint(tmp_path / "model.pt", tmp_path / "converted")
    assert sorted(file.name for file in target.iterdir()) == ["config.json", "model.safetensors"]
    loaded, loading = AutoModelForPreTraining.from_pretrained(target, output_loading_info=True)
    assert type(loaded) is CocoLMForPretraining and not any(loading.values())
    converted = convert_fairseq_state_dict(fairseq_weights)
    assert loaded.state_dict().keys() == converted.keys()
    assert all(torch.equal(loaded.get_parameter(name), tensor) for name, tensor in converted.items())
    # Shared weights are written once.
    assert len(load_file(target / "model.safetensors")) == len(converted) - len(SHARED)
    expected = {
        "vocab_size": 101,
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "max_position_embeddings": 64,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "rel_pos_bins": 32,
        "max_rel_pos": 128,
        "auxiliary_layers": 2,
        "auxiliary_sampling": "train",
        "contrastive_embedding_size": 32,
        "contrastive_temperature": 0.5,
        "contrastive_loss_weight": 2,
        "copy_loss_weight": 40,
    }
    assert {name: getattr(loaded.config, name) for name in expected} == expected


def test_the_encoder_alone_with_a_tokenizer_beside_it(tmp_path, fairseq_weights):
    encoder = {name: tensor for name, tensor in fairseq_weights.items() if name.startswith("encoder.sentence_encoder.")}
    # fairseq leaves out what was not set; its defaults apply.
    unset = ("rel_pos_bins", "max_rel_pos", "seq_contrast", "generator_sample_mode")
    save_fairseq(tmp_path / "model.pt", encoder, **dict.fromkeys(unset))
    copy_tokenizer(tmp_path)
    target = convert_checkpoint(tmp_path / "model.pt", tmp_path / "converted")
    loaded, loading = AutoModel.from_pretrained(target, output_loading_info=True)
    assert type(loaded) is CocoLMModel and not any(loading.values())
    config = loaded.config
    assert (config.rel_pos_bins, config.max_rel_pos, config.max_position_embeddings) == (32, 128, 64)
    assert (config.auxiliary_sampling, config.contrastive_loss_weight) == ("eval", 0)
    assert type(AutoTokenizer.from_pretrained(target)) is CocoLMTokenizer


def test_no_relative_positions(tmp_path, fairseq_weights):
    weights = {name: tensor for name, tensor in fairseq_weights.items() if "relative_attention_bias" not in name}
    save_fairseq(tmp_path / "model.pt", weights, rel_pos=0)
    target = convert_checkpoint(tmp_path / "model.pt", tmp_path / "converted")
    assert CocoLMForPretraining.from_pretrained(target).config.rel_pos_bins == 0


def test_what_a_checkpoint_does_not_have_is_not_written(tmp_path, fairseq_weights):
    weights = {name: tensor for name, tensor in fairseq_weights.items() if not name.startswith("auxiliary.")}
    save_fairseq(tmp_path / "model.pt", weights)
    target = convert_checkpoint(tmp_path / "model.pt", tmp_path / "converted")
    assert not any(name.startswith("auxiliary") for name in load_file(target / "model.safetensors"))
    _, loading = CocoLMForPretraining.from_pretrained(target, output_loading_info=True)
    assert {name.split(".")[0] for name in loading["missing_keys"]} == {"auxiliary", "auxiliary_lm_head"}


def test_a_checkpoint_of_fairseq_that_is_none(tmp_path, fairseq_weights):
    source, target = tmp_path / "model.pt", tmp_path / "converted"
    message = (
        f"{source} is no checkpoint of fairseq: it must hold 'model', the weights, and the settings as 'args' or as "
        "'model' in 'cfg'."
    )
    arguments = argparse.Namespace(**ARGUMENTS)
    for content in (
        fairseq_weights,
        {"model": fairseq_weights},
        {"args": arguments},
        {"args": arguments, "model": 1},
        [1],
    ):
        torch.save(content, source)
        refuses(source, target, message)
    save_fairseq(source, fairseq_weights, activation_fn="swoosh")
    with pytest.raises(StrictDataclassError, match=r"hidden_act must be one of \(.*\), but got 'swoosh'\.$"):
        convert_checkpoint(source, target)


def test_fairseq_weights_that_do_not_fit(tmp_path, fairseq_weights):
    source, target = tmp_path / "model.pt", tmp_path / "converted"
    reason = "Either the checkpoint is damaged, or its config.json is missing or of another model."

    def refuses_weights(problem, weights, **changes):
        save_fairseq(source, weights, **changes)
        with pytest.raises(RuntimeError, match=f"^The weights of the state dict do not fit .*{re.escape(problem)}"):
            convert_checkpoint(source, target)
        assert not target.exists()

    save_fairseq(source, {old: tensor for old, tensor in fairseq_weights.items() if "embed_positions" not in old})
    refuses(source, target, f"{source} has no position embeddings of the main network.")
    partial = {old: tensor for old, tensor in fairseq_weights.items() if old != "encoder.seq_head.dense.bias"}
    refuses_weights(f"1 missing: contrastive_head.dense.bias. {reason}", partial)
    refuses_weights("15 of another shape, which ", fairseq_weights, encoder_ffn_embed_dim=60)
    layer = {"encoder.sentence_encoder.layers.3.fc1.bias": torch.zeros(64)}
    refuses_weights(
        f"1 not in the model: cocolm.encoder.layer.3.intermediate.dense.bias. {reason}", fairseq_weights | layer
    )
    broken = {"encoder.binary_head.out_proj.bias": torch.tensor([float("nan")])}
    refuses_weights(f"1 NaN or infinite: copy_head.bias. {reason}", fairseq_weights | broken)


# Files and folders that are not as they should be


@pytest.mark.parametrize("missing", ["config.json", "pytorch_model.bin"])
def test_a_missing_file(released, tmp_path, missing):
    (released / missing).unlink()
    with pytest.raises(OSError, match=re.escape(missing)):
        convert_checkpoint(released, tmp_path / "converted")
    assert sorted(tmp_path.iterdir()) == [released]


def test_half_a_tokenizer(released, tmp_path):
    (released / "dict.txt").unlink()
    message = (
        "A COCO-LM tokenizer is made of tokenizer.json, or of both sp.model and dict.txt, but got "
        f"vocab_file={str(released / 'sp.model')!r} and dict_file=None. Put what is missing into the folder."
    )
    refuses(released, tmp_path / "converted", message)


def test_no_tokenizer_is_said(released, tmp_path, caplog):
    for name in ("sp.model", "dict.txt"):
        (released / name).unlink()
    target = convert_checkpoint(released, tmp_path / "converted")
    assert said(caplog) == [f"{released} has no sp.model and dict.txt, so no tokenizer is written."]
    assert sorted(file.name for file in target.iterdir()) == ["config.json", "model.safetensors"]


def test_a_dictionary_with_more_tokens_than_embeddings_is_said(released, tmp_path, caplog):
    with open(released / "dict.txt", "a", encoding="utf-8") as file:
        file.write("madeupword0000 0\n")
    convert_checkpoint(released, tmp_path / "converted")
    assert said(caplog) == [
        f"{released / 'dict.txt'} has 93 tokens, but the model has embeddings for 92: it cannot read the last ones."
    ]


def test_no_source_and_a_target_that_exists(released, tmp_path):
    refuses(tmp_path / "no", tmp_path / "converted", f"There is no checkpoint {tmp_path / 'no'}.", FileNotFoundError)
    target = tmp_path / "converted"
    for make in (target.mkdir, target.touch):
        make()
        message = f"{target} exists. Nothing is overwritten: name another folder, or remove it first."
        refuses(released, target, message, FileExistsError)
        target.rmdir() if target.is_dir() else target.unlink()


@pytest.mark.parametrize("size", [0, 100, 5000, -1])
def test_a_truncated_file_of_fairseq(tmp_path, fairseq_weights, size):
    source = tmp_path / "model.pt"
    save_fairseq(source, fairseq_weights)
    data = source.read_bytes()[:size]
    source.write_bytes(data)
    message = (
        f"{source} ({len(data)} bytes) cannot be read. It may be cut off: compare its size and copy it again, as a "
        "whole. Or it holds more than weights and settings, which could run code and is not loaded: where you trust "
        "it, save its 'model' and vars(args) alone."
    )
    refuses(source, tmp_path / "converted", message, RuntimeError)


class Exploit:
    def __reduce__(self):
        return os.mkdir, (os.environ["EXPLOITED"],)


def test_no_code_of_a_checkpoint_runs(released, tmp_path, model, monkeypatch):
    monkeypatch.setenv("EXPLOITED", str(tmp_path / "exploited"))
    torch.save(model.state_dict() | {"exploit": Exploit()}, released / "pytorch_model.bin")
    torch.save({"args": Exploit(), "model": {}}, released / "model.pt")
    for source in (released, released / "model.pt"):
        with pytest.raises(RuntimeError, match=r"which could run code and is not loaded"):
            convert_checkpoint(source, tmp_path / "converted")
    assert sorted(tmp_path.iterdir()) == [released]


@pytest.mark.parametrize("damage", [{"encoder.layer.1.output.dense.bias": torch.zeros(17)}, {"lone": Exploit}])
def test_a_damaged_folder_leaves_nothing(released, tmp_path, model, damage):
    # What else is refused: tests/test_bad_input_cocolm.py.
    torch.save(model.state_dict() | damage, released / "pytorch_model.bin")
    with pytest.raises(RuntimeError):
        convert_checkpoint(released, tmp_path / "converted")
    assert sorted(tmp_path.iterdir()) == [released]


def test_an_interrupted_conversion_leaves_nothing(released, tmp_path, monkeypatch):
    def interrupt(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(CocoLMTokenizer, "save_pretrained", interrupt)
    with pytest.raises(KeyboardInterrupt):
        convert_checkpoint(released, tmp_path / "converted")
    assert list(tmp_path.iterdir()) == [released]


# The command


def test_the_command_converts(released, tmp_path, run_python):
    code = """
import runpy, warnings
warnings.simplefilter("error")
runpy.run_module("hf_paraphrase_lm.models.cocolm.convert_microsoft_cocolm", run_name="__main__")
"""
    target = tmp_path / "converted"
    printed = run_python(code, released, target)
    assert printed == f"Wrote {target}: config.json, model.safetensors, tokenizer.json, tokenizer_config.json\n"
    assert type(AutoModel.from_pretrained(target)) is CocoLMModel


def test_the_command_explains_itself(capsys):
    with pytest.raises(SystemExit) as stopped:
        conversion.main(["--help"])
    assert stopped.value.code == 0
    printed = capsys.readouterr().out
    assert "python -m hf_paraphrase_lm.models.cocolm.convert_microsoft_cocolm cocolm-base-released" in printed
    assert 'AutoTokenizer.from_pretrained("cocolm-base")' in printed


def test_the_command_ends_with_a_sentence(released, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        conversion.main([str(tmp_path / "no"), str(tmp_path / "converted")])
    assert stopped.value.code == 1
    assert capsys.readouterr().err == f"convert_microsoft_cocolm: error: There is no checkpoint {tmp_path / 'no'}.\n"
    for content, cause in (("{", "config.json"), ('{"hidden_size": "16"}', "hidden_size"), ('{"hiden_size": 16}', "")):
        (released / "config.json").write_text(content)
        with pytest.raises(SystemExit) as stopped:
            conversion.main([str(released), str(tmp_path / "converted")])
        assert stopped.value.code == 1
        assert cause in capsys.readouterr().err
