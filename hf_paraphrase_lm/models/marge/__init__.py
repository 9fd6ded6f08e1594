"""MARGE: a document is rebuilt from related documents that the model retrieves itself (Lewis et al., 2020)."""

from .configuration_marge import MargeConfig
from .modeling_marge import (
    MargeForConditionalGeneration,
    MargeForSequenceClassification,
    MargeModel,
    MargePreTrainedModel,
)

__all__ = [
    "MargeConfig",
    "MargeForConditionalGeneration",
    "MargeForSequenceClassification",
    "MargeModel",
    "MargePreTrainedModel",
]
