"""Structured pruning that makes networks really smaller and faster while they train."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
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

# Where a public name is found once it is asked for: torch and Lightning take seconds to load, and until the
# first line of a command has run, nobody answers Ctrl-C.
_HOMES = {
    "BudgetError": "errors",
    "CertificateError": "errors",
    "CheckpointMismatchError": "errors",
    "Distillation": "training.distilling",
    "EmptyGroupError": "errors",
    "GroupNormPruner": "pruner",
    "OptionError": "errors",
    "Plan": "plan",
    "PlanError": "errors",
    "PrunableMixin": "checkpoint",
    "PruneError": "errors",
    "PrunedEarlyStopping": "training.checkpointing",
    "PrunedModelCheckpoint": "training.checkpointing",
    "PruningOptions": "options",
    "StaleGraphError": "errors",
    "StrategyError": "errors",
    "StructuredPruning": "training.callback",
    "TraceError": "errors",
    "UnsupportedOpError": "errors",
    "apply": "surgery.applying",
    "floats_on_meta": "tracing.meta",
    "from_pretrained": "pretrained",
    "load_from_checkpoint": "checkpoint",
    "load_pruned_state": "checkpoint",
    "prepare": "checkpoint",
}

if not TYPE_CHECKING:  # a checker that sees it takes any name for one of ours

    def __getattr__(name: str) -> object:
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
