"""Selection on drawn cases: what must hold for all of them, and enumeration of everything on small ones."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from itertools import product

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_prune.graph.groups import Grid, Group
from lightning_prune.selection.selecting import Demand, Pool, Selection, select


@dataclass(frozen=True, eq=False)
class Drawn:
    groups: list[Group]
    scores: list[np.ndarray]
    grids: list[Grid]
    demand: Demand


def holds(grid: Grid, keep: np.ndarray) -> bool:
    """Say whether the rows of live heads are equal and not empty."""
    values = set()
    for row, owner, scale, offset in zip(grid.rows, grid.owners, grid.scale, grid.offset, strict=True):
        if owner >= 0 and not keep[owner]:
            continue
        n = sum(1 for unit in row.tolist() if unit < 0 or keep[unit])
        if n == 0:
            return False
        values.add(Fraction(scale) * n + offset)
    return len(values) <= 1


@st.composite
def rows_of(draw: st.DrawFn, units: list[int], n_rows: int) -> list[np.ndarray]:
    """Rows that hold all units, some several times, and are filled up with positions that always stay."""
    rows = [draw(st.lists(st.sampled_from(units), min_size=1, max_size=4)) for _ in range(n_rows)]
    for unit in sorted(set(units).difference(*rows)):
        draw(st.sampled_from(rows)).append(unit)
    longest = max(map(len, rows))
    return [np.array(row + [-1] * (longest - len(row))) for row in rows]


@st.composite
def small(draw: st.DrawFn, *, grids: int) -> Drawn:
    """One pool over up to three groups with at most nine units, and rows drawn at random."""
    sizes = draw(st.lists(st.integers(1, 5), min_size=1, max_size=3).filter(lambda s: sum(s) <= 9))
    ends = np.cumsum([0, *sizes]).tolist()
    groups = [Group(f"g{i}", "channel", np.arange(ends[i], ends[i + 1]), (), "") for i in range(len(sizes))]
    score = st.sampled_from([-np.inf, 0.0, 1.0, 2.0, 3.0])
    scores = [np.array(draw(st.lists(score, min_size=n, max_size=n))) for n in sizes]
    bound = []
    for _ in range(grids):
        n_rows = draw(st.integers(1, 3))
        inside = draw(st.sets(st.sampled_from(groups), min_size=1))  # whole groups, the others stand free
        units = sorted(int(u) for group in inside for u in group.units)
        rows = tuple(draw(rows_of(units, n_rows)))
        bound.append(Grid(rows, np.full(n_rows, -1), (1.0,) * n_rows, (0,) * n_rows, "drawn"))
    pools = (Pool(tuple(range(len(sizes))), draw(st.sampled_from([0.1, 0.25, 0.5, 0.7, 0.9]))),)
    locked = np.array(
        draw(st.lists(st.sampled_from([False, False, False, True]), min_size=ends[-1], max_size=ends[-1]))
    )
    cap = draw(st.sampled_from([1.0, 1.0, 0.5]))
    return Drawn(groups, scores, bound, Demand(pools, np.array(sizes), locked, cap))


def ask(drawn: Drawn) -> Selection:
    return select(drawn.groups, drawn.scores, drawn.grids, drawn.demand)


def respects(drawn: Drawn, keep: np.ndarray) -> bool:
    """Say whether grids, locks, caps and the one unit per group are kept to."""
    cap = Fraction(drawn.demand.max_pruning_ratio)
    lost = [(int((~keep[g.units]).sum()), g.n_units) for g in drawn.groups]
    return (
        bool(keep[drawn.demand.locked].all())
        and all(n < all_ and n <= cap * all_ for n, all_ in lost)
        and all(holds(grid, keep) for grid in drawn.grids)
    )


def best_deviation(drawn: Drawn, asked: int) -> int:
    """Try all subsets: how near to the asked count can one come?"""
    every = (np.array(bits, bool) for bits in product([False, True], repeat=len(drawn.demand.locked)))
    return min(abs(int(keep.sum()) - asked) for keep in every if respects(drawn, keep))


@settings(deadline=None, max_examples=60)
@given(small(grids=1))
def test_no_subset_of_the_units_comes_nearer_to_the_ratio(drawn: Drawn) -> None:
    chosen = ask(drawn)
    n, ratio = len(chosen.keep), Fraction(str(drawn.demand.pools[0].ratio))
    gone = next(k for k in range(n + 1) if abs(k - ratio * n) <= Fraction(1, 2))  # a half goes down
    assert respects(drawn, chosen.keep)
    if len(drawn.groups) > 1:  # one group alone may count per row
        asked = max(n - gone, 1)
        assert abs(int(chosen.keep.sum()) - asked) == best_deviation(drawn, asked)
    assert abs(int(chosen.keep.sum()) - int(chosen.asked.sum())) == best_deviation(
        drawn, int(chosen.asked.sum())
    )


@settings(deadline=None, max_examples=40)
@given(small(grids=3))
def test_several_grids_hold_whatever_is_drawn(drawn: Drawn) -> None:
    assert respects(drawn, ask(drawn).keep)


@settings(deadline=None, max_examples=60)
@given(small(grids=0))
def test_without_grids_the_units_are_those_of_a_plain_loop(drawn: Drawn) -> None:
    demand, n = drawn.demand, len(drawn.demand.locked)
    todo = -(-(Fraction(str(demand.pools[0].ratio)) * n * 2 - 1) // 2)
    keep, score = np.ones(n, bool), np.concatenate(drawn.scores)
    for unit in sorted(range(n), key=lambda u: (score[u], -u)):
        trial = keep.copy()
        trial[unit] = False
        if (~trial).sum() <= todo and respects(drawn, trial):
            keep = trial
    assert ask(drawn).keep.tolist() == keep.tolist()


@st.composite
def vision_transformer(draw: st.DrawFn) -> Drawn:
    """Layers of heads with cells of their own and a hidden width without a grid; rounding or not."""
    layers, heads, dims, hidden = (draw(st.integers(1, top)) for top in (3, 4, 12, 16))
    groups, grids, first = [], [], 0
    for layer in range(layers):
        head = np.arange(first, first + heads)
        cell = head[-1] + 1 + np.arange(heads * dims)
        wide = cell[-1] + 1 + np.arange(hidden)
        first = int(wide[-1]) + 1
        for name, kind, units in (("h", "head", head), ("c", "head_dim", cell), ("m", "channel", wide)):
            groups.append(Group(f"{name}{layer}", kind, units, (), name))  # type: ignore[arg-type]
        grids.append(
            Grid(tuple(cell.reshape(heads, dims)), head, (1.0,) * heads, (0,) * heads, f"layer {layer}")
        )
    ratios = [draw(st.sampled_from([0.0, 0.2, 0.5, 0.75, 0.95])) for _ in range(2)]
    head_pool, rest = tuple(range(0, 3 * layers, 3)), tuple(i for i in range(3 * layers) if i % 3)
    together = draw(st.booleans())
    pools = [Pool(head_pool, ratios[0])] + [
        Pool(p, ratios[1]) for p in ([rest] if together else [(i,) for i in rest])
    ]
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    locked = rng.random(first) < draw(st.sampled_from([0.0, 0.1]))
    scores = [rng.integers(0, 9, g.n_units).astype(float) for g in groups]
    initial = np.array([g.n_units for g in groups])
    demand = Demand(
        tuple(pools), initial, locked, draw(st.sampled_from([1.0, 0.6])), draw(st.sampled_from([None, 4]))
    )
    return Drawn(groups, scores, grids, demand)


@settings(deadline=None, max_examples=60)
@given(vision_transformer())
def test_transformers_keep_every_rule(drawn: Drawn) -> None:
    chosen = ask(drawn)
    assert all(holds(grid, chosen.keep) for grid in drawn.grids)
    for g, group in enumerate(drawn.groups):
        alive = chosen.keep[group.units]
        assert alive.any()
        if group.kind != "head_dim":
            assert (~alive).sum() <= Fraction(str(drawn.demand.max_pruning_ratio)) * group.n_units
            assert alive[drawn.demand.locked[group.units]].all()
            continue
        heads = chosen.keep[drawn.groups[g - 1].units]
        score = drawn.scores[g].reshape(len(heads), -1)
        held = drawn.demand.locked[group.units].reshape(score.shape)
        for live, row, at, lock in zip(heads, alive.reshape(score.shape), score, held, strict=True):
            assert live or not row.any()
            assert not live or row[lock].all()
            lost, left = at[~row & ~lock], at[row & ~lock]
            assert not live or not len(lost) or not len(left) or lost.max() <= left.min()


@settings(deadline=None, max_examples=60)
@given(vision_transformer())
def test_a_second_selection_of_the_same_ratio_removes_nothing(drawn: Drawn) -> None:
    """What is left after the first is a case of its own, with the initial counts of the first."""
    if drawn.demand.round_to or drawn.demand.max_pruning_ratio < 1 or drawn.demand.locked.any():
        return
    first = ask(drawn)
    new = np.cumsum(first.keep) - 1
    left = [g.units[first.keep[g.units]] for g in drawn.groups]
    groups = [Group(g.name, g.kind, new[u], (), "") for g, u in zip(drawn.groups, left, strict=True)]
    scores = [s[first.keep[g.units]] for s, g in zip(drawn.scores, drawn.groups, strict=True)]
    grids = []
    for grid in drawn.grids:
        live = first.keep[grid.owners]
        rows = tuple(new[row[first.keep[row]]] for row, alive in zip(grid.rows, live, strict=True) if alive)
        grids.append(Grid(rows, new[grid.owners[live]], (1.0,) * len(rows), (0,) * len(rows), grid.reason))
    locked = np.zeros(int(first.keep.sum()), bool)
    alone = all(len(pool.groups) == 1 for pool in drawn.demand.pools[1:])
    again = select(groups, scores, grids, Demand(drawn.demand.pools, drawn.demand.initial, locked))
    missing = first.keep.sum() - again.keep.sum()
    steps = sum(len(grid.rows) for grid in grids)
    assert missing == 0 if alone else 0 <= missing <= steps
