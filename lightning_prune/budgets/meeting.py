"""A budget over the steps of a prune: what was there at first, what a step may keep, how it is met."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from lightning_prune.budgets.subject import Subject
from lightning_prune.budgets.table import KINDS
from lightning_prune.options import check_budget
from lightning_prune.selection.choosing import Choice, meet_budget

__all__ = ["Budget"]


class Budget:
    """A share of the dense network to keep.

    Args:
        given: ``{name: share}`` as the user gave it; None or empty for none.

    Attributes:
        reached: Share of the dense cost that the last choice keeps.
    """

    def __init__(self, given: Mapping[str, float] | None) -> None:
        self.name, self.share = next(iter(check_budget(given).items())) if given else ("", 1.0)
        self.reached = 1.0
        self._dense: float | None = None
        self._notebook: dict[str, Any] = {}

    def __bool__(self) -> bool:
        return bool(self.name)

    def meet(self, subject: Subject, choose: Callable[[float], Choice], share: float) -> Choice:
        """Choose so that ``share`` of the dense cost is kept.

        Args:
            subject: The network as it is; the first one asked about is the dense one.
            choose: Ratio in [0, 1) -> choice.
            share: To keep after this step, in (0, 1].

        Raises:
            BudgetError: If it is out of reach; it says what is reachable.
        """
        kind = KINDS[self.name]
        cost = kind.cost(subject, self._notebook)
        now = cost(np.ones(subject.analysis.graph.n_units, bool))
        self._dense = self._dense or now
        dense = self._dense

        def meet(wanted: float) -> Choice:
            return meet_budget(choose, cost, wanted, self.name, tolerance=kind.tolerance)

        if kind.aim is None:
            choice = meet(share * dense)
            reached = cost(choice.keep) / dense
        else:
            choice, reached = kind.aim(subject, meet, now, share * dense, dense)
        self.reached = reached
        if abs(reached - share) <= kind.tolerance:
            return choice
        note = (
            f"budget {self.name}: asked {share:.3f}, the nearest that the structure allows is {reached:.3f}"
        )
        return replace(choice, notes=(*choice.notes, note))

    def state_dict(self) -> dict[str, Any]:
        """Give plain data."""
        return {"dense": self._dense, "reached": self.reached, "notebook": dict(self._notebook)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take plain data."""
        self._dense, self.reached = state["dense"], state["reached"]
        self._notebook = dict(state["notebook"])
