"""MARGE: equations against naive loops, gradient reach, padding, groups, generation, files."""

import itertools
import re

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from tokenizers import Tokenizer, models
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    DataCollatorForSeq2Seq,
    PreTrainedTokenizerFast,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from hf_paraphrase_lm import (
    DataCollatorForParaphrasing,
    MargeConfig,
    MargeForConditionalGeneration,
    MargeForSequenceClassification,
    MargeModel,
)
from hf_paraphrase_lm.models.marge import modeling_marge
from hf_paraphrase_lm.models.marge.modeling_marge import MargeCrossAttention, distillation_loss

from .reference import marge as reference
from .test_modeling_cocolm import checkpoint_activations

SIZES = {
    "vocab_size": 60,
    "hidden_size": 16,
    "num_attention_heads": 2,
    "encoder_layers": 3,
    "decoder_base_layers": 1,
    "decoder_layers": 2,
    "retrieval_layers": 2,
    "encoder_intermediate_size": 24,
    "decoder_base_intermediate_size": 20,
    "decoder_intermediate_size": 32,
    "max_position_embeddings": 32,
}


def make_model(cls=MargeForConditionalGeneration, **changes):
    """A tiny model in eval mode whose weights are large enough that every term of every equation shows."""
    torch.manual_seed(0)
    model = cls(MargeConfig(**{**SIZES, "initializer_range": 0.3, **changes})).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("relevance_weight"):
            parameter.data.fill_(5.0)
        elif parameter.dim() == 1:
            parameter.data += 0.2 * torch.randn_like(parameter)
        elif "out_proj" in name or "fc2" in name:
            parameter.data += 0.3 * torch.randn_like(parameter)
    return model


def make_tokenizer():
    vocabulary = {"[CLS]": 0, "[PAD]": 1, "[SEP]": 2, "[UNK]": 3, "[MASK]": 4, **{f"w{i}": i for i in range(5, 60)}}
    words = models.WordLevel(vocabulary, unk_token="[UNK]")
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words), pad_token="[PAD]")


def pad(rows, value, length=None):
    length = length or max(map(len, rows))
    return torch.tensor([list(row) + [value] * (length - len(row)) for row in rows])


def count_calls(layers):
    """A list that holds how often each of the layers has been called."""
    calls = [0] * len(layers)

    def count(number):
        calls[number] += 1

    for number, layer in enumerate(layers):
        layer.register_forward_hook(lambda *_, number=number: count(number))
    return calls


def random_ids(lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [[0, *torch.randint(5, 60, (n - 2,), generator=generator).tolist(), 2] for n in lengths]


@pytest.fixture
def batch():
    """Two groups of three documents, each shared by two targets; every length differs."""
    documents = random_ids([7, 9, 4, 5, 3, 8])
    targets = random_ids([6, 3, 8, 5], seed=1)
    return {
        "input_ids": pad(documents, 1).view(2, 3, -1),
        "attention_mask": (pad(documents, 1) != 1).long().view(2, 3, -1),
        "labels": pad(targets, -100),
    }


def gradients(model, **inputs):
    model.zero_grad()
    model(**inputs).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def assert_same_gradients(first, second, tolerance=1e-5):
    assert first.keys() == second.keys()
    for name in first:
        torch.testing.assert_close(first[name], second[name], rtol=1e-4, atol=tolerance, msg=name)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_naive_loop(batch, attention):
    model = make_model()
    model.set_attn_implementation(attention)
    with torch.no_grad():
        outputs = model(**batch)
        total, tokens = 0.0, 0
        for i, labels in enumerate(batch["labels"]):
            target = labels[labels != -100].tolist()
            evidence = [ids[ids != 1].tolist() for ids in batch["input_ids"][i // 2]]
            log_probs, loss, relevance = reference.reconstruct(model, evidence, target)
            torch.testing.assert_close(outputs.relevance_scores[i], relevance, rtol=0, atol=1e-5)
            torch.testing.assert_close(outputs.logits[i, : len(target)].log_softmax(-1), log_probs, rtol=0, atol=2e-5)
            total, tokens = total + loss, tokens + len(target)
    torch.testing.assert_close(outputs.loss, total / tokens, rtol=0, atol=1e-5)
    # The inputs are such that relevance matters: without it the loss is another one.
    with torch.no_grad():
        flat = model(**batch, relevance_scores=torch.ones(4, 3)).loss
    assert abs(flat - outputs.loss) > 1e-3


def test_eager_equals_sdpa(batch):
    results = {}
    for attention in ("eager", "sdpa"):
        model = make_model()
        model.set_attn_implementation(attention)
        results[attention] = (model(**batch).logits, gradients(model, **batch))
    real = batch["labels"] != -100
    torch.testing.assert_close(results["eager"][0][real], results["sdpa"][0][real], rtol=0, atol=1e-5)
    assert_same_gradients(results["eager"][1], results["sdpa"][1])


@pytest.fixture
def only_flash_kernel():
    """The name of an attention that lets PyTorch run its flash kernel only, and gives it neither bias nor mask."""

    def attention(module, query, key, value, attention_mask, **kwargs):
        assert "position_bias" not in kwargs
        if isinstance(module, MargeCrossAttention):
            assert attention_mask is None
            assert query.shape[-1] == key.shape[-1] == value.shape[-1] and query.shape[-1] % 8 == 0
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)

    AttentionInterface.register("unmasked", attention)
    AttentionMaskInterface.register("unmasked", sdpa_mask)
    return "unmasked"


@pytest.mark.parametrize("hidden_size", [16, 20])  # heads of 8 and of 10
@pytest.mark.parametrize("num_evidence", [1, 3, 8])
def test_flash_kernels_need_no_mask(only_flash_kernel, hidden_size, num_evidence):
    """Padding, hidden documents and relevance are all in the additional dimensions of queries and keys."""
    documents = pad(random_ids([3 + i % 5 for i in range(2 * num_evidence)]), 1).view(2, num_evidence, -1)
    evidence_mask = torch.rand(4, num_evidence, generator=torch.Generator().manual_seed(0)) < 0.6
    evidence_mask[0] = False
    batch = {"input_ids": documents, "labels": pad(random_ids([6, 3, 8, 5], seed=1), -100)}
    results = {}
    for attention in ("eager", only_flash_kernel):
        model = make_model(hidden_size=hidden_size)
        model.set_attn_implementation(attention)
        scores = torch.rand(4, num_evidence, generator=torch.Generator().manual_seed(1)).requires_grad_()
        outputs = model(**batch, evidence_mask=evidence_mask, relevance_scores=scores)
        (gradient,) = torch.autograd.grad(outputs.loss, scores)
        results[attention] = outputs.logits, gradient, gradients(model, **batch)
    for first, second in zip(results["eager"][:2], results[only_flash_kernel][:2], strict=True):
        torch.testing.assert_close(first, second, rtol=0, atol=1e-5)
    assert_same_gradients(results["eager"][2], results[only_flash_kernel][2])


class LargestTensor(TorchDispatchMode):
    """Numbers in the largest tensor that any operation returns, `size`."""

    size = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        outputs = function(*args, **(kwargs or {}))
        tensors = [x for x in pytree.tree_leaves(outputs) if isinstance(x, torch.Tensor)]
        self.size = max([self.size, *(tensor.numel() for tensor in tensors)])
        return outputs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_nothing_of_the_size_of_the_scores(attention, dtype):
    """Neither scores nor mask nor bias of cross-attention, queries times keys, is ever a tensor."""
    model = make_model().to(dtype)
    model.set_attn_implementation(attention)
    module = model.model.decoder.layers[1].cross_attn
    states, evidence = torch.randn(4, 64, 16, dtype=dtype), torch.randn(1, 3 * 64, 16, dtype=dtype)
    documents = torch.arange(3).repeat_interleave(64)[None]
    documents[:, -5:] = 3  # padding
    visible = torch.tensor([[True, False, True]] * 4)
    with LargestTensor() as largest:
        output, *_ = module(states, evidence, torch.rand(4, 3, requires_grad=True), documents, visible)
        output.sum().backward()
    assert (largest.size < 4 * 64 * 3 * 64) == (attention == "sdpa")


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_bfloat16_stays_close(batch, attention):
    results, exact, passes = [], None, []
    for enabled in (False, True):
        model = make_model(initializer_range=0.1)
        model.set_attn_implementation(attention)
        model.model.encoder.register_forward_hook(lambda _, inputs, output: passes.append(output.target_embeddings))
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            outputs = model(**batch)
            outputs.loss.backward()
            embeddings = model.embed(batch["labels"].clamp(min=0), batch["labels"] != -100)
        # Rounded to bfloat16, cosines near 1 would be steps of 0.004.
        cosines = torch.einsum(
            "gtd,ged->gte", passes[-1].unflatten(0, (2, 2)).double(), outputs.document_embeddings.double()
        )
        assert outputs.relevance_scores.dtype == torch.float32
        torch.testing.assert_close(outputs.relevance_scores, cosines.flatten(0, 1).float(), rtol=0, atol=1e-6)
        if enabled:
            # `embed` sums the last layer in another order, but is no further from float32 than the pass that trains.
            assert (embeddings - exact).norm() < 1.2 * (passes[-1] - exact).norm()
        else:
            exact = embeddings
            torch.testing.assert_close(passes[-1], exact, rtol=0, atol=1e-6)
        gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
        results.append((outputs.loss.detach(), gradient))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=0, atol=0.02)
    assert torch.nn.functional.cosine_similarity(results[0][1], results[1][1], dim=0) > 0.99


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_bfloat16_keeps_small_differences_of_relevance(attention):
    """Biases of 19.80, 19.84 and 19.88 are one number in bfloat16, but must give three weights."""
    model = make_model()
    model.set_attn_implementation(attention)
    module = model.model.decoder.layers[1].cross_attn
    for name, parameter in module.named_parameters():
        parameter.data.zero_()
        if name in ("v_proj.weight", "out_proj.weight"):
            parameter.data.copy_(torch.eye(16))
    module.relevance_weight.data.fill_(20.0)
    module.bfloat16()
    for scores in (torch.tensor([[0.99, 0.992, 0.994]]), 0.8 + 0.2 * torch.rand(100, 8)):
        targets, documents = scores.shape
        # With queries of 0 the weights are those of relevance alone; a document of unit vectors writes its weight down.
        output, *_ = module(
            torch.ones(targets, 1, 16).bfloat16(),
            torch.eye(documents, 16)[None].bfloat16(),
            scores,
            torch.arange(documents)[None],
            torch.ones(targets, documents, dtype=torch.bool),
        )
        torch.testing.assert_close(output[:, 0, :documents].float(), (20 * scores).softmax(-1), rtol=0, atol=3e-3)


def test_paper_size():
    with torch.device("meta"):
        model = MargeForConditionalGeneration(MargeConfig())
    parameters = sum(p.numel() for p in model.parameters())
    assert round(parameters / 1e6, 1) == 962.3


def test_shared_evidence_equals_evidence_of_each_target(batch):
    model = make_model()
    own = {**batch, "input_ids": batch["input_ids"].repeat_interleave(2, 0), "attention_mask": None}
    torch.testing.assert_close(model(**batch).logits, model(**own).logits, rtol=0, atol=1e-5)
    assert_same_gradients(gradients(model, **batch), gradients(model, **own))
    one_group = {**batch, "input_ids": batch["input_ids"][:1], "attention_mask": batch["attention_mask"][:1]}
    torch.testing.assert_close(model(**one_group).logits[:2], model(**batch).logits[:2], rtol=0, atol=1e-5)


def test_one_document_makes_relevance_irrelevant(batch):
    model = make_model()
    ids, labels = batch["input_ids"][:, 0], batch["labels"][:2]
    plain = model(ids, labels=labels)
    torch.testing.assert_close(plain.logits, model(ids.unsqueeze(1), labels=labels).logits)
    scores = torch.tensor([[0.1], [-0.7]])
    torch.testing.assert_close(plain.logits, model(ids, labels=labels, relevance_scores=scores).logits)
    assert plain.relevance_scores.tolist() == [[1.0], [1.0]]


def test_order_of_evidence_is_irrelevant(batch):
    model, order = make_model(), torch.tensor([2, 0, 1])
    scores = torch.rand(4, 3)
    shuffled = {
        "input_ids": batch["input_ids"][:, order],
        "attention_mask": batch["attention_mask"][:, order],
        "labels": batch["labels"],
    }
    for first, second in ((None, None), (scores, scores[:, order])):
        expected = model(**batch, relevance_scores=first)
        outputs = model(**shuffled, relevance_scores=second)
        torch.testing.assert_close(outputs.logits, expected.logits, rtol=0, atol=1e-5)
        torch.testing.assert_close(outputs.relevance_scores, expected.relevance_scores[:, order])


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_masked_document_has_no_influence_and_no_gradient(batch, attention):
    model = make_model()
    model.set_attn_implementation(attention)
    evidence_mask = torch.ones(4, 3, dtype=torch.bool)
    evidence_mask[:, 1] = False
    evidence_mask[0, 2] = False  # and one that only this target must not see
    scores = torch.rand(4, 3, requires_grad=True)
    outputs = model(**batch, evidence_mask=evidence_mask, relevance_scores=scores)
    outputs.loss.backward()
    assert scores.grad[~evidence_mask].eq(0).all() and scores.grad[evidence_mask][1:].ne(0).all()
    other = {**batch, "input_ids": batch["input_ids"].clone()}
    other["input_ids"][:, 1, 1:3] = 7
    changed = model(**other, evidence_mask=evidence_mask, relevance_scores=scores)
    assert torch.equal(changed.logits, outputs.logits)
    without = {
        "input_ids": batch["input_ids"][:, [0, 2]],
        "attention_mask": batch["attention_mask"][:, [0, 2]],
        "labels": batch["labels"],
    }
    expected = model(**without, evidence_mask=evidence_mask[:, [0, 2]], relevance_scores=scores[:, [0, 2]])
    torch.testing.assert_close(outputs.logits, expected.logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_hidden_document_gets_no_gradient(batch, attention):
    model = make_model()
    model.set_attn_implementation(attention)
    vectors = model.get_input_embeddings()(batch["input_ids"]).detach().requires_grad_()
    evidence_mask = torch.tensor([[True, False, True], [True, False, True], [False, True, True], [True, True, True]])
    inputs = {"inputs_embeds": vectors, "attention_mask": batch["attention_mask"], "labels": batch["labels"]}
    (gradient,) = torch.autograd.grad(model(**inputs, evidence_mask=evidence_mask.long()).loss, vectors)
    size = gradient.abs().sum((-1, -2))
    assert size[0, 1] == 0  # hidden from both targets of its group
    assert (size.flatten()[[0, 2, 3, 4, 5]] > 0).all()


def test_groups_of_different_sizes_are_as_if_alone():
    """What the collator fills up with, documents of padding and targets of -100, changes neither loss nor gradient."""
    documents, targets = random_ids([6, 4, 7, 5]), random_ids([5, 3, 6, 2], seed=1)
    groups = [
        {"input_ids": documents[:3], "labels": targets[:1], "evidence_mask": [[True, False, True]]},
        {"input_ids": documents[3:], "labels": targets[1:], "evidence_mask": [[True], [False], [True]]},
    ]
    collator, model = DataCollatorForParaphrasing(make_tokenizer()), make_model()
    together = gradients(model, **collator(groups), num_items_in_batch=16)
    alone = [gradients(model, **collator([group]), num_items_in_batch=16) for group in groups]
    assert_same_gradients({name: sum(part[name] for part in alone) for name in together}, together)
    loss = model(**collator(groups)).loss * 16
    parts = [model(**collator([group])).loss * n for group, n in zip(groups, (5, 11), strict=True)]
    torch.testing.assert_close(loss, sum(parts))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_targets_share_the_pass_of_evidence(batch, attention):
    """The result is that of separate passes, with hidden evidence, padding, and targets shorter or longer than it."""
    targets = [batch["labels"], batch["labels"][:, :3], pad(random_ids([6, 3, 12, 5], seed=1), -100)]
    targets.append(F.pad(batch["labels"], (1, 0), value=9))  # behind a language token
    visible = torch.tensor([[True, False, True], [True, True, True], [False, False, False], [False, True, True]])
    losses = {"distillation_loss_weight": 0.5, "contrastive_loss_weight": 0.5}
    for labels, targets_per_group in itertools.product(targets, (1, 2)):
        input_ids = batch["input_ids"].repeat_interleave(2 // targets_per_group, 0)
        inputs = {"input_ids": input_ids, "attention_mask": (input_ids != 1).long(), "labels": labels}
        inputs["evidence_mask"] = visible
        model = make_model(**losses, hidden_dropout_prob=0, attention_probs_dropout_prob=0).train()
        model.set_attn_implementation(attention)
        calls = count_calls(model.model.encoder.layers)
        together = model(**inputs)
        assert calls == [1, 1, 1]
        separate = reference.separate_passes(model, **inputs)
        assert calls == [1 + 2, 1 + 2, 1 + 1]
        for name in ("loss", "relevance_scores", "distillation_loss", "contrastive_loss"):
            torch.testing.assert_close(together[name], separate[name], rtol=0, atol=1e-5)
        expected = torch.autograd.grad(separate.loss, [*model.parameters()])
        for first, second in zip(torch.autograd.grad(together.loss, [*model.parameters()]), expected, strict=True):
            torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-5)


def test_shared_pass_is_without_dropout(batch):
    model = make_model(hidden_dropout_prob=0.5, attention_probs_dropout_prob=0.5).train()
    expected = reference.separate_passes(model, **batch).relevance_scores
    torch.testing.assert_close(model(**batch).relevance_scores, expected, rtol=0, atol=1e-5)
    # States that are asked for are those of evidence alone, so the passes are separate.
    for name in ("hidden_states", "attentions"):
        outputs = model(**batch, **{f"output_{name}": True})
        torch.testing.assert_close(outputs.relevance_scores, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_smallest_batches(attention):
    model = make_model()
    model.set_attn_implementation(attention)
    ids, token = torch.tensor([[0, 7, 2]]), torch.tensor([[9]])
    expected = model(ids, labels=token)
    for same in (ids[None], torch.stack([ids, torch.ones_like(ids)], dim=1)):  # and a second document of padding only
        torch.testing.assert_close(model(same, labels=token).loss, expected.loss)
    # Padding only is as good as no evidence at all.
    nothing = model(torch.ones_like(ids), labels=token)
    hidden = model(ids, labels=token, evidence_mask=torch.tensor([[False]]))
    torch.testing.assert_close(nothing.logits, hidden.logits)
    assert not torch.allclose(nothing.logits, expected.logits)
    for input_ids in (torch.ones_like(ids), torch.ones(1, 3, 4, dtype=torch.long)):
        assert all(
            gradient.isfinite().all() for gradient in gradients(model, input_ids=input_ids, labels=token).values()
        )
        assert model.generate(input_ids, max_new_tokens=3).shape[0] == 1
    assert model(ids, labels=torch.tensor([[-100]])).loss == 0


def test_target_without_evidence_reads_nothing(batch):
    model = make_model()
    evidence_mask = torch.tensor([[True, True, True], [False, False, False]] * 2)
    grads = gradients(model, **batch, evidence_mask=evidence_mask)
    assert all(torch.isfinite(g).all() for g in grads.values())
    logits = model(**batch, evidence_mask=evidence_mask).logits
    other = {**batch, "input_ids": batch["input_ids"].flip(0), "attention_mask": batch["attention_mask"].flip(0)}
    changed = model(**other, evidence_mask=evidence_mask).logits
    assert torch.equal(logits[1::2], changed[1::2]) and not torch.equal(logits[::2], changed[::2])


def test_padding_changes_nothing(batch):
    model = make_model()
    documents = torch.nn.functional.pad(batch["input_ids"], (0, 4, 0, 1), value=1)  # longer, and one document more
    padded = {
        "input_ids": documents,
        "attention_mask": (documents != 1).long(),
        "labels": torch.nn.functional.pad(batch["labels"], (0, 3), value=-100),
    }
    real = batch["labels"] != -100
    for inputs in (padded, {**padded, "attention_mask": None}):
        logits = model(**inputs).logits[:, : real.shape[1]]
        torch.testing.assert_close(logits[real], model(**batch).logits[real], rtol=0, atol=1e-5)
        torch.testing.assert_close(model(**inputs).loss, model(**batch).loss, rtol=0, atol=1e-5)
        assert_same_gradients(gradients(model, **inputs), gradients(model, **batch))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_training_reads_no_padding_of_evidence(batch, attention):
    """Cross-attention gets the tokens of the fullest group, and the result is that with all padding."""
    none = torch.full_like(batch["input_ids"], 1)
    for input_ids in (batch["input_ids"], torch.cat([batch["input_ids"][:1], none[:1]]), none):
        inputs = {"input_ids": input_ids, "labels": batch["labels"]}
        inputs["evidence_mask"] = torch.tensor([[True, False, True], [True] * 3, [False] * 3, [False, True, True]])
        model = make_model(hidden_dropout_prob=0, attention_probs_dropout_prob=0)
        model.set_attn_implementation(attention)
        keys = []
        projection = model.model.decoder.layers[-1].cross_attn.k_proj
        projection.register_forward_hook(lambda module, args, output, keys=keys: keys.append(output.shape[1]))
        expected, expected_gradients = model(**inputs), gradients(model, **inputs)
        model.train()
        outputs = model(**inputs)
        torch.testing.assert_close(outputs.loss, expected.loss, rtol=0, atol=1e-5)
        assert_same_gradients(gradients(model, **inputs), expected_gradients)
        assert keys[0] == 3 * input_ids.shape[-1] and keys[-1] == max(1, (input_ids != 1).sum((1, 2)).max())
        is_token = (input_ids != 1).flatten(1)
        states = outputs.encoder_last_hidden_state, expected.encoder_last_hidden_state
        torch.testing.assert_close(*(tensor[is_token] for tensor in states))


def batches_to_be_packed():
    """Batches of two groups for training, by name: documents and targets of all lengths, none among them."""
    documents, targets = random_ids([7, 9, 4, 5, 3, 8, 16, 2]), random_ids([6, 3, 12, 5], seed=1)
    visible = torch.tensor([[1, 0, 1, 1], [1, 1, 1, 1], [0, 0, 0, 0], [0, 1, 1, 0]]).bool()
    shared = {"input_ids": pad(documents, 1).view(2, 4, -1), "labels": pad(targets, -100)}
    language = F.pad(shared["labels"], (1, 0), value=9)
    middle = shared["labels"].clone()
    middle[:, 1] = -100
    empty = [*documents[:2], [], documents[2], [], [], [], []]
    return {
        "shared": shared,
        "hidden": shared | {"evidence_mask": visible},
        "own": {"input_ids": shared["input_ids"].repeat_interleave(2, 0), "labels": shared["labels"]},
        "one group": {"input_ids": shared["input_ids"][:1], "labels": shared["labels"], "evidence_mask": visible},
        "one document": {"input_ids": shared["input_ids"][:, 0], "labels": shared["labels"]},
        "empty": {"input_ids": pad(empty, 1).view(2, 4, -1), "labels": pad([targets[0], [], *targets[2:]], -100)},
        "no target": {"input_ids": shared["input_ids"], "labels": torch.full((4, 5), -100)},
        "language": shared | {"labels": language},
        "equal lengths": {
            "input_ids": pad(random_ids([5] * 8), 1).view(2, 4, -1),
            "labels": pad(random_ids([7] * 4), 1),
        },
        # These are read as they are.
        "left": shared | {"input_ids": shared["input_ids"].flip(-1)},
        "middle": shared | {"labels": middle},
        "decoder mask": shared | {"decoder_attention_mask": (shared["labels"] != -100).long()},
        "vectors": {
            "inputs_embeds": torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0)),
            "attention_mask": (shared["input_ids"] != 1).long(),
            "labels": shared["labels"],
        },
    }


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", batches_to_be_packed())
def test_training_without_padding_equals_that_with_padding(name, attention, monkeypatch):
    inputs = batches_to_be_packed()[name]
    losses = {"distillation_loss_weight": 0.5, "contrastive_loss_weight": 0.5}
    model = make_model(**losses, hidden_dropout_prob=0, attention_probs_dropout_prob=0).train()
    model.set_attn_implementation(attention)
    lengths_of = modeling_marge.lengths_of
    monkeypatch.setattr(modeling_marge, "lengths_of", lambda masks: None)
    expected, expected_gradients = model(**inputs, output_logits=True), gradients(model, **inputs)
    monkeypatch.setattr(modeling_marge, "lengths_of", lengths_of)
    outputs = model(**inputs, output_logits=True)
    for field in ("loss", "distillation_loss", "contrastive_loss"):
        if expected.get(field) is not None:
            torch.testing.assert_close(outputs[field], expected[field], rtol=0, atol=1e-5)
    attention_mask = inputs.get("attention_mask", inputs.get("input_ids") != 1)
    attention_mask = attention_mask.reshape(len(attention_mask), -1, attention_mask.shape[-1]).bool()
    is_document = attention_mask.any(-1).repeat_interleave(4 // len(attention_mask), 0)
    is_target = (inputs["labels"] != -100).any(-1, keepdim=True)
    for field, places in (
        ("relevance_scores", is_document & is_target),
        ("document_embeddings", attention_mask.any(-1)),
        ("encoder_last_hidden_state", attention_mask.flatten(1)),
        ("logits", inputs["labels"] != -100),
    ):
        assert outputs[field].shape == expected[field].shape
        torch.testing.assert_close(outputs[field][places], expected[field][places], rtol=0, atol=1e-5)
    assert_same_gradients(gradients(model, **inputs), expected_gradients)
    for reentrant in (False, True):
        checkpoint_activations(model, use_reentrant=reentrant)
        if reentrant:
            model.enable_input_require_grads()
        assert_same_gradients(gradients(model, **inputs), expected_gradients)


def test_layers_in_training_get_tokens_only():
    """Each once, and all of them without padding; keys of cross-attention are as many as the fullest group has."""
    inputs = batches_to_be_packed()["shared"]
    model = make_model(hidden_dropout_prob=0, attention_probs_dropout_prob=0).train()
    sizes = {}

    def record(name):
        return lambda module, args, output: sizes.setdefault(name, []).append(output.shape[:-1].numel())

    for name, module in model.model.named_modules():
        if isinstance(module, (torch.nn.Linear, torch.nn.LayerNorm)):
            module.register_forward_hook(record(name))
    model(**inputs)
    evidence, targets = (inputs["input_ids"] != 1).sum((1, 2)), int((inputs["labels"] != -100).sum())
    for name, size in sizes.items():
        if name.startswith("encoder.layers"):
            reads_targets = int(name.split(".")[2]) < model.config.retrieval_layers
            assert size == [int(evidence.sum()) + (targets if reads_targets else 0)], name
        elif name.endswith(("cross_attn.k_proj", "cross_attn.v_proj")):
            assert size == [2 * int(evidence.max())], name
        else:
            assert size == [targets if name.startswith("decoder") else int(evidence.sum())], name


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_training_without_padding_in_bfloat16(attention, monkeypatch):
    """Other shapes round otherwise: the loss is within 0.01, and gradients point the same way."""
    inputs = batches_to_be_packed()["hidden"]
    model = make_model(initializer_range=0.1, hidden_dropout_prob=0, attention_probs_dropout_prob=0).train()
    model.set_attn_implementation(attention)
    results = []
    for change in ({}, {"lengths_of": lambda masks: None}):
        for name, value in change.items():
            monkeypatch.setattr(modeling_marge, name, value)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(**inputs).loss.detach()
            gradient = torch.cat([gradient.flatten() for gradient in gradients(model, **inputs).values()])
        results.append((loss, gradient))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=0, atol=0.01)
    assert F.cosine_similarity(results[0][1], results[1][1], dim=0) > 0.999


def test_projections_share_one_copy_in_the_type_of_autocast(batch):
    """Those of a layer one of its states, and the keys and values of all layers one of the evidence."""
    model, read = make_model().train(), {}
    for name, module in model.model.named_modules():
        if name.endswith(("q_proj", "k_proj", "v_proj")):
            place = "evidence" if ".cross_attn." in name else name.rpartition(".")[0]
            if name.endswith("cross_attn.q_proj"):
                continue
            inputs = read.setdefault(place, [])
            module.register_forward_pre_hook(lambda _, args, inputs=inputs: inputs.append(args[0]))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(**batch)
    assert len(read["evidence"]) == 4 and all(len(inputs) == 3 for place, inputs in read.items() if place != "evidence")
    for inputs in read.values():
        assert {tensor.dtype for tensor in inputs} == {torch.bfloat16}
        assert len({tensor.data_ptr() for tensor in inputs}) == 1


def test_loss_reaches_both_embeddings_through_relevance_only(batch):
    model = make_model()
    kept = []
    hook = model.model.encoder.register_forward_hook(lambda module, inputs, outputs: kept.append(outputs))
    outputs = model(**batch)
    gx, gz = kept[0].target_embeddings, outputs.document_embeddings
    grads = torch.autograd.grad(outputs.loss, (gx, gz))
    assert all(g.norm() > 1e-4 for g in grads)
    hook.remove()
    # beta = 0 cuts this way, and then the gradient is that of constant scores: there is no other way.
    for name, parameter in model.named_parameters():
        if name.endswith("relevance_weight"):
            parameter.data.zero_()
    constant = model(**batch).relevance_scores.detach()
    assert_same_gradients(gradients(model, **batch), gradients(model, **batch, relevance_scores=constant))


def test_every_parameter_learns(batch):
    assert all(g.abs().sum() > 0 for g in gradients(make_model(), **batch).values())


def test_embedding_is_the_same_in_every_mode(batch):
    model = make_model(hidden_dropout_prob=0.5, attention_probs_dropout_prob=0.5)
    expected = model.embed(batch["input_ids"], batch["attention_mask"])
    torch.testing.assert_close(expected.norm(dim=-1), torch.ones(2, 3))
    assert expected.dtype == torch.float32 and expected.shape == (2, 3, 16)
    model.train()
    torch.testing.assert_close(model.embed(batch["input_ids"]), expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(model(**batch).document_embeddings, expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(model(**batch).relevance_scores, model(**batch).relevance_scores)
    alone = model.embed(batch["input_ids"][1, 1, :3].unsqueeze(0))  # a document of 3 tokens, without its padding
    torch.testing.assert_close(alone[0], expected[1, 1], rtol=0, atol=1e-6)


def test_embedding_without_gradients_needs_no_keys_and_values(batch):
    model = make_model()
    attention = model.model.encoder.layers[model.config.retrieval_layers - 1].self_attn
    calls = []
    torch.nn.init.normal_(attention.k_proj.bias)
    torch.nn.init.normal_(attention.v_proj.bias)
    expected = model.embed(batch["input_ids"])
    with torch.no_grad():
        torch.testing.assert_close(model.embed(batch["input_ids"]), expected.detach(), rtol=0, atol=1e-6)
        with torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(model.embed(batch["input_ids"]), expected.detach(), rtol=0, atol=0.02)
    without_bias = make_model()
    attention_without_bias = without_bias.model.encoder.layers[model.config.retrieval_layers - 1].self_attn
    attention_without_bias.v_proj.bias = None
    with torch.no_grad():
        embeddings = without_bias.embed(batch["input_ids"])
    torch.testing.assert_close(embeddings, without_bias.embed(batch["input_ids"]).detach(), rtol=0, atol=1e-6)
    # What is added to a projection, such as an adapter, is not passed over.
    attention.k_proj.register_forward_hook(lambda module, args, output: calls.append(module))
    attention.v_proj.register_forward_hook(lambda module, args, output: 2 * output)
    changed = model.embed(batch["input_ids"])
    with torch.no_grad():
        torch.testing.assert_close(model.embed(batch["input_ids"]), changed.detach(), rtol=0, atol=1e-6)
    assert len(calls) == 2 and not torch.allclose(changed, expected, atol=1e-3)


@pytest.mark.parametrize("block", [1, 200, 2**20])
@pytest.mark.parametrize("scale", [0.0, 1.0, 100.0, float("nan")])
def test_attention_of_embeddings_on_a_cpu(scale, block, monkeypatch):
    monkeypatch.setattr(modeling_marge, "SCORES_PER_BLOCK", block)
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 5, 2, 7, 8).bfloat16()
    query = query * scale
    mask = torch.zeros(5, 1, 7, 7).bfloat16()
    mask[1, ..., 4:] = mask[4, ..., 1:] = modeling_marge.HIDDEN_SCORE
    output, weights = modeling_marge.cpu_attention_forward(None, query, key, value, mask, 8**-0.5)
    exact = [states.float() for states in (query, key, value, mask)]
    expected, _ = modeling_marge.eager_attention_forward(None, *exact, 8**-0.5)
    plain, _ = modeling_marge.eager_attention_forward(None, query, key, value, mask, 8**-0.5)
    assert weights is None and output.shape == (5, 7, 2, 8) and output.dtype == torch.bfloat16
    if scale == 100:  # Scores of hundreds are rounded by more than 1, but by either kernel alike.
        torch.testing.assert_close(output, plain, rtol=0, atol=0.05)
    else:
        torch.testing.assert_close(output.float(), expected, rtol=0, atol=0.05, equal_nan=True)
        assert scale != 0 or torch.equal(output[4], value[4, :, :1].transpose(0, 1).expand(7, -1, -1))


def test_bfloat16_embeddings_on_a_cpu_use_their_attention(batch, monkeypatch):
    model, calls = make_model(), []
    kernel = modeling_marge.cpu_attention_forward

    def counted(*args, **kwargs):
        calls.append(1)
        return kernel(*args, **kwargs)

    monkeypatch.setattr(modeling_marge, "cpu_attention_forward", counted)
    expected = model.embed(batch["input_ids"])
    for enabled in (False, True):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            embeddings = model.embed(batch["input_ids"])
        torch.testing.assert_close(embeddings, expected.detach(), rtol=0, atol=0.02 if enabled else 1e-6)
        assert len(calls) == enabled * (model.config.retrieval_layers - 1)
    with torch.autocast("cpu", torch.bfloat16):
        model.embed(batch["input_ids"]).sum().backward()
    assert len(calls) == model.config.retrieval_layers - 1


def test_dropout_where_it_belongs(batch):
    model = make_model(hidden_dropout_prob=0.3).train()
    assert model(**batch).loss != model(**batch).loss
    ids = batch["input_ids"][:, 0]
    states = [model.model.encoder(ids, output_hidden_states=True).hidden_states for _ in range(2)]
    assert not torch.equal(states[0][1], states[1][1])  # one document a target: in every layer
    states = [model.model.encoder(batch["input_ids"], output_hidden_states=True).hidden_states for _ in range(2)]
    assert torch.equal(states[0][2], states[1][2]) and not torch.equal(states[0][3], states[1][3])


def test_distillation(batch):
    model = make_model(distillation_loss_weight=0.5, hidden_dropout_prob=0, attention_probs_dropout_prob=0).train()
    plain = make_model(hidden_dropout_prob=0, attention_probs_dropout_prob=0).train()
    assert plain(**batch).distillation_loss is None
    outputs = model(**batch)
    torch.testing.assert_close(outputs.loss, plain(**batch).loss + 0.5 * outputs.distillation_loss)
    # The teacher, from the eager scores of every query, key, head and layer. Scores are logarithms of the weights up
    # to a shift, so beta = 0 and differences between documents suffice.
    for name, parameter in model.named_parameters():
        if name.endswith("relevance_weight"):
            parameter.data.zero_()
    outputs = model(**batch)
    model.set_attn_implementation("eager")
    weights = model(**batch, output_attentions=True).cross_attentions
    logits = torch.zeros(4, 3)
    for i in range(4):
        queries = batch["labels"][i] != -100
        for j in range(3):
            keys = batch["attention_mask"][i // 2, j].bool()
            scores = [layer[i].unflatten(-1, (3, -1))[:, queries, j][..., keys].log() for layer in weights]
            logits[i, j] = torch.stack(scores).mean()
    visible, num_tokens = torch.ones(4, 3, dtype=torch.bool), (batch["labels"] != -100).sum(-1)
    expected = reference.distillation(
        logits.tolist(), outputs.relevance_scores.tolist(), visible.tolist(), num_tokens.tolist()
    )
    assert outputs.distillation_loss.item() == pytest.approx(expected, abs=1e-5)


def test_distillation_teaches_the_student_only():
    logits, scores = torch.randn(3, 4, requires_grad=True), torch.randn(3, 4, requires_grad=True)
    visible = torch.tensor([[True] * 4, [True, False, True, False], [False] * 4])
    loss = distillation_loss(logits, scores, visible, torch.tensor([5, 2, 1]))
    expected = reference.distillation(logits.tolist(), scores.tolist(), visible.tolist(), [5, 2, 1])
    assert loss.item() == pytest.approx(expected, abs=1e-6)
    loss.backward()
    assert logits.grad is None and scores.grad[~visible].eq(0).all() and scores.grad[0].ne(0).all()


@pytest.mark.parametrize("autocast", [False, True])
def test_contrastive_loss(batch, autocast):
    """Copies of a target, of its evidence, empty documents, empty targets and hidden evidence included."""
    documents = [random_ids([7, 9, 4]), [*random_ids([7]), *random_ids([5], seed=3)], random_ids([6, 8], seed=4)]
    targets = [*random_ids([6, 3], seed=1), documents[2][0], *random_ids([8], seed=5), *random_ids([4], seed=6), []]
    documents[1].append(targets[0])
    input_ids = pad([ids for group in documents for ids in group] + [[]], 1)
    evidence_mask = torch.tensor([[1, 1, 0], [1, 0, 1], [1, 1, 1], [0, 1, 0], [0, 0, 0], [0, 0, 0]]).bool()
    inputs = {"input_ids": input_ids.view(3, 3, -1), "labels": pad(targets, -100), "evidence_mask": evidence_mask}
    changes = {"hidden_dropout_prob": 0, "attention_probs_dropout_prob": 0}
    model = make_model(contrastive_loss_weight=0.5, contrastive_temperature=0.3, **changes).train()
    plain = make_model(**changes).train()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        outputs, expected = model(**inputs), plain(**inputs)
        assert expected.contrastive_loss is None and model.eval()(**inputs).contrastive_loss is None
        torch.testing.assert_close(outputs.loss, expected.loss + 0.5 * outputs.contrastive_loss)
        texts = [[*group, []][:3] for group in documents]
        with torch.no_grad():
            embed = [[model.embed(torch.tensor([ids or [1]]))[0] for ids in group] for group in [*texts, targets]]
    relevance = [[[float(x @ z) for z in group] for group in embed[:3]] for x in embed[3]]
    counts = [len(ids) for ids in targets]
    visible = evidence_mask.tolist()
    expected = reference.contrastive(relevance, texts, targets, [0, 0, 1, 1, 2, 2], visible, counts, 0.3)
    assert outputs.contrastive_loss.item() == pytest.approx(expected, abs=0.05 if autocast else 1e-5)


def test_contrastive_loss_needs_other_groups_and_one_document_is_enough(batch):
    model = make_model(contrastive_loss_weight=0.5).train()
    alone = model(batch["input_ids"][:1], labels=batch["labels"][:2])
    assert alone.contrastive_loss == 0
    # Relevance of a single document is irrelevant to reconstruction, but not here.
    model(batch["input_ids"][:, :1], labels=batch["labels"]).contrastive_loss.backward()
    own = model.model.encoder.layers[: model.config.retrieval_layers].parameters()
    assert all(parameter.grad is not None for parameter in own)


def test_contrast_alone(batch):
    """The same loss, scores and gradients as beside the reconstruction; the decoder and the layers above get none."""
    weights = {"contrastive_loss_weight": 0.5, "hidden_dropout_prob": 0, "attention_probs_dropout_prob": 0}
    model = make_model(reconstruction_loss_weight=0, **weights).train()
    both = make_model(reconstruction_loss_weight=3, **weights).train()
    batch = batch | {"num_items_in_batch": 50}
    outputs, expected = model(**batch), both(**batch)
    torch.testing.assert_close(outputs.contrastive_loss, expected.contrastive_loss)
    torch.testing.assert_close(outputs.relevance_scores, expected.relevance_scores)
    share = (batch["labels"] != -100).sum() / 50
    torch.testing.assert_close(outputs.loss, 0.5 * outputs.contrastive_loss * share)
    plain = make_model(**{**weights, "contrastive_loss_weight": 0}).train()(**batch).loss
    torch.testing.assert_close(expected.loss, 3 * plain + outputs.loss)
    # In evaluation it is the reconstruction that counts.
    torch.testing.assert_close(model.eval()(**batch).loss, both.eval()(**batch).loss)
    outputs.loss.backward()
    (0.5 * expected.contrastive_loss * share).backward()
    own = {"shared.weight", "encoder.embed_positions.weight"}
    for (name, weight), other in zip(model.model.named_parameters(), both.model.parameters(), strict=True):
        if name in own or name.startswith(("encoder.layers.0.", "encoder.layers.1.")):
            torch.testing.assert_close(weight.grad, other.grad)
        else:
            assert weight.grad is None, name
    with pytest.raises(ValueError, match=re.escape("needs evidence as input_ids (groups, num_evidence, length)")):
        model.train()(batch["input_ids"][0], labels=batch["labels"][:3])
    with pytest.raises(ValueError, match="multiple of the number of evidence groups"):
        model(batch["input_ids"], labels=batch["labels"][:3])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loss_in_chunks_equals_that_of_all_logits(batch, dtype, monkeypatch):
    model = make_model(hidden_dropout_prob=0, attention_probs_dropout_prob=0).train()
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        outputs = model(**batch, output_logits=True)
        expected = F.cross_entropy(outputs.logits.float().flatten(0, 1), batch["labels"].flatten())
        model.zero_grad()
        expected.backward()
        plain = {name: p.grad.clone() for name, p in model.named_parameters()}
        # 22 labels.
        for size in (1, 4, 11, 256):
            monkeypatch.setattr(modeling_marge, "TOKENS_PER_CPU_CHUNK", size)
            chunked = model(**batch)
            assert chunked.logits is None
            torch.testing.assert_close(chunked.loss, expected, rtol=0, atol=1e-5)
            assert_same_gradients(gradients(model, **batch), plain, 1e-5 if dtype == torch.float32 else 0.02)


def test_gradients_of_chunks_add_up_in_float32(monkeypatch):
    """Also under autocast, whose one copy of the weights would sum them in bfloat16, with six times the error."""
    torch.manual_seed(0)
    states, labels, lm_head = torch.randn(1, 3000, 64), torch.randint(0, 500, (1, 3000)), torch.nn.Linear(64, 500)

    def gradient(size, enabled):
        monkeypatch.setattr(modeling_marge, "TOKENS_PER_CPU_CHUNK", size)
        lm_head.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = modeling_marge.reconstruction_loss(states, labels, lm_head)
        loss.backward()
        return lm_head.weight.grad.clone()

    exact, whole, chunks = gradient(3000, False), gradient(3000, True), gradient(16, True)
    assert (chunks - exact).norm() < 1.2 * (whole - exact).norm()


def test_loss_of_a_head_with_a_hook_or_an_adapter(batch):
    """Its scores are the head's own, whatever it does, and computed once more in the backward pass."""

    class Adapted(torch.nn.Linear):
        def forward(self, states):
            return super().forward(states)

    model, calls = make_model(hidden_dropout_prob=0, attention_probs_dropout_prob=0).train(), []
    expected, loss = gradients(model, **batch), model(**batch).loss.detach()
    hook = model.lm_head.register_forward_hook(lambda *_: calls.append(1))
    assert_same_gradients(gradients(model, **batch), expected)
    hook.remove()
    assert len(calls) == 2
    head = Adapted(model.config.hidden_size, model.config.vocab_size, bias=False)
    head.weight, model.lm_head = model.lm_head.weight, head
    torch.testing.assert_close(model(**batch).loss, loss, rtol=0, atol=1e-5)
    assert_same_gradients(gradients(model, **batch), expected)


def test_loss_with_part_of_the_model_frozen(batch):
    model = make_model(tie_word_embeddings=False, hidden_dropout_prob=0, attention_probs_dropout_prob=0).train()
    loss = model(**batch).loss
    loss.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert len(expected) > 20 and "lm_head.weight" in expected
    for frozen, trained in ((model.lm_head, model.model), (model.model, model.lm_head)):
        frozen.requires_grad_(False)
        model.zero_grad()
        loss = model(**batch).loss
        loss.backward(retain_graph=True)
        loss.backward()
        frozen.requires_grad_(True)
        for name, parameter in model.named_parameters():
            if name in expected and any(parameter is other for other in trained.parameters()):
                torch.testing.assert_close(parameter.grad, 2 * expected[name], rtol=1e-4, atol=1e-5, msg=name)
            else:
                assert parameter.grad is None


def test_a_batch_without_labels_has_the_loss_0(batch):
    model = make_model().train()
    states = torch.randn(2, 3, model.config.hidden_size, requires_grad=True)
    loss = modeling_marge.reconstruction_loss(states, torch.full((2, 3), -100), model.lm_head)
    loss.backward()
    assert loss == 0 and not states.grad.any() and not model.lm_head.weight.grad.any()


def test_all_tokens_are_looked_up_at_once(batch, monkeypatch):
    """Each lookup would have a gradient of the size of the vocabulary."""
    evidence, targets, lookups = batch["input_ids"].numel(), batch["labels"].numel(), []

    def embedding(ids, weight, *args, plain=F.embedding):
        if len(weight) == model.config.vocab_size:
            lookups.append(ids.numel())
        return plain(ids, weight, *args)

    monkeypatch.setattr(F, "embedding", embedding)
    model = make_model().train()
    model(**batch)
    assert lookups == [evidence + 2 * targets]
    for model in (make_model(tie_word_embeddings=False), make_model()):
        lookups.clear()
        # What it does, no other lookup may leave out.
        model.model.decoder.embed_tokens.register_forward_hook(lambda *_: None)
        model.train()(**batch)
        assert sorted(lookups) == sorted([evidence, targets, targets])


def test_embeddings_that_are_not_tied_are_each_used(batch):
    model = make_model(tie_word_embeddings=False, hidden_dropout_prob=0, attention_probs_dropout_prob=0).train()
    plain = reference.separate_passes(model, **batch)
    torch.testing.assert_close(model(**batch).loss, plain.loss, rtol=0, atol=1e-5)
    assert not torch.equal(model.model.encoder.embed_tokens.weight, model.model.decoder.embed_tokens.weight)


def test_loss_over_accumulated_batches_is_a_mean_over_all_tokens(batch):
    model = make_model(distillation_loss_weight=0.5, hidden_dropout_prob=0, attention_probs_dropout_prob=0).train()
    whole = model(**batch).loss
    num_items = (batch["labels"] != -100).sum()
    parts = [{k: v[i : i + 1] if k != "labels" else v[2 * i : 2 * i + 2] for k, v in batch.items()} for i in (0, 1)]
    split = sum(model(**part, num_items_in_batch=num_items).loss for part in parts)
    torch.testing.assert_close(split, whole)


def test_gradient_checkpointing(batch):
    model = make_model(hidden_dropout_prob=0, attention_probs_dropout_prob=0).train()
    expected = gradients(model, **batch)
    for reentrant in (False, True):
        checkpoint_activations(model, use_reentrant=reentrant)
        if reentrant:
            model.enable_input_require_grads()
        assert_same_gradients(gradients(model, **batch), expected)


def saved_bytes(model, batch):
    """What the forward pass keeps for the backward pass, without parameters."""
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    saved = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            saved[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(**batch)
    return sum(storage.nbytes() for storage in saved.values())


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_gradient_checkpointing_halves_memory(batch, attention):
    """Of 6 + 6 layers the backward pass holds one at a time, less than a quarter, beside what is kept: another one."""
    model = make_model(encoder_layers=6, decoder_base_layers=2, decoder_layers=4).train()
    model.set_attn_implementation(attention)
    everything = saved_bytes(model, batch)
    checkpoint_activations(model, use_reentrant=False)
    assert saved_bytes(model, batch) < everything / 4


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_padding_takes_no_memory(attention):
    """What is kept for the backward pass does not grow with it, beside states of evidence that are returned."""
    documents, targets = random_ids([16] * 4), random_ids([16] * 4, seed=1)
    model = make_model(max_position_embeddings=128).train()
    model.set_attn_implementation(attention)
    kept = []
    for length in (16, 128):
        input_ids = pad([*documents, *random_ids([length], seed=2)], 1).unsqueeze(0)
        kept.append(saved_bytes(model, {"input_ids": input_ids, "labels": pad(targets, -100, length)}))
    alone = saved_bytes(model, {"input_ids": input_ids[:, 4:], "labels": pad(targets[:1], -100)})
    assert kept[1] < kept[0] + 1.1 * alone


@pytest.mark.parametrize(
    "settings", [{}, {"num_beams": 3}, {"do_sample": True, "top_k": 5}, {"num_return_sequences": 2, "do_sample": True}]
)
def test_cached_generation_equals_uncached(batch, settings):
    model = make_model()
    scores = torch.tensor([[0.9, 0.1, 0.2], [0.3, 0.2, 0.8]])
    inputs = {"input_ids": batch["input_ids"], "relevance_scores": scores, "max_new_tokens": 12, **settings}
    results = []
    for cache in ({}, {"use_cache": False}, {"cache_implementation": "static", "disable_compile": True}):
        torch.manual_seed(0)
        results.append(model.generate(**inputs, **cache).tolist())
    torch.manual_seed(0)
    results.append(model.generate(**inputs, attention_mask=batch["attention_mask"]).tolist())
    torch.manual_seed(0)
    encoded = model.get_encoder()(batch["input_ids"])
    flat_mask = batch["attention_mask"].flatten(1)
    no_ids = {k: v for k, v in inputs.items() if k != "input_ids"}
    results.append(model.generate(**no_ids, encoder_outputs=encoded, attention_mask=flat_mask).tolist())
    assert all(result == results[0] for result in results)


def test_generation_of_a_batch_equals_one_by_one(batch):
    model = make_model()
    model.generation_config.eos_token_id = None
    together = model.generate(batch["input_ids"], max_new_tokens=8)
    alone = [model.generate(ids[None], max_new_tokens=8)[0] for ids in batch["input_ids"]]
    assert together.tolist() == [ids.tolist() for ids in alone]
    # one document a target, without an attention mask: padding is found by its id
    documents = batch["input_ids"].flatten(0, 1)
    together = model.generate(documents, max_new_tokens=8)
    alone = [model.generate(ids[ids != 1][None], max_new_tokens=8)[0] for ids in documents]
    assert together.tolist() == [ids.tolist() for ids in alone]


@pytest.mark.parametrize("num_evidence", [1, 2, 8])
def test_beams_read_the_evidence_of_their_row(num_evidence):
    """With beams, scores of a search and any number of documents, a batch is as its rows alone."""
    model = make_model()
    documents = pad(random_ids([3 + i % 6 for i in range(3 * num_evidence)]), 1).view(3, num_evidence, -1)
    scores = torch.rand(3, num_evidence, generator=torch.Generator().manual_seed(0))
    visible = torch.ones(3, num_evidence, dtype=torch.bool)
    visible[1, 1:] = False
    settings = {"num_beams": 3, "num_return_sequences": 2, "min_new_tokens": 6, "max_new_tokens": 6}
    settings |= {"return_dict_in_generate": True, "output_scores": True}
    together = model.generate(documents, relevance_scores=scores, evidence_mask=visible, **settings)
    rows = [{"relevance_scores": scores[i][None], "evidence_mask": visible[i][None]} for i in range(3)]
    alone = [model.generate(ids[None], **row, **settings) for ids, row in zip(documents, rows, strict=True)]
    assert together.sequences.tolist() == [ids for row in alone for ids in row.sequences.tolist()]
    expected = torch.cat([row.sequences_scores for row in alone])
    torch.testing.assert_close(together.sequences_scores, expected, rtol=0, atol=1e-5)
    assert expected.diff().abs().min() > 1e-3
    if num_evidence == 1:
        assert torch.equal(model.generate(documents[:, 0], **settings).sequences, together.sequences)


def test_relevance_steers_generation(batch):
    model = make_model()
    for name, parameter in model.named_parameters():
        if name.endswith("relevance_weight"):
            parameter.data.fill_(1000.0)
    only = [model.generate(batch["input_ids"][:, j], max_new_tokens=8).tolist() for j in range(3)]
    for j in range(3):
        scores = torch.eye(3)[j].repeat(2, 1)
        assert model.generate(batch["input_ids"], relevance_scores=scores, max_new_tokens=8).tolist() == only[j]
        mask = scores.bool()
        assert model.generate(batch["input_ids"], evidence_mask=mask, max_new_tokens=8).tolist() == only[j]
    assert only[0] != only[1]


def test_relevance_is_that_of_the_document_without_its_language(batch):
    """A language token before [CLS] is predicted, but the relevance is what search in an index gives."""
    model = make_model()
    languages = torch.tensor([5, 6, 5, 5])[:, None]
    steered = {**batch, "labels": torch.cat([languages, batch["labels"]], dim=1)}
    outputs = model(**steered)
    torch.testing.assert_close(outputs.relevance_scores, model(**batch).relevance_scores, rtol=0, atol=1e-6)
    assert outputs.logits.shape[1] == batch["labels"].shape[1] + 1
    # In the place of the start token, the language is in the decoder's input alone.
    decoder_input_ids = model.prepare_decoder_input_ids_from_labels(batch["labels"])
    decoder_input_ids[:, :1] = languages
    first = model(**batch, decoder_input_ids=decoder_input_ids)
    torch.testing.assert_close(first.relevance_scores, outputs.relevance_scores, rtol=0, atol=1e-6)
    assert not torch.allclose(first.logits, model(**batch).logits)
    written = model.generate(batch["input_ids"], decoder_start_token_id=[5, 6], max_new_tokens=4)
    assert written[:, 0].tolist() == [5, 6]
    # A document that begins with neither a language nor [CLS], or has one token only, is taken as it is.
    for labels in (torch.tensor([[7, 8, 0, 2], [0, 0, 9, 2]]), torch.tensor([[5], [0]])):
        relevance = model(batch["input_ids"], labels=labels).relevance_scores
        expected = torch.einsum("gd,ged->ge", model.embed(labels), model.embed(batch["input_ids"]))
        torch.testing.assert_close(relevance, expected, rtol=0, atol=1e-6)


def test_language_token_steers_generation():
    """One model writes a document's words (token 5), or their translations, 10 higher (token 6), as it is told."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "decoder_intermediate_size": 64, "initializer_range": 0.1}
    config = MargeConfig(**{**SIZES, **sizes}, hidden_dropout_prob=0, attention_probs_dropout_prob=0)
    model, collator = MargeForConditionalGeneration(config), DataCollatorForParaphrasing(make_tokenizer())
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)

    def target(words, language):
        return [language, 0, *(words + 10 * (language - 5)).tolist(), 2]

    for _ in range(150):
        texts = torch.randint(10, 20, (16, 2))
        groups = [{"input_ids": [[0, *w.tolist(), 2]], "labels": [target(w, 5), target(w, 6)]} for w in texts]
        optimizer.zero_grad()
        model(**collator(groups)).loss.backward()
        optimizer.step()
    model.eval()
    texts = torch.randint(10, 20, (8, 2))
    evidence = torch.cat([torch.zeros(8, 1).long(), texts, torch.full((8, 1), 2)], dim=1)
    for language in (5, 6):
        written = model.generate(evidence, forced_bos_token_id=language, max_new_tokens=8)
        assert written[:, 1:].tolist() == [target(words, language) for words in texts]
    languages = [5, 6] * 4
    prefix = torch.tensor([[config.decoder_start_token_id, language] for language in languages])
    written = model.generate(evidence[:, None], decoder_input_ids=prefix, num_beams=2, max_new_tokens=8)
    assert written[:, 1:].tolist() == [target(*pair) for pair in zip(texts, languages, strict=True)]


def test_one_batch_can_be_overfitted(batch):
    torch.manual_seed(0)
    config = MargeConfig(**SIZES, initializer_range=0.1, hidden_dropout_prob=0, attention_probs_dropout_prob=0)
    model = MargeForConditionalGeneration(config)
    batch = {**batch, "labels": batch["labels"][::2]}
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(100):
        optimizer.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
    assert loss < 0.05
    model.eval()
    ids = model.generate(batch["input_ids"], max_new_tokens=8)
    assert [row[row >= 0].tolist() for row in batch["labels"]] == [
        generated[: (target >= 0).sum()].tolist() for generated, target in zip(ids[:, 1:], batch["labels"], strict=True)
    ]


def test_save_and_load(batch, tmp_path):
    model = make_model()
    model.save_pretrained(tmp_path)
    for cls in (MargeForConditionalGeneration, MargeModel, MargeForSequenceClassification):
        loaded, info = cls.from_pretrained(tmp_path, output_loading_info=True)
        classifier = {"classifier.weight", "classifier.bias"} if cls is MargeForSequenceClassification else set()
        assert set(info["missing_keys"]) == classifier
        assert not info["mismatched_keys"] and not info["error_msgs"]
    loaded = MargeForConditionalGeneration.from_pretrained(tmp_path)
    assert torch.equal(loaded(**batch).logits, model(**batch).logits)
    shared = loaded.model.shared.weight
    tied = (loaded.lm_head.weight, loaded.model.encoder.embed_tokens.weight, loaded.model.decoder.embed_tokens.weight)
    assert all(weight is shared for weight in tied)
    MargeModel(model.config).save_pretrained(tmp_path / "base")
    MargeForConditionalGeneration.from_pretrained(tmp_path / "base")


def test_initial_weights():
    """The residual projections are scaled by depth, and a new cross-attention copies what it reads."""
    config = MargeConfig(**{**SIZES, "hidden_size": 64, "decoder_intermediate_size": 256})
    model = MargeForConditionalGeneration(config).model
    assert model.encoder.layers[0].mlp.fc1.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert model.encoder.layers[0].self_attn.out_proj.weight.std().item() == pytest.approx(0.02 / 6**0.5, rel=0.1)
    assert model.decoder.layers[2].mlp.fc2.weight.std().item() == pytest.approx(0.02 / 8**0.5, rel=0.1)
    for layer in model.decoder.layers[1:]:
        copied = layer.cross_attn.out_proj.weight @ layer.cross_attn.v_proj.weight
        torch.testing.assert_close(copied, 0.5 * torch.eye(64), rtol=0, atol=1e-5)
        assert layer.cross_attn.relevance_weight.tolist() == [1.0]


def test_resize_token_embeddings(batch):
    model = make_model()
    model.resize_token_embeddings(70, mean_resizing=False)
    assert model.lm_head.weight is model.model.encoder.embed_tokens.weight
    assert model(**batch).logits.shape[-1] == model.config.vocab_size == 70


def test_hidden_states_and_attentions(batch):
    model = make_model()
    model.set_attn_implementation("eager")
    outputs = model(**batch, output_hidden_states=True, output_attentions=True)
    length, target_length = batch["input_ids"].shape[-1], batch["labels"].shape[-1]
    assert [tuple(x.shape) for x in outputs.encoder_hidden_states] == [(6, length, 16)] * 4
    assert [tuple(x.shape) for x in outputs.encoder_attentions] == [(6, 2, length, length)] * 3
    assert [tuple(x.shape) for x in outputs.decoder_hidden_states] == [(4, target_length, 16)] * 4
    assert [tuple(x.shape) for x in outputs.decoder_attentions] == [(4, 2, target_length, target_length)] * 3
    assert [tuple(x.shape) for x in outputs.cross_attentions] == [(4, 2, target_length, 3 * length)] * 2
    torch.testing.assert_close(outputs.cross_attentions[0].sum(-1), torch.ones(4, 2, target_length))
    assert isinstance(model(**batch, return_dict=False), tuple)


def test_middle_layer_for_sentence_retrieval(batch):
    """Hidden states are of one document each, so that the mean over its tokens stands for it, whatever the padding."""
    model = make_model()
    documents, mask = batch["input_ids"].flatten(0, 1), batch["attention_mask"].flatten(0, 1).unsqueeze(-1)
    states = model.get_encoder()(documents, output_hidden_states=True).hidden_states
    for layer in range(4):
        mean = (states[layer] * mask).sum(1) / mask.sum(1)
        naive = torch.stack(
            [reference.layer_states(model.model.encoder, i[i != 1].tolist(), layer).mean(0) for i in documents]
        )
        torch.testing.assert_close(mean, naive, rtol=0, atol=1e-5)


def test_sequence_classification(batch):
    model = make_model(MargeForSequenceClassification, num_labels=3)
    ids = batch["input_ids"][0]
    outputs = model(ids, labels=torch.tensor([0, 2, 1]))
    outputs.loss.backward()
    assert outputs.logits.shape == (3, 3)
    without_dropout = {"hidden_dropout_prob": 0, "attention_probs_dropout_prob": 0}
    in_training = make_model(MargeForSequenceClassification, num_labels=3, **without_dropout).train()
    torch.testing.assert_close(in_training(ids).logits, outputs.logits, rtol=0, atol=1e-5)
    alone = torch.stack([reference.classify(model, row[row != 1].tolist()) for row in ids])
    torch.testing.assert_close(outputs.logits, alone, rtol=0, atol=2e-5)
    several = make_model(MargeForSequenceClassification, num_labels=3, problem_type="multi_label_classification")
    truth = torch.tensor([[1.0, 0.0, 1.0]] * 3)
    loss = torch.nn.functional.binary_cross_entropy_with_logits(outputs.logits, truth)
    torch.testing.assert_close(several(ids, labels=truth).loss, loss)
    regression = make_model(MargeForSequenceClassification, num_labels=1)
    value = regression(ids, labels=torch.tensor([0.5, 1.0, 2.0]))
    torch.testing.assert_close(value.loss, (value.logits[:, 0] - torch.tensor([0.5, 1.0, 2.0])).square().mean())


def test_stock_seq2seq_fine_tuning(tmp_path):
    """The trainer and the collator that people use for BART and T5 work unchanged on one document a target."""
    tokenizer = make_tokenizer()
    model = make_model()
    rows = {"input_ids": random_ids([5, 7, 4, 6]), "labels": random_ids([4, 5, 6, 3], seed=1)}
    trainer = Seq2SeqTrainer(
        model=model,
        args=Seq2SeqTrainingArguments(
            output_dir=tmp_path,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            max_steps=2,
            predict_with_generate=True,
            generation_max_length=8,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
            dataloader_pin_memory=False,
        ),
        train_dataset=Dataset.from_dict(rows),
        eval_dataset=Dataset.from_dict(rows),
        data_collator=DataCollatorForSeq2Seq(tokenizer, model=model),
        processing_class=tokenizer,
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.predict(trainer.eval_dataset).predictions.shape[0] == 4
    assert trainer.evaluate()["eval_loss"] != before


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            {"retrieval_layers": 5},
            "retrieval_layers must be between 1 and encoder_layers (3), but got 5. The document embedding is read "
            "inside the encoder, so it cannot lie above its last layer.",
        ),
        (
            {"num_attention_heads": 3},
            "hidden_size must be a multiple of num_attention_heads (3), but got 16. Every head works on an equal part "
            "of the hidden state.",
        ),
        ({"decoder_layers": 0}, "decoder_layers must be at least 1, but got 0."),
        ({"decoder_base_layers": -1}, "decoder_base_layers must not be negative, but got -1."),
        ({"hidden_dropout_prob": 1.5}, "hidden_dropout_prob must be in [0, 1), but got 1.5."),
        ({"distillation_loss_weight": -1}, "distillation_loss_weight must not be negative, but got -1."),
        ({"contrastive_loss_weight": -1}, "contrastive_loss_weight must not be negative, but got -1."),
        ({"reconstruction_loss_weight": -1}, "reconstruction_loss_weight must not be negative, but got -1."),
        (
            {"reconstruction_loss_weight": 0},
            "reconstruction_loss_weight=0 trains by the contrastive loss alone, but contrastive_loss_weight is 0, too",
        ),
        ({"contrastive_temperature": 0}, "contrastive_temperature must be positive, but got 0."),
    ],
)
def test_bad_configuration(change, sentence):
    with pytest.raises(Exception, match=re.escape(sentence)):
        MargeConfig(**{**SIZES, **change})


def test_every_field_is_read(batch):
    """Changing any field of the configuration changes the network or what it computes."""
    changes = {
        "vocab_size": 61,
        "hidden_size": 20,
        "encoder_layers": 4,
        "decoder_base_layers": 2,
        "decoder_layers": 3,
        "num_attention_heads": 4,
        "encoder_intermediate_size": 25,
        "decoder_base_intermediate_size": 25,
        "decoder_intermediate_size": 33,
        "retrieval_layers": 3,
        "max_position_embeddings": 33,
        "hidden_act": "relu",
        "hidden_dropout_prob": 0.5,
        "attention_probs_dropout_prob": 0.5,
        "distillation_loss_weight": 1.0,
        "reconstruction_loss_weight": 2.0,
        "contrastive_loss_weight": 1.0,
        "contrastive_temperature": 0.5,
        "initializer_range": 0.1,
        "layer_norm_eps": 0.5,
    }
    own = set(MargeConfig.__annotations__) - {"use_cache", "is_encoder_decoder", "tie_word_embeddings"}
    own -= {"bos_token_id", "pad_token_id", "eos_token_id", "decoder_start_token_id", "classifier_dropout"}
    assert own == set(changes)

    def run(**change):
        model = make_model(**change).train()
        torch.manual_seed(1)
        outputs = model(**batch)
        return sum(p.numel() for p in model.parameters()), outputs.loss.item()

    for name, value in changes.items():
        needed = {"contrastive_loss_weight": 1.0} if name == "contrastive_temperature" else {}
        default = run(**needed)
        assert run(**needed) == default
        assert run(**needed, **{name: value}) != default, name


def test_bad_input(batch):
    model = make_model()
    sentence = (
        "The number of targets must be a multiple of the number of evidence groups (2), but got 3. Evidence of shape "
        "(groups, num_evidence, length) serves targets // groups consecutive targets a group."
    )
    with pytest.raises(ValueError, match=re.escape(sentence)):
        model(batch["input_ids"], labels=batch["labels"][:3])
    sentence = "relevance_scores must have the shape (targets, num_evidence) = (4, 3), but got (2, 3)."
    with pytest.raises(ValueError, match=re.escape(sentence)):
        model(**batch, relevance_scores=torch.ones(2, 3))
    sentence = (
        "A document must have at most max_position_embeddings (32) tokens, but got 40. There is no position embedding "
        "beyond; cut it with chunk_documents, truncate it in the tokenizer, or generate fewer tokens."
    )
    with pytest.raises(ValueError, match=re.escape(sentence)):
        model(torch.zeros(1, 40, dtype=torch.long), labels=batch["labels"][:1])
    sentence = (
        "Token ids must be from 0 to 59, below the model's vocab_size, but got ids from 0 to 60. The text comes from "
        "another tokenizer, or from one with tokens that model.resize_token_embeddings(len(tokenizer)) has not been "
        "told of."
    )
    foreign = torch.tensor([[0, 60, 2]])
    for run in (model.embed, model.get_encoder(), lambda ids: model(batch["input_ids"][:1], labels=ids)):
        with pytest.raises(ValueError, match=re.escape(sentence)):
            run(foreign)
    with pytest.raises(ValueError, match=re.escape("Expected exactly one of decoder_input_ids and decoder_inputs")):
        model(batch["input_ids"])
    sentence = (
        "input_ids must be (batch, length) with one document a target, or (groups, num_evidence, length), but got "
        "shape (2, 3, 9, 1)."
    )
    with pytest.raises(ValueError, match=re.escape(sentence)):
        model(batch["input_ids"][..., None], labels=batch["labels"])
