"""What Python integers demand of counts: grids before the selection, attribute values after it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property

import numpy as np
import numpy.typing as npt

from lightning_prune.graph.groups import Graph, Grid
from lightning_prune.tracing.integers import Equation, Expr, evaluate, invert, mentions
from lightning_prune.tracing.labels import FROZEN, unique

Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

Terms = dict[int, Fraction]
"""Linear form: axis -> factor."""


@dataclass(frozen=True)
class Violation:
    """An equation that the selection breaks, and the axes it speaks of."""

    text: str
    axes: tuple[int, ...]


class Constraints:
    """Counts of axes, grids of units and values of attributes of one graph."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.ledger = graph.tracer.ledger
        self.equations: list[Equation] = graph.tracer.equations
        self._of_heads: dict[int, bool] = {}  # axis -> whether it counts heads

    @cached_property
    def axes(self) -> list[Ints]:
        """Classes of every axis, [rows, n]."""
        return [self.graph.classes.of[axis.rows] for axis in self.ledger.axes]

    def living_rows(self, axis: int, alive: Bools) -> Ints:
        """Classes of the rows of an axis whose head lives; all rows if none does."""
        rows = self.axes[axis]
        lives = alive[self.graph.classes.of[self.ledger.axes[axis].owners]]
        return rows[lives] if lives.any() else rows

    @cached_property
    def head_of(self) -> Ints:
        """[n_classes] class of the head that a class dies with, -1 for none, -2 for several."""
        classes = self.graph.classes
        head = np.full(len(classes.row), -1, np.int64)
        position, element = classes.of_all
        is_head = classes.is_head[element] & classes.is_row[element]
        pairs = np.divmod(unique(position[is_head] * len(head) + element[is_head]), max(len(head), 1))
        several = pairs[0][1:][pairs[0][1:] == pairs[0][:-1]]
        head[pairs[0]] = pairs[1]
        head[several] = -2
        return head

    @cached_property
    def unit(self) -> Ints:
        """[n_classes] unit a position of this class dies with beside its head; -1 = it stays."""
        classes = self.graph.classes
        unit = np.full(len(classes.row), -1, np.int64)
        position, element = classes.of_all
        own = ~(classes.is_head[element] & classes.is_row[element]) | (element == position)
        unit[position[own]] = self.graph.unit_of[element[own]]
        return unit

    @cached_property
    def definitions(self) -> dict[int, int]:
        """Attribute -> the axis it is the length of, by the first equation that says so."""
        found: dict[int, int] = {}
        for e in self.equations:
            if e.expr[0] == "attr" and e.target is not None:
                found.setdefault(e.expr[1], e.target)
        return found

    @cached_property
    def spoken_of(self) -> dict[Expr, int]:
        """Expression -> the first axis that it is the length of: equal expressions mean equal lengths."""
        found: dict[Expr, int] = {}
        for e in self.equations:
            if e.target is not None:
                found.setdefault(e.expr, e.target)
        return found

    def counts(self, alive: Bools) -> Callable[[int], int]:
        """Kept length of an axis, given the living classes: that of its fullest row."""
        known: dict[int, int] = {}

        def count(axis: int) -> int:
            if axis not in known:
                known[axis] = int(alive[self.living_rows(axis, alive)].sum(axis=1).max())
            return known[axis]

        return count

    # -- grids -------------------------------------------------------------------------------------

    def head_grids(self) -> list[Grid]:
        """Grids between numbers of heads."""
        everything = np.ones(len(self.graph.classes.row), bool)
        return [g for g in self._grids(everything, heads=True) if g is not None]

    def cell_grids(self, alive: Bools) -> list[Grid]:
        """Grids between everything else, with the heads that live already known.

        Args:
            alive: [n_classes] False for classes that went with their heads.
        """
        return [g for g in self._grids(alive, heads=False) if g is not None]

    def _grids(self, alive: Bools, *, heads: bool) -> Iterator[Grid | None]:
        for rows, owners, why in self.ledger.grids:
            classes = self.graph.classes.of[rows]
            owner = None if owners is None else self.graph.classes.of[owners]
            yield self._ledger_grid(classes, owner, alive, self.ledger.explain(why), heads)
        for e in self.equations:
            yield from self._equation_grids(e, alive, heads)

    def _ledger_grid(
        self, classes: Ints, owner: Ints | None, alive: Bools, reason: str, heads: bool
    ) -> Grid | None:
        if not classes.any() or heads != self._speaks_of_heads(classes):
            return None
        table = classes if owner is None else np.column_stack([owner, classes])
        first = sorted({row.tobytes(): i for i, row in reversed(list(enumerate(table)))}.values())
        classes = classes[first]
        living = np.ones(len(first), bool) if owner is None else alive[owner[first]]
        rows = [self._positions(row, alive) for row, lives in zip(classes, living, strict=True) if lives]
        return _grid(rows, reason)

    def _speaks_of_heads(self, classes: Ints) -> bool:
        """True if every position is a head or stays."""
        live = classes[classes != FROZEN]
        return bool(len(live)) and bool(np.all(self.head_of[live] == live))

    def _counts_heads(self, axis: int) -> bool:
        if axis not in self._of_heads:
            self._of_heads[axis] = self._speaks_of_heads(self.axes[axis])
        return self._of_heads[axis]

    def _positions(self, classes: Ints, alive: Bools) -> Ints:
        """Units of the positions of a row that are not gone with their head."""
        return self.unit[classes[alive[classes]]]

    def _equation_grids(self, e: Equation, alive: Bools, heads: bool) -> Iterator[Grid]:
        left = self._linear(e.expr, alive, heads)
        if left is None and e.target is not None:
            left = self._axis_term(self.spoken_of[e.expr], alive, heads)
        if left is None:
            return
        right: tuple[Terms, Fraction]
        right = ({}, Fraction(e.value)) if e.target is None else self._axis_term(e.target, alive, heads)
        terms, constant = _combine("-", left, right) or ({}, Fraction(0))
        terms = {axis: k for axis, k in terms.items() if k}
        if terms and all(heads == self._counts_heads(a) for a in terms):
            grid = self._balance(terms, constant, alive, self.ledger.explain(e.why))
            if grid is not None:
                yield grid

    def _balance(self, terms: Terms, constant: Fraction, alive: Bools, reason: str) -> Grid | None:
        """Sum of factors * counts + constant == 0 as two rows."""
        scale = int(np.lcm.reduce([k.denominator for k in terms.values()] + [constant.denominator]))
        sides: list[list[Ints]] = [[], []]
        for axis, factor in terms.items():
            k = int(factor * scale)
            rows = self.living_rows(axis, alive)
            row = rows[int(alive[rows].sum(axis=1).argmax())]
            sides[k < 0] += [self._positions(row, alive)] * abs(k)
        fixed = np.full(abs(int(constant * scale)), -1, np.int64)
        sides[constant < 0].append(fixed)
        rows_ = [np.concatenate(side) if side else np.zeros(0, np.int64) for side in sides]
        if len(rows_[0]) != len(rows_[1]):
            return None
        return _grid(rows_, reason)

    def _linear(self, expr: Expr, alive: Bools, heads: bool) -> tuple[Terms, Fraction] | None:
        """An expression as a linear form of axes; None where it is none."""
        head = expr[0]
        if head == "const":
            return {}, Fraction(expr[1])
        if head == "axis":
            return self._axis_term(expr[1], alive, heads)
        if head == "attr":
            axis = self.definitions.get(expr[1])
            return None if axis is None else self._axis_term(axis, alive, heads)
        left, right = self._linear(expr[1], alive, heads), self._linear(expr[2], alive, heads)
        if left is None or right is None:
            return None
        return _combine(head, left, right)

    def _axis_term(self, axis: int, alive: Bools, heads: bool) -> tuple[Terms, Fraction]:
        """Heads are known numbers once they are chosen."""
        if not self.axes[axis].any():
            return {}, Fraction(self.axes[axis].shape[1])
        if not heads and self._counts_heads(axis):
            return {}, Fraction(int(alive[self.axes[axis]].sum(axis=1).max()))
        return {axis: Fraction(1)}, Fraction(0)

    # -- afterwards --------------------------------------------------------------------------------

    def attributes(self, alive: Bools) -> dict[int, int]:
        """Value of every attribute after the cut, solved one by one from the equations."""
        count = self.counts(alive)
        values = {i: a.value for i, a in enumerate(self.graph.tracer.attributes)}
        known: set[int] = set()
        pending = sorted(self.equations, key=lambda e: e.expr[0] != "attr")
        for _ in range(4):
            for e in pending:
                free = mentions(e.expr, "attr") - known
                if len(free) == 1:
                    (one,) = free
                    target = e.value if e.target is None else count(e.target)
                    solved = invert(e.expr, target, count, values, one)
                    if solved is not None:
                        values[one] = solved
                        known.add(one)
        for e in pending:
            self._solve_the_rest(e, count, values, known)
        return values

    def _solve_the_rest(
        self, e: Equation, count: Callable[[int], int], values: dict[int, int], known: set[int]
    ) -> None:
        """Of several unknown attributes the first that can follow alone does; the others stay."""
        target = e.value if e.target is None else count(e.target)
        if evaluate(e.expr, count, values) == target:
            return
        for one in sorted(mentions(e.expr, "attr") - known):
            solved = invert(e.expr, target, count, values, one)
            if solved is not None:
                values[one] = solved
                known.add(one)
                return

    def violations(self, alive: Bools) -> list[Violation]:
        """Equations and grids that do not hold."""
        count, values = self.counts(alive), self.attributes(alive)
        broken = []
        for e in self.equations:
            target = e.value if e.target is None else count(e.target)
            found = evaluate(e.expr, count, values)
            if found != target:
                axes = {*self.axes_of(e.expr), *(() if e.target is None else (e.target,))}
                text = f"{found} where {target} are kept, {self.ledger.explain(e.why)}"
                broken.append(Violation(text, tuple(sorted(axes))))
        for c in self.graph.tracer.conditions.values():
            if not c.holds(count, values):
                text = f"another answer after the cut, {self.ledger.explain(c.why)}"
                broken.append(Violation(text, self.axes_of(c.left) + self.axes_of(c.right)))
        return broken + self._uneven(alive)

    def axes_of(self, expr: Expr) -> tuple[int, ...]:
        """Axes that an expression speaks of, also by the attributes that are their lengths."""
        named = {self.definitions[a] for a in mentions(expr, "attr") if a in self.definitions}
        return tuple(sorted(mentions(expr, "axis") | named))

    def _uneven(self, alive: Bools) -> list[Violation]:
        broken = []
        for rows, owners, why in self.ledger.grids:
            classes = self.graph.classes.of[rows]
            kept = alive[classes].sum(axis=1)
            if owners is not None:
                kept = kept[alive[self.graph.classes.of[owners]]]
            if len(kept) and (kept.min() != kept.max() or kept.min() == 0):
                broken.append(
                    Violation(f"rows keep {kept.min()} to {kept.max()}, {self.ledger.explain(why)}", ())
                )
        return broken


def _combine(
    symbol: str, left: tuple[Terms, Fraction], right: tuple[Terms, Fraction]
) -> tuple[Terms, Fraction] | None:
    if symbol in "+-":
        sign = 1 if symbol == "+" else -1
        terms = dict(left[0])
        for axis, k in right[0].items():
            terms[axis] = terms.get(axis, Fraction(0)) + sign * k
        return terms, left[1] + sign * right[1]
    if symbol == "*" and (not left[0] or not right[0]):
        (terms, constant), factor = (right, left[1]) if not left[0] else (left, right[1])
        return {axis: k * factor for axis, k in terms.items()}, constant * factor
    if symbol == "//" and not right[0] and right[1]:
        return {axis: k / right[1] for axis, k in left[0].items()}, left[1] / right[1]
    return None


def _grid(rows: list[Ints], reason: str) -> Grid | None:
    """A grid, unless it holds by itself."""
    ordered = [np.sort(row) for row in rows]
    distinct = (
        [row for i, row in enumerate(ordered) if not any(np.array_equal(row, o) for o in ordered[:i])]
        if len(rows) < 9
        else rows
    )
    if len(distinct) < 2:
        return None
    n = len(distinct)
    return Grid(tuple(distinct), np.full(n, -1, np.int64), (1.0,) * n, (0,) * n, reason)
