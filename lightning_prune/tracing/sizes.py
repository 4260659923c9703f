"""Python integers as sizes: where the code reads them off a tensor, and where it writes them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_prune.tracing.integers import Equation, Size
from lightning_prune.tracing.labels import Ints, Label, Tags, along
from lightning_prune.tracing.rules import function_rule
from lightning_prune.tracing.tracer import Tracer

Run = Callable[..., Any]


# -- sizes that Python reads -----------------------------------------------------------------------


SHAPE: Any = vars(torch._C.TensorBase)["shape"].__get__


@function_rule(SHAPE)
def shape(t: Tracer, func: Run, x: Tensor) -> Any:
    """``x.shape``: labelled dimensions give tracked integers."""
    if t.tags(x).is_opaque:
        return func(x)
    return torch.Size([t.sized(x, d) for d in range(x.ndim)])


@function_rule(Tensor.size)
def size(t: Tracer, func: Run, x: Tensor, dim: int | None = None) -> Any:
    """``x.size()`` and ``x.size(dim)``."""
    if t.tags(x).is_opaque:
        return func(x) if dim is None else func(x, dim)
    return shape(t, SHAPE, x) if dim is None else t.sized(x, dim % x.ndim)


@function_rule(Tensor.__len__)
def length(t: Tracer, func: Run, x: Tensor) -> Any:
    """``len(x)`` is a plain int: nothing can be followed through it."""
    t.freeze(t.tags(x).dims[0] if x.ndim else None, "its length is read by len()")
    return func(x)


@function_rule(Tensor.numel, torch.numel, Tensor.nelement)
def numel(t: Tracer, func: Run, x: Tensor) -> Any:
    """The product of the sizes, tracked: asking whether a tensor is empty changes nothing."""
    count: Any = int(func(x)) if t.tags(x).is_opaque or not x.ndim else 1
    for d in range(x.ndim if count == 1 else 0):
        count = count * t.sized(x, d)
    return count


@function_rule(Tensor.tolist, Tensor.numpy)
def read(t: Tracer, func: Run, x: Tensor) -> Any:
    """Values leave for Python: nothing can be followed through them."""
    t.freeze_tensor(x, "its elements are read by Python")
    return func(x)


# -- sizes that Python writes ----------------------------------------------------------------------


def sizes_of(args: tuple[Any, ...]) -> list[Any]:
    """``f(2, 3)`` and ``f((2, 3))`` alike."""
    if len(args) == 1 and isinstance(args[0], (tuple, list)):
        return list(args[0])
    return list(args)


@function_rule(Tensor.view, Tensor.reshape, torch.reshape)
def view(t: Tracer, func: Run, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Every size but -1 is checked against the label it is the length of."""
    out: Tensor = func(x, *args, **kwargs)
    wanted = sizes_of(args) if args else list(kwargs.get("shape", kwargs.get("size", ())))
    if wanted and not isinstance(wanted[0], torch.dtype):
        t.begin("reshape")
        check_sizes(t, wanted, out)
    return out


def check_sizes(t: Tracer, wanted: Sequence[Any], out: Tensor) -> None:
    """Sizes written in the code against labels, aligned at the last."""
    dims = t.tags(out).dims
    for value, d in zip(reversed(list(wanted)), reversed(range(out.ndim)), strict=False):
        is_written = not isinstance(value, Tensor) and int.__int__(value) != -1
        if is_written and (out.shape[d] > 1 or isinstance(value, Size)):
            t.expect(value, dims[d], d)


@function_rule(Tensor.unflatten, torch.unflatten)
def unflatten(t: Tracer, func: Run, x: Tensor, dim: int, sizes: Sequence[int]) -> Tensor:
    """Split one dimension."""
    at = dim % x.ndim
    return view(t, Tensor.reshape, x, [*shape_list(x, at), *sizes, *list(x.shape)[at + 1 :]])


def shape_list(x: Tensor, stop: int) -> list[int]:
    """Sizes that are passed on as they are, so that they need no check."""
    return list(x.shape)[:stop]


@function_rule(Tensor.expand, Tensor.broadcast_to, torch.broadcast_to)
def expand(t: Tracer, func: Run, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """A dimension that grows to a literal length stays."""
    out: Tensor = func(x, *args, **kwargs)
    wanted = sizes_of(args) if args else list(kwargs.get("size", kwargs.get("sizes", ())))
    t.begin("expand")
    check_sizes(t, wanted, out)
    return out


def place(atoms: Ints, rank: int, dim: int) -> Label:
    """A row of atoms as the label of one dimension."""
    shape_ = [1] * rank
    shape_[dim] = -1
    return atoms.reshape(shape_)


@function_rule(Tensor.expand_as, Tensor.view_as, Tensor.reshape_as)
def like_other(t: Tracer, func: Run, x: Tensor, other: Tensor) -> Tensor:
    """The sizes of another tensor: where they grow, its labels."""
    with t.silently():
        wanted = list(other.shape)
    if func is not Tensor.expand_as:
        with_sizes = [t.sized(other, d) for d in range(other.ndim)]
        return view(t, Tensor.reshape, x, with_sizes)
    out: Tensor = x.expand(wanted)
    tags, there = t.tags(out), t.tags(other)
    dims = []
    for d, label in enumerate(tags.dims):
        own = d - out.ndim + x.ndim
        grown = out.shape[d] > 1 and (own < 0 or x.shape[own] == 1)
        dims.append(there.dims[d] if grown else label)
        if not grown and label is not None:
            t.expect(t.sized(other, d), label, d)
    t.put(out, Tags(tuple(dims), tags.zero, tags.statistics))
    return out


@function_rule(
    torch.zeros, torch.ones, torch.empty, torch.full, torch.rand, torch.randn,
    Tensor.new_zeros, Tensor.new_ones, Tensor.new_empty, Tensor.new_full,
)  # fmt: skip
def factory(t: Tracer, func: Run, *args: Any, **kwargs: Any) -> Tensor:
    """A new tensor: dimensions of tracked length get atoms of their own."""
    out: Tensor = func(*args, **kwargs)
    sizes = [a for a in args if not isinstance(a, Tensor)]
    if not sizes:
        sizes = [kwargs.get("size", ())]
    if isinstance(sizes[0], (tuple, list)):
        sizes = list(sizes[0])
    dims: list[Label | None] = [None] * out.ndim
    for d, value in enumerate(sizes[: out.ndim]):
        if isinstance(value, Size) and out.shape[d] > 1:
            dims[d] = place(t.ledger.new((out.shape[d],)), out.ndim, d)
    t.put(out, Tags(tuple(dims), (False,) * out.ndim))
    t.begin(getattr(func, "__name__", "new"))
    for d, label in enumerate(dims):
        if label is not None:
            t.expect(sizes[d], label, d)
    return out


@function_rule(Tensor.split, torch.split, Tensor.split_with_sizes, torch.split_with_sizes)
def split(
    t: Tracer, func: Run, x: Tensor, split_size_or_sections: Any = None, dim: int = 0, **kwargs: Any
) -> Any:
    """The length of every piece is checked."""
    sections = kwargs.pop("split_size", kwargs.pop("split_sizes", split_size_or_sections))
    out = func(x, sections, dim)
    t.begin("split")
    at = dim % x.ndim
    lengths = list(sections) if isinstance(sections, (list, tuple)) else [sections] * len(out)
    for piece, wanted in zip(out, lengths, strict=False):
        label = t.tags(piece).dims[at]
        if piece.shape[at] == int.__int__(wanted):
            t.expect(wanted, label, at)
        elif label is not None:
            t.freeze(label, "the rest of an uneven split")
    return out


@function_rule(Tensor.chunk, torch.chunk, Tensor.tensor_split, torch.tensor_split)
def chunk(t: Tracer, func: Run, x: Tensor, chunks: Any = None, dim: int = 0, **kwargs: Any) -> Any:
    """Pieces of equal length stay of equal length."""
    out = func(x, chunks, dim=dim, **kwargs) if chunks is not None else func(x, dim=dim, **kwargs)
    t.begin("chunk")
    at = dim % x.ndim
    label = t.tags(x).dims[at]
    t.pin(chunks, "a number of pieces must not change")
    if label is None:
        return out
    if not isinstance(chunks, int):
        t.freeze(label, "cut at positions that are written in the code")
    elif len({piece.shape[at] for piece in out}) == 1:
        rows = along(label, at)
        cells = np.unique(rows.reshape(len(rows) * len(out), -1), axis=0)
        t.ledger.bind(cells, 1, t.why("pieces of equal length"))
    elif func in (Tensor.chunk, torch.chunk) and len(out) == chunks:
        _shorter_last(t, [t.tags(piece).dims[at] for piece in out], at)
    else:
        t.freeze(label, "pieces of unequal length")
    return out


def _shorter_last(t: Tracer, pieces: Sequence[Label | None], dim: int) -> None:
    """Pieces of one length but for the last, which is shorter by less than there are pieces: it stays so.

    ``chunk`` rounds the length of a piece up, so the lengths come out the same with any number of rounds
    that the last is shorter by.
    """
    *full, last = [piece for piece in pieces if piece is not None]
    why = t.why("pieces of equal length, the last one shorter")
    for piece in full[1:]:
        t.equations.append(_difference(t, full[0], piece, dim, 0, why))
    short = full[0].shape[dim] - last.shape[dim]
    t.equations.append(_difference(t, full[0], last, dim, short, why))


def _difference(t: Tracer, long: Label, short: Label, dim: int, difference: int, why: int) -> Equation:
    expr = ("-", ("axis", t.ledger.axis(long, dim)), ("const", difference))
    return Equation(expr, t.ledger.axis(short, dim), short.shape[dim], why)


@function_rule(Tensor.narrow, torch.narrow)
def narrow(t: Tracer, func: Run, x: Tensor, dim: int, start: Any, length: Any) -> Tensor:
    """Both bounds are checked."""
    out: Tensor = func(x, dim, start, length)
    t.begin("narrow")
    at = dim % x.ndim
    check_slice(t, x, at, slice(start, start + length))
    return out


@function_rule(Tensor.__getitem__)
def getitem(t: Tracer, func: Run, x: Tensor, index: Any) -> Any:
    """Bounds of slices are checked; numbers and tensors are seen by the operations inside."""
    out = func(x, index)
    if t.tags(x).is_opaque:
        return out
    t.begin("index")
    entries = list(index) if isinstance(index, tuple) else [index]
    used = sum(
        e.ndim if isinstance(e, Tensor) and e.dtype == torch.bool else 1
        for e in entries
        if e is not None and e is not Ellipsis
    )
    d = 0
    for entry in entries:
        if entry is Ellipsis:
            d += x.ndim - used
        elif entry is not None:
            if isinstance(entry, slice):
                check_slice(t, x, d, entry)
            d += entry.ndim if isinstance(entry, Tensor) and entry.dtype == torch.bool else 1
    return out


@function_rule(torch.roll, Tensor.roll)
def roll(t: Tracer, func: Run, x: Tensor, shifts: Any, dims: Any = ()) -> Tensor:
    """The end of a dimension comes first: as many must come over the edge, wherever that is then."""
    by = list(shifts) if isinstance(shifts, (tuple, list)) else [shifts]
    along_ = [d % x.ndim for d in (dims if isinstance(dims, (tuple, list)) else [dims])]
    labels = t.tags(x).dims
    if len(along_) != len(by):
        out: Tensor = func(x, shifts, dims)
        return out
    for shift, d in zip(by, along_, strict=True):
        if labels[d] is None or not 0 < abs(shift) < x.shape[d]:
            t.pin(shift, "a number of places must not change")
            x = func(x, shift, d)
        else:
            head, tail = [(slice(None),) * d + (part,) for part in (slice(-shift, None), slice(None, -shift))]
            x = torch.cat(
                [getitem(t, Tensor.__getitem__, x, head), getitem(t, Tensor.__getitem__, x, tail)], d
            )
    return x


def check_slice(t: Tracer, x: Tensor, dim: int, part: slice) -> None:
    """What is counted by a bound: indices before it, or behind it when it is negative."""
    label, n = t.tags(x).dims[dim], int(x.shape[dim])
    for bound, is_stop in ((part.start, False), (part.stop, True)):
        if bound is None:
            continue
        value = int.__int__(bound)
        if label is None:
            t.pin(bound, "a bound of a dimension that stays")
        elif value < 0:
            t.expect(-bound, _part(label, dim, slice(value, None)), dim)
        elif is_stop and value >= n:
            if isinstance(bound, Size) and value == n:
                t.expect(bound, label, dim)
        elif value > 0:
            t.expect(bound, _part(label, dim, slice(0, value)), dim)


def _part(label: Label, dim: int, part: slice) -> Label:
    return label[(slice(None),) * dim + (part,)]
