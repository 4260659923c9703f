"""Builders of selections written by hand: groups, grids, and a run that checks every grid."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lightning_prune.graph.groups import Grid, Group
from lightning_prune.selection.selecting import Demand, Pool, Selection, select, violations


def make_group(name: str, first: int, n: int, kind: str = "channel") -> Group:
    return Group(name, kind, np.arange(first, first + n), (), name)  # type: ignore[arg-type]


def make_grid(
    rows: Sequence[Sequence[int]],
    owners: Sequence[int] | None = None,
    scale: Sequence[float] | None = None,
    offset: Sequence[int] | None = None,
    reason: str = "view in net.py:7",
) -> Grid:
    return Grid(
        tuple(np.array(row, np.int64) for row in rows),
        np.array(owners if owners is not None else [-1] * len(rows), np.int64),
        tuple(scale or [1.0] * len(rows)),
        tuple(offset or [0] * len(rows)),
        reason,
    )


def falling(group: Group) -> np.ndarray:
    """Scores under which the first units are the best."""
    return -np.arange(group.n_units, dtype=float)


def run(
    groups: Sequence[Group],
    pools: Sequence[tuple[Sequence[int], float]],
    grids: Sequence[Grid] = (),
    scores: Sequence[Sequence[float]] | None = None,
    *,
    locked: Sequence[int] = (),
    initial: Sequence[int] | None = None,
    cap: float = 1.0,
    round_to: int | None = None,
) -> Selection:
    held = np.zeros(sum(g.n_units for g in groups), bool)
    held[list(locked)] = True
    demand = Demand(
        tuple(Pool(tuple(members), ratio) for members, ratio in pools),
        np.array(initial if initial is not None else [g.n_units for g in groups]),
        held,
        cap,
        round_to,
    )
    given = [falling(g) for g in groups] if scores is None else [np.array(s, float) for s in scores]
    chosen = select(groups, given, grids, demand)
    assert violations(groups, grids, chosen.keep) == ()
    assert chosen.reached.tolist() == [int(chosen.keep[g.units].sum()) for g in groups]
    return chosen


def kept(chosen: Selection) -> list[int]:
    return np.flatnonzero(chosen.keep).tolist()
