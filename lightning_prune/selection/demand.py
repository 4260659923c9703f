"""What is asked of a selection, and the model's side of it in flat arrays."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from math import ceil

import numpy as np
import numpy.typing as npt

from lightning_prune.graph.groups import Grid, Group
from lightning_prune.tracing.labels import starts

__all__ = ["Case", "Demand", "Pool", "exact", "flatten", "removals"]

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Pool:
    """Groups that rank together.

    Args:
        groups: Indexes into the list of groups.
        ratio: Share of the pool's initial units that shall be gone, in [0, 1). At 0 the groups stay whole.
    """

    groups: tuple[int, ...]
    ratio: float


@dataclass(frozen=True, eq=False)
class Demand:
    """What is asked of a selection.

    Args:
        pools: Each group stands in at most one; a group in none stays whole.
        initial: [n_groups] units before the first step, those of heads that have gone since included.
        locked: [n_units_total] units that must stay.
        max_pruning_ratio: Largest share of its initial units that a group may lose, in [0, 1].
        round_to: Kept counts shall be a multiple of it; None or 1 for no rounding. Heads are not rounded.
    """

    pools: tuple[Pool, ...]
    initial: Ints
    locked: Bools
    max_pruning_ratio: float = 1.0
    round_to: int | None = None


def exact(ratio: float) -> Fraction:
    """Give the fraction that a ratio stands for: 0.1 + 0.2 is 3/10.

    >>> exact(0.1 + 0.2)
    Fraction(3, 10)
    """
    return Fraction(ratio).limit_denominator(10**9)


def removals(ratio: float, n: Fraction | int) -> int:
    """Round ``ratio * n`` to the nearest whole number, a half down, free of float error.

    >>> removals(0.5, 3), removals(0.9, 10), removals(0.1 + 0.2, 5)
    (1, 9, 1)
    """
    return ceil(exact(ratio) * n - Fraction(1, 2))


@dataclass(frozen=True, eq=False)
class Case:
    """Groups, scores, grids and demand in flat arrays.

    Units go by their global id. An entry says that a unit stands in a row; entries are sorted by unit, then
    row. The rows of all grids are numbered through.

    Args:
        groups: The groups.
        grids: The grids.
        demand: The demand.
        group: [n_units] group, or -1 for a unit of none, which stays.
        place: [n_units] order among equal scores.
        score: [n_units] higher = keep.
        pool: [n_groups] pool with a positive ratio, or -1.
        locked: [n_units] units that must stay.
        unit: [n_entries] the unit.
        row: [n_entries] the row.
        times: [n_entries] how often the unit stands in the row.
        grid: [n_rows] grid of a row.
        owner: [n_rows] head that owns the row, or -1.
        fixed: [n_rows] positions that always stay.
        scale: [n_rows] as in the grid.
        offset: [n_rows] as in the grid.
    """

    groups: Sequence[Group]
    grids: Sequence[Grid]
    demand: Demand
    group: Ints
    place: Ints
    score: Floats
    pool: Ints
    locked: Bools
    unit: Ints
    row: Ints
    times: Ints
    grid: Ints
    owner: Ints
    fixed: Ints
    scale: Floats
    offset: Ints

    @property
    def round_to(self) -> int:
        """What kept counts shall be a multiple of, 1 where nothing is asked."""
        return self.demand.round_to or 1

    @cached_property
    def owned(self) -> tuple[Ints, Ints]:
        """Unit and head of every entry whose row a head owns."""
        owner = self.owner[self.row]
        at = np.flatnonzero(owner >= 0)
        return self.unit[at], owner[at]


def flatten(groups: Sequence[Group], scores: Sequence[Floats], grids: Sequence[Grid], demand: Demand) -> Case:
    """Put everything into flat arrays; the arguments are those of ``selection.select``."""
    n_units, n_groups = len(demand.locked), len(groups)
    group, pool = np.full(n_units, -1), np.full(n_groups, -1)
    place, score = np.zeros(n_units, np.int64), np.zeros(n_units)
    start = 0
    for g, each in enumerate(groups):
        group[each.units], score[each.units] = g, scores[g]
        place[each.units] = start + np.arange(each.n_units)
        start += each.n_units
    for p, members in enumerate(demand.pools):
        if members.ratio > 0:
            pool[list(members.groups)] = p
    pool_of_unit = np.append(pool, -1)[group]
    rows = [row for grid in grids for row in grid.rows]
    flat = np.concatenate([np.zeros(0, np.int64), *rows])
    row = np.repeat(np.arange(len(rows)), [len(row) for row in rows])
    stays = (flat < 0) | (np.append(group, -1)[flat] < 0)
    base = max(len(rows), 1)
    entries = np.sort(flat[~stays] * base + row[~stays])
    begins = np.flatnonzero(starts(entries))
    codes, times = entries[begins], np.diff(begins, append=len(entries))
    return Case(
        groups=groups,
        grids=grids,
        demand=demand,
        group=group,
        place=place,
        score=score,
        pool=pool,
        locked=demand.locked | (pool_of_unit < 0),
        unit=codes // base,
        row=codes % base,
        times=times,
        grid=np.repeat(np.arange(len(grids)), [len(grid.rows) for grid in grids]),
        owner=np.array([owner for grid in grids for owner in grid.owners], np.int64),
        fixed=np.bincount(row[stays], minlength=len(rows)),
        scale=np.array([scale for grid in grids for scale in grid.scale], float),
        offset=np.array([offset for grid in grids for offset in grid.offset], np.int64),
    )
