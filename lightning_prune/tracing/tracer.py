"""Run the model once under two interceptors and write down what it does to channels."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_prune.tracing.borrowing import Borrowed
from lightning_prune.tracing.integers import Condition, Equation, Expr, Recorder, Size, mentions
from lightning_prune.tracing.labels import Ints, Label, Ledger, Site, Tags, opaque
from lightning_prune.tracing.meta import Shapes
from lightning_prune.tracing.numbers import Numbers

TAGS = "_lightning_prune_tags"
_TORCH = str(Path(torch.__file__).parent)
_HERE = str(Path(__file__).parent.parent)
_NETWORKS = str(Path(__file__).parent.parent / "models")  # those of the demo are models like any other


class Attribute(NamedTuple):
    """A tracked integer attribute: owner module, path within it, value."""

    module: str
    path: str
    value: int


@dataclasses.dataclass(frozen=True)
class Left:
    """A number was computed from a size; it is kept where it is used, or else the size stays."""

    module: str
    expr: Expr
    why: int


@dataclasses.dataclass(frozen=True)
class Work:
    """Multiply-accumulates of one contraction: ``constant`` times the kept counts of ``axes``."""

    constant: int
    axes: tuple[int, ...]
    module: str


@dataclasses.dataclass
class Unknown:
    """An operation without a rule, met by a labelled tensor."""

    op: str
    site: Site


class Tracer:
    """State of one trace. Rules receive it as their first argument."""

    def __init__(self, borrowed: Borrowed | None = None, numbers: Numbers | None = None) -> None:
        self.ledger = Ledger()
        self.numbers = Numbers() if numbers is None else numbers
        self.numbers.site = self.site
        self.attributes: list[Attribute] = []
        self.equations: list[Equation] = []
        self.conditions: dict[tuple[str, Expr, Expr, bool], Condition] = {}
        self.left: list[Left] = []
        self.work: list[Work] = []
        self.unknown: list[Unknown] = []
        self.leaves: dict[str, tuple[Label | None, ...]] = {}
        self.ragged: dict[str, Ints] = {}
        self.stated: dict[tuple[str, str], set[int | None]] = {}
        self.names: dict[int, str] = {}
        self.buffers: set[str] = set()
        self.touched: set[str] = set()
        self.whole: set[str] = set()
        self.modules: list[str] = [""]
        self.module_types: dict[str, str] = {}
        self.dirty: dict[int, torch.UntypedStorage] = {}
        self.inputs: set[tuple[str, int]] = set()
        self.paused = 0
        self.op = ""
        self.borrowed = borrowed or Borrowed()
        self.shapes: Shapes | None = None  # runs what is to be run where floats have no values
        self.stand_in: Tensor | None = None  # asked in the place of floats without values where they are
        self.recorder = Recorder(self._on_value, self._on_equal, self._on_answer)
        self._site: Site | None = None

    # -- tensors -----------------------------------------------------------------------------------

    def tags(self, tensor: Tensor) -> Tags:
        """What is known of a tensor; unknown tensors are opaque."""
        found: Tags | None = tensor.__dict__.get(TAGS)
        if found is None or len(found.dims) != tensor.ndim:
            return opaque(tensor.ndim)
        name = self.names.get(id(tensor))
        if name is not None:
            self.touched.add(name)
            self.whole.add(name)
        if self.dirty and any(found.zero) and tensor.untyped_storage()._cdata in self.dirty:
            return found._replace(zero=(False,) * tensor.ndim)
        return found

    def soil(self, tensor: Tensor) -> None:
        """Removed positions of this memory, whoever looks at it, hold zeros no more."""
        storage = tensor.untyped_storage()
        self.dirty[storage._cdata] = storage  # held, for its address must not be given to another

    def put(self, tensor: Tensor, tags: Tags) -> None:
        """Say what is known of a tensor."""
        if tags.is_opaque:
            tensor.__dict__.pop(TAGS, None)
        else:
            tensor.__dict__[TAGS] = tags

    def why(self, text: str) -> int:
        """Reason number for the operation that runs now."""
        return self.ledger.why(self.site(), text)

    def freeze_tensor(self, tensor: Tensor, text: str) -> None:
        """Every labelled dimension of a tensor stays."""
        tags = self.tags(tensor)
        if not tags.is_opaque:
            why = self.why(text)
            for label in (*tags.dims, *tags.statistics):
                self.ledger.freeze(label, why)

    def freeze(self, label: Label | None, text: str) -> None:
        """A label stays."""
        if label is not None:
            self.ledger.freeze(label, self.why(text))

    # -- integers ----------------------------------------------------------------------------------

    def sized(self, tensor: Tensor, dim: int) -> int:
        """Length of a dimension, tracked where it is labelled."""
        label = self.tags(tensor).dims[dim] if tensor.ndim else None
        size = int(tensor.shape[dim])
        if label is None:
            return size
        return Size(size, ("axis", self.ledger.axis(label, dim)), self.recorder)

    def expect(self, size: Any, label: Label | None, dim: int) -> None:
        """A Python integer was used as the length of a dimension with this label."""
        if isinstance(size, Size):
            if label is None or not label.any():
                self.pin(size, "a size that is counted nowhere must not change")
            else:
                axis = self.ledger.axis(label, dim)
                if size.expr != ("axis", axis):
                    why = self.why("used as a size")
                    self.equations.append(Equation(size.expr, axis, int.__int__(size), why))
        elif label is not None:
            self.freeze(label, f"the literal size {size} is written in the code")

    def pin(self, size: Any, text: str) -> None:
        """The value of a tracked integer must not change."""
        if isinstance(size, Size):
            self._pin(size.expr, int.__int__(size), text)

    def _pin(self, expr: Expr, value: int, text: str) -> None:
        why = self.why(text)
        for axis in mentions(expr, "axis"):
            self.ledger.freeze(self.ledger.axes[axis].rows, why)
        if mentions(expr, "attr"):
            self.equations.append(Equation(expr, None, value, why))

    def _why_here(self, what: str, text: str) -> int:
        """Reason number for what Python does between two operations."""
        return self.ledger.why(Site(what, self.modules[-1], self._line()), text)

    def _on_value(self, expr: Expr, value: int) -> None:
        why = self._why_here("arithmetic", "a value is computed from this size")
        self.left.append(Left(self.modules[-1], expr, why))

    def _on_equal(self, left: Expr, right: Expr, value: int) -> None:
        if left != right:
            why = self.why("compared in the code")
            self.equations.append(Equation(("-", left, right), None, 0, why))

    def _on_answer(self, relation: str, left: Expr, right: Expr, answer: bool) -> None:
        key = (relation, left, right, answer)
        if key not in self.conditions:
            why = self._why_here("comparison", "the code decides by this size")
            self.conditions[key] = Condition(relation, left, right, answer, why)

    # -- where -------------------------------------------------------------------------------------

    def site(self) -> Site:
        """Where the running operation was called from."""
        if self._site is None:
            self._site = Site(self.op, self.modules[-1], self._line())
        return self._site

    def begin(self, op: str, site: Site | None = None) -> None:
        """A new operation starts; without a ``site`` it is where the model's code calls it."""
        self.op = op
        self._site = site

    def _line(self) -> str:
        frame: FrameType | None = sys._getframe(2)
        while frame is not None:
            name = _of_a_network(frame.f_code.co_filename)
            if name is not None:
                return f"{name}:{frame.f_lineno}"
            frame = frame.f_back
        return ""

    def quietly(self, func: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run a function that makes one tensor and writes into none, without following it.

        The caller states the result's tags.
        """
        self.paused += 1
        try:
            return func(*args, **kwargs) if self.shapes is None else self.shapes.whole(func, args, kwargs)
        finally:
            self.paused -= 1

    @contextmanager
    def silently(self) -> Iterator[None]:
        """Run operations without following them; the caller states the result's tags."""
        self.paused += 1
        try:
            yield
        finally:
            self.paused -= 1

    def count_work(self, constant: int, sizes: list[tuple[Label | None, int, int]]) -> None:
        """Note multiply-accumulates: (label, dim, length) per factor."""
        axes = []
        for label, dim, length in sizes:
            if label is None or not label.any():
                constant *= length
            else:
                axes.append(self.ledger.axis(label, dim))
        self.work.append(Work(constant, tuple(axes), self.modules[-1]))


@lru_cache(maxsize=4096)
def _of_a_network(path: str) -> str | None:
    """Name of a file of source code; None if it is torch's or ours."""
    is_ours = path.startswith((_TORCH, _HERE, "<")) and not path.startswith(_NETWORKS)
    return None if is_ours else Path(path).name
