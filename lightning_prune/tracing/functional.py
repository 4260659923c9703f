"""Functions as Python calls them: here the integers that sizes are written with are still to be seen."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_prune.tracing.contraction import add_bias, contract, convolve
from lightning_prune.tracing.integers import Size
from lightning_prune.tracing.labels import Label, Tags, along
from lightning_prune.tracing.normalization import group_norm, layer_norm
from lightning_prune.tracing.rules import function_rule, unknown
from lightning_prune.tracing.tracer import Scaled, Tracer

Run = Callable[..., Any]


# -- sizes that Python reads -----------------------------------------------------------------------


@function_rule(Tensor.shape.__get__)
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
    return shape(t, Tensor.shape.__get__, x) if dim is None else t.sized(x, dim % x.ndim)


@function_rule(Tensor.__len__)
def length(t: Tracer, func: Run, x: Tensor) -> Any:
    """``len(x)`` is a plain int: nothing can be followed through it."""
    t.freeze(t.tags(x).dims[0] if x.ndim else None, "its length is read by len()")
    return func(x)


@function_rule(Tensor.numel, torch.numel, Tensor.nelement, Tensor.tolist, Tensor.numpy)
def counted(t: Tracer, func: Run, x: Tensor) -> Any:
    """A plain number of elements: nothing can be followed through it."""
    t.freeze_tensor(x, "its elements are counted or read by Python")
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
        if not isinstance(value, Tensor) and int.__int__(value) != -1 and out.shape[d] > 1:
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
    """A tracked length makes atoms of its own; a literal one stays."""
    out: Tensor = func(x, *args, **kwargs)
    wanted = sizes_of(args) if args else list(kwargs.get("size", kwargs.get("sizes", ())))
    t.begin("expand")
    tags = t.tags(out)
    dims = list(tags.dims)
    grown = []
    for d, value in enumerate(wanted):
        own = d - out.ndim + x.ndim
        is_grown = out.shape[d] > 1 and (own < 0 or x.shape[own] == 1)
        if is_grown and isinstance(value, Size):
            dims[d] = _along(t.ledger.stretch(out.shape[d]), out.ndim, d)
            grown.append(d)
    if grown:
        t.put(out, Tags(tuple(dims), tags.zero, tags.statistics))
    check_sizes(t, wanted, out)
    return out


def _along(atoms: np.ndarray[Any, Any], rank: int, dim: int) -> Label:
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
            dims[d] = _along(t.ledger.new((out.shape[d],)), out.ndim, d)
    t.put(out, Tags(tuple(dims), (False,) * out.ndim))
    t.begin(getattr(func, "__name__", "new"))
    for d, label in enumerate(dims):
        if label is not None:
            t.expect(sizes[d], label, d)
    return out


@function_rule(Tensor.split, torch.split, Tensor.split_with_sizes, torch.split_with_sizes)
def split(t: Tracer, func: Run, x: Tensor, split_size_or_sections: Any = None, dim: int = 0, **kwargs: Any) -> Any:
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
    if any(piece.shape[at] != out[0].shape[at] for piece in out) or not isinstance(chunks, int):
        t.freeze(label, "pieces of unequal length")
        return out
    rows = along(label, at)
    cells = rows.reshape(len(rows) * len(out), -1)
    t.ledger.grids.append((cells, None, t.why("pieces of equal length")))
    return out


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
    used = sum(e.ndim if isinstance(e, Tensor) and e.dtype == torch.bool else 1 for e in entries if e is not None and e is not Ellipsis)
    d = 0
    for entry in entries:
        if entry is Ellipsis:
            d += x.ndim - used
        elif entry is not None:
            if isinstance(entry, slice):
                check_slice(t, x, d, entry)
            d += entry.ndim if isinstance(entry, Tensor) and entry.dtype == torch.bool else 1
    return out


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


# -- composites that are one idea ------------------------------------------------------------------


@function_rule(F.linear)
def linear(t: Tracer, func: Run, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """[..., i] @ [o, i].T + [o]."""
    with t.silently():
        out: Tensor = func(input, weight, bias)
    batch = "abcdefgh"[: input.ndim - 1]
    if weight.ndim == 1:
        contract(t, input, batch + "i", weight, "i", out, batch)
    else:
        contract(t, input, batch + "i", weight, "oi", out, batch + "o")
    if bias is not None:
        add_bias(t, bias, out)
    return out


@function_rule(torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm, Tensor.bmm, torch.mm, Tensor.mm)
def matmul(t: Tracer, func: Run, input: Tensor, other: Tensor, **kwargs: Any) -> Tensor:
    """Batched matrix product with broadcast batch dimensions."""
    with t.silently():
        out: Tensor = func(input, other, **kwargs)
    batch = "abcdefgh"
    width = max(input.ndim, other.ndim) - 2
    left = batch[max(0, width - (input.ndim - 2)) : width] + ("nk" if input.ndim > 1 else "k")
    right = batch[max(0, width - (other.ndim - 2)) : width] + ("km" if other.ndim > 1 else "k")
    result = batch[: max(width, 0)] + ("n" if input.ndim > 1 else "") + ("m" if other.ndim > 1 else "")
    contract(t, input, left, other, right, out, result)
    return out


@function_rule(Tensor.__rmatmul__)
def rmatmul(t: Tracer, func: Run, input: Tensor, other: Tensor) -> Tensor:
    """``other @ input``."""
    return matmul(t, torch.matmul, other, input)


@function_rule(torch.einsum)
def einsum(t: Tracer, func: Run, *args: Any) -> Tensor:
    """Two operands by their letters; more operands, ellipses and repeated letters one step at a time."""
    equation, operands = args[0], list(args[1:])
    if len(operands) == 1 and isinstance(operands[0], (list, tuple)):
        operands = list(operands[0])
    with t.silently():
        out: Tensor = func(*args)
    spec = _spelled(equation, operands, out) if isinstance(equation, str) else None
    if spec is None or len(operands) != 2 or any(len(set(s)) != len(s) for s in spec):
        if any(not t.tags(x).is_opaque for x in operands if isinstance(x, Tensor)):
            unknown(t, [x for x in operands if isinstance(x, Tensor)])
        return out
    contract(t, operands[0], spec[0], operands[1], spec[1], out, spec[2])
    return out


def _spelled(equation: str, operands: Sequence[Tensor], out: Tensor) -> list[str] | None:
    """Write out the arrow and the ellipses.

    >>> _spelled("...i,oi->...o", [torch.ones(2, 3, 4), torch.ones(5, 4)], torch.ones(2, 3, 5))
    ['ABi', 'oi', 'ABo']
    """
    equation = equation.replace(" ", "")
    left, arrow, result = equation.partition("->")
    terms = left.split(",")
    if not arrow:
        letters = [c for c in left if c.isalpha()]
        result = ("..." if "..." in left else "") + "".join(sorted(c for c in set(letters) if letters.count(c) == 1))
    spelled = []
    for term, x in zip([*terms, result], [*operands, out], strict=True):
        hidden = x.ndim - len(term.replace("...", ""))
        pool = "ABCDEFGH"
        widest = max(o.ndim - len(s.replace("...", "")) for s, o in zip(terms, operands, strict=True))
        spelled.append(term.replace("...", pool[widest - hidden : widest] if hidden else ""))
    return spelled if all(len(s) == x.ndim for s, x in zip(spelled, [*operands, out], strict=True)) else None


def _convolution(transposed: bool) -> Callable[..., Tensor]:
    def run(t: Tracer, func: Run, input: Tensor, weight: Tensor, bias: Tensor | None = None, *args: Any, **kwargs: Any) -> Tensor:
        with t.silently():
            out: Tensor = func(input, weight, bias, *args, **kwargs)
        at = 3 if transposed else 3
        groups = kwargs.get("groups", args[at] if len(args) > at else 1)
        rows = convolve(t, input, weight, bias, int.__int__(groups), transposed, out)
        if rows is not None:
            t.expect(groups, rows, 0)
        else:
            t.pin(groups, "a number of groups must not change")
        return out

    return run


function_rule(torch.conv1d, torch.conv2d, torch.conv3d)(_convolution(False))
function_rule(torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d)(_convolution(True))


@function_rule(F.scaled_dot_product_attention)
def attention(
    t: Tracer,
    func: Run,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """softmax(q k^T * scale + mask) v, step by step; a default scale is noted because it follows a size."""
    if scale is None:
        label = t.tags(query).dims[-1]
        if label is not None and label.any():
            axis = t.ledger.axis(label, query.ndim - 1)
            t.scaled.append(Scaled(t.modules[-1], axis, int(query.shape[-1])))
    factor = 1.0 / math.sqrt(query.shape[-1]) if scale is None else scale
    if enable_gqa and key.ndim > 2 and key.shape[-3] != query.shape[-3]:
        times = query.shape[-3] // key.shape[-3]
        key, value = repeat_interleave(t, None, key, times, -3), repeat_interleave(t, None, value, times, -3)
    with t.silently():
        out: Tensor = F.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=factor
        )
    _follow_attention(t, query, key, value, attn_mask, out)
    return out


def _follow_attention(t: Tracer, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, out: Tensor) -> None:
    rank = max(q.ndim, k.ndim)
    batch = "abcdefgh"[: rank - 2]
    scores = torch.empty((*out.shape[:-1], k.shape[-2]), device="meta")
    contract(t, q, batch + "nd", k, batch + "md", scores, batch + "nm")
    if mask is not None:
        from lightning_prune.tracing.pointwise import meet

        dims = meet(t, [scores, mask], [t.tags(scores), t.tags(mask)], scores)
        t.put(scores, Tags(dims, (False,) * rank))
    tags = t.tags(scores)
    t.freeze(tags.dims[-1], "mixed along this dimension")
    t.put(scores, Tags((*tags.dims[:-1], None), (False,) * rank))
    contract(t, scores, batch + "nm", v, batch + "me", out, batch + "ne")


@function_rule(Tensor.repeat_interleave, torch.repeat_interleave)
def repeat_interleave(t: Tracer, func: Any, input: Tensor, repeats: Any, dim: int | None = None, **kwargs: Any) -> Tensor:
    """Every index several times in a row."""
    if isinstance(repeats, Tensor) or dim is None:
        t.freeze_tensor(input, "repeated by a tensor of counts, or flattened")
        out: Tensor = torch.repeat_interleave(input, repeats, dim=dim, **kwargs)
        return out
    at = dim % input.ndim
    with t.silently():
        out = torch.repeat_interleave(input, int.__int__(repeats), dim=dim)
    t.pin(repeats, "a number of repetitions must not change")
    tags = t.tags(input)
    times = int.__int__(repeats)
    dims = tuple(
        None if label is None else (np.repeat(label, times, axis=at) if label.shape[at] > 1 else label) for label in tags.dims
    )
    t.put(out, Tags(dims, tags.zero, tags.statistics))
    return out


@function_rule(F.pixel_shuffle)
def pixel_shuffle(t: Tracer, func: Run, input: Tensor, upscale_factor: int) -> Tensor:
    """[.., C r^2, H, W] -> [.., C, H r, W r]: a result channel goes whole."""
    r = int.__int__(upscale_factor)
    t.pin(upscale_factor, "an upscale factor must not change")
    *batch, c, h, w = input.shape
    at = len(batch)
    split_ = view(t, Tensor.reshape, input, [*batch, -1, r, r, h, w])
    moved = split_.permute(*range(at), at, at + 3, at + 1, at + 4, at + 2)
    return moved.reshape(*batch, c // (r * r), h * r, w * r)


@function_rule(F.pixel_unshuffle)
def pixel_unshuffle(t: Tracer, func: Run, input: Tensor, downscale_factor: int) -> Tensor:
    """[.., C, H r, W r] -> [.., C r^2, H, W]."""
    r = int.__int__(downscale_factor)
    t.pin(downscale_factor, "a downscale factor must not change")
    *batch, c, h, w = input.shape
    at = len(batch)
    split_ = input.reshape(*batch, c, h // r, r, w // r, r)
    moved = split_.permute(*range(at), at, at + 2, at + 4, at + 1, at + 3)
    return moved.reshape(*batch, c * r * r, h // r, w // r)


@function_rule(torch.channel_shuffle)
def channel_shuffle(t: Tracer, func: Run, input: Tensor, groups: int) -> Tensor:
    """[B, g c, ...] -> [B, c g, ...]."""
    g = int.__int__(groups)
    t.pin(groups, "a number of groups must not change")
    b, c, *rest = input.shape
    return view(t, Tensor.reshape, input, [b, g, -1, *rest]).transpose(1, 2).reshape(b, c, *rest)


@function_rule(F.glu)
def glu(t: Tracer, func: Run, input: Tensor, dim: int = -1) -> Tensor:
    """First half times sigmoid of the second."""
    left, right = chunk(t, Tensor.chunk, input, 2, dim)
    return left * right.sigmoid()  # type: ignore[no-any-return]


@function_rule(F.layer_norm, torch.layer_norm, F.rms_norm, torch.rms_norm)
def normalise_last(t: Tracer, func: Run, input: Tensor, normalized_shape: Sequence[Any], weight: Tensor | None = None, *args: Any, **kwargs: Any) -> Tensor:
    """Layer norm and RMS norm: the written shape is checked."""
    bias = kwargs.get("bias", args[0] if args and isinstance(args[0], Tensor) else None)
    with t.silently():
        out: Tensor = func(input, normalized_shape, weight, *args, **kwargs)
    written = list(normalized_shape)
    dims = t.tags(input).dims
    for value, d in zip(reversed(written), reversed(range(input.ndim)), strict=False):
        t.expect(value, dims[d], d)
    layer_norm(t, {"input": input, "normalized_shape": written, "weight": weight, "bias": bias}, out)
    return out


@function_rule(F.group_norm, torch.group_norm)
def normalise_groups(t: Tracer, func: Run, input: Tensor, num_groups: Any, weight: Tensor | None = None, bias: Tensor | None = None, *args: Any, **kwargs: Any) -> Tensor:
    """Group norm: the number of groups stays."""
    with t.silently():
        out: Tensor = func(input, num_groups, weight, bias, *args, **kwargs)
    t.pin(num_groups, "a number of groups must not change")
    group_norm(t, {"input": input, "num_groups": num_groups, "weight": weight, "bias": bias}, out)
    return out


@function_rule(F.instance_norm, torch.instance_norm)
def normalise_instances(t: Tracer, func: Run, input: Tensor, running_mean: Tensor | None = None, running_var: Tensor | None = None, weight: Tensor | None = None, bias: Tensor | None = None, *args: Any, **kwargs: Any) -> Tensor:
    """Instance norm: one mean per channel and sample."""
    from lightning_prune.tracing.normalization import channel_norm

    with t.silently():
        out: Tensor = func(input, running_mean, running_var, weight, bias, *args, **kwargs)
    channel_norm(t, {"input": input, "weight": weight, "bias": bias, "running_mean": running_mean, "running_var": running_var}, out)
    return out


@function_rule(torch.prelu)
def prelu(t: Tracer, func: Run, input: Tensor, weight: Tensor) -> Tensor:
    """A slope per channel."""
    with t.silently():
        out: Tensor = func(input, weight)
    tags = t.tags(input)
    if weight.numel() > 1:
        label, slope = tags.dims[1], t.tags(weight).dims[0]
        if label is None or slope is None:
            t.freeze(label, "has slopes that stay")
            t.freeze(slope, "slopes of a dimension that stays")
        else:
            t.ledger.tie(label, _along(slope.reshape(-1), input.ndim, 1), t.why("slopes of"))
    t.put(out, tags)
    return out


@function_rule(torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu)
def recurrent(t: Tracer, func: Run, *args: Any) -> Any:
    """Recurrent layers stay whole."""
    with t.silently():
        out = func(*args)
    for value in args:
        for x in value if isinstance(value, (list, tuple)) else (value,):
            if isinstance(x, Tensor):
                t.freeze_tensor(x, "recurrent layers stay whole")
    return out
