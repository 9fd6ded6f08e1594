"""Around `Trainer`: refreshing the evidence while a model learns, its losses in the logs, and what it has learned."""

from .component_losses import LogComponentLossesCallback
from .corrective_lm_trainer import CorrectiveLMTrainer, global_batch
from .interrupt import StopOnInterruptCallback
from .metrics import corrective_lm_metrics, evidence_losses, recall_at_k
from .new_masks import NewMasksCallback
from .refresh import RefreshIndexCallback

__all__ = [
    "CorrectiveLMTrainer",
    "LogComponentLossesCallback",
    "NewMasksCallback",
    "RefreshIndexCallback",
    "StopOnInterruptCallback",
    "corrective_lm_metrics",
    "evidence_losses",
    "global_batch",
    "recall_at_k",
]
