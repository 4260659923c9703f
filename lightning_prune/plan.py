"""Plan: what is kept. Data alone, no tensors, no modules; it goes through JSON unchanged.

Iterating composes plans, resuming replays one, DDP broadcasts one, a dry run prints one.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from operator import index
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from lightning_prune.errors import PlanError

__all__ = ["Cut", "Patch", "Plan", "Rewrite", "Scalar"]

Scalar: TypeAlias = int | float | str | bool | None
FORMAT = 1


@dataclass(frozen=True)
class Cut:
    """Kept indices of one dimension of one parameter or buffer.

    Args:
        tensor: Name as in ``named_parameters()`` / ``named_buffers()``.
        dim: Dimension that is cut, >= 0.
        size: Length of that dimension before the cut.
        keep: Kept indices, [kept], in the order they have afterwards. With ``rows`` > 1 it is a
            concatenation of ``rows`` lists of equal length: dimension 0 of the tensor is then made of
            ``rows`` equal blocks (the groups of a grouped convolution) and block r keeps list r.
        rows: Number of blocks of dimension 0 that keep indices of their own; 1 = all keep the same.
            The blocks are those of dimension 0 *before* the cut.
    """

    tensor: str
    dim: int
    size: int
    keep: tuple[int, ...]
    rows: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.rows <= max(len(self.keep), 1) or len(self.keep) % self.rows:
            raise PlanError(
                f"{self.tensor} dim {self.dim}: {len(self.keep)} kept indices do not divide into "
                f"{self.rows} rows"
            )
        for row in self.by_row():
            if len(set(row)) != len(row) or (row and not 0 <= min(row) <= max(row) < self.size):
                raise PlanError(
                    f"{self.tensor} dim {self.dim}: kept indices must be distinct and in [0, {self.size}), "
                    f"got {row[:8]}"
                )

    @property
    def kept(self) -> int:
        """Length of the dimension after the cut."""
        return len(self.keep) // self.rows

    @cached_property
    def table(self) -> npt.NDArray[np.int64]:
        """``keep`` as an array, [rows, kept], made once; nobody may write into it."""
        return np.array(self.keep, np.int64).reshape(self.rows, self.kept)

    def elsewhere(self, tensor: str, dim: int) -> Cut:
        """Give the cut that keeps the same indices elsewhere; they need no second check.

        >>> Cut("conv.weight", 0, 4, (0, 2)).elsewhere("bn.weight", 0)
        Cut(tensor='bn.weight', dim=0, size=4, keep=(0, 2), rows=1)
        """
        twin: Cut = object.__new__(type(self))
        vars(twin).update(vars(self), tensor=tensor, dim=dim, table=self.table)
        return twin

    def by_row(self) -> list[tuple[int, ...]]:
        """Split ``keep`` into one tuple per row."""
        return [self.keep[r * self.kept : (r + 1) * self.kept] for r in range(self.rows)]


@dataclass(frozen=True)
class Rewrite:
    """A Python value of a module that follows a size: ``num_heads``, ``groups``, ``normalized_shape[0]``.

    Args:
        module: Name as in ``named_modules()``; "" is the model itself.
        path: Attribute, with ``[i]`` for an item and ``.`` for a nested attribute (``config.hidden_size``).
        before: Value it has now; a different one is an error when the plan is applied.
        after: Value it gets.
    """

    module: str
    path: str
    before: Scalar
    after: Scalar


@dataclass(frozen=True)
class Patch:
    """A replacement of how a module computes, needed because a value followed a size.

    Args:
        module: Name as in ``named_modules()``.
        kind: Entry of the table of patches in ``surgery`` (``"sdpa_scale"``, ``"attention"``).
        values: Arguments of that entry, plain numbers.
    """

    module: str
    kind: str
    values: tuple[tuple[str, Scalar], ...] = ()


@dataclass(frozen=True)
class Plan:
    """Everything that one or several prunes keep.

    Args:
        cuts: One entry per cut (tensor, dim), in the order of the model's tensors.
        rewrites: Attribute rewrites.
        patches: Replacements of computations.
        sizes: Shape before, per tensor that is cut: ``{tensor: (d0, d1, ...)}`` as sorted pairs.

    >>> plan = Plan(cuts=(Cut("fc.weight", 0, 4, (0, 2)),), sizes=(("fc.weight", (4, 3)),))
    >>> Plan.from_dict(plan.as_dict()) == plan
    True
    >>> plan.then(Plan(cuts=(Cut("fc.weight", 0, 2, (1,)),), sizes=(("fc.weight", (2, 3)),))).cuts[0].keep
    (2,)
    """

    cuts: tuple[Cut, ...] = ()
    rewrites: tuple[Rewrite, ...] = ()
    patches: tuple[Patch, ...] = ()
    sizes: tuple[tuple[str, tuple[int, ...]], ...] = field(default=())

    def __bool__(self) -> bool:
        return bool(self.cuts or self.rewrites or self.patches)

    def by_tensor(self) -> dict[str, tuple[Cut, ...]]:
        """Group the cuts by tensor, row-wise cuts first (they refer to the blocks before any cut)."""
        table: dict[str, list[Cut]] = {}
        for cut in self.cuts:
            table.setdefault(cut.tensor, []).append(cut)
        return {name: tuple(sorted(cuts, key=lambda c: (c.rows == 1, c.dim))) for name, cuts in table.items()}

    def then(self, later: Plan) -> Plan:
        """Compose: this plan first, ``later`` on its result.

        Returns:
            One plan; applying it to the original equals applying both in turn.

        Raises:
            PlanError: If ``later`` was made for other sizes than this plan leaves.
        """
        return Plan(
            cuts=_compose_cuts(self, later),
            rewrites=_compose_rewrites(self.rewrites, later.rewrites),
            patches=tuple({(p.module, p.kind): p for p in (*self.patches, *later.patches)}.values()),
            sizes=tuple(sorted({**dict(later.sizes), **dict(self.sizes)}.items())),
        )

    def below(self, module: str) -> Plan:
        """Give what the plan says of a submodule, with names relative to it.

        Args:
            module: Name as in ``named_modules()``; "" is the whole.

        >>> Plan(cuts=(Cut("net.fc.bias", 0, 3, (0,)), Cut("fc.bias", 0, 2, (0,)))).below("net").cuts
        (Cut(tensor='fc.bias', dim=0, size=3, keep=(0,), rows=1),)
        """
        inside = f"{module}." if module else ""

        def is_inside(name: str) -> bool:
            return name == module or name.startswith(inside)

        def local(name: str) -> str:
            return name[len(inside) :]

        return Plan(
            cuts=tuple(replace(c, tensor=local(c.tensor)) for c in self.cuts if is_inside(c.tensor)),
            rewrites=tuple(replace(r, module=local(r.module)) for r in self.rewrites if is_inside(r.module)),
            patches=tuple(replace(p, module=local(p.module)) for p in self.patches if is_inside(p.module)),
            sizes=tuple((local(name), shape) for name, shape in self.sizes if is_inside(name)),
        )

    def as_dict(self) -> dict[str, Any]:
        """Give the plan as plain lists, numbers and strings, for JSON and ``weights_only`` checkpoints."""
        return {
            "format": FORMAT,
            "cuts": [[c.tensor, c.dim, c.size, list(c.keep), c.rows] for c in self.cuts],
            "rewrites": [[r.module, r.path, r.before, r.after] for r in self.rewrites],
            "patches": [[p.module, p.kind, [list(v) for v in p.values]] for p in self.patches],
            "sizes": [[name, list(shape)] for name, shape in self.sizes],
        }

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> Plan:
        """Read what ``as_dict`` wrote.

        Raises:
            PlanError: If a key is missing, of a wrong type, or of another format version.
        """
        try:
            if data["format"] != FORMAT:
                raise PlanError(f"the plan has format {data['format']!r}, this version reads {FORMAT}")
            return Plan(
                cuts=tuple(
                    Cut(str(t), index(d), index(s), _ints(k), index(r)) for t, d, s, k, r in data["cuts"]
                ),
                rewrites=tuple(
                    Rewrite(str(m), str(p), _scalar(b), _scalar(a)) for m, p, b, a in data["rewrites"]
                ),
                patches=tuple(
                    Patch(str(m), str(k), tuple((str(n), _scalar(v)) for n, v in vs))
                    for m, k, vs in data["patches"]
                ),
                sizes=tuple((str(n), _ints(s)) for n, s in data["sizes"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            if isinstance(error, PlanError):
                raise
            raise PlanError(f"not a plan: {type(error).__name__}: {error}") from error


def _ints(values: Iterable[Any]) -> tuple[int, ...]:
    return tuple(index(v) for v in values)  # 1.5 is a damage, no place


def _scalar(value: Any) -> Scalar:
    if value is None or isinstance(value, (int, float, str, bool)):
        return value
    raise PlanError(f"expected a plain number or string in a plan, got {type(value).__name__}")


def _compose_cuts(first: Plan, later: Plan) -> tuple[Cut, ...]:
    early = {(c.tensor, c.dim): c for c in first.cuts}
    table = dict(early)
    for cut in later.cuts:
        key = (cut.tensor, cut.dim)
        blocks = early.get((cut.tensor, 0))
        if cut.rows > 1 and blocks is not None:
            table[key] = _compose_rows(early.get(key), cut, blocks)
        else:
            table[key] = _compose_cut(table[key], cut) if key in table else cut
    return tuple(table.values())


def _compose_rows(early: Cut | None, late: Cut, blocks: Cut) -> Cut:
    """Row-wise cut after one that also cut dimension 0: refer the later blocks to that dimension as it was.

    ``blocks`` is the earlier cut of dimension 0. The composed cut has the fewest rows of which none holds
    positions of two later blocks; a row without survivors keeps any list of the right length.
    """
    where = f"{late.tensor} dim {late.dim}"
    if len(blocks.keep) % late.rows:
        raise PlanError(
            f"{where}: {late.rows} rows do not divide the {len(blocks.keep)} positions left of dimension 0"
        )
    step = len(blocks.keep) // late.rows
    owner = {position: i // step for i, position in enumerate(blocks.keep)}
    early = early or Cut(late.tensor, late.dim, late.size, tuple(range(late.size)))
    for rows in (n for n in range(early.rows, blocks.size + 1, early.rows) if blocks.size % n == 0):
        size = blocks.size // rows
        found = [{owner[p] for p in range(r * size, (r + 1) * size) if p in owner} for r in range(rows)]
        if all(len(hit) <= 1 for hit in found):
            keep = tuple(i for hit in found for i in late.by_row()[min(hit, default=0)])
            return _compose_cut(early, Cut(late.tensor, late.dim, late.size, keep, rows))
    raise PlanError(f"{where}: {early.rows} rows do not divide the {blocks.size} positions of dimension 0")


def _compose_cut(a: Cut, b: Cut) -> Cut:
    if a.kept != b.size:
        raise PlanError(
            f"{b.tensor} dim {b.dim}: the later plan starts from {b.size}, the earlier one leaves {a.kept}"
        )
    rows = math.lcm(a.rows, b.rows)
    pairs = zip(_spread(a, rows), _spread(b, rows), strict=True)
    return Cut(a.tensor, a.dim, a.size, tuple(early[i] for early, late in pairs for i in late), rows)


def _spread(cut: Cut, rows: int) -> list[tuple[int, ...]]:
    """Kept indices of the same cut by ``rows`` rows, a multiple of its own."""
    return [row for row in cut.by_row() for _ in range(rows // cut.rows)]


def _compose_rewrites(first: tuple[Rewrite, ...], later: tuple[Rewrite, ...]) -> tuple[Rewrite, ...]:
    table = {(r.module, r.path): r for r in first}
    for r in later:
        old = table.get((r.module, r.path))
        table[r.module, r.path] = Rewrite(r.module, r.path, old.before if old else r.before, r.after)
    return tuple(r for r in table.values() if r.before != r.after)
