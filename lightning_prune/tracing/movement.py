"""Data movement: labels go where the data goes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from torch import Tensor

from lightning_prune.tracing.labels import Label, Tags, opaque
from lightning_prune.tracing.rules import Arguments, rule, tensors_in, unknown
from lightning_prune.tracing.shapes import blocks, reshape
from lightning_prune.tracing.tracer import Tracer


@rule(
    "clone",
    "contiguous",
    "detach",
    "alias",
    "lift_fresh",
    "lift",
    "positive",
    "resolve_conj",
    "resolve_neg",
    "dropout",
    "_conj",
    "feature_dropout",
)
def same(t: Tracer, a: Arguments, out: Tensor) -> None:
    """The result has the labels of the first tensor."""
    t.put(out, t.tags(tensors_in(a.values())[0]))


@rule("zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "randn_like")
def like(t: Tracer, a: Arguments, out: Tensor) -> None:
    """A new tensor of the same sizes."""
    tags = t.tags(a["self"])
    t.put(out, Tags(tags.dims, (False,) * out.ndim))


@rule("view", "_unsafe_view", "reshape", "_reshape_alias", "_reshape_copy", "flatten", "unflatten", "view_as")
def view(t: Tracer, a: Arguments, out: Tensor) -> None:
    """Merge and split dimensions."""
    x = a["self"]
    if x.dtype != out.dtype:
        unknown(t, [x])
        return
    tags = t.tags(x)
    dims = reshape(t.ledger, tags.dims, x.shape, out.shape, t.why("reshaped"))
    zero = [False] * out.ndim
    for ins, outs in blocks(x.shape, out.shape) if 0 not in x.shape else ():
        is_zero = all(tags.zero[d] for d in ins if tags.dims[d] is not None)
        for d in outs:
            zero[d] = is_zero
    t.put(out, Tags(dims, tuple(zero), tags.statistics))


def move_axes(
    t: Tracer, x: Tensor, out: Tensor, move: Callable[[Label], Label], order: Sequence[int | None]
) -> None:
    """Axes change places: ``order[j]`` is the input dimension that output dimension j was, None if new."""
    tags = t.tags(x)
    dims = [None if d is None or tags.dims[d] is None else move(tags.dims[d]) for d in order]  # type: ignore[arg-type]
    zero = tuple(d is not None and tags.zero[d] for d in order)
    t.put(out, Tags(tuple(dims), zero, tags.statistics))


@rule("permute")
def permute(t: Tracer, a: Arguments, out: Tensor) -> None:
    """Reorder dimensions."""
    order = [d % out.ndim for d in a["dims"]]
    move_axes(t, a["self"], out, lambda label: label.transpose(order), order)


@rule("transpose", "swapaxes")
def transpose(t: Tracer, a: Arguments, out: Tensor) -> None:
    """Swap two dimensions."""
    order = list(range(out.ndim))
    i, j = a["dim0"] % out.ndim, a["dim1"] % out.ndim
    order[i], order[j] = j, i
    move_axes(t, a["self"], out, lambda label: label.transpose(order), order)


@rule("t", "numpy_T")
def t_(t: Tracer, a: Arguments, out: Tensor) -> None:
    """Reverse two dimensions."""
    order = list(reversed(range(out.ndim)))
    move_axes(t, a["self"], out, lambda label: label.transpose(order), order)


@rule("unsqueeze")
def unsqueeze(t: Tracer, a: Arguments, out: Tensor) -> None:
    """Insert a dimension of length 1."""
    at = a["dim"] % out.ndim
    order: list[int | None] = list(range(out.ndim - 1))
    order.insert(at, None)
    move_axes(t, a["self"], out, lambda label: np.expand_dims(label, at), order)


@rule("squeeze")
def squeeze(t: Tracer, a: Arguments, out: Tensor) -> None:
    """Drop dimensions of length 1."""
    x = a["self"]
    wanted = a.get("dim")
    listed = range(x.ndim) if wanted is None else ([wanted] if isinstance(wanted, int) else wanted)
    gone = tuple(d for d in {d % max(x.ndim, 1) for d in listed} if x.shape[d] == 1)
    order = [d for d in range(x.ndim) if d not in gone]
    move_axes(t, x, out, lambda label: np.squeeze(label, gone), order)


@rule("expand")
def expand(t: Tracer, a: Arguments, out: Tensor) -> None:
    """Repeat dimensions of length 1: they get atoms of their own, which tie where they meet others."""
    x = a["self"]
    new = out.ndim - x.ndim
    order: list[int | None] = [None] * new + list(range(x.ndim))
    move_axes(t, x, out, lambda label: label.reshape((1,) * new + label.shape), order)
    tags = t.tags(out)
    dims = list(tags.dims)
    for d in range(out.ndim):
        if out.shape[d] > 1 and (d < new or x.shape[d - new] == 1):
            shape = [1] * out.ndim
            shape[d] = -1
            dims[d] = t.ledger.stretch(out.shape[d]).reshape(shape)
    t.put(
        out,
        Tags(tuple(dims), tags.zero if len(tags.zero) == out.ndim else (False,) * out.ndim, tags.statistics),
    )


@rule("select")
def select(t: Tracer, a: Arguments, out: Tensor) -> None:
    """One index of a dimension: it and what is counted before it stay."""
    x = a["self"]
    dim, index = a["dim"] % x.ndim, int(a["index"])
    label = t.tags(x).dims[dim]
    if label is not None:
        counted = slice(0, index + 1) if index >= 0 else slice(index, None)
        t.freeze(_sliced(label, dim, counted), "picked by its number")
    order = [d for d in range(x.ndim) if d != dim]
    move_axes(t, x, out, lambda other: np.take(other, index if other.shape[dim] > 1 else 0, axis=dim), order)


@rule("unbind")
def unbind(t: Tracer, a: Arguments, out: Sequence[Tensor]) -> None:
    """Every index of a dimension by itself."""
    for index, piece in enumerate(out):
        select(t, {"self": a["self"], "dim": a["dim"], "index": index}, piece)


def _sliced(label: Label, dim: int, part: slice) -> Label:
    if label.shape[dim] == 1:
        return label
    return label[(slice(None),) * dim + (part,)]


def take_slice(t: Tracer, x: Tensor, out: Tensor, dim: int, part: slice) -> None:
    """A range of a dimension. With a step, blocks of that many neighbours stay together."""
    if 0 in out.shape:
        t.put(out, opaque(out.ndim))
        return
    tags = t.tags(x)
    label, step = tags.dims[dim], part.step or 1
    if label is not None and step > 1:
        _tie_blocks(t, label, dim, step)
    dims = tuple(None if d is None else _sliced(d, dim, part) for d in tags.dims)
    piece = dims[dim]
    if label is not None and piece is not None and piece.size < label.size:
        t.ledger.bind(piece, dim, t.why("a range of every row"))
    t.put(out, Tags(dims, tags.zero, tags.statistics))


def _tie_blocks(t: Tracer, label: Label, dim: int, step: int) -> None:
    if label.shape[dim] % step:
        t.freeze(label, f"every {step}th index is taken from a length that {step} does not divide")
        return
    rows = np.moveaxis(label, dim, -1)
    cells = rows.reshape(*rows.shape[:-1], -1, step)
    t.ledger.tie(cells, cells[..., :1], t.why(f"every {step}th index is taken"))


@rule("slice")
def slice_(t: Tracer, a: Arguments, out: Tensor) -> None:
    """A range of a dimension; its bounds were checked where Python wrote them."""
    x = a["self"]
    take_slice(t, x, out, a["dim"] % x.ndim, slice(a["start"], a["end"], a["step"]))


@rule("narrow")
def narrow(t: Tracer, a: Arguments, out: Tensor) -> None:
    """A range of a dimension, by start and length."""
    x = a["self"]
    take_slice(t, x, out, a["dim"] % x.ndim, slice(a["start"], a["start"] + a["length"]))


@rule("split", "split_with_sizes", "chunk", "unsafe_split", "unsafe_chunk", "tensor_split")
def split(t: Tracer, a: Arguments, out: Sequence[Tensor]) -> None:
    """Consecutive ranges of a dimension."""
    x = a["self"]
    dim, start = (a["dim"] or 0) % x.ndim, 0
    for piece in out:
        take_slice(t, x, piece, dim, slice(start, start + piece.shape[dim]))
        start += piece.shape[dim]


@rule("flip")
def flip(t: Tracer, a: Arguments, out: Tensor) -> None:
    """Reverse: the kept ones reverse alike."""
    turned = {d % out.ndim for d in a["dims"]}
    tags = t.tags(a["self"])
    dims = tuple(
        None if label is None else np.flip(label, tuple(d for d in turned if label.shape[d] > 1))
        for label in tags.dims
    )
    t.put(out, Tags(dims, tags.zero, tags.statistics))


@rule("roll")
def roll(t: Tracer, a: Arguments, out: Tensor) -> None:
    """Rotate: a labelled dimension that is rotated by a number of places stays."""
    rolled = [d % out.ndim for d in a["dims"]] if a["dims"] else list(range(out.ndim))
    pass_through(
        t, a["self"], out, [d for d in range(out.ndim) if d not in rolled], "rolled by a number of places"
    )


@rule("repeat", "tile")
def repeat(t: Tracer, a: Arguments, out: Tensor) -> None:
    """Tile every dimension."""
    x = a["self"]
    tags = t.tags(x)
    new = out.ndim - x.ndim
    dims: list[Label | None] = [None] * new
    for d, label in enumerate(tags.dims):
        if label is None:
            dims.append(None)
            continue
        reps = [1] * new
        for axis, size in enumerate(label.shape):
            reps.append(out.shape[new + axis] // size if axis == d or (size > 1) else 1)
        dims.append(np.tile(label.reshape((1,) * new + label.shape), reps))
    t.put(out, Tags(tuple(dims), (False,) * new + tags.zero, tags.statistics))


@rule("constant_pad_nd")
def pad(t: Tracer, a: Arguments, out: Tensor) -> None:
    """Padded positions of a labelled dimension stay."""
    x, amounts = a["self"], [int(v) for v in a["pad"]]
    tags = t.tags(x)
    widths = [(0, 0)] * out.ndim
    for k in range(len(amounts) // 2):
        widths[out.ndim - 1 - k] = (amounts[2 * k], amounts[2 * k + 1])
    dims: list[Label | None] = []
    for d, label in enumerate(tags.dims):
        if label is None:
            dims.append(None)
        elif min(widths[d]) < 0:
            t.freeze(label, "cropped by a number of places")
            dims.append(None)
        else:
            scoped = t.ledger.collapse(
                label, [k for k in range(out.ndim) if k != d and widths[k] != (0, 0)], t.why("padded")
            )
            dims.append(np.pad(scoped, [widths[k] if k == d else (0, 0) for k in range(out.ndim)]))
    is_zero = a["value"] in (None, 0)
    zero = tuple(z and (is_zero or widths[d] == (0, 0)) for d, z in enumerate(tags.zero))
    t.put(out, Tags(tuple(dims), zero, tags.statistics))


def pass_through(
    t: Tracer, x: Tensor, out: Tensor, kept: Sequence[int], text: str, *, zero: bool = True
) -> None:
    """Dimensions in ``kept`` (same place in the result) carry on; labelled others stay."""
    tags = t.tags(x)
    dims: list[Label | None] = [None] * out.ndim
    for d, label in enumerate(tags.dims):
        if label is None:
            continue
        if d in kept:
            loose = [k for k in range(x.ndim) if k not in kept or (d != k and x.shape[k] != out.shape[k])]
            dims[d] = t.ledger.collapse(label, loose, t.why("the same for all positions"))
        else:
            t.freeze(label, text)
    t.put(out, Tags(tuple(dims), tuple(zero and z for z in tags.zero), tags.statistics))


@rule("as_strided")
def as_strided(t: Tracer, a: Arguments, out: Tensor) -> None:
    """Known only where it changes nothing."""
    x = a["self"]
    if x.shape == out.shape and x.stride() == out.stride():
        t.put(out, t.tags(x))
    else:
        unknown(t, [x])


@rule("diagonal")
def diagonal(t: Tracer, a: Arguments, out: Tensor) -> None:
    """Two dimensions counted in step: both stay."""
    x = a["self"]
    gone = (a["dim1"] % x.ndim, a["dim2"] % x.ndim)
    for d in gone:
        t.freeze(t.tags(x).dims[d], "a diagonal is taken")
    rest = [d for d in range(x.ndim) if d not in gone]
    why = t.why("a diagonal is taken")
    move_axes(
        t,
        x,
        out,
        lambda label: np.squeeze(t.ledger.collapse(label, gone, why), gone)[..., None],
        [*rest, None],
    )


@rule("view_as_complex")
def view_as_complex(t: Tracer, a: Arguments, out: Tensor) -> None:
    """[..., 2] -> [...]: real and imaginary part are told apart by their place."""
    x = a["self"]
    t.freeze(t.tags(x).dims[-1], "real and imaginary part")
    why = t.why("the same for real and imaginary part")
    last = x.ndim - 1
    move_axes(t, x, out, lambda label: t.ledger.collapse(label, [last], why)[..., 0], list(range(last)))


@rule("view_as_real")
def view_as_real(t: Tracer, a: Arguments, out: Tensor) -> None:
    """[...] -> [..., 2]."""
    move_axes(t, a["self"], out, lambda label: label[..., None], [*range(out.ndim - 1), None])
