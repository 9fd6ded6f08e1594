"""Around `Trainer`: refreshing the evidence while a model learns, its losses in the logs, and what it has learned."""

from .checkpoints import last_checkpoint, set_aside_half_checkpoints
from .collapse import evidence_use
from .component_losses import LogComponentLossesCallback
from .corrective_lm_trainer import CorrectiveLMTrainer, global_batch
from .evidence_metrics import LogEvidenceCallback
from .interrupt import StopOnInterruptCallback
from .memory import keep_freed_memory
from .metrics import corrective_lm_metrics, evidence_losses, recall_at_k
from .muon import MuonWithAdamW, weight_decay_groups
from .new_masks import NewMasksCallback
from .refresh import RefreshIndexCallback

__all__ = [
    "CorrectiveLMTrainer",
    "LogComponentLossesCallback",
    "LogEvidenceCallback",
    "MuonWithAdamW",
    "NewMasksCallback",
    "RefreshIndexCallback",
    "StopOnInterruptCallback",
    "corrective_lm_metrics",
    "evidence_losses",
    "evidence_use",
    "global_batch",
    "keep_freed_memory",
    "last_checkpoint",
    "recall_at_k",
    "set_aside_half_checkpoints",
    "weight_decay_groups",
]
