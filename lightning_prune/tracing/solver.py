"""Ties, freezes and ANDs -> classes of atoms, and which removable classes each atom depends on.

``A = R AND C``: leaf A lives while its row R and its cell C live. Classes are closed under congruence:
(R,C)=(R',C') => A=A'; A=A' and R=R' => C=C' (and symmetrically); R frozen => A=C; C frozen => A=R;
A frozen => R and C frozen; equal row content => same R.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from lightning_prune.tracing.labels import FROZEN, Ints, Ledger, starts, unique


@dataclass(frozen=True)
class Classes:
    """The solved trace.

    Args:
        of: [n_atoms] class of every atom; 0 = frozen.
        row: [n_classes] class of the row, for classes that are "row AND cell"; -1 for others.
        cell: [n_classes] class of the cell, likewise.
        is_row: [n_classes] True if the class is the row of something.
        is_head: [n_classes] True for rows that are attention heads.
        is_head_dim: [n_classes] True for cells of attention heads.
    """

    of: Ints
    row: Ints
    cell: Ints
    is_row: np.ndarray
    is_head: np.ndarray
    is_head_dim: np.ndarray

    @cached_property
    def of_all(self) -> tuple[Ints, Ints]:
        """Elements of every class, which is its own position."""
        return self.elements(np.arange(len(self.row)))

    def elements(self, classes: Ints) -> tuple[Ints, Ints]:
        """Removable classes that each of ``classes`` depends on, as pairs (position, class)."""
        position = np.flatnonzero(classes != FROZEN)
        current = classes[position]
        done_p: list[Ints] = []
        done_c: list[Ints] = []
        while len(current):
            nested = self.row[current] >= 0
            done_p.append(position[~nested])
            done_c.append(current[~nested])
            p, c = position[nested], current[nested]
            position = np.concatenate([p, p])
            current = np.concatenate([self.row[c], self.cell[c]])
        if not done_p:
            return np.zeros(0, np.int64), np.zeros(0, np.int64)
        return np.concatenate(done_p), np.concatenate(done_c)


class _Union:
    """Class of every atom, merged by batches of pairs."""

    def __init__(self, count: int, left: Ints, right: Ints) -> None:
        self.of = _components(count, left, right)

    @property
    def count(self) -> int:
        """Number of classes."""
        return int(self.of.max()) + 1

    def merge(self, left: Ints, right: Ints) -> None:
        self.of = _components(self.count, left, right)[self.of]


def _components(count: int, left: Ints, right: Ints) -> Ints:
    """Connected components of a graph, numbered by their smallest nodes; node 0 is FROZEN.

    Every root is hung below the smallest root that it has an edge to, all paths are cut short, and edges
    within one tree are dropped, until there are none (Liu and Tarjan, "Simple concurrent labeling algorithms
    for connected components", SOSA 2019).
    """
    of = np.arange(count, dtype=np.int64)
    while len(left):
        np.minimum.at(of, left, right)  # of the two the smaller one is not changed by this
        np.minimum.at(of, right, left)
        while not np.array_equal(up := of[of], of):
            of = up
        left, right = of[left], of[right]
        apart = left != right
        left, right = left[apart], right[apart]
    is_root = of == np.arange(count)
    return (np.cumsum(is_root) - 1)[of]


def solve(ledger: Ledger, lone: Ints | None = None) -> Classes:
    """Close all ties and freezes under congruence.

    Args:
        ledger: What the trace learnt.
        lone: Atoms to freeze on top of it.
    """
    extra = np.zeros(0, np.int64) if lone is None else lone
    left = np.concatenate([np.zeros(1, np.int64), extra, *(a for a, _, _ in ledger.ties)])
    right = np.concatenate([np.zeros(1 + len(extra), np.int64), *(b for _, b, _ in ledger.ties)])
    union = _Union(ledger.count, left, right)
    empty = np.zeros(0, np.int64)
    ands = [np.concatenate([empty, *(part[k] for part in ledger.ands)]) for k in range(3)]
    heads = np.concatenate([empty, *ledger.head_rows])
    _close(union, ands)
    while _freeze_rows(union, ands, heads):
        _close(union, ands)
    return _classes(ledger, union, ands, heads)


def _close(union: _Union, ands: list[Ints]) -> None:
    """Apply the congruence rules until nothing changes."""
    while True:
        row, cell, leaf = (union.of[part] for part in ands)
        pairs = [
            *_equal_where(row, cell, leaf),
            *_equal_where(leaf, row, cell),
            *_equal_where(leaf, cell, row),
            (leaf[row == FROZEN], cell[row == FROZEN]),
            (leaf[cell == FROZEN], row[cell == FROZEN]),
            (row[leaf == FROZEN], leaf[leaf == FROZEN]),
            (cell[leaf == FROZEN], leaf[leaf == FROZEN]),
            *_degenerate(row, cell, leaf),
            *_equal_rows(row, leaf),
        ]
        left = np.concatenate([a for a, _ in pairs])
        right = np.concatenate([b for _, b in pairs])
        real = left != right
        if not real.any():
            return
        union.merge(left[real], right[real])


def _equal_where(a: Ints, b: Ints, value: Ints) -> list[tuple[Ints, Ints]]:
    """Values at equal pairs (a, b) are equal."""
    if not len(a):
        return []
    key = a * (int(b.max()) + 1) + b
    order = np.argsort(key)
    same = ~starts(key[order])[1:]
    ordered = value[order]
    return [(ordered[1:][same], ordered[:-1][same])]


def _degenerate(row: Ints, cell: Ints, leaf: Ints) -> list[tuple[Ints, Ints]]:
    """A leaf that is its own row or cell: all three are one."""
    own = (leaf == row) | (leaf == cell) | (row == cell)
    own &= (leaf != FROZEN) & (row != FROZEN) & (cell != FROZEN)
    return [(leaf[own], row[own]), (leaf[own], cell[own])]


def _equal_rows(row: Ints, leaf: Ints) -> list[tuple[Ints, Ints]]:
    """Rows made of the same leaves are one row."""
    live = (row != FROZEN) & (leaf != FROZEN)
    if not live.any():
        return []
    width = int(leaf.max()) + 1
    rows, leaves = np.divmod(unique(row[live] * width + leaf[live]), width)
    weight = np.random.default_rng(0).integers(1, 2**62, width)
    start = np.flatnonzero(starts(rows))
    content = np.add.reduceat(weight[leaves], start)
    order = np.argsort(content)
    same = ~starts(content[order])[1:]
    rows = rows[start][order]
    return [(rows[1:][same], rows[:-1][same])]


def _heads_first(union: _Union, ands: list[Ints], heads: Ints) -> tuple[Ints, Ints, Ints, np.ndarray]:
    """Row, cell and leaf classes, and which classes are heads: of the two sides of an AND a head is the row.

    Merging ``(.., dims, heads)`` makes the dimensions rows and the heads cells, although it is the heads that
    the dimensions were split off with.
    """
    row, cell, leaf = (union.of[part] for part in ands)
    is_head = np.zeros(union.count, bool)
    is_head[union.of[heads]] = True
    turned = is_head[cell] & ~is_head[row]
    return np.where(turned, cell, row), np.where(turned, row, cell), leaf, is_head


def _freeze_rows(union: _Union, ands: list[Ints], heads: Ints) -> bool:
    """Rows that are not heads stay whole, and so do rows of a leaf that is cut two ways."""
    row, cell, leaf, is_head = _heads_first(union, ands, heads)
    live = (row != FROZEN) & (cell != FROZEN) & (leaf != FROZEN)
    is_twice = np.zeros(union.count, bool)
    is_twice[_cut_two_ways(row[live], cell[live], leaf[live])] = True
    targets = unique(row[live & (~is_head[row] | is_twice[leaf])])
    if not len(targets):
        return False
    union.merge(targets, np.zeros(len(targets), np.int64))
    return True


def _cut_two_ways(row: Ints, cell: Ints, leaf: Ints) -> Ints:
    """Leaves that are not the same row AND cell everywhere."""
    order = np.argsort(leaf)
    row, cell, leaf = row[order], cell[order], leaf[order]
    return leaf[1:][~starts(leaf)[1:] & (starts(row)[1:] | starts(cell)[1:])]


def _classes(ledger: Ledger, union: _Union, ands: list[Ints], heads: Ints) -> Classes:
    row, cell, leaf, _ = _heads_first(union, ands, heads)
    count = union.count
    row_of, cell_of = np.full(count, -1, np.int64), np.full(count, -1, np.int64)
    live = (row != FROZEN) & (cell != FROZEN) & (leaf != FROZEN) & (leaf != row) & (leaf != cell)
    row_of[leaf[live]], cell_of[leaf[live]] = row[live], cell[live]
    flags = [np.zeros(count, bool) for _ in range(3)]
    flags[0][row[live]] = True
    flags[1][union.of[heads]] = True
    if ledger.narrow_heads:  # heads of one dimension have no cells and are rows of nothing
        flags[0][union.of[np.concatenate(ledger.narrow_heads)]] = True
    flags[2][cell[live & flags[1][row]]] = True
    if ledger.head_cells:
        flags[2][union.of[np.concatenate(ledger.head_cells)]] = True
    for flag in flags:
        flag[FROZEN] = False
    _break_cycles(row_of, cell_of)
    return Classes(union.of, row_of, cell_of, *flags)


def _break_cycles(row: Ints, cell: Ints) -> None:
    """A class that depends on itself through its rows or cells counts as removable by itself."""
    current = np.flatnonzero(row >= 0)
    reach = current.copy()
    origin = current.copy()
    for _ in range(8):
        nested = row[reach] >= 0
        origin = np.concatenate([origin[nested], origin[nested]])
        reach = np.concatenate([row[reach[nested]], cell[reach[nested]]])
        loops = unique(origin[reach == origin])
        row[loops] = cell[loops] = -1
        if not len(reach):
            return
    row[origin] = cell[origin] = -1
