"""MARGE: equations against naive loops, gradient reach, padding, groups, generation, files."""

import re

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models
from transformers import (
    DataCollatorForSeq2Seq,
    PreTrainedTokenizerFast,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
)

from hf_paraphrase_lm import MargeConfig, MargeForConditionalGeneration, MargeForSequenceClassification, MargeModel
from hf_paraphrase_lm.models.marge.modeling_marge import distillation_loss

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


def pad(rows, value, length=None):
    length = length or max(map(len, rows))
    return torch.tensor([list(row) + [value] * (length - len(row)) for row in rows])


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


def test_bfloat16_keeps_small_differences_of_relevance(batch):
    """Scores that differ in the third decimal only must not be rounded to one value."""
    model = make_model()
    scores = 0.99 + torch.tensor([[0.0, 0.002, 0.004]]).repeat(4, 1)
    gradient = []
    for dtype in (torch.float32, torch.bfloat16):
        leaf = scores.clone().requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss = model(**batch, relevance_scores=leaf).loss
        gradient.append(torch.autograd.grad(loss, leaf)[0])
    assert torch.nn.functional.cosine_similarity(*(g.flatten() for g in gradient), dim=0) > 0.99


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


def test_loss_reaches_both_embeddings_through_relevance_only(batch):
    model = make_model()
    kept = []
    embed = model.model.embed
    model.model.embed = lambda *args: kept.append(embed(*args)) or kept[-1]
    outputs = model(**batch)
    gx, gz = kept[0], outputs.document_embeddings
    grads = torch.autograd.grad(outputs.loss, (gx, gz))
    assert all(g.norm() > 1e-4 for g in grads)
    del model.model.embed
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


def test_dropout_where_it_belongs(batch):
    model = make_model(hidden_dropout_prob=0.3).train()
    assert not torch.equal(model(**batch).logits, model(**batch).logits)
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


def test_sequence_classification(batch):
    model = make_model(MargeForSequenceClassification, num_labels=3)
    ids = batch["input_ids"][0]
    outputs = model(ids, labels=torch.tensor([0, 2, 1]))
    outputs.loss.backward()
    assert outputs.logits.shape == (3, 3)
    alone = torch.cat([model(row[row != 1][None]).logits for row in ids])
    torch.testing.assert_close(outputs.logits, alone, rtol=0, atol=1e-5)
    regression = make_model(MargeForSequenceClassification, num_labels=1)
    value = regression(ids, labels=torch.tensor([0.5, 1.0, 2.0]))
    torch.testing.assert_close(value.loss, (value.logits[:, 0] - torch.tensor([0.5, 1.0, 2.0])).square().mean())


def test_stock_seq2seq_fine_tuning(tmp_path):
    """The trainer and the collator that people use for BART and T5 work unchanged on one document a target."""
    vocabulary = {"[CLS]": 0, "[PAD]": 1, "[SEP]": 2, "[UNK]": 3, "[MASK]": 4, **{f"w{i}": i for i in range(5, 60)}}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]")), pad_token="[PAD]"
    )
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

    default = run()
    assert run() == default
    for name, value in changes.items():
        assert run(**{name: value}) != default, name


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
    with pytest.raises(ValueError, match=re.escape("Expected exactly one of decoder_input_ids and decoder_inputs")):
        model(batch["input_ids"])
    sentence = (
        "input_ids must be (batch, length) with one document a target, or (groups, num_evidence, length), but got "
        "shape (2, 3, 9, 1)."
    )
    with pytest.raises(ValueError, match=re.escape(sentence)):
        model(batch["input_ids"][..., None], labels=batch["labels"])
