"""MuonWithAdamW: which weights are whose, its updates beside those of the two optimizers, and its state."""

import pytest
import torch
from torch import nn

from hf_paraphrase_lm import CocoLMConfig, CocoLMForPretraining, MuonWithAdamW

SIZES = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
SETTINGS = {"lr": 0.01, "weight_decay": 0.1}


class Network(nn.Module):
    """A tied output, a layer norm and a layer with one output."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.layer, self.norm = nn.Embedding(7, 4), nn.Linear(4, 4), nn.LayerNorm(4)
        self.head, self.output = nn.Linear(4, 1), nn.Linear(4, 7, bias=False)
        self.output.weight = self.embedding.weight

    def train_step(self, *optimizers):
        states = self.norm(self.layer(self.embedding(torch.arange(7))))
        loss = self.output(states).logsumexp(1).sum() + self.head(states).square().sum()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        self.zero_grad()


def assert_same_weights(one, other):
    for (name, weight), expected in zip(one.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(weight, expected, rtol=0, atol=0, msg=name)


def test_same_as_both_apart(monkeypatch):
    """But for Muon's products, which on a CPU are computed in float32."""
    model, expected = Network(), Network()
    plain = [expected.embedding.weight, expected.head.weight]
    undecayed = [expected.layer.bias, expected.norm.weight, expected.norm.bias, expected.head.bias]
    muon = torch.optim.Muon([expected.layer.weight], **SETTINGS, adjust_lr_fn="match_rms_adamw")
    groups = [{"params": plain}, {"params": undecayed, "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, **SETTINGS, betas=(0.9, 0.98), eps=1e-6)
    optimizer = MuonWithAdamW(model, **SETTINGS)
    for _ in range(3):
        model.train_step(optimizer)
        with monkeypatch.context() as patch:
            patch.setattr(torch.Tensor, "bfloat16", torch.Tensor.float)
            expected.train_step(muon, adamw)
        assert_same_weights(model, expected)


def test_weights_of_cocolm():
    """The matrices of the layers of both networks are Muon's; embeddings, the relative bias and vectors are not."""
    model = CocoLMForPretraining(CocoLMConfig(**SIZES, auxiliary_layers=1, intermediate_size=64))
    model.cocolm.embeddings.requires_grad_(False)
    optimizer = MuonWithAdamW(model)
    names = {id(weight): name for name, weight in model.named_parameters()}
    trained = [names[id(weight)] for group in optimizer.param_groups for weight in group["params"]]
    assert sorted(trained) == sorted(name for name, weight in model.named_parameters() if weight.requires_grad)
    own = {names[id(weight)] for weight in optimizer.muon.param_groups[0]["params"]}
    layers = {name for name, weight in model.named_parameters() if ".layer" in name and weight.dim() == 2}
    assert layers and layers <= own
    assert not any("embed" in name or "relative" in name for name in own)


def test_schedulers_and_closures_reach_both():
    model = Network()
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    optimizer = MuonWithAdamW(model, **SETTINGS)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0 if step == 0 else 1.0)
    model.train_step(optimizer)
    assert all(torch.equal(weight, before[name]) for name, weight in model.named_parameters())
    scheduler.step()

    def closure():
        loss = model.output(model.norm(model.layer(model.embedding(torch.arange(7))))).square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure) > 0
    assert not torch.equal(model.layer.weight, before["layer.weight"])
    assert not torch.equal(model.norm.weight, before["norm.weight"])


def test_goes_on_from_its_state(tmp_path):
    """Saved without pickled code."""
    model, other = Network(), Network()
    optimizer = MuonWithAdamW(model, **SETTINGS)
    model.train_step(optimizer)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    other.load_state_dict(model.state_dict())
    resumed = MuonWithAdamW(other, lr=1.0)
    resumed.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    for _ in range(2):
        model.train_step(optimizer)
        other.train_step(resumed)
        assert_same_weights(other, model)


def test_no_matrix_to_train():
    with pytest.raises(ValueError, match=r"has none to train\. Take AdamW"):
        MuonWithAdamW(nn.LayerNorm(4))
