"""Structured pruning that makes networks really smaller and faster while they train."""

from lightning_prune.checkpoint import (
    PrunableMixin,
    load_from_checkpoint,
    load_pruned_state,
    prepare,
)
from lightning_prune.errors import (
    BudgetError,
    CertificateError,
    CheckpointMismatchError,
    EmptyGroupError,
    OptionError,
    PlanError,
    PruneError,
    StaleGraphError,
    StrategyError,
    TraceError,
    UnsupportedOpError,
)
from lightning_prune.options import PruningOptions
from lightning_prune.plan import Plan
from lightning_prune.pretrained import from_pretrained
from lightning_prune.pruner import GroupNormPruner
from lightning_prune.surgery.applying import apply
from lightning_prune.tracing.meta import floats_on_meta
from lightning_prune.training.callback import StructuredPruning
from lightning_prune.training.checkpointing import PrunedEarlyStopping, PrunedModelCheckpoint
from lightning_prune.training.distilling import Distillation

__version__ = "0.1.0.dev0"
__all__ = [
    "BudgetError",
    "CertificateError",
    "CheckpointMismatchError",
    "Distillation",
    "EmptyGroupError",
    "GroupNormPruner",
    "OptionError",
    "Plan",
    "PlanError",
    "PrunableMixin",
    "PruneError",
    "PrunedEarlyStopping",
    "PrunedModelCheckpoint",
    "PruningOptions",
    "StaleGraphError",
    "StrategyError",
    "StructuredPruning",
    "TraceError",
    "UnsupportedOpError",
    "apply",
    "floats_on_meta",
    "from_pretrained",
    "load_from_checkpoint",
    "load_pruned_state",
    "prepare",
]
