"""Pooling, resizing, sampling and windows: channels pass, the dimensions behind them stay."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

from lightning_prune.tracing.labels import Label, Tags
from lightning_prune.tracing.movement import pass_through
from lightning_prune.tracing.rules import Arguments, rule, tensors_in
from lightning_prune.tracing.tracer import Tracer


@rule(
    "max_pool1d", "max_pool2d", "max_pool3d", "max_pool2d_with_indices", "max_pool3d_with_indices",
    "avg_pool1d", "avg_pool2d", "avg_pool3d", "_adaptive_avg_pool2d", "_adaptive_avg_pool3d",
    "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d", "adaptive_max_pool1d",
    "adaptive_max_pool2d", "adaptive_max_pool3d", "upsample_nearest1d", "upsample_nearest2d",
    "upsample_nearest3d", "_upsample_nearest_exact1d", "_upsample_nearest_exact2d",
    "_upsample_nearest_exact3d", "upsample_linear1d", "upsample_bilinear2d", "upsample_trilinear3d",
    "upsample_bicubic2d", "_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa", "reflection_pad1d",
    "reflection_pad2d", "reflection_pad3d", "replication_pad1d", "replication_pad2d",
    "replication_pad3d", "mkldnn_max_pool2d",
)  # fmt: skip
def spatial(t: Tracer, a: Arguments, out: Any) -> None:
    """Works on each channel by itself, over the dimensions behind it."""
    x = a["self"] if "self" in a else a["input"]
    spatial_dims = {"1d": 1, "2d": 2, "3d": 3}[next(k for k in ("1d", "2d", "3d") if k in t.op)]
    kept = list(range(x.ndim - spatial_dims))
    for result in tensors_in((out,)):
        pass_through(t, x, result, kept, "pooled or resized along this dimension")


@rule("grid_sampler", "grid_sampler_2d", "grid_sampler_3d", "cudnn_grid_sampler")
def grid_sampler(t: Tracer, a: Arguments, out: Tensor) -> None:
    """Samples each channel at the same places."""
    t.freeze_tensor(a["grid"], "coordinates stay")
    pass_through(t, a["input"], out, [0, 1], "sampled along this dimension")


@rule("triu", "tril")
def triangle(t: Tracer, a: Arguments, out: Tensor) -> None:
    """Masks by position in the last two dimensions."""
    pass_through(t, a["self"], out, list(range(out.ndim - 2)), "masked by position")


@rule("im2col")
def im2col(t: Tracer, a: Arguments, out: Tensor) -> None:
    """[.., C, H, W] -> [.., C * k, positions]: a channel's window goes with it."""
    x = a["self"]
    tags = t.tags(x)
    channel = x.ndim - 3
    label = tags.dims[channel]
    pass_through(t, x, x.new_empty(x.shape), [channel], "unfolded along this dimension")
    dims: list[Label | None] = [None] * out.ndim
    if label is not None:
        flat = t.ledger.collapse(label, [d for d in range(x.ndim) if d != channel], t.why("unfolded"))
        window = out.shape[channel] // x.shape[channel]
        shape = [1] * out.ndim
        shape[channel] = -1
        dims[channel] = np.repeat(flat.ravel(), window).reshape(shape)
    t.put(out, Tags(tuple(dims), (True,) * out.ndim if tags.zero[channel] else (False,) * out.ndim))


@rule("col2im")
def col2im(t: Tracer, a: Arguments, out: Tensor) -> None:
    """[.., C * k, positions] -> [.., C, H, W]: the window of a channel ties."""
    x = a["self"]
    tags = t.tags(x)
    channel = x.ndim - 2
    label = tags.dims[channel]
    dims: list[Label | None] = [None] * out.ndim
    if label is not None:
        why = t.why("folded")
        flat = t.ledger.collapse(label, [d for d in range(x.ndim) if d != channel], why).ravel()
        rows = flat.reshape(out.shape[channel], -1)
        t.ledger.tie(rows, rows[:, :1], why)
        shape = [1] * out.ndim
        shape[channel] = -1
        dims[channel] = rows[:, 0].reshape(shape)
    for d, other in enumerate(tags.dims):
        if d != channel:
            t.freeze(other, "folded along this dimension")
    t.put(
        out,
        Tags(tuple(dims), tuple(z and d == channel for d, z in enumerate((*tags.zero, False)[: out.ndim]))),
    )


@rule("unfold")
def unfold(t: Tracer, a: Arguments, out: Tensor) -> None:
    """Sliding windows over one dimension."""
    x = a["self"]
    dim = a["dimension"] % x.ndim
    tags = t.tags(x)
    t.freeze(tags.dims[dim], "cut into windows")
    dims: list[Label | None] = []
    for d, label in enumerate(tags.dims):
        keep = (
            None if label is None or d == dim else t.ledger.collapse(label, [dim], t.why("cut into windows"))
        )
        dims.append(None if keep is None else keep[..., None])
    t.put(out, Tags((*dims, None), (*tags.zero, False), tags.statistics))
