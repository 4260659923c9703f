"""Normalisations and reductions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from lightning_prune.tracing.labels import Label, Tags
from lightning_prune.tracing.movement import pass_through
from lightning_prune.tracing.pointwise import pointwise
from lightning_prune.tracing.rules import Arguments, rule, tensors_in
from lightning_prune.tracing.tracer import Tracer


@rule(
    "native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training",
    "cudnn_batch_norm", "_batch_norm_with_update", "_native_batch_norm_legit.no_stats", "batch_norm",
    "instance_norm",
)  # fmt: skip
def channel_norm(t: Tracer, a: Arguments, out: Any) -> None:
    """One mean and variance per channel: dimension 1 ties with all per-channel tensors."""
    x, result = a["input"], tensors_in((out,))[0]
    per_channel = [a.get(k) for k in ("weight", "bias", "running_mean", "running_var")]
    normalise(t, x, result, [1], per_channel, affine=a.get("weight") is not None)


@rule("native_layer_norm", "_fused_rms_norm", "layer_norm", "rms_norm")
def layer_norm(t: Tracer, a: Arguments, out: Any) -> None:
    """Statistics over the last dimensions, taken over the survivors."""
    x, result = a["input"], tensors_in((out,))[0]
    over = list(range(x.ndim - len(a["normalized_shape"]), x.ndim))
    normalise(t, x, result, over, [a.get("weight"), a.get("bias")], affine=a.get("weight") is not None)


def normalise(
    t: Tracer,
    x: Tensor,
    out: Tensor,
    over: Sequence[int],
    per_channel: Sequence[Tensor | None],
    *,
    affine: bool,
) -> None:
    """Tie affine tensors and statistics, of the shape of dimensions ``over``, with these dimensions."""
    tags = t.tags(x)
    why = t.why("normalised with")
    dims = list(tags.dims)
    for other in (o for o in per_channel if o is not None):
        for k, d in enumerate(over):
            label, mine = t.tags(other).dims[k], dims[d]
            if label is None or mine is None:
                t.freeze(label, "normalises a dimension that must stay")
                t.freeze(mine, "normalised by something that must stay")
                dims[d] = None
                continue
            shape = [1] * x.ndim
            shape[d] = -1
            t.ledger.tie(mine, label.reshape(shape), why)
    zero = tuple(affine if d in over else z and affine for d, z in enumerate(tags.zero))
    t.put(out, Tags(tuple(dims), zero, tags.statistics))


@rule("native_group_norm", "group_norm")
def group_norm(t: Tracer, a: Arguments, out: Any) -> None:
    """Channels split into groups of equally many; statistics over the survivors."""
    x, result = a["input"], tensors_in((out,))[0]
    groups = int(a["group"] if "group" in a else a["num_groups"])
    label = t.tags(x).dims[1]
    if label is not None and groups > 1:
        flat = t.ledger.collapse(
            label, [d for d in range(x.ndim) if d != 1], t.why("normalised in groups")
        ).reshape(-1)
        if len(flat) == groups:
            t.freeze(flat, "a normalisation group of one channel")
        else:
            t.ledger.divide(flat, groups, t.why("groups of a normalisation"))
    normalise(t, x, result, [1], [a.get("weight"), a.get("bias")], affine=a.get("weight") is not None)


def reduced_dims(a: Arguments, rank: int) -> list[int]:
    """Dimensions that a reduction runs over."""
    dim = a.get("dim")
    if dim is None or (isinstance(dim, (list, tuple)) and not dim):
        return list(range(rank))
    return sorted({d % rank for d in ([dim] if isinstance(dim, int) else dim)}) if rank else []


def reduce(t: Tracer, a: Arguments, out: Any, *, zero_is_neutral: bool, statistic: bool) -> None:
    """Drop dimensions. A labelled one stays, unless removing zeros or taking survivors is right."""
    x = a["self"]
    over = reduced_dims(a, x.ndim)
    tags = t.tags(x)
    taken: list[Label] = list(tags.statistics)
    for d in over:
        label = tags.dims[d]
        if label is None or not label.any() or (zero_is_neutral and tags.zero[d]):
            continue
        if statistic:
            taken.append(label)
        else:
            t.freeze(label, "reduced where removed units are not neutral")
    why = t.why("the same for all reduced positions")
    for result in tensors_in((out,)):
        keepdim = result.ndim == x.ndim and len(over) > 0
        dims: list[Label | None] = []
        for d, label in enumerate(tags.dims):
            if d in over:
                dims += [None] if keepdim else []
            elif label is None:
                dims.append(None)
            else:
                scoped = t.ledger.collapse(label, over, why)
                dims.append(scoped if keepdim else np.squeeze(scoped, tuple(over)))
        zero = [z for d, z in enumerate(tags.zero) if keepdim or d not in over]
        t.put(result, Tags(tuple(dims), tuple(zero), tuple(taken)))


@rule("sum", "nansum", "linalg_vector_norm", "norm", "any", "count_nonzero")
def total(t: Tracer, a: Arguments, out: Any) -> None:
    """Zeros may go."""
    reduce(t, a, out, zero_is_neutral=True, statistic=False)


@rule("mean", "var", "std", "var_mean", "std_mean")
def statistic(t: Tracer, a: Arguments, out: Any) -> None:
    """A mean over channels is right over survivors when it normalises these channels, and only then."""
    reduce(t, a, out, zero_is_neutral=False, statistic=True)


@rule(
    "max",
    "min",
    "amax",
    "amin",
    "aminmax",
    "argmax",
    "argmin",
    "prod",
    "all",
    "logsumexp",
    "median",
    "mode",
    "nanmedian",
)
def extreme(t: Tracer, a: Arguments, out: Any) -> None:
    """Labelled dimensions stay."""
    if isinstance(a.get("other"), Tensor):
        pointwise(t, a, out)
        return
    reduce(t, a, out, zero_is_neutral=False, statistic=False)


@rule(
    "_softmax",
    "_log_softmax",
    "softmax",
    "log_softmax",
    "_safe_softmax",
    "cumsum",
    "cumprod",
    "logcumsumexp",
    "sort",
    "argsort",
    "cummax",
    "cummin",
    "glu_jvp",
)
def over_one_dim(t: Tracer, a: Arguments, out: Any) -> None:
    """Mixes along one dimension, which stays; the others pass."""
    x = a["self"]
    over = (a["dim"] if a.get("dim") is not None else -1) % max(x.ndim, 1)
    for result in tensors_in((out,)):
        pass_through(
            t, x, result, [d for d in range(x.ndim) if d != over], "mixed along this dimension", zero=False
        )


@rule("topk", "kthvalue")
def topk(t: Tracer, a: Arguments, out: Any) -> None:
    """Picks along one dimension, which stays."""
    over_one_dim(t, a, out)


@rule("_weight_norm_interface", "_weight_norm")
def weight_norm(t: Tracer, a: Arguments, out: Any) -> None:
    """G v / ||v||, the norm taken over all dimensions but one: zeros do not change it."""
    v, g, dim = a["v"], a["g"], a["dim"]
    result = tensors_in((out,))[0]
    tags, scale = t.tags(v), t.tags(g)
    for d, label in enumerate(tags.dims):
        if label is None or not label.any():
            continue
        factor = scale.dims[d]
        if d == dim % v.ndim and factor is not None:
            t.ledger.tie(label, factor, t.why("scale of"))
        elif d == dim % v.ndim or not tags.zero[d]:
            t.freeze(label, "normalised where removed units are not zero")
    t.put(result, Tags(tags.dims, tags.zero, tags.statistics))
