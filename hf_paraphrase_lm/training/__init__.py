"""Around `Trainer`: refreshing the evidence while a model learns, and measuring whether it helps."""

from .metrics import evidence_losses, recall_at_k
from .refresh import RefreshIndexCallback

__all__ = ["RefreshIndexCallback", "evidence_losses", "recall_at_k"]
