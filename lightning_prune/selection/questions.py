"""What can be asked of a model that was analysed; nothing is touched by any of it."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from lightning_prune.graph.analysis import Analysis
from lightning_prune.graph.couplings import Coupling, couplings
from lightning_prune.graph.explaining import Frozen, explain, list_frozen
from lightning_prune.graph.groups import Group
from lightning_prune.graph.planning import kept_units
from lightning_prune.plan import Plan
from lightning_prune.selection.settling import Settler

__all__ = ["Questions"]

Bools = npt.NDArray[np.bool_]


class Questions:
    """Questions that a pruner answers about its model.

    Args:
        settler: The model as it was last analysed.
    """

    def __init__(self, settler: Settler) -> None:
        self._settler = settler

    def groups(self) -> tuple[Group, ...]:
        """Groups of units that can be removed now."""
        return self.analysis.groups

    @property
    def analysis(self) -> Analysis:
        """The graph of the model as it is."""
        return self._settler.analysis

    @property
    def notes(self) -> tuple[str, ...]:
        """What is to be said of the last plan: what rounding, caps, grids and sizes have changed."""
        return self._settler.notes

    def kept_units(self, plan: Plan) -> tuple[Bools, ...]:
        """Tell per group which units a plan for the model as it is keeps, [n_units] each."""
        keep = kept_units(self.analysis.graph, plan)
        return tuple(keep[group.units] for group in self.groups())

    def couplings(self, group: Group) -> tuple[Coupling, ...]:
        """List the ties between the tensors of a group, each with its reason."""
        return couplings(self.analysis, group)

    def frozen(self) -> tuple[Frozen, ...]:
        """List the channel dimensions of which something stays whatever is asked, each with its reason."""
        return list_frozen(self.analysis)

    def explain(self, name: str, dim: int) -> str:
        """Say why a dimension of a parameter or buffer stays, or with what it is tied.

        Raises:
            OptionError: If there is no such tensor or dimension.
        """
        return explain(self.analysis, name, dim, self._settler.held)

    def unknown_operations(self) -> tuple[str, ...]:
        """Operations without a rule that the trace met; what went into them stays."""
        return tuple(dict.fromkeys(str(u.site) for u in self.analysis.graph.tracer.unknown))
