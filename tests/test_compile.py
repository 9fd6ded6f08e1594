"""torch.compile of COCO-LM, with backends that need no compiler of C++."""

import pytest
import torch
from transformers import Trainer

from hf_paraphrase_lm import CocoLMForPretraining, CocoLMModel

from .test_modeling_cocolm import Texts, texts, training_arguments, without_dropout


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_encoder_is_one_graph_for_all_lengths(attention):
    model = CocoLMModel(without_dropout(num_hidden_layers=1))
    model.set_attn_implementation(attention)
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    for lengths, stance in (((12, 9, 12, 5), "default"), ((18, 7, 3), "fail_on_recompile")):
        inputs = texts(lengths)
        with torch.compiler.set_stance(stance):
            states = compiled(*inputs).last_hidden_state
        # The graph computes on padding, too.
        states, expected = (each[inputs[1].bool()] for each in (states, model(*inputs).last_hidden_state))
        torch.testing.assert_close(states, expected, rtol=1e-5, atol=1e-5)
        gradients, other = (torch.autograd.grad(s.pow(3).sum(), list(model.parameters())) for s in (states, expected))
        torch.testing.assert_close(gradients, other, rtol=1e-4, atol=1e-4)


# Of torch itself, which looks at the .grad of every tensor where it takes up a graph again.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf Tensor:UserWarning")
def test_compiled_pretraining_trains(tmp_path):
    """The masked positions, whose number is known only when the batch is, may break the graph."""
    dataset, losses = Texts(), []
    # Drawn beforehand: a compiled backward pass takes random numbers of its own.
    dataset.batch["corrupted_input_ids"] = dataset.batch["labels"].clamp(min=1).flip(0)
    for settings in ({}, {"torch_compile": True, "torch_compile_backend": "eager"}):
        torch.manual_seed(0)
        model = CocoLMForPretraining(without_dropout(num_hidden_layers=1))
        arguments = training_arguments(
            tmp_path, max_steps=3, logging_steps=1, per_device_train_batch_size=4, learning_rate=1e-3, **settings
        )
        trainer = Trainer(model, arguments, train_dataset=dataset)
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert len(losses[0]) == 3
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
