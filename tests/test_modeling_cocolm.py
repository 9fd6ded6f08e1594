"""COCO-LM: configuration, encoder, pre-training objective and heads, on tiny models with random weights."""

import json
import re

import pytest
import torch
import torch.nn.functional as F
import transformers
from huggingface_hub.errors import StrictDataclassError
from safetensors.torch import load_file
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

from hf_paraphrase_lm.models.cocolm import (
    CocoLMConfig,
    CocoLMForMaskedLM,
    CocoLMForMultipleChoice,
    CocoLMForPretraining,
    CocoLMForQuestionAnswering,
    CocoLMForSequenceClassification,
    CocoLMForTokenClassification,
    CocoLMModel,
    modeling_cocolm,
)

from .reference import cocolm as reference

CLS, PAD, SEP, MASK, FIRST_WORD, VOCAB_SIZE = 0, 1, 2, 4, 5, 50
LOSSES = ("mlm_loss", "copy_loss", "corrective_lm_loss", "contrastive_loss")


def tiny_config(**changes):
    sizes = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "max_position_embeddings": 24,
        "rel_pos_bins": 12,
        "max_rel_pos": 16,
        "auxiliary_layers": 1,
        # Wide enough that every part of the network shows in its outputs.
        "initializer_range": 0.3,
    }
    return CocoLMConfig(**sizes | changes)


def without_dropout(**changes):
    return tiny_config(**{"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0} | changes)


def texts(lengths=(12, 9, 12, 5)):
    """Random texts `[CLS] ... [SEP]`, padded on the right, and their mask."""
    input_ids = torch.full((len(lengths), max(lengths)), PAD)
    for row, length in zip(input_ids, lengths, strict=True):
        row[:length] = torch.randint(FIRST_WORD, VOCAB_SIZE, (length,))
        row[0], row[length - 1] = CLS, SEP
    return input_ids, (input_ids != PAD).long()


def pretraining_batch(lengths=(12, 9, 12, 5), corrupted=True):
    """What the collator makes of random texts; positions 2 and 3 are masked, the first text has 1 masked too."""
    original, attention_mask = texts(lengths)
    input_ids = original.clone()
    input_ids[:, 2:4] = MASK
    input_ids[0, 1] = MASK
    spans, span_mask = texts([max(length - 2, 2) for length in lengths])
    spans[:, 1:] = torch.where(span_mask[:, 1:].bool(), original[:, 2 : spans.shape[1] + 1], PAD)
    batch = {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "labels": original.masked_fill(attention_mask == 0, -100),
        "span_input_ids": spans,
        "span_attention_mask": span_mask,
    }
    if corrupted:
        sampled = torch.randint(FIRST_WORD, VOCAB_SIZE, original.shape)
        # The sample at position 3 happens to be right.
        sampled[:, 3] = original[:, 3]
        batch["corrupted_input_ids"] = torch.where(input_ids == MASK, sampled, input_ids)
    return batch


def gradients(model, loss):
    """Gradients that the loss gives, 0 for parameters that it does not reach."""
    parameters = dict(model.named_parameters())
    values = torch.autograd.grad(loss, parameters.values(), allow_unused=True, retain_graph=True)
    return {
        name: torch.zeros_like(parameter) if value is None else value
        for (name, parameter), value in zip(parameters.items(), values, strict=True)
    }


def reached(model, loss):
    return {name for name, gradient in gradients(model, loss).items() if gradient.abs().max() > 0}


def assert_same_weights(model, other):
    expected = model.state_dict()
    assert expected.keys() == other.state_dict().keys()
    for name, tensor in other.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


# Configuration


def test_defaults_are_the_released_base_model():
    with torch.device("meta"):
        model = CocoLMModel(CocoLMConfig())
    assert model.num_parameters() == 134_601_984
    assert (model.config.bos_token_id, model.config.pad_token_id, model.config.eos_token_id) == (0, 1, 2)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"auxiliary_layers": 0}, "auxiliary_layers must be at least 1, but got 0."),
        ({"contrastive_embedding_size": 0}, "contrastive_embedding_size must be at least 1, but got 0."),
        (
            {"num_attention_heads": 3},
            "hidden_size must be a multiple of num_attention_heads (3), but got 16. Every head works on an equal part "
            "of the hidden state.",
        ),
        (
            {"rel_pos_bins": 7},
            "rel_pos_bins must be 0 (no relative bias) or an even number from 4 on, but got 7. Half of the buckets "
            "serve each direction.",
        ),
        (
            {"rel_pos_bins": 32, "max_rel_pos": 9},
            "max_rel_pos must be at least rel_pos_bins // 4 + 2 (10), but got 9. Distances below rel_pos_bins // 4 "
            "have a bucket each, and the others are spread over the range from there to max_rel_pos.",
        ),
        ({"cls_dropout_prob": 1.0}, "cls_dropout_prob must be in [0, 1), but got 1.0."),
        ({"copy_loss_weight": -1}, "copy_loss_weight must not be negative, but got -1."),
        ({"contrastive_temperature": 0}, "contrastive_temperature must be positive, but got 0."),
        ({"corrective_lm_form": "all"}, "corrective_lm_form must be one of ('released', 'paper'), but got 'all'."),
        (
            {"auxiliary_sampling": "zero-dropout"},
            "auxiliary_sampling must be one of ('eval', 'train', 'zero_dropout'), but got 'zero-dropout'.",
        ),
        (
            {"type_vocab_size": 2},
            "type_vocab_size must be 0, but got 2. COCO-LM has no token types: the two texts of a pair are told apart "
            "by the separators between them.",
        ),
        (
            {"layer_norm_type": "pre"},
            "layer_norm_type must be 'post', but got 'pre'. No COCO-LM checkpoint was released with another order of "
            "layers.",
        ),
        (
            {"tie_word_embeddings": False},
            "tie_word_embeddings must be true, but got False. The language model heads and the auxiliary network of "
            "COCO-LM share the embeddings of the main network.",
        ),
    ],
)
def test_config_refuses(changes, sentence):
    with pytest.raises(StrictDataclassError, match=re.escape(f"ValueError: {sentence}") + "$"):
        tiny_config(**changes)


def test_config_refuses_an_unknown_activation_and_a_wrong_type():
    with pytest.raises(StrictDataclassError, match=r"hidden_act must be one of \('.*'\), but got 'gulu'\.$"):
        tiny_config(hidden_act="gulu")
    with pytest.raises(StrictDataclassError, match="hidden_size"):
        tiny_config(hidden_size="16")


def test_config_keeps_an_unknown_key(tmp_path):
    config = tiny_config(trained_by="us")
    config.save_pretrained(tmp_path)
    assert CocoLMConfig.from_pretrained(tmp_path).trained_by == "us"


def test_every_config_field_is_read():
    read = set()

    class RecordingConfig(CocoLMConfig):
        def __getattribute__(self, name):
            read.add(name)
            return super().__getattribute__(name)

    fields = set(CocoLMConfig.__annotations__)
    # One value is possible, and the validators above check it; the tokenizer and pipelines read these two ids.
    fields -= {"type_vocab_size", "layer_norm_type", "tie_word_embeddings", "bos_token_id", "eos_token_id"}
    # Beside main_config only: tests/test_any_encoder.py.
    fields -= {"auxiliary_config"}
    config = RecordingConfig(**tiny_config().to_dict())
    read.clear()
    batch = pretraining_batch(corrupted=False)
    del batch["attention_mask"]
    CocoLMForPretraining(config)(**batch)
    CocoLMForSequenceClassification(config)
    assert fields - read == set()


# Equations


@pytest.mark.parametrize(("num_buckets", "max_distance"), [(4, 3), (12, 16), (32, 128), (50, 100), (128, 256)])
def test_relative_position_bucket(num_buckets, max_distance):
    distances = torch.arange(-300, 301)
    buckets = modeling_cocolm.relative_position_bucket(distances, num_buckets, max_distance)
    expected = [reference.relative_position_bucket(d, num_buckets, max_distance) for d in distances.tolist()]
    assert buckets.tolist() == expected


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_encoder_equals_loops(attention):
    model = CocoLMModel(tiny_config()).eval()
    model.set_attn_implementation(attention)
    input_ids, attention_mask = texts()
    states = model(input_ids, attention_mask).last_hidden_state
    for row, mask, expected_row in zip(states, attention_mask, input_ids, strict=True):
        length = int(mask.sum())
        expected = reference.encode(model, expected_row[:length].tolist())
        torch.testing.assert_close(row[:length], expected, rtol=1e-5, atol=1e-5)


def test_losses_equal_loops():
    logits, labels, sampled = torch.randn(6, 9), torch.randint(9, (6,)), torch.randint(9, (6,))
    sampled[:3] = labels[:3]
    copy_logits, is_original = torch.randn(6), torch.tensor([True, False, True, True, False, True])
    cross_entropy = modeling_cocolm.cross_entropy(logits, labels)
    assert cross_entropy.item() == pytest.approx(reference.masked_lm_loss(logits, labels), rel=1e-5)
    copy_loss = modeling_cocolm.copy_loss(copy_logits, is_original)
    assert copy_loss.item() == pytest.approx(reference.copy_loss(copy_logits, is_original), rel=1e-5)
    for temperature in (1.0, 0.2):
        views, spans = torch.randn(5, 8), torch.randn(5, 8)
        loss = modeling_cocolm.contrastive_loss(views, spans, torch.ones(5, dtype=torch.bool), temperature)
        assert loss.item() == pytest.approx(reference.contrastive_loss(views, spans, temperature), rel=1e-5)


@pytest.mark.parametrize("form", ["released", "paper"])
def test_corrective_lm_loss_and_its_gradients_equal_loops(form):
    logits, copy_logits = torch.randn(6, 9, requires_grad=True), torch.randn(6, requires_grad=True)
    labels, sampled = torch.randint(9, (6,)), torch.randint(9, (6,))
    sampled[:3] = labels[:3]
    losses = F.cross_entropy(logits, labels, reduction="none")
    loss = modeling_cocolm.corrective_lm_loss(losses, copy_logits, labels, sampled, form)
    expected = reference.corrective_lm_loss(logits, copy_logits, labels, sampled, form)
    torch.testing.assert_close(loss, expected)
    gradient, none = torch.autograd.grad(loss, [logits, copy_logits], allow_unused=True)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, logits)[0])
    assert none is None


@pytest.mark.parametrize("form", ["released", "paper"])
def test_corrective_lm_loss_is_finite_for_certain_networks(form):
    logits = torch.tensor([[300.0, 0.0], [0.0, 300.0], [0.0, 300.0]], requires_grad=True)
    copy_logits, labels, sampled = (
        torch.tensor([300.0, 300.0, -300.0]),
        torch.tensor([0, 0, 0]),
        torch.tensor([0, 1, 0]),
    )
    losses = F.cross_entropy(logits, labels, reduction="none")
    loss = modeling_cocolm.corrective_lm_loss(losses, copy_logits, labels, sampled, form)
    loss.backward()
    assert loss.isfinite()
    assert logits.grad.isfinite().all()


def test_every_loss_takes_a_normaliser_of_a_larger_batch():
    logits, labels, copy_logits = torch.randn(6, 9), torch.randint(9, (6,)), torch.randn(6)
    is_text = torch.ones(3, dtype=torch.bool)
    for loss, arguments, count in (
        (modeling_cocolm.cross_entropy, (logits, labels), 6),
        (modeling_cocolm.copy_loss, (copy_logits, labels > 4), 6),
        (modeling_cocolm.corrective_lm_loss, (logits[:, 0], copy_logits, labels, labels, "released"), 6),
        (modeling_cocolm.contrastive_loss, (logits[:3], logits[3:], is_text, 1.0, False), 6),
    ):
        torch.testing.assert_close(loss(*arguments, 2 * count), loss(*arguments) / 2)


@pytest.mark.parametrize("form", ["released", "paper"])
@pytest.mark.parametrize("size", [1, 4, 256])
@pytest.mark.parametrize("is_plain", [True, False])
def test_losses_in_chunks_equal_those_of_all_logits(form, size, is_plain, monkeypatch):
    """Also where a head has a hook, and so is called as any module."""
    model = CocoLMForPretraining(without_dropout(corrective_lm_form=form))
    if not is_plain:
        for head in (model.auxiliary_lm_head, model.corrective_lm_head):
            head.register_forward_hook(lambda *args: None)
    batch = pretraining_batch()
    output = model(**batch, output_logits=True)
    is_masked = batch["input_ids"] == MASK
    labels, sampled = batch["labels"][is_masked], batch["corrupted_input_ids"][is_masked]
    copy_logits, logits = output.copy_logits[is_masked], output.corrective_lm_logits
    expected = F.cross_entropy(output.auxiliary_logits, labels)
    expected = expected + reference.corrective_lm_loss(logits, copy_logits, labels, sampled, form)
    expected.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    monkeypatch.setattr(modeling_cocolm, "TOKENS_PER_CPU_CHUNK", size)
    state = torch.get_rng_state()
    output = model(**batch)
    assert output.auxiliary_logits is None and output.corrective_lm_logits is None
    (output.mlm_loss + output.corrective_lm_loss).backward()
    torch.testing.assert_close(output.mlm_loss + output.corrective_lm_loss, expected)
    for name, gradient in gradients.items():
        torch.testing.assert_close(model.get_parameter(name).grad, gradient, msg=name)
    assert torch.equal(torch.get_rng_state(), state)


def test_bfloat16_gradients_are_as_near_as_those_of_a_head_with_a_hook():
    """Whose logits are computed once more in the backward pass, by autograd."""
    model, batch = CocoLMForPretraining(without_dropout()), pretraining_batch()

    def weight_gradients(enabled):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            output = model(**batch)
        (output.mlm_loss + output.corrective_lm_loss).backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    exact, plain = weight_gradients(False), weight_gradients(True)
    for head in (model.auxiliary_lm_head, model.corrective_lm_head):
        head.register_forward_hook(lambda *args: None)
    assert 0 < (plain - exact).norm() < 1.2 * (weight_gradients(True) - exact).norm()


def test_a_retained_graph_gives_the_same_gradients_again():
    model = CocoLMForPretraining(without_dropout())
    loss = model(**pretraining_batch()).loss
    loss.backward(retain_graph=True)
    once = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    loss.backward()
    for name, gradient in once.items():
        torch.testing.assert_close(model.get_parameter(name).grad, 2 * gradient, msg=name)


def test_backward_draws_nothing():
    """Logits are computed again there, but not the tokens drawn from them."""
    model = CocoLMForPretraining(without_dropout(auxiliary_sampling="train"))
    torch.manual_seed(0)
    output = model(**pretraining_batch(corrupted=False))
    state = torch.get_rng_state()
    output.loss.backward()
    assert torch.equal(torch.get_rng_state(), state)


def test_pretraining_loss_is_the_weighted_sum():
    config = without_dropout(copy_loss_weight=7, contrastive_loss_weight=3, contrastive_temperature=0.5)
    model = CocoLMForPretraining(config)
    batch = pretraining_batch()
    with torch.no_grad():
        output = model(**batch, output_logits=True)
    weighted = output.mlm_loss + 7 * output.copy_loss + output.corrective_lm_loss + 3 * output.contrastive_loss
    torch.testing.assert_close(output.loss, weighted)

    is_masked, is_token = batch["input_ids"] == MASK, batch["attention_mask"].bool()
    labels, copy_logits = batch["labels"][is_masked], output.copy_logits
    is_original = batch["corrupted_input_ids"] == batch["labels"]
    for loss, expected in (
        (output.mlm_loss, reference.masked_lm_loss(output.auxiliary_logits, labels)),
        (output.copy_loss, reference.copy_loss(copy_logits[is_token], is_original[is_token])),
        (
            output.corrective_lm_loss,
            reference.corrective_lm_loss(
                output.corrective_lm_logits,
                copy_logits[is_masked],
                labels,
                batch["corrupted_input_ids"][is_masked],
                "released",
            ),
        ),
        (
            output.contrastive_loss,
            reference.contrastive_loss(output.contrastive_embeddings, output.span_embeddings, 0.5),
        ),
    ):
        assert loss.item() == pytest.approx(float(expected), rel=1e-5)


def test_heads_read_what_they_should():
    model = CocoLMForPretraining(without_dropout(contrastive_embedding_size=10)).eval()
    batch = pretraining_batch()
    output = model(**batch, output_logits=True, output_hidden_states=True)
    states, is_masked = output.hidden_states[-1], batch["input_ids"] == MASK
    embeddings = model.cocolm.embeddings.word_embeddings.weight
    logits = states[is_masked] @ embeddings.T + model.corrective_lm_head.bias
    torch.testing.assert_close(output.corrective_lm_logits, logits)
    torch.testing.assert_close(output.copy_logits, (states @ model.copy_head.weight[0]) + model.copy_head.bias)
    assert output.contrastive_embeddings.shape == output.span_embeddings.shape == (4, 10)
    assert output.auxiliary_logits.shape == output.corrective_lm_logits.shape == (9, VOCAB_SIZE)
    detected = model(batch["corrupted_input_ids"], batch["attention_mask"])
    is_token = batch["attention_mask"].bool()
    torch.testing.assert_close(detected.copy_logits[is_token], output.copy_logits[is_token])
    assert detected.loss is None


# Gradient reach


def test_each_loss_trains_its_own_network():
    model = CocoLMForPretraining(tiny_config())
    output = model(**pretraining_batch(corrupted=False))
    names = set(dict(model.named_parameters()))
    shared = {name for name in names if name.startswith("cocolm.embeddings.")}
    auxiliary = {name for name in names if name.startswith("auxiliary")}
    main = {name for name in names if name.startswith("cocolm.")} - shared
    copy_head = {"copy_head.weight", "copy_head.bias"}
    assert shared | auxiliary | main | copy_head < names

    assert reached(model, output.mlm_loss) == shared | auxiliary
    assert reached(model, output.copy_loss) == shared | main | copy_head
    assert reached(model, output.corrective_lm_loss) == shared | main | {"corrective_lm_head.bias"}
    contrastive_head = {name for name in names if name.startswith("contrastive_head.")}
    assert reached(model, output.contrastive_loss) == shared | main | contrastive_head
    assert reached(model, output.loss) == names


def test_shared_embeddings_get_the_gradients_of_both_networks():
    model = CocoLMForPretraining(without_dropout())
    output = model(**pretraining_batch())
    name = "cocolm.embeddings.word_embeddings.weight"
    parts = [gradients(model, getattr(output, loss))[name] for loss in LOSSES]
    total = parts[0] + 50 * parts[1] + parts[2] + parts[3]
    torch.testing.assert_close(gradients(model, output.loss)[name], total)


def test_padding_token_gets_no_gradient_as_input_but_cls_does():
    model = CocoLMModel(tiny_config())
    input_ids, attention_mask = texts()
    model(input_ids, attention_mask).last_hidden_state[attention_mask.bool()].pow(3).sum().backward()
    gradient = model.embeddings.word_embeddings.weight.grad
    assert gradient[PAD].abs().max() == 0
    assert gradient[CLS].abs().max() > 0


# Sampling


def record_probabilities(monkeypatch):
    recorded = []
    draw = modeling_cocolm._draw

    def recording(probabilities):
        recorded.append(probabilities.clone())
        return draw(probabilities)

    monkeypatch.setattr(modeling_cocolm, "_draw", recording)
    return recorded


def test_tokens_are_drawn_by_their_probabilities():
    torch.manual_seed(0)
    probabilities = torch.tensor([0.0, 0.5, 0.0, 0.2, 0.29, 0.01, 0.0])
    drawn = modeling_cocolm._draw(probabilities.expand(100_000, -1))
    shares = torch.bincount(drawn, minlength=7) / 100_000
    # Five standard deviations of the largest.
    torch.testing.assert_close(shares, probabilities, rtol=0, atol=0.008)
    assert not shares[probabilities == 0].any()


@pytest.mark.parametrize("drawn", [0.0, 1.0])
def test_a_draw_at_an_end_is_a_token_of_the_vocabulary(monkeypatch, drawn):
    monkeypatch.setattr(torch, "rand_like", lambda tensor: torch.full_like(tensor, drawn))
    assert modeling_cocolm._draw(torch.full((3, 5), 0.2)).tolist() == [4 * int(drawn)] * 3


@pytest.mark.parametrize("mode", ["eval", "train", "zero_dropout"])
def test_sampling_modes(monkeypatch, mode):
    config = tiny_config(auxiliary_sampling=mode, hidden_dropout_prob=0.5, attention_probs_dropout_prob=0.5)
    model = CocoLMForPretraining(config)
    batch = pretraining_batch(corrupted=False)
    probabilities = record_probabilities(monkeypatch)
    trained = model(**batch, output_logits=True)
    assert model.auxiliary.training
    evaluated = model.eval()(**batch, output_logits=True)
    without = F.softmax(evaluated.auxiliary_logits, dim=-1)
    loss_has_dropout = not torch.allclose(F.softmax(trained.auxiliary_logits, dim=-1), without)
    assert loss_has_dropout == (mode != "zero_dropout")
    expected = F.softmax(trained.auxiliary_logits, dim=-1) if mode == "train" else without
    torch.testing.assert_close(probabilities[0], expected)
    torch.testing.assert_close(probabilities[1], without)


def test_sampling_keeps_the_modes_of_the_auxiliary_network():
    model = CocoLMForPretraining(tiny_config()).train()
    model.auxiliary.embeddings.eval()
    modes = {name: module.training for name, module in model.named_modules()}
    model(**pretraining_batch(corrupted=False))
    assert {name: module.training for name, module in model.named_modules()} == modes


def test_samples_follow_the_auxiliary_network_and_stay_at_the_masks():
    model = CocoLMForPretraining(tiny_config()).eval()
    batch = pretraining_batch((12,) * 4, corrupted=False)
    batch = {name: tensor[:1].repeat(3000, 1) for name, tensor in batch.items()}
    with torch.no_grad():
        output = model(**batch, output_logits=True)
    is_masked = batch["input_ids"] == MASK
    assert torch.equal(output.corrupted_input_ids[~is_masked], batch["input_ids"][~is_masked])
    sampled = output.corrupted_input_ids[is_masked].view(3000, 3)
    expected = F.softmax(output.auxiliary_logits.view(3000, 3, -1)[0], dim=-1)
    frequencies = F.one_hot(sampled, VOCAB_SIZE).float().mean(dim=0)
    # Four standard deviations of a frequency over 3000 draws.
    assert ((frequencies - expected).abs() < 4 * (expected * (1 - expected) / 3000).sqrt() + 1e-3).all()


def test_a_sample_that_equals_the_original_is_original():
    model = CocoLMForPretraining(without_dropout())
    batch = pretraining_batch()
    batch["corrupted_input_ids"] = torch.where(batch["labels"] == -100, PAD, batch["labels"])
    output = model(**batch)
    is_token = batch["attention_mask"].bool()
    assert output.copy_loss.item() == pytest.approx(-F.logsigmoid(output.copy_logits[is_token]).mean().item())


# Padding and small batches


def head_cases():
    input_ids, attention_mask = texts()
    batch = {"input_ids": input_ids, "attention_mask": attention_mask}
    token_labels = torch.where(attention_mask.bool() & (torch.rand(input_ids.shape) < 0.5), input_ids % 3, -100)
    choices = {name: tensor.view(2, 2, -1) for name, tensor in batch.items()}
    positions = {"start_positions": torch.tensor([1, 2, 0, 3]), "end_positions": torch.tensor([2, 2, 0, 4])}
    return [
        (CocoLMForPretraining, pretraining_batch()),
        (CocoLMForMaskedLM, batch | {"labels": token_labels}),
        (CocoLMForSequenceClassification, batch | {"labels": torch.tensor([0, 2, 1, 1])}),
        (CocoLMForTokenClassification, batch | {"labels": token_labels}),
        (CocoLMForQuestionAnswering, batch | positions),
        (CocoLMForMultipleChoice, choices | {"labels": torch.tensor([0, 1])}),
    ]


def padded(name, tensor):
    value = {"labels": -100, "attention_mask": 0, "span_attention_mask": 0}.get(name, PAD)
    # Ids under the padding must not matter, so they are words.
    value = FIRST_WORD if "input_ids" in name and name != "input_ids" else value
    is_sequence = "input_ids" in name or "attention_mask" in name or (name == "labels" and tensor.ndim == 2)
    return F.pad(tensor, (0, 5), value=value) if is_sequence else tensor


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("case", range(6))
def test_padding_changes_nothing(case, attention):
    model_class, batch = head_cases()[case]
    model = model_class(without_dropout(num_labels=3, cls_dropout_prob=0.0))
    model.set_attn_implementation(attention)
    loss = model(**batch).loss
    longer = model(**{name: padded(name, tensor) for name, tensor in batch.items()}).loss
    torch.testing.assert_close(longer, loss, rtol=1e-6, atol=1e-6)
    expected = gradients(model, loss)
    for name, gradient in gradients(model, longer).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("settings", [{}, {"rel_pos_bins": 0}])
@pytest.mark.parametrize("lengths", [(12, 9, 12, 5), (5, 5, 12, 12), (3, 7, 12), (12, 12, 12, 12)])
def test_layers_compute_nothing_for_padding(lengths, settings, attention, monkeypatch):
    """And give what they give if they do."""
    model = CocoLMForPretraining(without_dropout(**settings))
    model.set_attn_implementation(attention)
    batch = pretraining_batch(lengths)
    # A text and its crop that are only padding.
    batch["attention_mask"][-1] = batch["span_attention_mask"][-1] = 0
    batch["labels"][-1] = -100
    shapes = []
    for layer in (model.cocolm.encoder.layer[1], model.auxiliary.encoder.layer[0]):
        layer.attention.self_attn.in_proj.register_forward_hook(lambda _, inputs, __: shapes.append(inputs[0].shape))
    output = model(**batch)
    num_texts, num_crops = (int(batch[name].sum()) + 1 for name in ("attention_mask", "span_attention_mask"))
    for shape, number in zip(shapes, (num_texts, num_texts + num_crops), strict=True):
        assert len(shape) == 2 and number <= shape[0] <= number * 17 / 16
    monkeypatch.setattr(CocoLMModel, "leaves_out_padding", lambda *_, **__: False)
    plain = model(**batch)
    assert len(shapes[-1]) == 3
    for name in ("loss", *LOSSES):
        torch.testing.assert_close(output[name], plain[name], rtol=1e-5, atol=1e-5)
    is_token = batch["attention_mask"].bool()
    torch.testing.assert_close(output.copy_logits[is_token], plain.copy_logits[is_token], rtol=1e-5, atol=1e-5)
    expected = gradients(model, plain.loss)
    for name, gradient in gradients(model, output.loss).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-5, atol=1e-5, msg=name)
    monkeypatch.undo()
    for reentrant in (False, True):
        checkpoint_activations(model, use_reentrant=reentrant)
        model.zero_grad()
        model(**batch).loss.backward()
        for name, gradient in expected.items():
            found = model.get_parameter(name).grad
            torch.testing.assert_close(found, gradient, rtol=1e-5, atol=1e-5, msg=name)


def test_matrices_have_few_sizes():
    sizes = [rows + modeling_cocolm.filling(rows) for rows in range(10_000)]
    assert all(rows <= size <= rows * 17 / 16 for rows, size in enumerate(sizes))
    assert sizes[:33] == list(range(33))
    assert len(set(sizes[4096:8192])) == 17


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_layers_compute_nothing_for_padding_in_bfloat16(attention, monkeypatch):
    """Other shapes round otherwise: the loss is within 1 %, and gradients point the same way."""
    model, batch = CocoLMForPretraining(without_dropout()), pretraining_batch()
    model.set_attn_implementation(attention)
    results = []
    for change in ({}, {"leaves_out_padding": lambda *_, **__: False}):
        for name, value in change.items():
            monkeypatch.setattr(CocoLMModel, name, value)
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(**batch).loss
        results.append((loss, torch.cat([gradient.flatten() for gradient in gradients(model, loss).values()])))
    (loss, gradient), (plain_loss, plain_gradient) = results
    torch.testing.assert_close(loss, plain_loss, rtol=0.01, atol=0)
    assert F.cosine_similarity(gradient, plain_gradient, dim=0) > 0.999


def test_crops_may_be_wider_than_texts():
    model, batch = CocoLMForPretraining(without_dropout()), pretraining_batch()
    expected = model(**batch)
    for name in ("span_input_ids", "span_attention_mask"):
        batch[name] = F.pad(batch[name], (0, 6), value=PAD if name == "span_input_ids" else 0)
    output = model(**batch)
    torch.testing.assert_close(output.loss, expected.loss)
    assert output.copy_logits.shape == batch["input_ids"].shape


@pytest.mark.parametrize("rel_pos_bins", [12, 0])
def test_biases_have_the_type_of_the_scores(rel_pos_bins, monkeypatch):
    model, types = CocoLMModel(tiny_config(rel_pos_bins=rel_pos_bins, attn_implementation="eager")), []
    kernel = modeling_cocolm.eager_attention_forward

    def recording(*inputs, position_bias, **arguments):
        types.append(None if position_bias is None else position_bias.dtype)
        return kernel(*inputs, position_bias=position_bias, **arguments)

    monkeypatch.setattr(modeling_cocolm, "eager_attention_forward", recording)
    for dtype in (torch.bfloat16, torch.float16):
        types.clear()
        with torch.autocast("cpu", dtype):
            model(*texts((12, 8, 12, 12, 12)))
            model(*(tensor.flip(1) for tensor in texts((12, 8))))
        assert types == [dtype if rel_pos_bins else None, dtype if rel_pos_bins else None] * 2 + [dtype] * 2


def test_layers_may_be_on_other_devices():
    """The device without memory stands for another one: layers move what they are given, and the rest follows."""
    model = CocoLMModel(tiny_config()).to("meta")
    states = model(texts()[0].to("meta")).last_hidden_state
    assert states.shape == (4, 12, 16)
    batches = modeling_cocolm.Batches.of(texts((12, 9, 12, 8, 4))[1])
    states = torch.empty(46, 16, device="meta")
    assert batches.join(batches.split(states)).shape == states.shape
    assert batches.put(states, torch.Size((5, 12))).shape == (5, 12, 16)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_padding_may_be_anywhere(attention):
    model = CocoLMModel(without_dropout())
    model.set_attn_implementation(attention)
    input_ids, attention_mask = texts()
    attention_mask[0, :3] = attention_mask[2, 4] = 0
    states = model(input_ids, attention_mask).last_hidden_state
    for row in range(len(input_ids)):
        # On its own, behind one without padding, so that it is laid out as it is.
        pair = torch.stack([attention_mask[row], torch.ones_like(attention_mask[row])])
        alone = model(input_ids[[row, row]], pair).last_hidden_state[0]
        is_token = attention_mask[row].bool()
        torch.testing.assert_close(states[row][is_token], alone[is_token], rtol=1e-5, atol=1e-5)
    recorded = model(input_ids, attention_mask, output_hidden_states=True).last_hidden_state
    torch.testing.assert_close(states, recorded)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_row_of_padding_changes_nothing(attention):
    model = CocoLMForPretraining(without_dropout())
    model.set_attn_implementation(attention)
    batch = pretraining_batch()
    empty = {"labels": -100, "attention_mask": 0, "span_attention_mask": 0}
    longer = {name: F.pad(tensor, (0, 0, 0, 1), value=empty.get(name, PAD)) for name, tensor in batch.items()}
    output, longer_output = model(**batch), model(**longer)
    for name in ("loss", *LOSSES):
        torch.testing.assert_close(getattr(longer_output, name), getattr(output, name))
    assert longer_output.copy_logits.isfinite().all()
    expected = gradients(model, output.loss)
    for name, gradient in gradients(model, longer_output.loss).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_has_no_nan(attention, dtype):
    batch = pretraining_batch()
    batch["attention_mask"][1] = batch["span_attention_mask"][2] = 0
    model = CocoLMForPretraining(tiny_config())
    model.set_attn_implementation(attention)
    with torch.autocast("cpu", dtype):
        loss = model(**batch).loss
    assert all(gradient.isfinite().all() for gradient in gradients(model, loss).values())
    loss = model.to(dtype)(**batch).loss
    assert loss.dtype == torch.float32
    assert all(gradient.isfinite().all() for gradient in gradients(model, loss).values())


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_half_precision_has_no_nan_where_scores_are_low(attention):
    model = CocoLMModel(tiny_config(attn_implementation=attention)).eval()
    for layer in model.encoder.layer:
        query, key, _ = layer.attention.self_attn.in_proj.bias.data.chunk(3)
        query.fill_(5.0)
        key.fill_(-5.0)
    model.half()
    input_ids, attention_mask = texts()
    attention_mask[1] = 0
    states = model(input_ids, attention_mask).last_hidden_state
    assert states.isfinite().all()
    assert all(gradient.isfinite().all() for gradient in gradients(model, states.float().sum()).values())


def test_mask_is_made_of_the_padding_token():
    model = CocoLMForPretraining(without_dropout())
    batch = pretraining_batch()
    loss = model(**batch).loss
    del batch["attention_mask"], batch["span_attention_mask"]
    torch.testing.assert_close(model(**batch).loss, loss)
    model.config.pad_token_id = None
    assert not torch.allclose(model(**batch).loss, loss)


def test_small_batches_are_defined():
    model = CocoLMForPretraining(without_dropout())
    batch = {name: tensor[:1] for name, tensor in pretraining_batch().items()}
    output = model(**batch)
    assert output.contrastive_loss == 0
    assert output.loss.isfinite()

    unmasked = pretraining_batch(corrupted=False)
    unmasked["input_ids"] = unmasked["labels"].clamp(min=PAD)
    unmasked["input_ids"][:, 0] = CLS
    output = model(**unmasked)
    assert output.mlm_loss == output.corrective_lm_loss == 0
    assert torch.equal(output.corrupted_input_ids, unmasked["input_ids"])
    assert all(gradient.isfinite().all() for gradient in gradients(model, output.loss).values())

    del batch["span_input_ids"], batch["span_attention_mask"]
    assert model(**batch).contrastive_loss == 0


def test_contrastive_weight_zero_does_not_encode_the_crop():
    model = CocoLMForPretraining(without_dropout(contrastive_loss_weight=0))
    batch = pretraining_batch()
    batch["span_input_ids"] = batch["span_input_ids"] + VOCAB_SIZE
    assert model(**batch).contrastive_loss == 0


# What transformers expects of a model


def test_sdpa_equals_eager_with_gradients():
    model = CocoLMForPretraining(without_dropout())
    batch = pretraining_batch()
    model.set_attn_implementation("eager")
    assert model.auxiliary.config._attn_implementation == "eager"
    eager = model(**batch)
    model.set_attn_implementation("sdpa")
    sdpa = model(**batch)
    torch.testing.assert_close(sdpa.loss, eager.loss)
    expected = gradients(model, eager.loss)
    for name, gradient in gradients(model, sdpa.loss).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-5, atol=1e-5)


def test_no_relative_bias():
    model = CocoLMModel(tiny_config(rel_pos_bins=0)).eval()
    assert not any("relative" in name for name in model.state_dict())
    input_ids, attention_mask = texts()
    masked = model(input_ids, attention_mask).last_hidden_state
    torch.testing.assert_close(masked[:1], model(input_ids[:1]).last_hidden_state)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_attention_bias_is_made_once_and_without_padding_for_all_rows(attention, monkeypatch):
    """Every layer reads one tensor, which has a row for each text only where texts of like length are padded."""
    model = CocoLMModel(without_dropout(num_hidden_layers=3))
    model.set_attn_implementation(attention)
    read = []
    kernel = modeling_cocolm.eager_attention_forward if attention == "eager" else F.scaled_dot_product_attention
    owner = modeling_cocolm if attention == "eager" else F
    name = {"eager": "position_bias", "sdpa": "attn_mask"}[attention]

    def recording(*inputs, **arguments):
        read.append(arguments[name])
        return kernel(*inputs, **arguments)

    monkeypatch.setattr(owner, kernel.__name__, recording)
    input_ids, attention_mask = texts((12, 12, 12, 12))
    states = model(input_ids).last_hidden_state
    assert torch.equal(model(input_ids, attention_mask).last_hidden_state, states)
    assert [tuple(bias.shape) for bias in read] == [(1, 2, 12, 12)] * 6
    read.clear()
    model(*texts((12, 9, 12, 8, 4, 4)))
    # Many of one length stay without padding, and the others are with those of like length.
    assert [tuple(bias.shape) for bias in read] == [(1, 2, 12, 12), (2, 2, 9, 9), (1, 2, 4, 4)] * 3
    # Kernels want them as tensors of their own, whose memory is aligned.
    assert all(bias.is_contiguous() and bias.storage_offset() == 0 for bias in read)
    assert [bias.data_ptr() for bias in read] == [bias.data_ptr() for bias in read[:3]] * 3


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_attentions_and_hidden_states(attention):
    model = CocoLMForTokenClassification(tiny_config()).eval()
    model.set_attn_implementation(attention)
    input_ids, attention_mask = texts()
    output = model(input_ids, attention_mask, output_attentions=True, output_hidden_states=True)
    assert [tuple(weights.shape) for weights in output.attentions] == [(4, 2, 12, 12)] * 2
    assert len(output.hidden_states) == 3
    for weights in output.attentions:
        torch.testing.assert_close(weights.sum(dim=-1), torch.ones(4, 2, 12))
        assert (weights * (attention_mask == 0)[:, None, None, :]).abs().max() == 0
    is_token = attention_mask.bool()
    torch.testing.assert_close(model(input_ids, attention_mask).logits[is_token], output.logits[is_token])
    assert output.hidden_states[0][~is_token].abs().max() == 0


@pytest.mark.parametrize("case", range(6))
def test_outputs_as_a_tuple(case):
    model_class, batch = head_cases()[case]
    model = model_class(tiny_config(num_labels=3)).eval()
    output = model(**batch)
    as_argument = model(**batch, return_dict=False)
    model.config.return_dict = False
    for as_tuple in (as_argument, model(**batch)):
        assert isinstance(as_tuple, tuple)
        for value, expected in zip(as_tuple, output.to_tuple(), strict=True):
            torch.testing.assert_close(value, expected)


@pytest.mark.parametrize("case", range(1, 6))
def test_inputs_embeds(case):
    model_class, batch = head_cases()[case]
    model = model_class(tiny_config(num_labels=3)).eval()
    loss = model(**batch).loss
    embeds = model.get_input_embeddings()(batch.pop("input_ids"))
    torch.testing.assert_close(model(**batch, inputs_embeds=embeds).loss, loss)


def checkpoint_activations(model, **options):
    """Has the backward pass compute the layers' activations again; transformers 5.23 renamed the method."""
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable(options)


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing(reentrant):
    model = CocoLMForPretraining(without_dropout())
    batch = pretraining_batch()
    model(**batch).loss.backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    checkpoint_activations(model, use_reentrant=reentrant)
    model(**batch).loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-5, atol=1e-5)


def saved_bytes(model, *inputs):
    """Bytes that a forward pass keeps for the backward pass, weights aside; a storage counts once."""
    weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    storages = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model(*inputs)
    assert output.last_hidden_state.requires_grad
    return sum(size for address, size in storages.items() if address not in weights)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_activation_checkpointing_halves_the_memory_of_activations(attention):
    model = CocoLMModel(tiny_config(num_hidden_layers=6, hidden_size=32, intermediate_size=128))
    model.set_attn_implementation(attention)
    inputs = texts((24,) * 8)
    stored = saved_bytes(model, *inputs)
    checkpoint_activations(model, use_reentrant=False)
    assert saved_bytes(model, *inputs) < stored / 2


def test_shared_weights_survive_saving(tmp_path):
    model = CocoLMForPretraining(tiny_config())
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    assert not any("auxiliary.embeddings" in name or name.endswith("decoder.weight") for name in saved)
    loaded, loading = CocoLMForPretraining.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(loading.values())
    assert_same_weights(model, loaded)
    for target, source in loaded._tied_weights_keys.items():
        assert loaded.get_parameter(target) is loaded.get_parameter(source), target
    assert list(loaded.buffers()) == []
    assert loaded.config.model_type == "cocolm"

    masked_lm = CocoLMForMaskedLM(tiny_config())
    masked_lm.save_pretrained(tmp_path)
    loaded = CocoLMForMaskedLM.from_pretrained(tmp_path)
    assert_same_weights(masked_lm, loaded)
    assert loaded.lm_head.decoder.weight is loaded.cocolm.embeddings.word_embeddings.weight


@pytest.mark.parametrize("size", [VOCAB_SIZE + 7, VOCAB_SIZE - 10])
def test_resized_vocabulary(tmp_path, size):
    for model_class in (CocoLMForPretraining, CocoLMForMaskedLM):
        model = model_class(tiny_config())
        kept = min(size, VOCAB_SIZE)
        before = model.get_input_embeddings().weight[:kept].clone()
        model.resize_token_embeddings(size, mean_resizing=False)
        assert torch.equal(model.get_input_embeddings().weight[:kept], before)
        for target, source in model._tied_weights_keys.items():
            assert model.get_parameter(target) is model.get_parameter(source), target
        assert all(bias.shape == (size,) for name, bias in model.named_parameters() if name.endswith("lm_head.bias"))
        model.save_pretrained(tmp_path)
        assert_same_weights(model, model_class.from_pretrained(tmp_path))
        batch = pretraining_batch() if model_class is CocoLMForPretraining else {"input_ids": texts()[0]}
        batch = {name: tensor.clamp(max=size - 1) for name, tensor in batch.items()}
        output = model(**batch, **{"output_logits": True} if "labels" in batch else {})
        logits = output.auxiliary_logits if "labels" in batch else output.logits
        assert logits.shape[-1] == size


def test_a_checkpoint_serves_every_class(tmp_path):
    model = CocoLMForPretraining(tiny_config())
    model.save_pretrained(tmp_path / "pretraining")
    encoder = CocoLMModel.from_pretrained(tmp_path / "pretraining")
    assert_same_weights(model.cocolm, encoder)
    encoder.save_pretrained(tmp_path / "encoder")
    for folder in ("pretraining", "encoder"):
        classifier, loading = CocoLMForSequenceClassification.from_pretrained(
            tmp_path / folder, num_labels=3, output_loading_info=True
        )
        assert all(name.startswith("classifier.") for name in loading["missing_keys"])
        assert_same_weights(model.cocolm, classifier.cocolm)
    classifier.save_pretrained(tmp_path / "classifier")
    continued, loading = CocoLMForPretraining.from_pretrained(tmp_path / "classifier", output_loading_info=True)
    assert_same_weights(model.cocolm, continued.cocolm)
    assert not any(name.startswith(("cocolm", "auxiliary.embeddings")) for name in loading["missing_keys"])
    for target, source in continued._tied_weights_keys.items():
        assert continued.get_parameter(target) is continued.get_parameter(source), target
    # What the checkpoint lacks is initialised, not left as the memory was.
    fresh = [continued.get_parameter(name) for name in loading["missing_keys"] if name.endswith("dense.weight")]
    assert all(0.2 < weight.std() < 0.4 for weight in fresh)


def test_a_weight_of_another_shape_is_refused(tmp_path):
    CocoLMModel(tiny_config()).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | {"intermediate_size": 30}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(RuntimeError, match="mismatched"):
        CocoLMModel.from_pretrained(tmp_path)


# Heads


def test_sequence_classification_losses():
    batch = dict(zip(("input_ids", "attention_mask"), texts(), strict=True))
    model = CocoLMForSequenceClassification(tiny_config(num_labels=3)).eval()
    labels = torch.tensor([2, 0, 1, 1])
    output = model(**batch, labels=labels)
    torch.testing.assert_close(output.loss, F.cross_entropy(output.logits, labels))
    labels = torch.rand(4, 3).round()
    output = model(**batch, labels=labels)
    torch.testing.assert_close(output.loss, F.binary_cross_entropy_with_logits(output.logits, labels))
    model.config.problem_type = "multi_label_classification"
    torch.testing.assert_close(model(**batch, labels=labels.long()).loss, output.loss)
    model.config.problem_type = "regression"
    torch.testing.assert_close(model(**batch, labels=labels).loss, F.mse_loss(output.logits, labels))

    model = CocoLMForSequenceClassification(tiny_config(num_labels=1)).eval()
    for labels in (torch.tensor([1, 0, 3, 2]), torch.tensor([[1.0], [0.0], [3.0], [2.0]])):
        output = model(**batch, labels=labels)
        torch.testing.assert_close(output.loss, F.mse_loss(output.logits, labels.view(4, 1).float()))


@pytest.mark.parametrize("hidden_act", ["gelu", "relu"])
def test_sequence_classification_head(hidden_act):
    model = CocoLMForSequenceClassification(tiny_config(num_labels=3, hidden_act=hidden_act)).eval()
    input_ids, attention_mask = texts()
    state = model.cocolm(input_ids, attention_mask).last_hidden_state[:, 0]
    head = model.classifier
    logits = F.gelu(state @ head.dense.weight.T + head.dense.bias) @ head.out_proj.weight.T + head.out_proj.bias
    torch.testing.assert_close(model(input_ids, attention_mask).logits, logits)


def test_question_answering_ignores_padding_and_positions_outside():
    model = CocoLMForQuestionAnswering(tiny_config()).eval()
    input_ids, attention_mask = texts()
    positions = {"start_positions": torch.tensor([3, 0, 99, 1]), "end_positions": torch.tensor([4, 0, -1, 2])}
    output = model(input_ids, attention_mask, **positions)
    expected = 0.0
    for logits, target in (
        (output.start_logits, positions["start_positions"]),
        (output.end_logits, positions["end_positions"]),
    ):
        for row in (0, 1, 3):
            inside = logits[row, : attention_mask[row].sum()]
            expected += F.cross_entropy(inside, target[row]) / 3 / 2
    torch.testing.assert_close(output.loss, expected)


@pytest.mark.parametrize("case", range(1, 6))
def test_accumulated_losses_add_up_to_the_whole_batch(case):
    model_class, batch = head_cases()[case]
    model = model_class(tiny_config(num_labels=3)).eval()
    whole = model(**batch).loss
    labels = batch.get("labels", batch.get("start_positions"))
    count, half = (labels != -100).sum(), len(labels) // 2
    halves = [{name: tensor[part] for name, tensor in batch.items()} for part in (slice(half), slice(half, None))]
    torch.testing.assert_close(sum(model(**part, num_items_in_batch=count).loss for part in halves), whole)


@pytest.mark.parametrize("kind", [CocoLMForMaskedLM, CocoLMForTokenClassification])
def test_no_label_gives_zero(kind):
    input_ids, attention_mask = texts()
    output = kind(tiny_config())(input_ids, attention_mask, labels=torch.full_like(input_ids, -100))
    assert output.loss == 0


# Bad input


def test_bad_input_is_named():
    model = CocoLMForPretraining(tiny_config())
    batch = pretraining_batch()
    cases = [
        (
            {"input_ids": torch.full((1, 25), 7)},
            "The input must have at most 24 tokens, for which there are position embeddings, but has 25. Truncate it "
            "when you tokenize.",
        ),
        (
            {"input_ids": torch.tensor([[CLS, VOCAB_SIZE]])},
            "input_ids must be between 0 and 49, but got 50. The tokenizer has another vocabulary than the model; if "
            "you added tokens, call resize_token_embeddings.",
        ),
        (
            {"input_ids": torch.tensor([[CLS, -100]])},
            "input_ids must be between 0 and 49, but got -100. The tokenizer has another vocabulary than the model; if "
            "you added tokens, call resize_token_embeddings.",
        ),
        (
            {"input_ids": torch.tensor([CLS, SEP])},
            "The input must have the dimensions batch and length, but its shape is (2,).",
        ),
        (
            batch | {"attention_mask": torch.ones(4, 11)},
            "attention_mask must have the shape (4, 12), but got (4, 11).",
        ),
        (batch | {"labels": batch["labels"][:, 1:]}, "labels must have the shape (4, 12), but got (4, 11)."),
        (
            batch | {"corrupted_input_ids": batch["labels"][:2]},
            "corrupted_input_ids must have the shape (4, 12), but got (2, 12).",
        ),
        (
            batch | {"span_input_ids": batch["span_input_ids"][:3], "span_attention_mask": None},
            "span_input_ids must have the shape (4, 10), but got (3, 10).",
        ),
        (
            batch | {"span_attention_mask": batch["span_attention_mask"][:, 1:]},
            "span_attention_mask must have the shape (4, 10), but got (4, 9).",
        ),
        (
            batch | {"span_input_ids": torch.full((4, 25), 7), "span_attention_mask": None},
            "span_input_ids must have at most 24 tokens, for which there are position embeddings, but has 25. Truncate "
            "it when you tokenize.",
        ),
        *(
            (
                batch | {name: batch[name].index_fill(1, torch.tensor([3]), value)},
                f"{name} must be between 0 and 49, but got {value}. The tokenizer has another vocabulary than the "
                "model; if you added tokens, call resize_token_embeddings.",
            )
            for name in ("labels", "span_input_ids", "corrupted_input_ids")
            for value in (VOCAB_SIZE, -1)
        ),
    ]
    for inputs, sentence in cases:
        with pytest.raises(ValueError, match=re.escape(sentence) + "$"):
            model(**inputs)
    for inputs in ({}, {"input_ids": batch["input_ids"], "inputs_embeds": torch.zeros(4, 12, 16)}):
        with pytest.raises(ValueError, match=r"^Exactly one of input_ids and inputs_embeds must be given"):
            model.cocolm(**inputs)


def test_labels_of_a_wrong_shape_are_named():
    input_ids, attention_mask = texts()
    cases = [
        (CocoLMForMaskedLM, {"labels": input_ids[:, 1:]}, "labels must have the shape (4, 12), but got (4, 11)."),
        (
            CocoLMForTokenClassification,
            {"labels": input_ids[:2]},
            "labels must have the shape (4, 12), but got (2, 12).",
        ),
        (CocoLMForSequenceClassification, {"labels": input_ids[0]}, "labels must have the shape (4,), but got (12,)."),
        (
            CocoLMForSequenceClassification,
            {"labels": torch.zeros(4, 2)},
            "labels must have the shape (4, 3), but got (4, 2).",
        ),
        (
            CocoLMForQuestionAnswering,
            {"start_positions": torch.zeros(4).long(), "end_positions": torch.zeros(3).long()},
            "end_positions must have the shape (4,), but got (3,).",
        ),
    ]
    for model_class, labels, sentence in cases:
        with pytest.raises(ValueError, match=re.escape(sentence) + "$"):
            model_class(tiny_config(num_labels=3))(input_ids, attention_mask, **labels)
    model = CocoLMForMultipleChoice(tiny_config())
    with pytest.raises(ValueError, match=re.escape("labels must have the shape (2,), but got (4,).") + "$"):
        model(input_ids.view(2, 2, 12), labels=torch.zeros(4).long())


# Training


def test_one_batch_is_learned():
    model = CocoLMForPretraining(without_dropout(hidden_size=32, initializer_range=0.05))
    batch = pretraining_batch()
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    first = model(**batch)
    for _ in range(80):
        optimizer.zero_grad()
        last = model(**batch)
        last.loss.backward()
        optimizer.step()
    assert last.mlm_loss < 0.1 * first.mlm_loss
    assert last.copy_loss < 0.1 * first.copy_loss
    assert last.corrective_lm_loss < 0.1 * first.corrective_lm_loss
    # Cosines are at most 1, so at temperature 1 this loss cannot fall to 0: 7 candidates are left in the softmax.
    assert last.contrastive_loss < first.contrastive_loss - 0.3


class Texts(Dataset):
    def __init__(self):
        self.batch = pretraining_batch((12, 9, 12, 5, 10, 7, 12, 8), corrupted=False)

    def __len__(self):
        return 8

    def __getitem__(self, index):
        return {name: tensor[index] for name, tensor in self.batch.items()}


def training_arguments(folder, **changes):
    return TrainingArguments(folder, use_cpu=True, disable_tqdm=True, save_strategy="no", max_grad_norm=0.0, **changes)


def test_plain_trainer_trains_and_evaluates(tmp_path):
    seen = []

    def compute_metrics(prediction):
        mlm, copy, corrective, contrastive, copy_logits, corrupted = prediction.predictions
        seen.append((copy_logits.shape, corrupted.shape, prediction.label_ids.shape))
        names = ("mlm_loss", "copy_loss", "corrective_lm_loss", "contrastive_loss")
        return {name: loss.mean() for name, loss in zip(names, (mlm, copy, corrective, contrastive), strict=True)}

    dataset = Texts()
    arguments = training_arguments(
        tmp_path, max_steps=20, learning_rate=5e-3, per_device_train_batch_size=4, per_device_eval_batch_size=4
    )
    model = CocoLMForPretraining(without_dropout(initializer_range=0.05))
    trainer = Trainer(model, arguments, train_dataset=dataset, eval_dataset=dataset, compute_metrics=compute_metrics)
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert seen == [((8, 12), (8, 12), (8, 12))] * 2
    assert after["eval_loss"] < before["eval_loss"] - 5
    parts = [after[f"eval_{name}"] for name in LOSSES]
    assert parts[0] + 50 * parts[1] + parts[2] + parts[3] == pytest.approx(after["eval_loss"], rel=1e-4)


def test_trainer_averages_the_loss_over_accumulated_batches(tmp_path):
    dataset, losses = Texts(), []
    dataset.batch["corrupted_input_ids"] = pretraining_batch((12, 9, 12, 5, 10, 7, 12, 8))["corrupted_input_ids"]
    for steps in (1, 2):
        transformers.set_seed(0)
        model = CocoLMForPretraining(without_dropout())
        arguments = training_arguments(
            tmp_path,
            max_steps=1,
            logging_steps=1,
            per_device_train_batch_size=4,
            gradient_accumulation_steps=steps,
        )
        trainer = Trainer(model, arguments, train_dataset=dataset)
        trainer.train()
        losses.append(trainer.state.log_history[0]["loss"])
    # Not twice as large: the second half of the data is only another sample of the same.
    assert losses[1] == pytest.approx(losses[0], rel=0.3)


RANKS = """
import multiprocessing
import sys
from pathlib import Path

import torch

from hf_paraphrase_lm.models.cocolm import CocoLMConfig, CocoLMForPretraining
from hf_paraphrase_lm.models.cocolm.modeling_cocolm import contrastive_loss

folder = Path(sys.argv[1])


def run(rank):
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    tensors = torch.load(folder / "inputs.pt")
    views, spans = (tensor.chunk(2)[rank].clone().requires_grad_() for tensor in tensors[:2])
    loss = contrastive_loss(views, spans, tensors[2].chunk(2)[rank], 0.5, all_ranks=True)
    loss.backward()
    model = CocoLMForPretraining(CocoLMConfig(vocab_size=10, hidden_size=12, num_hidden_layers=1, auxiliary_layers=1))
    gathers = [model._gathers(), model.eval()._gathers()]
    torch.save((loss.detach(), views.grad, spans.grad, gathers), folder / f"rank{rank}.pt")
    torch.distributed.destroy_process_group()


ranks = [multiprocessing.get_context("fork").Process(target=run, args=(rank,)) for rank in range(2)]
for rank in ranks:
    rank.start()
for rank in ranks:
    rank.join()
assert [rank.exitcode for rank in ranks] == [0, 0]
"""


def test_two_ranks_contrast_like_one(tmp_path, run_python):
    views, spans = torch.randn(6, 8, requires_grad=True), torch.randn(6, 8, requires_grad=True)
    is_text = torch.tensor([True, True, False, True, True, False])
    loss = modeling_cocolm.contrastive_loss(views, spans, is_text, 0.5)
    loss.backward()
    torch.save((views.detach(), spans.detach(), is_text), tmp_path / "inputs.pt")
    run_python(RANKS, tmp_path)
    ranks = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2)]
    torch.testing.assert_close((ranks[0][0] + ranks[1][0]) / 2, loss.detach())
    # Data-parallel training averages the gradients of the ranks.
    torch.testing.assert_close(torch.cat([rank[1] for rank in ranks]) / 2, views.grad)
    torch.testing.assert_close(torch.cat([rank[2] for rank in ranks]) / 2, spans.grad)
    assert [rank[3] for rank in ranks] == [[True, False]] * 2


def test_heads_that_start_with_their_neighbors():
    model = CocoLMModel(tiny_config(num_attention_heads=8, hidden_size=16, rel_pos_bins=32, max_position_embeddings=40))
    before = model.attention_bias(torch.zeros(1, 9, 16), None)[0]
    model.attend_to_neighbors(3.0)
    change = model.attention_bias(torch.zeros(1, 9, 16), None)[0] - before
    for head, offset in enumerate((-1, 1, -2, 2)):
        expected = torch.zeros(9, 9).diagonal_scatter(torch.full((9 - abs(offset),), 3.0), offset)
        torch.testing.assert_close(change[head], expected)
    assert not change[4:].any()
    with pytest.raises(ValueError) as caught:
        CocoLMModel(tiny_config(rel_pos_bins=8)).attend_to_neighbors()
    assert str(caught.value) == ("rel_pos_bins must be at least 16 to tell the 4 nearest tokens apart, but is 8.")
