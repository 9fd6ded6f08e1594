"""COCO-LM in the pipelines of transformers, from saved folders, as its users run it."""

import pytest
import torch
from transformers import AutoTokenizer, pipeline

from hf_paraphrase_lm import (
    CocoLMConfig,
    CocoLMForMaskedLM,
    CocoLMForSequenceClassification,
    CocoLMForTokenClassification,
    CocoLMModel,
    train_tokenizer,
)

TEXTS = ["The last train to the coast leaves at nine.", "Boil the eggs for ten minutes in a pot of water."]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS, vocab_size=290, progress=False)


@pytest.fixture
def folder(tmp_path, tokenizer):
    def save(model_class, **changes):
        sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
        model = model_class(CocoLMConfig(vocab_size=len(tokenizer), **sizes, **changes))
        model.save_pretrained(tmp_path)
        tokenizer.save_pretrained(tmp_path)
        return str(tmp_path), model.eval()

    return save


def test_text_classification(folder, tokenizer):
    path, model = folder(CocoLMForSequenceClassification, id2label={0: "late", 1: "soft"})
    answers = pipeline("text-classification", path, device="cpu")(TEXTS, batch_size=2, top_k=None)
    for text, answer in zip(TEXTS, answers, strict=True):
        expected = model(**tokenizer(text, return_tensors="pt")).logits.softmax(-1)[0]
        assert {item["label"]: item["score"] for item in answer} == pytest.approx(
            {"late": expected[0].item(), "soft": expected[1].item()}, rel=1e-4
        )


def test_token_classification_points_into_the_text(folder):
    path, _ = folder(CocoLMForTokenClassification, id2label={0: "O", 1: "THING"})
    for entity in pipeline("token-classification", path, device="cpu")(TEXTS[0]):
        assert TEXTS[0][entity["start"] : entity["end"]] == entity["word"].removeprefix("Ġ")


def test_fill_mask(folder, tokenizer):
    path, model = folder(CocoLMForMaskedLM)
    text = f"Boil the {tokenizer.mask_token} for ten minutes."
    answers = pipeline("fill-mask", path, device="cpu")(text, top_k=3)
    inputs = tokenizer(text, return_tensors="pt")
    position = (inputs["input_ids"][0] == tokenizer.mask_token_id).nonzero().item()
    best = model(**inputs).logits[0, position].softmax(-1).topk(3)
    assert [answer["token"] for answer in answers] == best.indices.tolist()
    assert [answer["score"] for answer in answers] == pytest.approx(best.values.tolist(), rel=1e-4)


def test_feature_extraction(folder, tokenizer):
    path, model = folder(CocoLMModel)
    assert AutoTokenizer.from_pretrained(path).model_input_names == ["input_ids", "attention_mask"]
    features = pipeline("feature-extraction", path, device="cpu")(TEXTS[1], return_tensors=True)
    expected = model(**tokenizer(TEXTS[1], return_tensors="pt")).last_hidden_state
    torch.testing.assert_close(features, expected)
