"""The COCO-LM objective on encoders of other families, and the objectives that the paper compares it with."""

import copy

import pytest
import torch
import torch.nn.functional as F
from huggingface_hub.errors import StrictDataclassError
from transformers import (
    AutoModel,
    AutoModelForPreTraining,
    BertConfig,
    BertForMaskedLM,
    BertModel,
    ElectraConfig,
    ElectraForPreTraining,
    ElectraModel,
    GPT2Config,
    GPT2Model,
    ModernBertConfig,
    ModernBertModel,
    RobertaConfig,
    RobertaModel,
    Trainer,
    XLNetConfig,
    XLNetModel,
)

from hf_paraphrase_lm import CocoLMConfig, CocoLMForPretraining, CocoLMForSequenceClassification, CocoLMModel, hub

from .reference import cocolm as reference
from .test_modeling_cocolm import (
    LOSSES,
    assert_same_weights,
    gradients,
    pretraining_batch,
    tiny_config,
    training_arguments,
)

VOCAB_SIZE = tiny_config().vocab_size
SIZES = {
    "hidden_size": 24,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "vocab_size": VOCAB_SIZE,
    "pad_token_id": 1,
}
WITHOUT_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
# Main and auxiliary encoder of each family; True if they share their embeddings.
FAMILIES = {
    "bert": (BertModel, BertConfig, SIZES | WITHOUT_DROPOUT, {}, True),
    "roberta": (RobertaModel, RobertaConfig, SIZES | WITHOUT_DROPOUT, {}, True),
    # Embeddings narrower than the layers, and a narrower auxiliary network, as ELECTRA has them.
    "electra": (
        ElectraModel,
        ElectraConfig,
        SIZES | WITHOUT_DROPOUT | {"embedding_size": 16},
        {"hidden_size": 12, "intermediate_size": 16},
        True,
    ),
    "modernbert": (
        ModernBertModel,
        ModernBertConfig,
        SIZES | {"cls_token_id": 0, "sep_token_id": 2, "bos_token_id": 0, "eos_token_id": 2},
        {},
        True,
    ),
    "narrow auxiliary": (BertModel, BertConfig, SIZES | WITHOUT_DROPOUT, {"hidden_size": 12}, False),
}


def encoders(family):
    model_class, config_class, sizes, auxiliary_sizes, _ = FAMILIES[family]
    main = model_class(config_class(num_hidden_layers=2, **sizes))
    return main, model_class(config_class(num_hidden_layers=1, **(sizes | auxiliary_sizes)))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_losses_are_those_of_the_encoders(family):
    """The same formulas as for COCO-LM's own networks, which are compared with naive loops elsewhere."""
    main, auxiliary = encoders(family)
    model = CocoLMForPretraining.from_encoders(main, auxiliary, copy_loss_weight=3).eval()
    batch = pretraining_batch()
    output = model(**batch, output_logits=True)
    mask = batch["attention_mask"].bool()
    is_masked = mask & (batch["input_ids"] != batch["labels"])
    states = main.eval()(batch["corrupted_input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
    projected = model.corrective_lm_projection(states[is_masked])
    expected = projected @ main.get_input_embeddings().weight.T + model.corrective_lm_head.bias
    torch.testing.assert_close(output.corrective_lm_logits, expected)
    # The auxiliary network has the main one's embeddings if it can.
    shared = copy.deepcopy(auxiliary)
    if FAMILIES[family][-1]:
        missing, unexpected = shared.load_state_dict(
            {n: w for n, w in main.state_dict().items() if n.startswith("embeddings.") and "position_ids" not in n},
            strict=False,
        )
        assert not unexpected and not any(n.startswith("embeddings.") for n in missing)
    states = shared.eval()(batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
    head = model.auxiliary_lm_head
    states = head.LayerNorm(head.activation(head.dense(states[is_masked])))
    expected = states @ shared.get_input_embeddings().weight.T + head.decoder.bias
    torch.testing.assert_close(output.auxiliary_logits, expected)
    total = output.mlm_loss + 3 * output.copy_loss + output.corrective_lm_loss + output.contrastive_loss
    torch.testing.assert_close(output.loss, total)
    assert all(output[name] > 0 for name in ("mlm_loss", "copy_loss", "corrective_lm_loss", "contrastive_loss"))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", ["cocolm", *FAMILIES])
def test_crops_take_no_pass_of_their_own_where_it_costs_no_padding(family, attention):
    if family == "cocolm":
        model = CocoLMForPretraining(tiny_config())
    else:
        model = CocoLMForPretraining.from_encoders(*encoders(family))
    model.set_attn_implementation(attention)
    # The pooler of the auxiliary network is frozen, as nothing uses it.
    model.eval().requires_grad_(True)
    batch, passes = pretraining_batch(), []
    model.cocolm.register_forward_hook(lambda *_: passes.append(1))
    width = batch["input_ids"].shape[1] - batch["span_input_ids"].shape[1]
    wider = {
        "span_input_ids": F.pad(batch["span_input_ids"], (0, width), value=model.config.pad_token_id),
        "span_attention_mask": F.pad(batch["span_attention_mask"], (0, width)),
    }
    expected = reference.pretraining_losses(model, batch)
    for spans, count in ((wider, 1), ({}, 1 if family == "cocolm" else 2)):
        passes.clear()
        output = model(**batch | spans)
        assert len(passes) == count
        for name, value in zip(LOSSES, expected, strict=True):
            torch.testing.assert_close(output[name], value, rtol=1e-5, atol=1e-5)
            other = gradients(model, value)
            for weight, gradient in gradients(model, output[name]).items():
                torch.testing.assert_close(gradient, other[weight], rtol=1e-4, atol=1e-5, msg=f"{name} {weight}")
    assert output.hidden_states is output.attentions is None
    recorded = {"output_hidden_states": True, "output_attentions": attention == "eager"}
    one, two = model(**batch | wider, **recorded), model(**batch, **recorded)
    torch.testing.assert_close(one.hidden_states, two.hidden_states)
    torch.testing.assert_close(one.attentions, two.attentions)
    assert len(one.hidden_states) == 3 and (attention == "sdpa" or len(one.attentions) == 2)


@pytest.mark.parametrize("family", FAMILIES)
def test_one_checkpoint_and_export_of_the_main_encoder(tmp_path, family):
    main, auxiliary = encoders(family)
    model = CocoLMForPretraining.from_encoders(main, auxiliary).eval()
    assert_same_weights(model.cocolm, main)
    model.save_pretrained(tmp_path / "both")
    loaded, loading = AutoModelForPreTraining.from_pretrained(tmp_path / "both", output_loading_info=True)
    assert type(loaded) is CocoLMForPretraining and not any(loading.values())
    assert_same_weights(loaded, model)
    assert {n for n, w in loaded.named_parameters() if w.requires_grad} == {
        n for n, w in model.named_parameters() if w.requires_grad
    }
    for target, source in loaded._tied_weights_keys.items():
        assert loaded.get_parameter(target) is loaded.get_parameter(source), target
    batch = pretraining_batch()
    assert torch.equal(loaded.eval()(**batch).loss, model(**batch).loss)

    loaded.base_model.save_pretrained(tmp_path / "main")
    exported, loading = AutoModel.from_pretrained(tmp_path / "main", output_loading_info=True)
    assert type(exported) is type(main) and not any(loading.values())
    assert_same_weights(exported, main)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_trainable_weight_is_trained_and_only_by_its_losses(family):
    model = CocoLMForPretraining.from_encoders(*encoders(family))
    output = model(**pretraining_batch(corrupted=False))
    output.loss.backward()
    for name, weight in model.named_parameters():
        # The main network's pooler is of no use here, but may be fine-tuned in this process.
        assert (weight.grad is not None) == (weight.requires_grad and not name.startswith("cocolm.pooler")), name
        assert weight.requires_grad != name.startswith("auxiliary.pooler"), name
    model.zero_grad()
    model(**pretraining_batch()).mlm_loss.backward()
    own = [n for n, w in model.named_parameters() if w.grad is not None and w.grad.abs().sum() > 0]
    shares = FAMILIES[family][-1]
    assert own and all(n.startswith(("auxiliary", "cocolm.embeddings") if shares else "auxiliary") for n in own)


def test_a_batch_is_learned_by_heart(tmp_path):
    model = CocoLMForPretraining.from_encoders(*encoders("modernbert"))
    batch = pretraining_batch((12, 9))
    rows = [{name: tensor[row] for name, tensor in batch.items()} for row in range(2)]
    arguments = training_arguments(tmp_path, max_steps=100, learning_rate=5e-3, logging_steps=1)
    trainer = Trainer(model, arguments, train_dataset=rows)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.2 * losses[0]


LOAD = """
import sys

import torch
from transformers import AutoModelForPreTraining

for folder in sys.argv[1:]:
    model, loading = AutoModelForPreTraining.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
    batch = torch.load(folder + "/batch.pt")
    print(any(loading.values()), model.eval()(**batch).loss.item())
"""


def test_own_encoders_load_without_the_package(tmp_path, run_python):
    """Beside another, of the same family, and with sizes of their own."""
    expected = ""
    for name, auxiliary in {"own": CocoLMModel(tiny_config(num_hidden_layers=1)), "bert": encoders("bert")[1]}.items():
        model = CocoLMForPretraining.from_encoders(CocoLMModel(tiny_config()), auxiliary).eval()
        hub.save_with_code(model, tmp_path / name)
        torch.save(pretraining_batch(), tmp_path / name / "batch.pt")
        expected += f"False {model(**torch.load(tmp_path / name / 'batch.pt')).loss.item()}\n"
    assert run_python(LOAD, tmp_path / "own", tmp_path / "bert", package=False) == expected


def test_encoders_of_a_type_of_their_own(tmp_path):
    main, auxiliary = encoders("bert")
    main.bfloat16().save_pretrained(tmp_path / "main")
    main = AutoModel.from_pretrained(tmp_path / "main")
    # The configuration of the checkpoint does not make one of the networks bfloat16.
    model = CocoLMForPretraining(CocoLMConfig(main_config=main.config, auxiliary_config=auxiliary.config))
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}
    assert model(**pretraining_batch()).loss.isfinite()
    # All have the main one's.
    model = CocoLMForPretraining.from_encoders(main, auxiliary)
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}
    assert_same_weights(model.cocolm, main)
    model.save_pretrained(tmp_path / "both")
    for dtype in (torch.bfloat16, torch.float32):
        loaded = CocoLMForPretraining.from_pretrained(tmp_path / "both", dtype=dtype)
        assert {weight.dtype for weight in loaded.parameters()} == {dtype}


def test_a_family_without_a_longest_sequence_is_saved(tmp_path):
    sizes = {"d_model": 24, "n_head": 2, "n_layer": 1, "d_inner": 32, "vocab_size": VOCAB_SIZE, "pad_token_id": 1}
    main, auxiliary = (XLNetModel(XLNetConfig(**sizes)) for _ in range(2))
    assert main.config.max_position_embeddings == -1
    model = CocoLMForPretraining.from_encoders(main, auxiliary)
    assert model.config.max_position_embeddings == 512
    model.save_pretrained(tmp_path)
    assert_same_weights(CocoLMForPretraining.from_pretrained(tmp_path), model)


def test_a_configuration_that_cannot_be_saved_is_refused():
    main, auxiliary = encoders("bert")
    main.config.initializer_range = 0.0
    with pytest.raises(StrictDataclassError, match=r"initializer_range must be positive, but got 0\.0\.$"):
        CocoLMForPretraining.from_encoders(main, auxiliary)


def test_no_setting_is_lost_silently(caplog):
    main, auxiliary = encoders("modernbert")
    with pytest.raises(ValueError) as caught:
        CocoLMForPretraining.from_encoders(main, auxiliary, CocoLMConfig(), copy_loss_weight=3, auxiliary_layers=2)
    assert str(caught.value) == (
        "The settings must be either in config or keywords, but got a config and auxiliary_layers, copy_loss_weight. "
        "Set them in the config."
    )
    gpt2 = GPT2Model(GPT2Config(n_embd=24, n_head=2, n_layer=1, vocab_size=VOCAB_SIZE))
    with pytest.raises(ValueError) as caught:
        CocoLMForPretraining.from_encoders(gpt2, auxiliary, pad_token_id=1)
    assert str(caught.value) == (
        "pad_token_id is read from main, whose configuration has None, but got 1. Set main.config.pad_token_id if the "
        "encoder is really of that kind."
    )
    gpt2.config.pad_token_id = 1
    settings = {"pad_token_id": 1, "torch_dtype": "float32", "id2label": {"0": "a", "1": "b"}}
    assert CocoLMForPretraining.from_encoders(gpt2, auxiliary, **settings).config.pad_token_id == 1
    caplog.clear()
    config = CocoLMConfig(initializer_range=0.5, pad_token_id=7)
    config = CocoLMForPretraining.from_encoders(main, copy.deepcopy(main), config).config
    assert (config.initializer_range, config.pad_token_id) == (0.02, 1)
    message = "The main encoder's configuration replaces initializer_range 0.5 by 0.02, pad_token_id 7 by 1."
    assert caplog.messages == [message]
    caplog.clear()
    CocoLMConfig(**config.to_dict())
    assert caplog.messages == []


def test_embeddings_are_shared_within_a_family_only():
    """RoBERTa's positions begin after that of padding."""
    sizes = SIZES | {"num_hidden_layers": 1, "type_vocab_size": 2, "max_position_embeddings": 20}
    bert, roberta = BertModel(BertConfig(**sizes)), RobertaModel(RobertaConfig(**sizes))
    model = CocoLMForPretraining.from_encoders(bert, roberta)
    assert_same_weights(model.auxiliary, roberta)
    assert_same_weights(model.cocolm, bert)


def test_bad_input_of_other_families_is_named():
    sizes = SIZES | {"num_hidden_layers": 1, "type_vocab_size": 2, "max_position_embeddings": 20}
    bert, roberta = BertModel(BertConfig(**sizes)), RobertaModel(RobertaConfig(**sizes))
    for main, auxiliary in ((bert, roberta), (roberta, bert)):
        model = CocoLMForPretraining.from_encoders(main, auxiliary)
        assert model(**pretraining_batch((18, 5))).loss.isfinite()
        with pytest.raises(ValueError) as caught:
            model(**pretraining_batch((19, 5)))
        assert str(caught.value) == (
            "The input must have at most 18 tokens, for which there are position embeddings, but has 19. Truncate it "
            "when you tokenize."
        )
        batch = pretraining_batch()
        for name in ("input_ids", "labels", "span_input_ids", "corrupted_input_ids"):
            with pytest.raises(ValueError) as caught:
                model(**batch | {name: torch.full_like(batch[name], VOCAB_SIZE)})
            assert str(caught.value) == (
                f"{name} must be between 0 and {VOCAB_SIZE - 1}, but got {VOCAB_SIZE}. The tokenizer has another "
                "vocabulary than the model; if you added tokens, call resize_token_embeddings."
            )


def test_dropout_under_any_name_is_zero():
    sizes = {"n_embd": 24, "n_head": 2, "n_layer": 1, "vocab_size": VOCAB_SIZE, "pad_token_id": 1}
    main, auxiliary = (GPT2Model(GPT2Config(**sizes)) for _ in range(2))
    model = CocoLMForPretraining.from_encoders(main, auxiliary, auxiliary_sampling="zero_dropout")
    dropouts = [[m.p for m in e.modules() if isinstance(m, torch.nn.Dropout)] for e in (model.auxiliary, model.cocolm)]
    assert set(dropouts[0]) == {0.0} and set(dropouts[1]) == {0.1}


def test_hidden_states_on_demand_of_the_configuration():
    model = CocoLMForPretraining.from_encoders(*encoders("bert"), output_hidden_states=True)
    batch = pretraining_batch()
    assert len(model(**batch).hidden_states) == len(model(batch["input_ids"]).hidden_states) == 3
    assert model(**batch, output_hidden_states=False).hidden_states is None


@pytest.mark.parametrize("size", [VOCAB_SIZE + 5, VOCAB_SIZE - 5])
@pytest.mark.parametrize("family", ["bert", "narrow auxiliary"])
def test_resized_vocabulary(tmp_path, family, size):
    model = CocoLMForPretraining.from_encoders(*encoders(family))
    model.resize_token_embeddings(size, mean_resizing=False)
    batch = {name: tensor.clamp(max=size - 1) for name, tensor in pretraining_batch().items()}
    output = model(**batch, output_logits=True)
    assert output.auxiliary_logits.shape[-1] == output.corrective_lm_logits.shape[-1] == size
    assert model.auxiliary_lm_head.decoder.out_features == model.corrective_lm_head.out_features == size
    model.save_pretrained(tmp_path / "both")
    assert_same_weights(CocoLMForPretraining.from_pretrained(tmp_path / "both"), model)
    model.base_model.save_pretrained(tmp_path / "main")
    assert_same_weights(AutoModel.from_pretrained(tmp_path / "main"), model.base_model)


def test_models_with_heads_give_their_encoders():
    config = ElectraConfig(**SIZES, num_hidden_layers=1)
    model = CocoLMForPretraining.from_encoders(ElectraForPreTraining(config), ElectraModel(config))
    assert type(model.base_model) is ElectraModel
    config = BertConfig(**SIZES, num_hidden_layers=1)
    model = CocoLMForPretraining.from_encoders(BertForMaskedLM(config), BertModel(config))
    assert type(model.base_model) is BertModel


def test_settings_of_the_objective():
    config = CocoLMConfig(copy_loss_weight=7, auxiliary_sampling="zero_dropout", contrastive_embedding_size=5)
    main, auxiliary = (BertModel(BertConfig(**SIZES, num_hidden_layers=n)) for n in (2, 1))
    model = CocoLMForPretraining.from_encoders(main, auxiliary, config)
    assert model.config.copy_loss_weight == 7 and config.main_config is None
    assert model.contrastive_head.dense.out_features == 5
    assert model.auxiliary.config.hidden_dropout_prob == 0.0 and model.cocolm.config.hidden_dropout_prob == 0.1
    assert model.config.auxiliary_config.hidden_dropout_prob == 0.1
    model = CocoLMForPretraining.from_encoders(main, auxiliary, contrastive_loss_weight=0)
    assert model.config.contrastive_loss_weight == 0


def test_embeddings_that_are_lost_are_said(caplog):
    main, auxiliary = encoders("bert")
    CocoLMForPretraining.from_encoders(main, auxiliary)
    assert caplog.messages == ["The auxiliary network now has the main network's embeddings in place of its own."]
    caplog.clear()
    auxiliary.embeddings.load_state_dict(main.embeddings.state_dict())
    CocoLMForPretraining.from_encoders(main, auxiliary)
    CocoLMForPretraining.from_encoders(*encoders("narrow auxiliary"))
    assert caplog.messages == []


def test_what_cannot_be_encoders():
    main, auxiliary = encoders("bert")
    with pytest.raises(TypeError) as caught:
        CocoLMForPretraining.from_encoders(main, torch.nn.Linear(2, 2))
    assert str(caught.value) == (
        "auxiliary must be a PreTrainedModel, such as AutoModel gives, but got a Linear. Wrap it in one and register "
        "that with AutoConfig and AutoModel, so that it can be saved."
    )
    auxiliary.resize_token_embeddings(VOCAB_SIZE + 1, mean_resizing=False)
    with pytest.raises(ValueError) as caught:
        CocoLMForPretraining.from_encoders(main, auxiliary)
    assert str(caught.value) == (
        f"Both networks must have one vocabulary, but main has {VOCAB_SIZE} tokens and auxiliary {VOCAB_SIZE + 1}: the "
        "tokens that the auxiliary network fills in are read by the main one. Make both with one tokenizer; if you "
        "only added tokens, call resize_token_embeddings."
    )

    class Unknown(BertModel):
        pass

    with pytest.raises(ValueError) as caught:
        CocoLMForPretraining.from_encoders(Unknown(main.config), main)
    assert str(caught.value) == (
        "main is a Unknown, but AutoModel makes a BertModel of its configuration, so it could not be loaded again. "
        "Give an encoder that AutoModel knows."
    )
    config = CocoLMForPretraining.from_encoders(main, main).config
    for model_class in (CocoLMModel, CocoLMForSequenceClassification):
        with pytest.raises(ValueError) as caught:
            model_class(config)
        assert str(caught.value) == (
            "This configuration is of two networks in pre-training (the main one: bert), not of one encoder. Load it "
            "with CocoLMForPretraining; base_model.save_pretrained writes its main encoder as a bert checkpoint."
        )
    with pytest.raises(Exception, match="main_config and auxiliary_config go together, but only one of them was given"):
        CocoLMConfig(main_config=main.config)
    with pytest.raises(ValueError) as caught:
        CocoLMConfig(main_config={"vocab_size": 50, "hidden_size": 24}, auxiliary_config=main.config)
    assert str(caught.value) == (
        "main_config must have a model_type, which says of what family the encoder is, but has only the keys "
        "['hidden_size', 'vocab_size']. Take it from the encoder's config.json."
    )


@pytest.mark.parametrize("weight", [0, 1])
@pytest.mark.parametrize("objective", ["corrective_lm", "replaced_token_detection", "masked_lm"])
def test_objectives(tmp_path, objective, weight):
    config = tiny_config(discriminator_objective=objective, contrastive_loss_weight=weight)
    model = CocoLMForPretraining(config)
    batch = pretraining_batch(corrupted=False)
    output = model(**batch, output_logits=True)
    expected = {"corrective_lm": "mlm copy corrective_lm", "replaced_token_detection": "mlm copy", "masked_lm": "mlm"}
    names = {f"{name}_loss" for name in expected[objective].split()} | ({"contrastive_loss"} if weight else set())
    for name in ("mlm_loss", "copy_loss", "corrective_lm_loss", "contrastive_loss"):
        assert (output[name] > 0) == (name in names), name
    total = output.mlm_loss + 50 * output.copy_loss + output.corrective_lm_loss + output.contrastive_loss
    torch.testing.assert_close(output.loss, total)
    # What is trained has a gradient and nothing else wants one, so that distributed training waits for none.
    output.loss.backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
    unused = {
        "replaced_token_detection": {"corrective_lm_head"},
        "masked_lm": {"auxiliary", "auxiliary_lm_head", "copy_head"},
    }
    unused = unused.get(objective, set()) | (set() if weight else {"contrastive_head"})
    assert {n.split(".")[0] for n, p in model.named_parameters() if not p.requires_grad} == unused
    model.save_pretrained(tmp_path)
    loaded = CocoLMForPretraining.from_pretrained(tmp_path)
    assert [p.requires_grad for p in loaded.parameters()] == [p.requires_grad for p in model.parameters()]
    # Another objective goes on from the same checkpoint.
    continued, loading = CocoLMForPretraining.from_pretrained(
        tmp_path, discriminator_objective="corrective_lm", contrastive_loss_weight=1, output_loading_info=True
    )
    assert not any(loading.values()) and all(p.requires_grad for p in continued.parameters())
    # Or in the same process, where what is frozen for another reason stays so.
    loaded.cocolm.embeddings.requires_grad_(False)
    loaded.config.discriminator_objective, loaded.config.contrastive_loss_weight = "corrective_lm", 1
    loaded.tie_weights()
    frozen = {n for n, p in loaded.named_parameters() if not p.requires_grad}
    assert frozen and all(name.startswith("cocolm.embeddings.") for name in frozen)


def test_masked_lm_is_that_of_the_main_network():
    model = CocoLMForPretraining(tiny_config(discriminator_objective="masked_lm", contrastive_loss_weight=0)).eval()
    batch = pretraining_batch(corrupted=False)
    output = model(**batch)
    states = model.cocolm(batch["input_ids"], batch["attention_mask"]).last_hidden_state
    losses = []
    for row, position in (batch["attention_mask"].bool() & (batch["input_ids"] != batch["labels"])).nonzero().tolist():
        logits = states[row, position] @ model.get_input_embeddings().weight.T + model.corrective_lm_head.bias
        losses.append(-logits.log_softmax(-1)[batch["labels"][row, position]])
    torch.testing.assert_close(output.mlm_loss, torch.stack(losses).mean())
    assert output.copy_logits is None and torch.equal(output.corrupted_input_ids, batch["input_ids"])
    assert model(batch["input_ids"], batch["attention_mask"]).copy_logits is None


def test_replaced_token_detection_is_electra():
    """As ElectraForPreTraining computes it, whose logit is that of "replaced"."""
    config = ElectraConfig(**SIZES, **WITHOUT_DROPOUT, num_hidden_layers=2)
    electra = ElectraForPreTraining(config).eval()
    model = CocoLMForPretraining.from_encoders(
        electra, ElectraModel(config), discriminator_objective="replaced_token_detection", contrastive_loss_weight=0
    ).eval()
    batch = pretraining_batch()
    states = electra.electra(batch["corrupted_input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
    logits = -model.copy_head(states).squeeze(-1)
    is_replaced = (batch["corrupted_input_ids"] != batch["labels"]).float()
    active = batch["attention_mask"].bool()
    expected = torch.nn.functional.binary_cross_entropy_with_logits(logits[active], is_replaced[active])
    output = model(**batch)
    torch.testing.assert_close(output.copy_loss, expected)
    torch.testing.assert_close(output.loss, output.mlm_loss + 50 * expected)
