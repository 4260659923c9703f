"""Scores and a request -> units that stay: heads first, then everything else, then every equation checked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import numpy.typing as npt

from lightning_prune.errors import BudgetError
from lightning_prune.graph.analysis import Analysis
from lightning_prune.graph.groups import Group
from lightning_prune.options import PruningOptions
from lightning_prune.selection.requests import Targets, demand
from lightning_prune.selection.selecting import select
from lightning_prune.tracing.labels import unique

Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]
Floats = npt.NDArray[np.float64]

ATTEMPTS = 6
TOLERANCE = 0.01


@dataclass(frozen=True, eq=False)
class Choice:
    """Units that stay, and what is to be said about it.

    Args:
        keep: [n_units] units that stay.
        notes: What rounding, caps and grids have changed about what was asked.
        held: Units that were asked to go and could not, [n_units], each time with the reason.
    """

    keep: Bools
    notes: tuple[str, ...] = ()
    held: tuple[tuple[Bools, str], ...] = ()


@dataclass(frozen=True, eq=False)
class Chooser:
    """Everything a choice depends on but the ratios.

    Args:
        analysis: Graph and constraints.
        scores: Per group, [n_units], higher = keep.
        initial: [n_groups] counts before the first cut, those of heads that went since left out.
        options: Caps and rounding.
    """

    analysis: Analysis
    scores: Sequence[Floats]
    initial: Sequence[float]
    options: PruningOptions

    @cached_property
    def _heads(self) -> list[int]:
        return [i for i, g in enumerate(self.analysis.groups) if g.kind == "head"]

    def choose(self, goal: Targets, ratios: Sequence[float]) -> Choice:
        """Choose the units that stay.

        Args:
            goal: Scopes and locks.
            ratios: [n_groups] share of the initial units to be gone after this step.
        """
        if not self.analysis.groups:
            return Choice(np.ones(0, bool))
        locked = goal.locked.copy()
        held: list[tuple[Bools, str]] = []
        for _ in range(ATTEMPTS):
            keep, notes = self._once(goal, ratios, locked)
            alive = self.analysis.alive(keep)
            broken = self.analysis.constraints.violations(alive)
            if not broken:
                return Choice(keep, notes, tuple(held))
            axes = [a for v in broken for a in v.axes]
            bound = bound_by(self.analysis, axes) if axes else _bound_by_grids(self.analysis)
            held.append((bound & ~keep, "; ".join(dict.fromkeys(v.text for v in broken[:3]))))
            locked |= bound
            goal = replace(goal, locked=locked)
        note = "sizes in the code could not be brought together, nothing is cut: " + "; ".join(
            v.text for v in broken[:3]
        )
        return Choice(np.ones(self.analysis.graph.n_units, bool), (note,))

    def _once(self, goal: Targets, ratios: Sequence[float], locked: Bools) -> tuple[Bools, tuple[str, ...]]:
        groups, constraints = self.analysis.groups, self.analysis.constraints
        keep = np.ones(self.analysis.graph.n_units, bool)
        notes: tuple[str, ...] = ()
        if any(ratios[i] > 0 for i in self._heads):
            initial = np.array([self._initial(i) for i in self._heads], np.int64)
            request = demand(self._heads, goal, ratios, initial, locked, self.options)
            picked = select(
                [groups[i] for i in self._heads],
                [self.scores[i] for i in self._heads],
                constraints.head_grids(),
                request,
            )
            for i in self._heads:
                keep[groups[i].units] = picked.keep[groups[i].units]
            notes += picked.notes
        alive = self.analysis.alive(keep)
        rest = self._living(alive)
        numbers = [i for i, _, _ in rest]
        initial = np.array(
            [round(self._initial(i) * len(g.units) / groups[i].n_units) for i, g, _ in rest], np.int64
        )
        request = demand(numbers, goal, ratios, initial, locked, self.options)
        picked = select(
            [g for _, g, _ in rest], [s for _, _, s in rest], constraints.cell_grids(alive), request
        )
        for i, g, _ in rest:
            keep[groups[i].units] = False
            keep[g.units] = picked.keep[g.units]
        return keep, notes + picked.notes

    def _initial(self, i: int) -> int:
        return max(round(self.initial[i]), self.analysis.groups[i].n_units)

    def _living(self, alive: Bools) -> list[tuple[int, Group, Floats]]:
        """Groups other than heads, without the units that went with their heads."""
        found = []
        for i, group in enumerate(self.analysis.groups):
            if group.kind == "head":
                continue
            lives = living_units(self.analysis, group, alive)
            if lives.all():
                found.append((i, group, self.scores[i]))
            elif lives.any():
                found.append((i, replace(group, units=group.units[lives], members=()), self.scores[i][lives]))
        return found


def bound_by(analysis: Analysis, axes: Sequence[int]) -> Bools:
    """[n_units] units that any of these axes counts."""
    return _units_of(analysis, [analysis.constraints.axes[a] for a in axes])


def _bound_by_grids(analysis: Analysis) -> Bools:
    """[n_units] units that any grid binds."""
    graph = analysis.graph
    return _units_of(analysis, [graph.classes.of[rows] for rows, _, _ in graph.tracer.ledger.grids])


def _units_of(analysis: Analysis, tables: Sequence[Ints]) -> Bools:
    graph = analysis.graph
    mask = np.zeros(graph.n_units, bool)
    for table in tables:
        _, elements = graph.classes.elements(unique(table))
        units = graph.unit_of[elements]
        mask[units[units >= 0]] = True
    return mask


def living_units(analysis: Analysis, group: Group, alive: Bools) -> Bools:
    """[n_units] False for units of a group all of whose positions went with their heads."""
    member = group.members[0]
    place = next(p for p in analysis.graph.places if (p.tensor, p.dim) == (member.tensor, member.dim))
    lives = np.zeros(group.n_units, bool)
    np.logical_or.at(lives, member.unit, alive[place.classes.ravel()[member.index]])
    return lives


def meet_budget(
    choose: Callable[[float], Choice],
    cost: Callable[[Bools], float],
    wanted: float,
    name: str,
    *,
    tolerance: float = TOLERANCE,
) -> Choice:
    """Find the ratio at which a cost is met, by bisection: cost falls as the ratio rises.

    Args:
        choose: Ratio in [0, 1) -> choice.
        cost: Units that stay -> cost.
        wanted: Cost to meet.
        name: Of the budget, for the message.
        tolerance: Share of the present cost by which it may be missed.

    Raises:
        BudgetError: If even the largest ratio leaves more than is wanted; it says what is reachable.
    """
    low, high = choose(0.0), choose(0.9999)
    most, least = cost(low.keep), cost(high.keep)
    if most <= wanted:
        return low
    if least > wanted + tolerance * most:
        raise BudgetError(
            f"budget {name}: {wanted / most:.3f} of {most:,.8g} was asked, the structure reaches "
            f"{least / most:.3f} at best. Ask for at least {least / most:.3f}, or allow more: fewer "
            "ignored_layers, a higher max_pruning_ratio, prune_num_heads=True."
        )
    best = high if abs(least - wanted) < abs(most - wanted) else low
    a, b = 0.0, 0.9999
    for _ in range(24):
        middle = (a + b) / 2
        choice = choose(middle)
        found = cost(choice.keep)
        if abs(found - wanted) < abs(cost(best.keep) - wanted):
            best = choice
        if abs(found - wanted) <= 0.0005 * most:
            break
        a, b = (middle, b) if found > wanted else (a, middle)
    return best
