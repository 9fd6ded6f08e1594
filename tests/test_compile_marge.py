"""MARGE under `torch.compile`: no graph breaks in encoder and decoder, same results, few graphs, plain Trainer."""

import pytest
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_paraphrase_lm import DataCollatorForParaphrasing

from .test_modeling_cocolm import checkpoint_activations
from .test_modeling_marge import assert_same_gradients, gradients, make_model, make_tokenizer, random_ids

# PyTorch's own code looks at what it warns of, when a compiled function gets a tensor that requires gradients.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")


@pytest.fixture(autouse=True)
def no_graphs_of_other_tests():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def make_batch(lengths, target_lengths, seed):
    """Two groups of as many documents and targets as there are lengths, padded."""
    groups = [
        {"input_ids": random_ids(lengths, seed + i), "labels": random_ids(target_lengths, seed + 2 + i)} for i in (0, 1)
    ]
    return DataCollatorForParaphrasing(make_tokenizer())(groups)


BATCHES = [make_batch([7, 9, 4], [6, 3], 0), make_batch([5, 8, 6], [10, 4], 4), make_batch([12, 3, 3], [7, 11], 8)]


def without_dropout(attention, **changes):
    sizes = {"encoder_layers": 2, "retrieval_layers": 1, "decoder_layers": 1}
    model = make_model(**sizes, hidden_dropout_prob=0, attention_probs_dropout_prob=0, **changes).train()
    model.set_attn_implementation(attention)
    return model


@pytest.mark.parametrize(("attention", "batches", "num_graphs"), [("eager", BATCHES[:1], 2), ("sdpa", BATCHES, 4)])
def test_encoder_and_decoder_are_one_graph_each(attention, batches, num_graphs):
    """With targets in the pass of their evidence. Other lengths make one more graph each, which is that of all."""
    model = without_dropout(attention, distillation_loss_weight=0.5, contrastive_loss_weight=0.5)
    expected = [(model(**batch, output_logits=True), gradients(model, **batch)) for batch in batches]
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    for stack in (model.model.encoder, model.model.decoder):
        stack.compile(fullgraph=True, backend=backend)
    for batch, (outputs, grads) in zip(batches, expected, strict=True):
        compiled = model(**batch, output_logits=True)
        for name in ("loss", "relevance_scores", "distillation_loss", "contrastive_loss"):
            torch.testing.assert_close(compiled[name], outputs[name], rtol=0, atol=1e-5)
        is_token = batch["labels"] != -100  # compiled, the rest is computed, too
        torch.testing.assert_close(compiled.logits[is_token], outputs.logits[is_token], rtol=0, atol=1e-5)
        assert_same_gradients(gradients(model, **batch), grads)
    assert len(graphs) == num_graphs


def test_checkpointed_layers_under_autocast_are_in_the_graph():
    model = without_dropout("sdpa")
    checkpoint_activations(model, use_reentrant=False)
    with torch.autocast("cpu", torch.bfloat16):
        expected = gradients(model, **BATCHES[0])
        for stack in (model.model.encoder, model.model.decoder):
            stack.compile(fullgraph=True, backend="aot_eager")
        assert_same_gradients(gradients(model, **BATCHES[0]), expected, tolerance=1e-2)


class Losses(TrainerCallback):
    def __init__(self):
        self.values = []

    def on_log(self, args, state, control, logs, **kwargs):
        if "loss" in logs:
            self.values.append(logs["loss"])


def test_trainer(tmp_path):
    """`torch_compile=True` compiles the whole model, with graph breaks where data decide; losses are the same."""
    groups = [{"input_ids": random_ids([7, 9, 4], i), "labels": random_ids([6, 3], 100 + i)} for i in range(6)]
    losses = {}
    for compiles in (False, True):
        callback = Losses()
        arguments = TrainingArguments(
            output_dir=tmp_path,
            max_steps=3,
            per_device_train_batch_size=2,
            learning_rate=1e-3,
            logging_steps=1,
            torch_compile=compiles,
            torch_compile_backend="eager" if compiles else None,
            remove_unused_columns=False,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
            dataloader_pin_memory=False,
        )
        trainer = Trainer(
            without_dropout("sdpa"),
            arguments,
            DataCollatorForParaphrasing(make_tokenizer()),
            groups,
            callbacks=[callback],
        )
        trainer.train()
        losses[compiles] = callback.values
    assert len(losses[True]) == 3 and losses[True] == pytest.approx(losses[False], abs=1e-4)
