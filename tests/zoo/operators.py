"""torchvision beside a torch that its compiled operators do not fit: what its models call, in Python."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

_BOXES = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
_ALIGN = (
    "(Tensor input, Tensor rois, float spatial_scale, SymInt pooled_height, SymInt pooled_width, "
    "int sampling_ratio, bool aligned) -> Tensor"
)


def import_torchvision() -> None:
    """Import torchvision, if it is there; where operators are missing, declare them with plain ones."""
    if find_spec("torchvision") is None:
        return
    try:
        import_module("torchvision")
    except RuntimeError:  # "operator torchvision::nms does not exist"
        for name in ("nms", "qnms"):
            torch.library.define(f"torchvision::{name}", _BOXES)
        import_module("torchvision")
    if not torch._C._dispatch_has_kernel_for_dispatch_key("torchvision::nms", "CPU"):
        torch.library.impl("torchvision::nms", "CPU", nms)
    if not hasattr(torch.ops.torchvision, "roi_align"):
        torch.library.define("torchvision::roi_align", _ALIGN)
        torch.library.impl("torchvision::roi_align", "CPU", roi_align)
        torch.library.register_autograd(
            "torchvision::roi_align", _align_backward, setup_context=_align_context
        )
    extension = import_module("torchvision.extension")
    extension._HAS_OPS = True
    extension._has_ops = lambda: True


def nms(dets: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    """Greedy suppression: the best box goes first, and takes those that overlap it out of the race."""
    kept: list[int] = []
    area = (dets[:, 2] - dets[:, 0]) * (dets[:, 3] - dets[:, 1])
    alive = torch.ones(len(dets), dtype=torch.bool)
    for i in scores.argsort(descending=True, stable=True).tolist():
        if not alive[i]:
            continue
        kept.append(i)
        low = torch.maximum(dets[:, :2], dets[i, :2])
        high = torch.minimum(dets[:, 2:], dets[i, 2:])
        shared = (high - low).clamp(min=0).prod(1)
        alive &= shared / (area + area[i] - shared) <= iou_threshold
    return torch.tensor(kept, dtype=torch.long)


def roi_align(
    image: Tensor,
    rois: Tensor,
    spatial_scale: float,
    pooled_height: int,
    pooled_width: int,
    sampling_ratio: int,
    aligned: bool,
) -> Tensor:
    """Mean of bilinear samples in every bin of every box, [boxes, channels, height, width]."""
    samples = max(sampling_ratio, 1)
    shift = 0.5 if aligned else 0.0
    parts = []
    for roi in rois:
        x0, y0, x1, y1 = (roi[1:] * spatial_scale - shift).unbind()
        width = x1 - x0 if aligned else (x1 - x0).clamp(min=1)
        height = y1 - y0 if aligned else (y1 - y0).clamp(min=1)
        xs = x0 + (torch.arange(pooled_width * samples) + 0.5) * width / (pooled_width * samples)
        ys = y0 + (torch.arange(pooled_height * samples) + 0.5) * height / (pooled_height * samples)
        values = _bilinear(image[int(roi[0])], ys, xs)
        parts.append(values.unflatten(2, (-1, samples)).unflatten(1, (-1, samples)).mean((2, 4)))
    if not parts:
        return image.new_zeros(0, image.shape[1], pooled_height, pooled_width)
    return torch.stack(parts)


def _align_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.image, ctx.rois, ctx.rest = inputs[0].detach(), inputs[1].detach(), inputs[2:]


def _align_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    with torch.enable_grad():
        image = ctx.image.requires_grad_()
        (out,) = torch.autograd.grad(roi_align(image, ctx.rois, *ctx.rest), image, grad)
    return (out, *[None] * 6)


def _bilinear(image: Tensor, ys: Tensor, xs: Tensor) -> Tensor:
    """Sample ``image`` [c, h, w] on the lattice of ``ys`` and ``xs``, [c, len(ys), len(xs)]."""
    y0, y1, fy = _between(ys, image.shape[1])
    x0, x1, fx = _between(xs, image.shape[2])
    top = image[:, y0][:, :, x0] * (1 - fx) + image[:, y0][:, :, x1] * fx
    low = image[:, y1][:, :, x0] * (1 - fx) + image[:, y1][:, :, x1] * fx
    return top * (1 - fy)[:, None] + low * fy[:, None]


def _between(at: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
    at = at.clamp(0, size - 1)
    low = at.floor().long()
    return low, (low + 1).clamp(max=size - 1), at - low
