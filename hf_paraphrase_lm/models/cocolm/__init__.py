"""COCO-LM: an encoder that learns by correcting and contrasting corrupted text."""

from .configuration_cocolm import CocoLMConfig
from .modeling_cocolm import (
    CocoLMForMaskedLM,
    CocoLMForMultipleChoice,
    CocoLMForPretraining,
    CocoLMForPretrainingOutput,
    CocoLMForQuestionAnswering,
    CocoLMForSequenceClassification,
    CocoLMForTokenClassification,
    CocoLMModel,
    CocoLMPreTrainedModel,
)
from .tokenization_cocolm import CocoLMTokenizer

__all__ = [
    "CocoLMConfig",
    "CocoLMForMaskedLM",
    "CocoLMForMultipleChoice",
    "CocoLMForPretraining",
    "CocoLMForPretrainingOutput",
    "CocoLMForQuestionAnswering",
    "CocoLMForSequenceClassification",
    "CocoLMForTokenClassification",
    "CocoLMModel",
    "CocoLMPreTrainedModel",
    "CocoLMTokenizer",
]
