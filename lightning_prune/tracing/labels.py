"""Provenance labels: which atom every index of every dimension belongs to, and what was learnt about atoms.

Shape legend: a *label* of dimension d of a tensor of rank n is an int64 array of rank n with length
``shape[d]`` along d, and along every other axis either 1 or the full length (then the label is *scoped*
by that axis: each of its positions has its own row of atoms). ``None`` stands for *opaque*.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from operator import itemgetter
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

Ints: TypeAlias = npt.NDArray[np.int64]
Label: TypeAlias = Ints
Dims: TypeAlias = tuple[Label | None, ...]

FROZEN = 0


class Site(NamedTuple):
    """Where something happened: operation, module path, source line."""

    op: str
    module: str
    line: str

    def __str__(self) -> str:
        where = f" in {self.module}" if self.module else ""
        return f"{self.op}{where} ({self.line})" if self.line else f"{self.op}{where}"


class Tags(NamedTuple):
    """What the trace knows of one tensor.

    Args:
        dims: Label per dimension, None = opaque.
        zero: Per dimension, True if the positions of removed units hold zeros.
        statistics: Labels over which a mean or variance in this tensor was taken.
    """

    dims: Dims
    zero: tuple[bool, ...]
    statistics: tuple[Label, ...] = ()

    @property
    def is_opaque(self) -> bool:
        """True if no dimension is labelled and no statistic is carried."""
        for label in self.dims:  # asked for every argument of every operation
            if label is not None:
                return False
        return not self.statistics


@lru_cache(maxsize=64)
def opaque(rank: int) -> Tags:
    """Tags of a tensor about whose dimensions nothing may be removed."""
    return Tags((None,) * rank, (False,) * rank)


def along(label: Label, dim: int) -> Ints:
    """View a label as [rows, n]: one row per position of its scopes."""
    if label.size == label.shape[dim]:
        return label.reshape(1, -1)
    last = dim % label.ndim
    order = (*range(last), *range(last + 1, label.ndim), last)  # np.moveaxis takes its time over this
    return label.transpose(order).reshape(-1, label.shape[dim])


def unique(values: Ints) -> Ints:
    """Different values in ascending order. ``np.unique`` looks them up one by one, which sorting need not.

    >>> unique(np.array([3, 1, 3])).tolist()
    [1, 3]
    """
    ordered = np.sort(values, axis=None)
    return ordered[starts(ordered)]


def starts(ordered: Ints) -> npt.NDArray[np.bool_]:
    """True where a value is another one than that before it.

    >>> starts(np.array([1, 1, 3])).tolist()
    [True, False, True]
    """
    begins = np.ones(len(ordered), bool)
    np.not_equal(ordered[1:], ordered[:-1], out=begins[1:])
    return begins


def distinct(rows: Ints) -> Ints:
    """Different rows in lexicographic order, as ``np.unique(rows, axis=0)`` gives them.

    Rows that differ mostly differ in their first entry; then one column decides.

    >>> distinct(np.array([[3, 1], [2, 9], [3, 1]])).tolist()
    [[2, 9], [3, 1]]
    """
    if len(rows) < 2 or not rows.shape[1]:
        return np.unique(rows, axis=0)
    ordered = rows[np.argsort(rows[:, 0], kind="stable")]
    is_new = np.concatenate([[True], (ordered[1:] != ordered[:-1]).any(axis=1)])
    found = ordered[is_new]
    return found if (found[1:, 0] > found[:-1, 0]).all() else np.unique(rows, axis=0)


def compress(label: Label, dim: int) -> Label:
    """Drop scopes along which the label does not vary."""
    for axis, size in enumerate(label.shape):
        if axis != dim and size > 1:
            first = label.take([0], axis=axis)
            if (label == first).all():
                label = first
    return label


@dataclass(frozen=True)
class Axis:
    """A label whose kept count is spoken of: rows [rows, n] of atoms, and what each was split off with."""

    rows: Ints
    owners: Ints


@dataclass
class Ledger:
    """Everything learnt in one trace: atoms, ties, freezes, ANDs and grids, each with its site."""

    count: int = 1
    sites: list[Site] = field(default_factory=list)
    reasons: list[tuple[int, str]] = field(default_factory=list)
    ties: list[tuple[Ints, Ints, int]] = field(default_factory=list)
    ands: list[tuple[Ints, Ints, Ints]] = field(default_factory=list)
    grids: list[tuple[Ints, Ints | None, int]] = field(default_factory=list)
    depthwise: list[tuple[Ints, Ints]] = field(default_factory=list)
    axes: list[Axis] = field(default_factory=list)
    head_rows: list[Ints] = field(default_factory=list)
    head_cells: list[Ints] = field(default_factory=list)
    narrow_heads: list[Ints] = field(default_factory=list)
    elastic: list[tuple[int, int]] = field(default_factory=list)
    _axis_of: dict[int, int] = field(default_factory=dict)
    _splits: dict[tuple[bytes, int, int], tuple[Ints, Ints]] = field(default_factory=dict)
    _rows: list[tuple[int, Ints]] = field(default_factory=list)
    _reason_of: dict[tuple[Site, str], int] = field(default_factory=dict)

    def why(self, site: Site, text: str) -> int:
        """Store a reason once and give its number."""
        number = self._reason_of.setdefault((site, text), len(self.reasons))
        if number == len(self.reasons):
            self.reasons.append((len(self.sites), text))
            self.sites.append(site)
        return number

    def explain(self, why: int) -> str:
        """One line for a reason."""
        site, text = self.reasons[why]
        return f"{text}: {self.sites[site]}"

    def new(self, shape: Sequence[int]) -> Ints:
        """Make atoms."""
        n = math.prod(shape)
        atoms = np.arange(self.count, self.count + n, dtype=np.int64).reshape(shape)
        self.count += n
        return atoms

    def tie(self, a: Ints, b: Ints, why: int) -> None:
        """Atoms at equal (broadcast) positions live or die together."""
        if a is b:
            return
        left, right = (a, b) if a.shape == b.shape else np.broadcast_arrays(a, b)
        if left.size > 4 * max(a.size, b.size):
            pairs = np.unique(np.stack([left.ravel(), right.ravel()]), axis=1)
            left, right = pairs[0], pairs[1]
        self.ties.append((left.ravel(), right.ravel(), why))

    def freeze(self, atoms: Ints | None, why: int) -> None:
        """Atoms that always stay."""
        if atoms is not None and atoms.any():
            self.ties.append((atoms.ravel(), np.zeros(atoms.size, np.int64), why))

    def collapse(self, label: Label, axes: Iterable[int], why: int) -> Label:
        """Tie a label over some of its scopes and drop these."""
        for axis in axes:
            if label.shape[axis] > 1:
                first = label.take([0], axis=axis)
                self.tie(label, first, why)
                label = first
        return label

    def both(self, row: Ints, cell: Ints) -> Ints:
        """Atoms for "row AND cell", equal pairs sharing one; a frozen side drops out."""
        row, cell = np.broadcast_arrays(row, cell)
        flat_row, flat_cell = row.ravel(), cell.ravel()
        leaf = np.where(flat_row == FROZEN, flat_cell, flat_row)
        real = np.flatnonzero((flat_row != FROZEN) & (flat_cell != FROZEN) & (flat_row != flat_cell))
        if len(real):
            key = flat_row[real] * self.count + flat_cell[real]
            _, first, back = np.unique(key, return_index=True, return_inverse=True)
            atoms = self.new((len(first),))
            self.ands.append((flat_row[real][first], flat_cell[real][first], atoms))
            leaf[real] = atoms[back]
        return leaf.reshape(row.shape)

    def divide(self, flat: Ints, outer: int, why: int) -> tuple[Ints, Ints]:
        """Split [scope..., n] into rows [scope..., outer] and cells [scope..., outer, n / outer]."""
        key = (flat.tobytes(), flat.shape[-1], outer)
        if key not in self._splits:
            leaf = flat.reshape(*flat.shape[:-1], outer, -1)
            row, cell = self.new(leaf.shape[:-1]), self.new(leaf.shape)
            spread = np.broadcast_to(row[..., None], leaf.shape)
            self._rows.append((int(cell.flat[0]), spread.ravel()))
            self.ands.append((spread.ravel(), cell.ravel(), leaf.ravel()))
            self.grids.append((cell.reshape(-1, cell.shape[-1]), row.ravel(), why))
            self._splits[key] = (row, cell)
        row, cell = self._splits[key]
        return row.reshape(*flat.shape[:-1], outer), cell.reshape(*flat.shape[:-1], outer, -1)

    def bind(self, label: Label, dim: int, why: int) -> None:
        """The rows of a scoped label keep equally many."""
        rows = along(label, dim)
        if len(rows) > 1 and rows.shape[1] > 1:
            rows = distinct(rows)
            self.grids.append((rows, self._owners(rows), why))

    def _owners(self, rows: Ints) -> Ints:
        """Row atom that each row of cells was split off with; frozen where there is none."""
        first = rows.max(axis=1)
        owners = np.zeros(len(rows), np.int64)
        begin = bisect_right(self._rows, int(first.min(initial=self.count)), key=itemgetter(0)) - 1
        end = bisect_right(self._rows, int(first.max(initial=0)), key=itemgetter(0))
        for start, row_of in self._rows[max(begin, 0) : end]:  # in order of the atoms, which were made so
            mine = (first >= start) & (first < start + len(row_of))
            owners[mine] = row_of[first[mine] - start]
        return owners

    def axis(self, label: Label, dim: int) -> int:
        """Number of the axis that a label stands for."""
        rows = along(label, dim)
        key = hash((rows.shape, rows.tobytes()))
        if key not in self._axis_of:
            self._axis_of[key] = len(self.axes)
            rows = distinct(rows) if len(rows) > 1 else rows
            self.axes.append(Axis(rows, self._owners(rows)))
        return self._axis_of[key]

    def stretch(self, n: int) -> Ints:
        """Atoms of a dimension that was expanded from length 1; they belong to no parameter."""
        atoms = self.new((n,))
        self.elastic.append((int(atoms[0]), int(atoms[-1])))
        return atoms

    def is_elastic(self, label: Label) -> bool:
        """True if every atom of a label came from an expanded dimension."""
        low, high = int(label.min()), int(label.max())
        return any(a <= low and high <= b for a, b in self.elastic)
