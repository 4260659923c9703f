"""How many units every group had before the first step: ratios are shares of these."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from lightning_prune.graph.analysis import Analysis
from lightning_prune.graph.groups import Group
from lightning_prune.selection.choosing import living_units
from lightning_prune.selection.requests import key

__all__ = ["Census"]

Bools = npt.NDArray[np.bool_]


class Census:
    """Counts by the key of a group, for groups come in another order after a cut.

    Attributes:
        head_dims: Keys of the groups that were head dimensions when they were first seen.
    """

    def __init__(self) -> None:
        self._initial: dict[str, float] = {}
        self.head_dims: frozenset[str] = frozenset()

    def count(self, groups: Iterable[Group]) -> None:
        """Count groups that were not seen before."""
        for group in groups:
            self._initial.setdefault(key(group), float(group.n_units))
            if group.kind == "head_dim":
                self.head_dims |= {key(group)}

    def of(self, groups: Iterable[Group]) -> list[float]:
        """[n_groups] initial counts."""
        return [self._initial[key(group)] for group in groups]

    def forget_heads(self, before: Analysis, keep: Bools) -> None:
        """Count out what has gone with its head: it was not asked to go.

        Args:
            before: The model before the cut.
            keep: [n_units] units that stayed.
        """
        keep = keep.copy()
        for group in before.groups:
            if group.kind != "head":
                keep[group.units] = True
        alive = before.alive(keep)
        for group in before.groups:
            if group.kind != "head":
                self._initial[key(group)] *= float(living_units(before, group, alive).mean())

    def state_dict(self) -> dict[str, Any]:
        """Give plain data."""
        return {"initial": dict(self._initial), "head_dims": sorted(self.head_dims)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take plain data."""
        self._initial = {str(k): float(v) for k, v in state["initial"].items()}
        self.head_dims = frozenset(state["head_dims"])
