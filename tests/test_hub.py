"""Checkpoints with their code load where this package is not installed, from a folder and from a Hub."""

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import DatasetCard
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import AutoConfig, AutoModel, BertConfig, BertModel, PreTrainedTokenizerFast

from hf_paraphrase_lm import (
    CocoLMConfig,
    CocoLMForMultipleChoice,
    CocoLMForPretraining,
    CocoLMModel,
    DocumentIndex,
    MargeConfig,
    MargeForConditionalGeneration,
    MargeModel,
    hub,
)

from .reference.evidence import RowEmbedder, row_documents

MARGE = {
    "vocab_size": 50,
    "hidden_size": 16,
    "encoder_layers": 2,
    "decoder_base_layers": 1,
    "decoder_layers": 1,
    "num_attention_heads": 2,
    "encoder_intermediate_size": 32,
    "decoder_base_intermediate_size": 32,
    "decoder_intermediate_size": 32,
    "retrieval_layers": 1,
    "max_position_embeddings": 24,
}
COCOLM = {
    "vocab_size": 50,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 24,
}
# Loads every case of a JSON file through its Auto class and compares with the outputs that the parent process saved.
LOAD = """
import json, sys, torch, transformers
from safetensors.torch import load_file

for source, auto_class, recording in json.load(open(sys.argv[1])):
    model = getattr(transformers, auto_class).from_pretrained(source, trust_remote_code=True).eval()
    assert type(model).__module__.startswith("transformers_modules."), type(model)
    # In the file weights lie at any address, and the address decides in which order a kernel adds up.
    for weight in model.parameters():
        weight.data = weight.data.clone()
    recording = load_file(recording)
    inputs = {key.removeprefix("input."): value for key, value in recording.items() if key.startswith("input.")}
    with torch.no_grad():
        outputs = model(**inputs)
    for key, value in recording.items():
        if key.startswith("output."):
            torch.testing.assert_close(outputs[key.removeprefix("output.")], value, rtol=0, atol=0)
    print(type(model).__name__)
"""


def inputs_of(model):
    """Two short texts, the second padded, in the form that the model's class expects."""
    input_ids = torch.tensor([[0, 7, 8, 9, 2], [0, 10, 11, 2, 1]])
    inputs = {"input_ids": input_ids, "attention_mask": (input_ids != 1).long()}
    labels = input_ids.masked_fill(input_ids == 1, -100)
    if isinstance(model, MargeModel):
        inputs["decoder_input_ids"] = input_ids
    elif isinstance(model, MargeForConditionalGeneration):
        inputs["labels"] = labels
    elif isinstance(model, CocoLMForMultipleChoice):
        inputs = {key: value[:, None].repeat(1, 2, 1) for key, value in inputs.items()}
    elif isinstance(model, CocoLMForPretraining):
        inputs |= {"labels": labels, "corrupted_input_ids": input_ids, "span_input_ids": input_ids[:, :3].contiguous()}
        inputs["input_ids"] = input_ids.masked_fill(input_ids == 8, 4)
    return inputs


@torch.no_grad()
def record(model, file):
    """Writes inputs and outputs of a model in evaluation mode for `LOAD`."""
    inputs = inputs_of(model)
    outputs = {key: value for key, value in model.eval()(**inputs).items() if isinstance(value, torch.Tensor)}
    tensors = {f"input.{key}": value for key, value in inputs.items()}
    tensors |= {f"output.{key}": value for key, value in outputs.items()}
    # Copies, because safetensors refuses tensors that share memory.
    save_file({key: value.clone(memory_format=torch.contiguous_format) for key, value in tensors.items()}, file)
    return str(file)


def make_tokenizer():
    words = {word: index for index, word in enumerate(["[CLS]", "[PAD]", "[SEP]", "[UNK]", "[MASK]", "hello"])}
    backend = Tokenizer(WordLevel(words, unk_token="[UNK]"))
    backend.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]")


def make_tokenizer_of_the_package(folder, monkeypatch):
    """A tokenizer whose class lies in a file of its own among the models."""
    file = folder / "tokenization_own.py"
    file.write_text(
        "from transformers import PreTrainedTokenizerFast\n\n\n"
        "class OwnTokenizer(PreTrainedTokenizerFast):\n"
        "    def shout(self):\n"
        "        return self.pad_token + '!'\n"
    )
    name = "hf_paraphrase_lm.models.own.tokenization_own"
    spec = importlib.util.spec_from_file_location(name, file)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    return module.OwnTokenizer(tokenizer_object=make_tokenizer().backend_tokenizer, pad_token="[PAD]")


def snapshot(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_every_class_runs_from_a_saved_folder_where_the_package_is_not_installed(tmp_path, run_python, monkeypatch):
    models = {
        (config_class.model_type, auto_class.__name__): model_class(config_class(**fields, num_labels=3))
        for config_class, fields in ((MargeConfig, MARGE), (CocoLMConfig, COCOLM))
        for auto_class, model_class in hub.AUTO_CLASSES[config_class].items()
    }
    # Of a pre-trained checkpoint, the encoder by itself.
    tokenizer = make_tokenizer_of_the_package(tmp_path, monkeypatch)
    hub.save_with_code(models["cocolm", "AutoModelForPreTraining"], tmp_path / "pretrained", tokenizer)
    models["pretrained", "AutoModel"] = CocoLMModel.from_pretrained(tmp_path / "pretrained")
    cases = []
    for (name, auto_class), model in models.items():
        folder = tmp_path / "pretrained"
        if name != "pretrained":
            folder = hub.save_with_code(model, tmp_path / name / auto_class)
        cases.append((str(folder), auto_class, record(model, tmp_path / f"{name}_{auto_class}.safetensors")))
    (tmp_path / "cases.json").write_text(json.dumps(cases))
    load_tokenizer = "print(transformers.AutoTokenizer.from_pretrained(source, trust_remote_code=True).shout())"
    printed = run_python(LOAD + load_tokenizer, tmp_path / "cases.json", package=False)
    assert printed.split() == [*(type(model).__name__ for model in models.values()), "[PAD]!"]


def test_push_and_load_through_a_hub(tmp_path, run_python, loopback_hub):
    model = MargeForConditionalGeneration(MargeConfig(**MARGE))
    model.save_pretrained(tmp_path / "plain")
    make_tokenizer().save_pretrained(tmp_path / "plain")
    recording = record(model, tmp_path / "recording.safetensors")
    # A repository that holds a card and the shards of an earlier push.
    loopback_hub.repositories["user/old"] = {"branches": {}, "commits": {}, "private": False}
    old_files = {"README.md": b"A card.", "model-00001-of-00002.safetensors": b"", "model.safetensors.index.json": b""}
    old = loopback_hub.commit("user/old", "main", old_files)

    push = """
import sys
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer
from hf_paraphrase_lm.hub import push_with_code

model = AutoModelForSeq2SeqLM.from_pretrained(sys.argv[1])
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
print(push_with_code(model, "tiny", tokenizer, private=True).oid)
print(push_with_code(model, "user/old", revision="experiment", commit_message="On a branch").oid)
"""
    first, second = run_python(push, tmp_path / "plain", hub=loopback_hub).split()
    weights = (tmp_path / "plain" / "model.safetensors").read_bytes()
    pushed = {
        "config.json",
        "configuration_marge.py",
        "generation_config.json",
        "model.safetensors",
        "modeling_marge.py",
    }

    assert loopback_hub.repositories["user/tiny"]["private"] is True
    assert loopback_hub.repositories["user/tiny"]["branches"] == {"main": first}
    files = loopback_hub.files("user/tiny")
    assert set(files) == pushed | {".gitattributes", "tokenizer.json", "tokenizer_config.json"}
    assert files["model.safetensors"] == weights

    assert loopback_hub.repositories["user/old"]["branches"] == {"main": old, "experiment": second}
    files = loopback_hub.files("user/old", "experiment")
    assert set(files) == pushed | {"README.md"}
    assert files["model.safetensors"] == weights

    (tmp_path / "cases.json").write_text(json.dumps([("user/tiny", "AutoModelForSeq2SeqLM", recording)]))
    load_tokenizer = "print(transformers.AutoTokenizer.from_pretrained('user/tiny', trust_remote_code=True).pad_token)"
    printed = run_python(LOAD + load_tokenizer, tmp_path / "cases.json", package=False, hub=loopback_hub)
    assert printed.split() == ["MargeForConditionalGeneration", "[PAD]"]


def test_push_and_load_an_index_through_a_hub(tmp_path, run_python, loopback_hub):
    embedder = RowEmbedder(torch.randn(20, 8))
    embedder.fingerprint = "rows"
    old, new = (DocumentIndex.build(row_documents(n), embedder, 99, progress=False) for n in (10, 20))
    old.save(tmp_path / "old")
    new.save(tmp_path / "new")
    loopback_hub.repositories["datasets/user/other"] = {"branches": {}, "commits": {}, "private": False}
    loopback_hub.commit("datasets/user/other", "main", {"README.md": b"A card."})
    np.save(tmp_path / "queries.npy", embedder.vectors.numpy())
    push_and_load = """
import sys
import numpy as np
from huggingface_hub.errors import RepositoryNotFoundError
from hf_paraphrase_lm import DocumentIndex

old, new = map(DocumentIndex.load, sys.argv[1:3])
first = old.push_to_hub("documents", private=True).oid
print(first)
print(new.push_to_hub("user/documents", commit_message="More").oid)
print(old.push_to_hub("user/other", revision="small").oid)
queries = np.load(sys.argv[3])
index = DocumentIndex.from_hub("user/documents", memory_map=True)
assert index.search(queries, 1)[1][:, 0].tolist() == list(range(20))
assert len(index.documents) == 20
assert len(DocumentIndex.from_hub("user/documents", revision=first)) == 10
assert len(DocumentIndex.from_hub("user/other", revision="small", verify=False)) == 10
try:
    DocumentIndex.from_hub("user/other")
except FileNotFoundError as error:
    print(error)
try:
    DocumentIndex.from_hub("user/nobody")
except RepositoryNotFoundError:
    print("no such repository")
"""
    paths = tmp_path / "old", tmp_path / "new", tmp_path / "queries.npy"
    first, second, third, *errors = run_python(push_and_load, *paths, hub=loopback_hub).splitlines()
    assert errors == [
        "The dataset repository user/other has no index.json at its main branch, so it holds no DocumentIndex. Upload "
        "one there with push_to_hub.",
        "no such repository",
    ]
    repository = loopback_hub.repositories["datasets/user/documents"]
    assert repository["private"] is True and repository["branches"] == {"main": second}
    for oid in (first, second):
        files = loopback_hub.files("datasets/user/documents", oid)
        assert {name.split("/")[0] for name in files} == {
            ".gitattributes",
            "README.md",
            "index.json",
            json.loads(files["index.json"])["data"],
        }
        assert {Path(name).suffix for name in files if "/" in name} == {".json", ".arrow", ".faiss"}
    card = DatasetCard(files["README.md"].decode())
    assert card.data.configs == [{"config_name": "default", "data_files": "index-data-*/documents/*.arrow"}]
    assert 'DocumentIndex.from_hub("user/documents", memory_map=True)' in card.text
    branches = loopback_hub.repositories["datasets/user/other"]["branches"]
    assert branches["small"] == third and branches["main"] != third
    assert loopback_hub.files("datasets/user/other", "small")["README.md"] == b"A card."


def test_saving_again_replaces_every_weight_file_and_keeps_other_files(tmp_path):
    folder = tmp_path / "checkpoint"
    first = MargeModel(MargeConfig(**MARGE))
    first.save_pretrained(folder, max_shard_size="10KB")
    assert (folder / "model.safetensors.index.json").exists()
    (folder / "README.md").write_text("A card.")

    second = MargeModel(MargeConfig(**MARGE))
    hub.save_with_code(second, folder, make_tokenizer())
    assert {file.name for file in folder.iterdir()} == {
        "README.md",
        "config.json",
        "configuration_marge.py",
        "model.safetensors",
        "modeling_marge.py",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    loaded = MargeModel.from_pretrained(folder)
    for (name, expected), (_, given) in zip(second.named_parameters(), loaded.named_parameters(), strict=True):
        torch.testing.assert_close(given, expected, rtol=0, atol=0, msg=name)


def test_auto_map_names_every_auto_class_of_the_family(tmp_path):
    hub.save_with_code(CocoLMModel(CocoLMConfig(**COCOLM)), tmp_path)
    auto_map = json.loads((tmp_path / "config.json").read_text())["auto_map"]
    heads = {auto.__name__: f"modeling_cocolm.{head.__name__}" for auto, head in hub.AUTO_CLASSES[CocoLMConfig].items()}
    assert auto_map == {"AutoConfig": "configuration_cocolm.CocoLMConfig"} | heads


def test_saving_with_code_does_not_mark_the_classes(tmp_path):
    model = MargeModel(MargeConfig(**MARGE))
    hub.save_with_code(model, tmp_path / "with_code")
    model.save_pretrained(tmp_path / "plain")
    assert {file.name for file in (tmp_path / "plain").iterdir()} == {"config.json", "model.safetensors"}
    assert "auto_map" not in json.loads((tmp_path / "plain" / "config.json").read_text())


def test_a_failed_save_leaves_the_folder_as_it_was(tmp_path, monkeypatch):
    folder = tmp_path / "checkpoint"
    hub.save_with_code(MargeModel(MargeConfig(**MARGE)), folder)
    before = snapshot(folder)

    def interrupted(self, save_directory, **kwargs):
        (Path(save_directory) / "model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(MargeModel, "save_pretrained", interrupted)
    with pytest.raises(KeyboardInterrupt):
        hub.save_with_code(MargeModel(MargeConfig(**MARGE)), folder)
    assert snapshot(folder) == before


def test_a_model_of_another_package_is_refused(tmp_path):
    config = BertConfig(vocab_size=8, hidden_size=4, num_hidden_layers=1, num_attention_heads=1, intermediate_size=4)
    with pytest.raises(TypeError) as error:
        hub.save_with_code(BertModel(config), tmp_path / "folder")
    assert str(error.value) == (
        "save_with_code expects one of CocoLMForMaskedLM, CocoLMForMultipleChoice, CocoLMForPretraining, "
        "CocoLMForQuestionAnswering, CocoLMForSequenceClassification, CocoLMForTokenClassification, CocoLMModel, "
        "MargeForConditionalGeneration, MargeForSequenceClassification, MargeModel, but got "
        "transformers.models.bert.modeling_bert.BertModel. Only the code of these classes works by itself; unwrap the "
        "model or save it with save_pretrained."
    )
    assert not (tmp_path / "folder").exists()


def test_a_file_in_the_place_of_the_folder_is_refused(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(FileExistsError):
        hub.save_with_code(MargeModel(MargeConfig(**MARGE)), tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("config_class, fields", [(MargeConfig, MARGE), (CocoLMConfig, COCOLM)])
def test_importing_the_package_registers_the_auto_classes(config_class, fields):
    config = AutoConfig.for_model(config_class.model_type, **fields)
    assert type(config) is config_class
    for auto_class, model_class in hub.AUTO_CLASSES[config_class].items():
        assert type(auto_class.from_config(config)) is model_class
    assert AutoModel in hub.AUTO_CLASSES[config_class]
