"""Around `Trainer`: refreshing the evidence while a model learns, its losses in the logs, and what it has learned."""

from .component_losses import LogComponentLossesCallback
from .interrupt import StopOnInterruptCallback
from .metrics import corrective_lm_metrics, evidence_losses, recall_at_k
from .refresh import RefreshIndexCallback

__all__ = [
    "LogComponentLossesCallback",
    "RefreshIndexCallback",
    "StopOnInterruptCallback",
    "corrective_lm_metrics",
    "evidence_losses",
    "recall_at_k",
]
