"""What a budget is counted on: a network, its graph, and ways to a smaller one."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import nn

from lightning_prune.graph.analysis import Analysis
from lightning_prune.plan import Plan
from lightning_prune.selection.choosing import Choice
from lightning_prune.surgery.applying import apply

__all__ = ["Aim", "Bools", "CostOf", "Subject"]

Bools = npt.NDArray[np.bool_]
CostOf = Callable[[Bools], float]


@dataclass(frozen=True, eq=False)
class Subject:
    """A network as it is, and the choices that a prune may make of it.

    Args:
        model: The network; never changed.
        analysis: Of it.
        inputs: Example inputs.
        forward_fn: ``forward_fn(model, inputs)`` replaces the call.
        choose: Ratio in [0, 1) -> units that stay, as the options rank and bind them.
    """

    model: nn.Module
    analysis: Analysis
    inputs: Any
    forward_fn: Callable[[nn.Module, Any], Any] | None
    choose: Callable[[float], Bools]

    def plan(self, keep: Bools) -> Plan:
        """Give what a choice keeps as a plan."""
        return self.analysis.plan(keep)[0]

    def pruned(self, keep: Bools) -> nn.Module:
        """Give a copy, cut as a prune would cut the network."""
        model, plan = copy.deepcopy(self.model), self.plan(keep)
        if plan:
            apply(model, plan)
        return model


# (subject, cost -> choice, cost now, cost wanted, dense cost) -> (choice, share of the dense cost)
Aim = Callable[[Subject, Callable[[float], Choice], float, float, float], tuple[Choice, float]]
