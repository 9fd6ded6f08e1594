"""COCO-LM: an encoder that learns by correcting and contrasting corrupted text."""

from .configuration_cocolm import CocoLMConfig
from .convert_microsoft_cocolm import convert_fairseq_state_dict
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
    "convert_fairseq_state_dict",
]
