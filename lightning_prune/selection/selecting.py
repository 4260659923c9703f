"""Scores, ratios and grids -> which units stay: counts first, then the best units of each block.

Heads are decided before everything else, because a head that goes takes its rows out of the comparison.
Within a phase each pool ranks its units, which gives a wish per block (``phase.py``); components of
blocks bound by grids are then solved one after another for counts near the wish (``counts.py``), each
passing on to the rest of its pools what it removed too much or too little. Units without a grid come last.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lightning_prune.graph.groups import Grid, Group
from lightning_prune.selection.demand import Case, Demand, Pool, flatten, removals
from lightning_prune.selection.phase import KEPT, Phase, Progress, StuckError

__all__ = ["Demand", "Pool", "Selection", "removals", "select", "violations"]

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Selection:
    """Which units stay.

    Args:
        keep: [n_units_total] by global unit id.
        asked: [n_groups] units that the ratio asks to keep, among those whose head lives.
        reached: [n_groups] units that are kept.
        notes: Sentences on where and why the two differ.
    """

    keep: Bools
    asked: Ints
    reached: Ints
    notes: tuple[str, ...]


def select(
    groups: Sequence[Group], scores: Sequence[Floats], grids: Sequence[Grid], demand: Demand
) -> Selection:
    """Choose the units that stay.

    Args:
        groups: All groups of the graph.
        scores: Per group, [n_units], higher = keep; -inf goes first. Of equal scores the lower index stays.
        grids: Rows that must keep equally many positions.
        demand: Ratios, caps, locks and rounding.

    Returns:
        A selection under which every grid holds that held before. Where a grid or a cap forbids the asked
        count, the nearest possible one; in the worst case all of what is bound together stays.
        Components are solved in turn, so a pool with several of them may miss its sum by part of a step.

    >>> group = Group("fc:0", "channel", np.arange(4), (), "")
    >>> demand = Demand((Pool((0,), 0.5),), np.array([4]), np.zeros(4, bool))
    >>> select([group], [np.array([3.0, 1.0, 2.0, 2.0])], [], demand).keep.tolist()
    [True, False, True, False]
    """
    case = flatten(groups, scores, grids, demand)
    locked = case.locked
    while True:
        try:
            return _attempt(case, locked)
        except StuckError as stuck:  # each time more heads are held, so this ends
            locked = locked | stuck.hold


def violations(groups: Sequence[Group], grids: Sequence[Grid], keep: Bools) -> tuple[str, ...]:
    """Name every grid that ``keep`` breaks; an independent check, row by row.

    Args:
        groups: All groups of the graph, for the names.
        grids: The grids.
        keep: [n_units_total] by global unit id.

    >>> group = Group("qkv:0", "channel", np.arange(4), (), "")
    >>> rows = (np.array([0, 1]), np.array([2, 3]))
    >>> halves = Grid(rows, np.array([-1, -1]), (1.0, 1.0), (0, 0), "chunk in glu.py:7")
    >>> violations([group], [halves], np.array([True, False, True, True]))[0]
    'chunk in glu.py:7: all rows must keep the same and at least one, got row 0 (qkv:0) 1, row 1 (qkv:0) 2'
    """
    name = {int(u): g.name for g in groups for u in g.units}
    broken = []
    for grid in grids:
        kept, values = [], []
        for i, row in enumerate(grid.rows):
            if grid.owners[i] >= 0 and not keep[grid.owners[i]]:
                continue
            n = int(np.count_nonzero((row < 0) | keep[row]))
            of = next((name[int(u)] for u in row if int(u) in name), "fixed positions")
            kept.append(f"row {i} ({of}) {n}")
            values.append(grid.scale[i] * n + grid.offset[i] if n else np.nan)
        if not all(abs(v - values[0]) < 1e-6 for v in values):
            broken.append(
                f"{grid.reason}: all rows must keep the same and at least one, got {', '.join(kept)}"
            )
    return tuple(broken)


def _attempt(case: Case, locked: Bools) -> Selection:
    run = Progress(case, locked)
    for now in _phases(case):
        Phase(run, now).decide()
        run.bury()
    kept = run.state == KEPT
    reached = np.array([np.count_nonzero(kept[g.units]) for g in case.groups], np.int64)
    return Selection(kept, run.asked, reached, tuple(_sentence(*note) for note in run.notes.items()))


def _sentence(heading: str, details: list[str]) -> str:
    more = f"; and {len(details) - 4} more" if len(details) > 4 else ""
    return f"{heading}: {'; '.join(details[:4])}{more}"


def _phases(case: Case) -> list[Bools]:
    """Masks of groups [n_groups]: owners of owners first, then owners, then all others."""
    owner = case.owner[case.row]
    above = np.unique(np.stack([case.group[owner], case.group[case.unit]], axis=1)[owner >= 0], axis=0)
    left = np.array([g.kind == "head" for g in case.groups], bool)
    left[above[:, 0]] = True
    rest, phases = ~left, []
    while left.any():
        ready = left.copy()
        ready[above[left[above[:, 0]], 1]] = False
        ready = ready if ready.any() else left.copy()
        phases.append(ready)
        left &= ~ready
    return [*phases, rest]
