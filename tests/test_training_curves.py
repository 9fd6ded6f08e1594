"""500 updates on real text go the same way with everything that makes them fast and without it."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from hf_paraphrase_lm import (
    CocoLMConfig,
    CocoLMForPretraining,
    CocoLMModel,
    DataCollatorForCorrectiveLM,
    DataCollatorForParaphrasing,
    MargeConfig,
    MargeForConditionalGeneration,
)
from hf_paraphrase_lm.data import chunk_documents, load_python_docs, train_tokenizer
from hf_paraphrase_lm.models.cocolm import modeling_cocolm
from hf_paraphrase_lm.models.marge import modeling_marge

from .reference import cocolm, marge

UPDATES = 500
LENGTH = 24
# How far the two may drift apart by rounding, as a part of the loss, which is a mean of 50 updates. Other texts in the
# same run change it by more than a hundred times as much, which is tested as well.
TOLERANCE = 3e-5


@pytest.fixture(scope="module")
def corpus():
    texts = load_python_docs(400, progress=False)
    tokenizer = train_tokenizer(texts, vocab_size=600, model_max_length=LENGTH, progress=False)
    return chunk_documents(texts, tokenizer, LENGTH)["input_ids"], tokenizer


def curve(model, batches, loss) -> torch.Tensor:
    """The loss of each update."""
    torch.manual_seed(0)
    model.train()
    # With a smaller eps, Adam makes whole steps of gradients that are nothing but rounding errors.
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, eps=1e-4)
    losses = []
    for batch in batches:
        optimizer.zero_grad()
        losses.append(loss(model, batch))
        losses[-1].backward()
        optimizer.step()
    return torch.stack(losses).detach()


def assert_same_curves(fast, plain, other):
    """`other` is the beginning of a run on other texts."""
    fast, plain, other = (each.view(-1, 50).mean(1) for each in (fast, plain, other))
    assert plain[-1] < 0.85 * plain[0]
    assert (fast / plain - 1).abs().max() < TOLERANCE
    assert (other / plain[: len(other)] - 1).abs().max() > 100 * TOLERANCE


def test_cocolm(corpus, monkeypatch):
    chunks, tokenizer = corpus
    rng, collator = np.random.default_rng(0), DataCollatorForCorrectiveLM(tokenizer, seed=0)
    batches = []
    for rows in rng.integers(len(chunks), size=(UPDATES, 6)):
        batch = collator([{"input_ids": chunks[row]} for row in rows])
        random = torch.from_numpy(rng.integers(10, len(tokenizer), batch["labels"].shape))
        is_masked = (batch["labels"] != -100) & (batch["labels"] != batch["input_ids"])
        # Half of the masks are filled as they were.
        random = torch.where(torch.from_numpy(rng.random(random.shape) < 0.5), random, batch["labels"])
        batches.append(batch | {"corrupted_input_ids": torch.where(is_masked, random, batch["input_ids"])})
    config = CocoLMConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        auxiliary_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=LENGTH + 1,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(0)
    start = CocoLMForPretraining(config).state_dict()

    def run(batches, loss):
        model = CocoLMForPretraining(config)
        model.load_state_dict(start)
        return curve(model, batches, loss)

    def plain_loss(model, batch):
        mlm, copying, correction, contrast = cocolm.pretraining_losses(model, batch)
        return mlm + config.copy_loss_weight * copying + correction + config.contrastive_loss_weight * contrast

    # Several chunks of masked tokens a batch.
    monkeypatch.setattr(modeling_cocolm, "TOKENS_PER_CPU_CHUNK", 8)
    fast, other = (run(part, lambda model, batch: model(**batch).loss) for part in (batches, batches[-100:]))
    monkeypatch.setattr(CocoLMModel, "leaves_out_padding", lambda *_, **__: False)
    assert_same_curves(fast, run(batches, plain_loss), other)


def test_marge(corpus, monkeypatch):
    chunks, tokenizer = corpus
    rng, collator, batches = np.random.default_rng(0), DataCollatorForParaphrasing(tokenizer), []
    for _ in range(UPDATES):
        groups = [[chunks[row] for row in rng.integers(len(chunks), size=4)] for _ in range(2)]
        # A target and its evidence are told apart by what they share.
        batches.append(collator([{"labels": texts[:2], "input_ids": texts[1:]} for texts in groups]))
    config = MargeConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_attention_heads=2,
        encoder_layers=2,
        decoder_base_layers=1,
        decoder_layers=1,
        retrieval_layers=1,
        encoder_intermediate_size=64,
        decoder_base_intermediate_size=64,
        decoder_intermediate_size=64,
        max_position_embeddings=LENGTH,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(0)
    start = MargeForConditionalGeneration(config).state_dict()

    def run(batches, loss):
        model = MargeForConditionalGeneration(config)
        model.load_state_dict(start)
        return curve(model, batches, loss)

    def plain_loss(model, batch):
        logits = marge.separate_passes(model, **batch, output_logits=True).logits
        return F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten())

    monkeypatch.setattr(modeling_marge, "TOKENS_PER_CPU_CHUNK", 8)
    fast, other = (run(part, lambda model, batch: model(**batch).loss) for part in (batches, batches[-100:]))
    monkeypatch.setattr(modeling_marge, "lengths_of", lambda masks: None)
    assert_same_curves(fast, run(batches, plain_loss), other)
