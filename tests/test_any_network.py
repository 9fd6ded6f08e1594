"""The example with x-transformers encoders, run with few documents and updates."""

import importlib.util
import re
import sys

import pytest
import torch
from transformers import AutoModel, AutoModelForPreTraining, AutoTokenizer

from hf_paraphrase_lm import CocoLMForPretraining

# x-transformers uses it on import.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script.* is deprecated:DeprecationWarning")


@pytest.fixture(scope="module")
def example(request):
    path = request.config.rootpath / "examples" / "any_network.py"
    spec = importlib.util.spec_from_file_location("any_network", path)
    module = importlib.util.module_from_spec(spec)
    # Where transformers looks for the file of a class.
    sys.modules["any_network"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["any_network"]


def test_networks_of_ones_own_train_reload_and_export(example, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["any_network.py", "--steps=60", "--documents=60", f"--output={tmp_path}"])
    example.main()
    printed = capsys.readouterr().out
    losses = dict(re.findall(r"^(\w+_loss) +(\d+\.\d+ +\d+\.\d+)$", printed, re.MULTILINE))
    assert list(losses) == ["mlm_loss", "copy_loss", "corrective_lm_loss", "contrastive_loss"]
    # All but the contrastive loss, which takes longer, fall within as many updates.
    for name in ("mlm_loss", "copy_loss", "corrective_lm_loss"):
        untrained, trained = map(float, losses[name].split())
        assert trained < untrained - 0.1, name
    for name in ("mlm_loss", "copy_loss", "corrective_lm_loss", "contrastive_loss"):
        assert f"'{name}'" in printed, "Trainer logs each loss"

    joint, encoder = AutoModelForPreTraining.from_pretrained(tmp_path), AutoModel.from_pretrained(tmp_path / "main")
    assert type(joint) is CocoLMForPretraining
    assert type(encoder) is type(joint.cocolm) is type(joint.auxiliary) is example.XTransformersModel
    assert (joint.cocolm.config.num_hidden_layers, joint.auxiliary.config.num_hidden_layers) == (2, 1)
    assert len(AutoTokenizer.from_pretrained(tmp_path)) == len(AutoTokenizer.from_pretrained(tmp_path / "main")) == 261
    assert joint.auxiliary.embed_tokens.weight is joint.cocolm.embed_tokens.weight
    for name, tensor in encoder.state_dict().items():
        assert torch.equal(tensor, joint.cocolm.state_dict()[name])
    # Everything trains: only the auxiliary network's own weights get gradients from its loss alone.
    ids = torch.randint(5, example.BYTES, (4, 10))
    masked = ids.clone()
    masked[:, 3] = 4
    joint(input_ids=masked, labels=ids, span_input_ids=ids).loss.backward()
    assert not [name for name, weight in joint.named_parameters() if weight.grad is None]


def test_padding_changes_nothing(example):
    model = example.XTransformersModel(example.XTransformersConfig()).eval()
    ids = torch.randint(5, example.BYTES, (2, 6))
    padded, mask = torch.full((3, 9), 1), torch.zeros(3, 9, dtype=torch.int64)
    padded[:2, :6], mask[:2, :6] = ids, 1
    states = model(input_ids=padded, attention_mask=mask).last_hidden_state
    torch.testing.assert_close(states[:2, :6], model(input_ids=ids).last_hidden_state)
    assert states.isfinite().all(), "a row of padding has no NaN"
