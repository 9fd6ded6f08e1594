"""Language models that learn from paraphrase, for Hugging Face Transformers: MARGE and COCO-LM.

Importing this package registers both families with the Auto classes of `transformers`.
"""

import transformers

from . import hub
from .data import (
    DataCollatorForCorrectiveLM,
    DataCollatorForParaphrasing,
    chunk_documents,
    load_token_array,
    train_tokenizer,
)
from .models.cocolm import (
    CocoLMConfig,
    CocoLMForMaskedLM,
    CocoLMForMultipleChoice,
    CocoLMForPretraining,
    CocoLMForQuestionAnswering,
    CocoLMForSequenceClassification,
    CocoLMForTokenClassification,
    CocoLMModel,
    CocoLMTokenizer,
)
from .models.marge import MargeConfig, MargeForConditionalGeneration, MargeForSequenceClassification, MargeModel
from .retrieval import DocumentIndex, EvidenceDataset, LexicalEmbedder
from .training import (
    CorrectiveLMTrainer,
    LogComponentLossesCallback,
    LogEvidenceCallback,
    MuonWithAdamW,
    NewMasksCallback,
    RefreshIndexCallback,
    StopOnInterruptCallback,
    keep_freed_memory,
)

__version__ = "0.1.0"

__all__ = [
    "CocoLMConfig",
    "CocoLMForMaskedLM",
    "CocoLMForMultipleChoice",
    "CocoLMForPretraining",
    "CocoLMForQuestionAnswering",
    "CocoLMForSequenceClassification",
    "CocoLMForTokenClassification",
    "CocoLMModel",
    "CocoLMTokenizer",
    "CorrectiveLMTrainer",
    "DataCollatorForCorrectiveLM",
    "DataCollatorForParaphrasing",
    "DocumentIndex",
    "EvidenceDataset",
    "LexicalEmbedder",
    "LogComponentLossesCallback",
    "LogEvidenceCallback",
    "MargeConfig",
    "MargeForConditionalGeneration",
    "MargeForSequenceClassification",
    "MargeModel",
    "MuonWithAdamW",
    "NewMasksCallback",
    "RefreshIndexCallback",
    "StopOnInterruptCallback",
    "chunk_documents",
    "hub",
    "keep_freed_memory",
    "load_token_array",
    "train_tokenizer",
]

hub.register_auto_classes()
transformers.AutoTokenizer.register(CocoLMConfig, tokenizer_class=CocoLMTokenizer, exist_ok=True)
