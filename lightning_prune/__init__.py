"""Structured pruning that makes networks really smaller and faster while they train."""

from lightning_prune.plan import Plan
from lightning_prune.pruner import GroupNormPruner
from lightning_prune.surgery import apply

__version__ = "0.1.0.dev0"
__all__ = ["GroupNormPruner", "Plan", "apply"]
