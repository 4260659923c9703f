"""How many units of each block stay, where rows must keep equally many positions.

A *block* is a set of units that stand in the same rows equally often: which of them stay never matters
to a row, only how many. So counts come first, one whole number per block. Blocks that share a grid form
a *component*; components are solved apart. Almost all have one degree of freedom and are solved by
trying every count; the rest are small integer programmes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import block_array, coo_array, csr_array
from scipy.sparse.csgraph import connected_components

__all__ = ["Component", "Wish", "candidates", "components", "partition", "solve"]

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]

# Nodes of the search tree, not seconds: every rank and every machine must come to the same counts.
NODE_LIMIT = 20_000
TOLERANCE = 1e-6


@dataclass(frozen=True, eq=False)
class Component:
    """Blocks and rows that bind one another; rows and blocks are numbered from 0 within the component.

    Args:
        blocks: [n_blocks] the blocks' numbers in the whole partition.
        size: [n_blocks] units per block.
        floor: [n_blocks] units of it that must stay.
        row: [n_entries] row of an entry.
        block: [n_entries] block of an entry.
        times: [n_entries] positions that each unit of the block has in the row.
        grid: [n_rows] number of the grid; rows of one grid must come out equal.
        fixed: [n_rows] positions that stay whatever happens.
        scale: [n_rows] factor of the kept positions.
        offset: [n_rows] added to the scaled positions.
    """

    blocks: Ints
    size: Ints
    floor: Ints
    row: Ints
    block: Ints
    times: Ints
    grid: Ints
    fixed: Ints
    scale: Floats
    offset: Ints

    def degree(self) -> Ints:
        """[n_rows] blocks in each row."""
        return np.bincount(self.row, minlength=len(self.grid))

    def positions(self, counts: Ints) -> Ints:
        """Count kept positions: [..., n_blocks] counts -> [..., n_rows]."""
        part = csr_array((self.times, (self.block, self.row)), shape=(len(self.size), len(self.grid)))
        return np.asarray(counts @ part + self.fixed, dtype=np.int64)

    def holds(self, counts: Ints) -> Bools:
        """Say for each [..., n_blocks] counts whether all rows of a grid agree and none is empty."""
        kept = self.positions(counts)
        value = self.scale * kept + self.offset
        _, first, which = np.unique(self.grid, return_index=True, return_inverse=True)
        equal = np.abs(value - value[..., first[which]]) < TOLERANCE
        return np.asarray((equal & (kept >= 1)).all(axis=-1))


@dataclass(frozen=True, eq=False)
class Wish:
    """What a component is asked for.

    Args:
        counts: [n_blocks] units that should stay.
        pool: [n_blocks] blocks with equal values may make up for one another.
        group: [n_blocks] group of the block.
        least: Group -> units of it that the component must keep.
        slack: Pool -> units that other blocks can stay for it, and can go for it, at no loss.
        round_to: The positions of ``rounded`` rows shall be a multiple of it, >= 1.
        rounded: [n_rows] rows that ``round_to`` applies to.
    """

    counts: Ints
    pool: Ints
    group: Ints
    least: dict[int, int]
    slack: dict[int, tuple[int, int]]
    round_to: int
    rounded: Bools

    def allowed(self, counts: Ints, floor: Ints) -> Bools:
        """Say for each [n, n_blocks] counts whether locked units and the groups' least are kept."""
        good = (counts >= floor).all(axis=1)
        for group, least in self.least.items():
            good &= counts[:, self.group == group].sum(axis=1) >= least
        return np.asarray(good)


def partition(group: Ints, unit: Ints, row: Ints, times: Ints) -> Ints:
    """Number the blocks: units of one group with the same rows, equally often in each.

    Args:
        group: [n_units] group of each unit.
        unit: [n_entries] unit of an entry; entries are sorted by unit, then row.
        row: [n_entries] row the unit stands in.
        times: [n_entries] how often.

    Returns:
        [n_units] block numbers, 0 to n_blocks - 1.

    >>> two = partition(np.array([0, 0, 0]), np.array([0, 1, 2]), np.array([4, 4, 5]), np.array([1, 1, 1]))
    >>> two.tolist()
    [0, 0, 1]
    """
    codes, code = np.unique(row * (times.max(initial=0) + 1) + times, return_inverse=True)
    degree = np.bincount(unit, minlength=len(group))
    start = np.cumsum(degree) - degree
    block = np.empty(len(group), np.int64)
    n_blocks = 0
    for d in np.unique(degree):
        units = np.flatnonzero(degree == d)
        label = group[units]
        for j in range(d):
            label = np.unique(label * len(codes) + code[start[units] + j], return_inverse=True)[1]
        labels, label = np.unique(label, return_inverse=True)
        block[units] = n_blocks + label
        n_blocks += len(labels)
    return block


def components(whole: Component) -> list[Component]:
    """Split what is not bound together; blocks without a row are left out.

    Args:
        whole: All blocks and rows as if they were one component.
    """
    n_blocks, n_grids = len(whole.size), int(whole.grid.max(initial=-1)) + 1
    n = n_blocks + n_grids
    links = coo_array(
        (np.ones(len(whole.row)), (whole.block, n_blocks + whole.grid[whole.row])), shape=(n, n)
    )
    label = connected_components(links, directed=False)[1]
    used = np.unique(label[whole.block])
    return [_component(whole, block, row, entry) for block, row, entry in zip(
        _split(label[:n_blocks], used),
        _split(label[n_blocks + whole.grid], used),
        _split(label[whole.block], used),
        strict=True,
    )]  # fmt: skip


def _split(label: Ints, used: Ints) -> list[Ints]:
    order = np.argsort(label, kind="stable")
    left, right = (np.searchsorted(label[order], used, side=side) for side in ("left", "right"))
    return [order[a:b] for a, b in zip(left, right, strict=True)]


def _component(whole: Component, block: Ints, row: Ints, entry: Ints) -> Component:
    return Component(
        blocks=whole.blocks[block],
        size=whole.size[block],
        floor=whole.floor[block],
        row=np.searchsorted(row, whole.row[entry]),
        block=np.searchsorted(block, whole.block[entry]),
        times=whole.times[entry],
        grid=whole.grid[row],
        fixed=whole.fixed[row],
        scale=whole.scale[row],
        offset=whole.offset[row],
    )


def candidates(part: Component) -> Ints | None:
    """List every count that the rows permit, where one number decides all.

    Rows with one block say what follows from what; rows with several are looked at afterwards. So the dims
    of heads are listed although one row holds them all: another one ties each head to the next.

    Returns:
        [n, n_blocks], ascending, not regarding ``floor``; None where rows with several blocks leave more
        than one degree of freedom. Empty where no count fits, not even keeping everything.
    """
    slope = part.scale[part.row] * part.times
    shift = part.scale * part.fixed + part.offset
    if (part.degree() == 1).all() and np.ptp(slope) == 0 and np.ptp(shift) == 0:
        lowest = 0 if part.fixed.min() > 0 else 1  # no block can be empty where its row would be
        shared = np.arange(lowest, part.size.min() + 1)
        return np.repeat(shared[:, None], len(part.size), axis=1)
    counts = _follow(part)
    if counts is None:
        return None
    counts = counts[((counts >= 0) & (counts <= part.size)).all(axis=1)]
    return counts[part.holds(counts)]


def _follow(part: Component) -> Ints | None:
    """Give the counts of all blocks for every count of block 0, where they are whole numbers.

    None where rows with one block, or none, do not lead from block 0 to every other.
    """
    plain = part.degree() < 2
    rows_of_grid: dict[int, list[int]] = {}
    for r in np.flatnonzero(plain).tolist():
        rows_of_grid.setdefault(int(part.grid[r]), []).append(r)
    entries = (a[plain[part.row]].tolist() for a in (part.row, part.block, part.times))
    entry_of_row = {r: (b, m) for r, b, m in zip(*entries, strict=True)}
    rows_of_block: dict[int, list[int]] = {}
    for r, (b, _) in entry_of_row.items():
        rows_of_block.setdefault(b, []).append(r)
    scale = [Fraction(s).limit_denominator(10**6) for s in part.scale]
    line = {0: (Fraction(1), Fraction(0))}  # block -> (slope, shift) in terms of the count of block 0
    seen, todo = set(), [0]
    while todo:
        block = todo.pop()
        for r in rows_of_block.get(block, ()):
            if (g := int(part.grid[r])) in seen:
                continue
            seen.add(g)
            m, (slope, shift) = entry_of_row[r][1], line[block]
            top, base = (
                scale[r] * m * slope,
                scale[r] * (m * shift + int(part.fixed[r])) + int(part.offset[r]),
            )
            for other in rows_of_grid[g]:
                b, m = entry_of_row.get(other, (0, 1))  # block 0 is known: nothing follows from a fixed row
                if b not in line:
                    rest = (base - int(part.offset[other])) / scale[other] - int(part.fixed[other])
                    line[b] = (top / scale[other] / m, rest / m)
                    todo.append(b)
    return _whole(line, int(part.size[0])) if len(line) == len(part.size) else None


def _whole(line: dict[int, tuple[Fraction, Fraction]], most: int) -> Ints:
    """Evaluate the lines at 0 to ``most`` and leave out what is not a whole number everywhere."""
    at = np.arange(most + 1)
    columns, good = [], np.ones(most + 1, bool)
    for block in range(len(line)):
        slope, shift = line[block]
        bottom = slope.denominator * shift.denominator
        top = at * (slope.numerator * shift.denominator) + shift.numerator * slope.denominator
        good &= top % bottom == 0
        columns.append(top // bottom)
    return np.stack(columns, axis=1)[good]


def solve(part: Component, wish: Wish, listed: Ints | None) -> Ints | None:
    """Choose the counts of a component: nearest to the wish, then rounded.

    Nearest means, in this order: the least deviation of the pools' sums beyond what other blocks can make
    up for, the least deviation of the blocks, the most units kept.

    Args:
        part: The component.
        wish: What is asked.
        listed: What ``candidates(part)`` gave.

    Returns:
        [n_blocks] counts, or None where none fits, not even keeping everything.
    """
    whole = part.size if part.holds(part.size) else None
    if (part.positions(part.size)[wish.rounded] < wish.round_to).any():
        return whole
    if listed is None:
        counts = _programme(part, wish)
        return whole if counts is None else counts
    counts = listed[wish.allowed(listed, part.floor)]
    if not len(counts):
        return None
    best = _nearest(counts, wish)
    return _round(part, wish, listed, counts, best) if wish.rounded.any() else np.asarray(counts[best])


def _nearest(counts: Ints, wish: Wish) -> int:
    away = np.zeros(len(counts), np.int64)
    for pool in np.unique(wish.pool):
        mine = wish.pool == pool
        off = counts[:, mine].sum(axis=1) - wish.counts[mine].sum()
        stay, go = wish.slack.get(int(pool), (0, 0))
        away += np.maximum(0, off - go) + np.maximum(0, -off - stay)
    spread = np.square(counts - wish.counts).sum(axis=1)
    return int(np.lexsort((-counts.sum(axis=1), spread, away))[0])


def _round(part: Component, wish: Wish, listed: Ints, counts: Ints, best: int) -> Ints:
    """Take the largest multiple up to the best; the smallest above it if there is none; else the best."""

    def multiple(table: Ints) -> Bools:
        kept = part.positions(table)[:, wish.rounded]
        return np.asarray((kept % wish.round_to == 0).all(axis=1) & (kept > 0).all(axis=1))

    fits = np.flatnonzero(multiple(counts))
    below, above = fits[fits <= best], fits[fits > best]
    if len(below):
        return np.asarray(counts[below[-1]])
    forbidden = bool((multiple(listed) & (listed.sum(axis=1) <= counts[best].sum())).any())
    if forbidden:  # only a cap or a lock speaks against a smaller multiple: they do not undo the cut
        above = above[(counts[above] < part.size).any(axis=1)]
    return np.asarray(counts[above[0]] if len(above) else counts[best])


def _programme(part: Component, wish: Wish) -> Ints | None:
    free = _integers(part, wish, part.size, rounded=False)
    if free is None or not wish.rounded.any():
        return free
    near = replace(wish, counts=free, slack={})
    below = _integers(part, near, free, rounded=True)
    if below is not None:
        return below
    above = _integers(part, near, part.size, rounded=True)
    return above if above is not None and (above < part.size).any() else free


def _integers(part: Component, wish: Wish, most: Ints, *, rounded: bool) -> Ints | None:
    """Solve the counts as an integer programme.

    Unknowns: counts [n_blocks], deviation of each block [n_blocks] and of each pool, and the multiple of
    each rounded row. One deviation of a pool outweighs all of the blocks.
    """
    pools, pool = np.unique(wish.pool, return_inverse=True)
    rows = np.flatnonzero(wish.rounded) if rounded else np.zeros(0, np.int64)
    n, total = len(part.size), int(part.size.sum()) + 1
    widths = [n, n, len(pools), len(rows)]
    low, high = np.repeat([0, 0, 0, 1], widths), np.full(sum(widths), total)
    low[:n], high[:n] = part.floor, most
    high[n + n + len(pools) :] = part.positions(part.size).max()
    answer = milp(
        np.repeat([-0.25 / total, 1.0, float(total), 0.0], widths),
        integrality=np.repeat([1, 0, 0, 1], widths),
        bounds=Bounds(low, high),
        constraints=_constraints(part, wish, pool, rows),
        # HiGHS' presolve calls some of these programmes infeasible and never ends on others.
        options={"presolve": False, "mip_rel_gap": 0.0, "node_limit": NODE_LIMIT},
    )
    if answer.x is None:
        return None
    counts = np.rint(answer.x[:n]).astype(np.int64)
    good = part.holds(counts[None])[0] and wish.allowed(counts[None], part.floor)[0]
    return counts if good else None


def _constraints(part: Component, wish: Wish, pool: Ints, rows: Ints) -> LinearConstraint:
    """Write the lines of the programme, one kind per line of the table, over the four kinds of unknowns."""
    shape = (len(part.grid), len(part.size))
    kept = csr_array((part.times.astype(float), (part.row, part.block)), shape=shape)
    sums, own, step = _indicator(pool).T, _indicator(np.arange(len(pool))), _indicator(np.arange(len(rows)))
    each = _indicator(np.arange(sums.shape[0]))
    least = csr_array(np.array([wish.group == g for g in wish.least], float).reshape(-1, len(pool)))
    _, first, which = np.unique(part.grid, return_index=True, return_inverse=True)
    scaled, level = csr_array(kept.multiply(part.scale[:, None])), part.scale * part.fixed + part.offset
    apart, equal = scaled - scaled[first[which]], level[first[which]] - level
    asked, asked_sum, still = wish.counts, sums @ wish.counts, -part.fixed[rows]
    stay, go = np.array([wish.slack.get(int(p), (0, 0)) for p in np.unique(wish.pool)]).T
    lines: list[tuple[list[Any], Any, Any]] = [
        ([apart, None, None, None], equal, equal),
        ([kept, None, None, None], 1 - part.fixed, np.inf),
        ([own, own, None, None], asked, np.inf),
        ([own, -own, None, None], -np.inf, asked),
        ([sums, None, each, None], asked_sum - stay, np.inf),
        ([sums, None, -each, None], -np.inf, asked_sum + go),
        ([least, None, None, None], np.array(list(wish.least.values()), float), np.inf),
        ([kept[rows], None, None, -wish.round_to * step], still, still),
    ]
    heights = [blocks[0].shape[0] for blocks, _, _ in lines]
    low = [np.broadcast_to(low, h) for (_, low, _), h in zip(lines, heights, strict=True)]
    high = [np.broadcast_to(high, h) for (_, _, high), h in zip(lines, heights, strict=True)]
    matrix = csr_array(block_array([blocks for blocks, _, _ in lines]))
    matrix.eliminate_zeros()
    some = np.flatnonzero(np.diff(matrix.indptr))  # an empty line can make HiGHS stop at a poor answer
    return LinearConstraint(matrix[some], np.concatenate(low)[some], np.concatenate(high)[some])


def _indicator(which: Ints) -> csr_array:
    """[n, n_values] matrix with a one at (i, which[i])."""
    n = len(which)
    return csr_array((np.ones(n), (np.arange(n), which)), shape=(n, int(which.max(initial=-1)) + 1))
