"""Functions as Python calls them that are one idea, although they run as several operations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import index
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_prune.tracing.contraction import add_bias, contract
from lightning_prune.tracing.convolution import convolve
from lightning_prune.tracing.labels import Tags
from lightning_prune.tracing.normalization import channel_norm, group_norm, layer_norm
from lightning_prune.tracing.pointwise import meet
from lightning_prune.tracing.rules import function_rule, unknown
from lightning_prune.tracing.sizes import chunk, place, view
from lightning_prune.tracing.tracer import Tracer

Run = Callable[..., Any]


@function_rule(F.linear)
def linear(t: Tracer, func: Run, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """[..., i] @ [o, i].T + [o]."""
    out: Tensor = t.quietly(func, input, weight, bias)
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
    out: Tensor = t.quietly(func, input, other, **kwargs)
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
    out: Tensor = t.quietly(func, *args)
    spec = _spelled(equation, operands, out) if isinstance(equation, str) else None
    if spec is None or len(operands) < 2 or any(len(set(s)) != len(s) for s in spec):
        unknown(t, [x for x in operands if isinstance(x, Tensor)])
        return out
    left, letters = operands[0], spec[0]
    for i in range(1, len(operands)):
        later = "".join(spec[i + 1 :])
        result = (
            spec[-1]
            if i == len(operands) - 1
            else "".join(c for c in dict.fromkeys(letters + spec[i]) if c in later)
        )
        with t.silently():
            size = {
                **dict(zip(letters, left.shape, strict=True)),
                **dict(zip(spec[i], operands[i].shape, strict=True)),
            }
            target = out if result is spec[-1] else torch.empty([size[c] for c in result], device="meta")
        contract(t, left, letters, operands[i], spec[i], target, result)
        left, letters = target, result
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
        result = ("..." if "..." in left else "") + "".join(
            sorted(c for c in set(letters) if letters.count(c) == 1)
        )
    spelled = []
    for term, x in zip([*terms, result], [*operands, out], strict=True):
        hidden = x.ndim - len(term.replace("...", ""))
        pool = "ABCDEFGH"
        widest = max(o.ndim - len(s.replace("...", "")) for s, o in zip(terms, operands, strict=True))
        spelled.append(term.replace("...", pool[widest - hidden : widest] if hidden else ""))
    return spelled if all(len(s) == x.ndim for s, x in zip(spelled, [*operands, out], strict=True)) else None


def _convolution(transposed: bool) -> Callable[..., Tensor]:
    def run(
        t: Tracer,
        func: Run,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        out: Tensor = t.quietly(func, input, weight, bias, *args, **kwargs)
        groups = kwargs.get("groups", args[3] if len(args) > 3 else 1)  # fourth behind bias in both
        stride = kwargs.get("stride", args[0] if args else 1)
        rows = convolve(t, input, weight, bias, stride, index(groups), transposed, out)
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
    """softmax(q k^T * scale + mask) v, step by step; a default scale has been written out."""
    factor = None if scale is None else float(scale)
    if enable_gqa and key.ndim > 2 and key.shape[-3] != query.shape[-3]:
        times = query.shape[-3] // key.shape[-3]
        key, value = repeat_interleave(t, None, key, times, -3), repeat_interleave(t, None, value, times, -3)
    attend = F.scaled_dot_product_attention
    out: Tensor = t.quietly(attend, query, key, value, attn_mask, dropout_p, is_causal, scale=factor)
    _follow_attention(t, query, key, value, attn_mask, out)
    return out


def _follow_attention(t: Tracer, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, out: Tensor) -> None:
    rank = max(q.ndim, k.ndim)
    batch = "abcdefgh"[: rank - 2]
    with t.silently():
        scores = torch.empty((*out.shape[:-1], k.shape[-2]), device="meta")
    contract(t, q, batch + "nd", k, batch + "md", scores, batch + "nm")
    if mask is not None:
        dims = meet(t, [scores, mask], [t.tags(scores), t.tags(mask)], scores)
        t.put(scores, Tags(dims, (False,) * rank))
    tags = t.tags(scores)
    t.freeze(tags.dims[-1], "mixed along this dimension")
    t.put(scores, Tags((*tags.dims[:-1], None), (False,) * rank))
    contract(t, scores, batch + "nm", v, batch + "me", out, batch + "ne")


@function_rule(Tensor.repeat_interleave, torch.repeat_interleave)
def repeat_interleave(
    t: Tracer, func: Any, input: Tensor, repeats: Any, dim: int | None = None, **kwargs: Any
) -> Tensor:
    """Every index several times in a row."""
    if isinstance(repeats, Tensor) or dim is None:
        t.freeze_tensor(input, "repeated by a tensor of counts, or flattened")
        out: Tensor = torch.repeat_interleave(input, repeats, dim=dim, **kwargs)
        return out
    at = dim % input.ndim
    with t.silently():
        out = torch.repeat_interleave(input, int.__int__(index(repeats)), dim=dim)
    t.pin(repeats, "a number of repetitions must not change")
    tags = t.tags(input)
    times = int.__int__(index(repeats))
    dims = tuple(
        None if label is None else (np.repeat(label, times, axis=at) if label.shape[at] > 1 else label)
        for label in tags.dims
    )
    t.put(out, Tags(dims, tags.zero, tags.statistics))
    return out


@function_rule(F.pixel_shuffle)
def pixel_shuffle(t: Tracer, func: Run, input: Tensor, upscale_factor: int) -> Tensor:
    """[.., C r^2, H, W] -> [.., C, H r, W r]: a result channel goes whole."""
    r = int.__int__(index(upscale_factor))
    t.pin(upscale_factor, "an upscale factor must not change")
    *batch, c, h, w = input.shape
    at = len(batch)
    split_ = view(t, Tensor.reshape, input, [*batch, -1, r, r, h, w])
    moved = split_.permute(*range(at), at, at + 3, at + 1, at + 4, at + 2)
    return moved.reshape(*batch, c // (r * r), h * r, w * r)


@function_rule(F.pixel_unshuffle)
def pixel_unshuffle(t: Tracer, func: Run, input: Tensor, downscale_factor: int) -> Tensor:
    """[.., C, H r, W r] -> [.., C r^2, H, W]."""
    r = int.__int__(index(downscale_factor))
    t.pin(downscale_factor, "a downscale factor must not change")
    *batch, c, h, w = input.shape
    at = len(batch)
    split_ = input.reshape(*batch, c, h // r, r, w // r, r)
    moved = split_.permute(*range(at), at, at + 2, at + 4, at + 1, at + 3)
    return moved.reshape(*batch, c * r * r, h // r, w // r)


@function_rule(torch.channel_shuffle)
def channel_shuffle(t: Tracer, func: Run, input: Tensor, groups: int) -> Tensor:
    """[B, g c, ...] -> [B, c g, ...]."""
    g = int.__int__(index(groups))
    t.pin(groups, "a number of groups must not change")
    b, c, *rest = input.shape
    return view(t, Tensor.reshape, input, [b, g, -1, *rest]).transpose(1, 2).reshape(b, c, *rest)


@function_rule(F.glu)
def glu(t: Tracer, func: Run, input: Tensor, dim: int = -1) -> Tensor:
    """First half times sigmoid of the second."""
    left, right = chunk(t, Tensor.chunk, input, 2, dim)
    return left * right.sigmoid()  # type: ignore[no-any-return]


@function_rule(F.layer_norm, torch.layer_norm, F.rms_norm, torch.rms_norm)
def normalise_last(
    t: Tracer,
    func: Run,
    input: Tensor,
    normalized_shape: Sequence[Any],
    weight: Tensor | None = None,
    *args: Any,
    **kwargs: Any,
) -> Tensor:
    """Layer norm and RMS norm: the written shape is checked."""
    bias = kwargs.get("bias", args[0] if args and isinstance(args[0], Tensor) else None)
    out: Tensor = t.quietly(func, input, normalized_shape, weight, *args, **kwargs)
    written = list(normalized_shape)
    dims = t.tags(input).dims
    for value, d in zip(reversed(written), reversed(range(input.ndim)), strict=False):
        t.expect(value, dims[d], d)
    layer_norm(t, {"input": input, "normalized_shape": written, "weight": weight, "bias": bias}, out)
    return out


@function_rule(F.group_norm, torch.group_norm)
def normalise_groups(
    t: Tracer,
    func: Run,
    input: Tensor,
    num_groups: Any,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *args: Any,
    **kwargs: Any,
) -> Tensor:
    """Group norm: the number of groups stays."""
    out: Tensor = t.quietly(func, input, num_groups, weight, bias, *args, **kwargs)
    t.pin(num_groups, "a number of groups must not change")
    group_norm(t, {"input": input, "num_groups": num_groups, "weight": weight, "bias": bias}, out)
    return out


@function_rule(F.batch_norm)
def normalise_batch(
    t: Tracer,
    func: Run,
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    *args: Any,
    **kwargs: Any,
) -> Tensor:
    """Batch norm: one mean per channel, learnt from the batch in training."""
    given = (input, running_mean, running_var, weight, bias, training, *args)
    if training:
        with t.silently():
            out: Tensor = func(*given, **kwargs)
    else:
        out = t.quietly(func, *given, **kwargs)
    statistics = {"running_mean": running_mean, "running_var": running_var}
    channel_norm(t, {"input": input, "weight": weight, "bias": bias, **statistics}, out)
    return out


@function_rule(F.instance_norm, torch.instance_norm)
def normalise_instances(
    t: Tracer,
    func: Run,
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *args: Any,
    **kwargs: Any,
) -> Tensor:
    """Instance norm: one mean per channel and sample."""
    with t.silently():
        out: Tensor = func(input, running_mean, running_var, weight, bias, *args, **kwargs)
    channel_norm(
        t,
        {
            "input": input,
            "weight": weight,
            "bias": bias,
            "running_mean": running_mean,
            "running_var": running_var,
        },
        out,
    )
    return out


@function_rule(torch.prelu)
def prelu(t: Tracer, func: Run, input: Tensor, weight: Tensor) -> Tensor:
    """A slope per channel."""
    out: Tensor = t.quietly(func, input, weight)
    tags = t.tags(input)
    if weight.numel() > 1:
        label, slope = tags.dims[1], t.tags(weight).dims[0]
        if label is None or slope is None:
            t.freeze(label, "has slopes that stay")
            t.freeze(slope, "slopes of a dimension that stays")
        else:
            t.ledger.tie(label, place(slope.reshape(-1), input.ndim, 1), t.why("slopes of"))
    t.put(out, tags)
    return out
