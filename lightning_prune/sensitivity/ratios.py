"""Curves -> ratios: every part gives as much as costs the metric equally, until a budget is met."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import nn

from lightning_prune.budgets.meeting import Budget
from lightning_prune.budgets.subject import Subject
from lightning_prune.errors import OptionError
from lightning_prune.pruner import GroupNormPruner
from lightning_prune.selection.choosing import Choice
from lightning_prune.sensitivity.curves import Sensitivity
from lightning_prune.sensitivity.parts import Bools, Part, cut_parts, parts_of

__all__ = ["options_of", "ratios_for", "shares_for"]


def ratios_for(
    sensitivity: Sensitivity,
    model: nn.Module,
    example_inputs: Any,
    budget: Mapping[str, float],
    **options: Any,
) -> dict[str, dict[str, float]]:
    """Turn curves into ratios per layer that meet a budget.

    A level of harm is sought at which the budget is met when every part is cut as far as its curve allows at
    that level; if less is asked than costs nothing, every part gives the same part of that. Parts that were
    not measured stay whole.

    Args:
        sensitivity: Measured on this network with these options.
        model: The network; left as it is.
        example_inputs: As for ``GroupNormPruner``.
        budget: ``{name: share}`` as for ``GroupNormPruner``.
        options: As for ``measure_sensitivity``.

    Returns:
        ``{"pruning_ratio_dict": {...}}``, with ``head_pruning_ratio_dict`` where heads were measured; pass it
        on to a pruner with ``pruning_ratio=0`` and the same options.

    Raises:
        OptionError: If nothing that was measured is a part of this network.
        BudgetError: If the budget is out of reach; it says what is reachable.
    """
    return options_of(shares_for(sensitivity, model, example_inputs, budget, **options))


def shares_for(
    sensitivity: Sensitivity,
    model: nn.Module,
    example_inputs: Any,
    budget: Mapping[str, float],
    **options: Any,
) -> dict[Part, float]:
    """Find the share of its units that every part gives for a budget; arguments as for ``ratios_for``."""
    pruner = GroupNormPruner(model, example_inputs, **options)
    parts = [p for p in parts_of(pruner) if p.name in sensitivity.points and p.keys]
    if not parts:
        raise OptionError(
            f"the sensitivity speaks of {list(sensitivity.points)[:4]}, and the network has "
            f"{[p.name for p in parts_of(pruner)][:4]}; measure it on this network"
        )
    finite = [harm for p in parts for _, harm in sensitivity.harm(p.name) if harm < float("inf")]
    most = max(finite, default=0.0) * 1.001 + 1e-12

    def choose(way: float) -> Choice:
        # First what costs nothing, then ever higher levels of harm: finely where little is lost, for there
        # the ratios change most.
        free, level = min(1.0, 2 * way), most * max(0.0, 2 * way - 1) ** 3
        shares = {p: free * sensitivity.ratio_at(p.name, level) for p in parts}
        choice = cut_parts(pruner, shares)
        tried.append((choice.keep, shares))
        return choice

    tried: list[tuple[Bools, dict[Part, float]]] = []
    subject = Subject(
        model, pruner.analysis, example_inputs, pruner.options.forward_fn, lambda way: choose(way).keep
    )
    kept = Budget(budget).meet(subject, choose, next(iter(budget.values())))
    asked = next(shares for keep, shares in tried if np.array_equal(keep, kept.keep))
    return {part: round(_gone(pruner, part, share), 9) for part, share in asked.items()}


def _gone(pruner: GroupNormPruner, part: Part, share: float) -> float:
    """Say what goes, not what is asked: a share at the edge of rounding would tip over in YAML.

    The part alone is cut for it, since the dims of a head that goes are not dims that its share has taken.
    """
    keep = cut_parts(pruner, {part: share}).keep
    return 1 - float(keep[pruner.groups()[part.groups[0]].units].mean())


def options_of(shares: Mapping[Part, float]) -> dict[str, dict[str, float]]:
    """Write shares as options of a pruner.

    Args:
        shares: Share of its units that every part gives, in [0, 1).
    """
    table: dict[str, dict[str, float]] = {"pruning_ratio_dict": {}}
    for part, share in shares.items():
        option = "head_pruning_ratio_dict" if part.heads else "pruning_ratio_dict"
        table.setdefault(option, {}).update(dict.fromkeys(part.keys, share))
    return table
