"""What a callback was asked and what it has reached, for the record."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from lightning_prune.reporting.report import Target
from lightning_prune.training.progress import Progress

if TYPE_CHECKING:
    from lightning_prune.training.callback import StructuredPruning

__all__ = ["reached_targets", "settings_of"]

# Costs that are counted on the network; the others are what the budget itself has measured.
_COUNTED = {"params": "parameters", "macs": "macs"}
_WORDS = {"params": "parameters", "macs": "MACs"}
_SETTINGS = (
    "pruning_ratio", "module", "sparse_start_epoch", "start_epoch", "every_n_epochs", "iterative_steps",
    "update_every", "recalibrate_batches",
)  # fmt: skip


def reached_targets(callback: StructuredPruning, progress: Progress) -> tuple[Target, ...]:
    """Hold what was asked against what was reached: a budget, else the ratio of units.

    Args:
        callback: What was asked.
        progress: What is left.
    """
    if not callback.options.budget or callback.pruner is None:
        return (Target("units removed", callback.pruning_ratio, 1 - progress.kept("units")),)
    budget = callback.pruner.budget
    counted = _COUNTED.get(budget.name)
    kept = progress.kept(counted) if counted else budget.reached
    return (Target(f"{_WORDS.get(budget.name, budget.name)} kept", budget.share, kept),)


def settings_of(callback: StructuredPruning) -> dict[str, Any]:
    """List every setting by name, as plain data where it is plain."""
    own: dict[str, Any] = {name: getattr(callback, name) for name in _SETTINGS}
    how = callback.distillation
    own["distillation"] = None if how is None else asdict(how)
    return {**own, "options": callback.options.as_keywords()}
