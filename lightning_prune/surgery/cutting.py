"""Kept indices meet data here: cut one tensor, and put the result under the same Python object."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from lightning_prune.plan import Cut
from lightning_prune.surgery.scratch import Scratch

__all__ = ["cut_tensor", "mask_tensor", "set_tensor_data"]


def cut_tensor(tensor: Tensor, cuts: Iterable[Cut], scratch: Scratch | None = None) -> Tensor:
    """Give what the cuts keep of a tensor, as a new tensor.

    Row-wise cuts go first, because their blocks are those of dimension 0 before any cut. Device, dtype and
    memory layout (``channels_last``, a transposed weight) are those of ``tensor``; autograd does not see it.

    Args:
        tensor: Any parameter, buffer, gradient or optimizer state of the shape that the cuts were made for.
        cuts: Cuts of this one tensor, at most one per dimension, in any order.
        scratch: Where the first of several cuts may leave what the next one reads.

    Returns:
        A new tensor, smaller along the cut dimensions.

    >>> weight = torch.arange(8).reshape(4, 2)
    >>> cut_tensor(weight, [Cut("w", 0, 4, (3, 0))]).tolist()
    [[6, 7], [0, 1]]
    >>> cut_tensor(weight, [Cut("w", 1, 2, (1, 0), rows=2)]).tolist()
    [[1], [3], [4], [6]]
    """
    if tensor.is_meta:
        return _cut_shape(tensor, cuts)
    out = tensor.detach()
    ordered = sorted(cuts, key=lambda c: (c.rows == 1, c.dim))
    for number, cut in enumerate(ordered):
        keep = torch.from_numpy(cut.table[0] if cut.rows == 1 else cut.table).to(tensor.device)
        if cut.rows > 1:
            out = _cut_rows(out, cut, keep)
        else:
            room = None
            if scratch is not None and number == 0 < len(ordered) - 1:
                room = scratch.room((*out.shape[: cut.dim], cut.kept, *out.shape[cut.dim + 1 :]), out)
            out = torch.index_select(out, cut.dim, keep, out=room)
    return out if tensor.layout != torch.strided else _laid_out_like(out, tensor)


def _cut_shape(tensor: Tensor, cuts: Iterable[Cut]) -> Tensor:
    shape = list(tensor.shape)
    for cut in cuts:
        shape[cut.dim] = cut.kept
    return _laid_out_like(torch.empty(shape, dtype=tensor.dtype, device="meta"), tensor)


def mask_tensor(tensor: Tensor, cuts: Iterable[Cut]) -> Tensor:
    """Give a tensor of the same shape with zeros where the cuts would remove something.

    >>> mask_tensor(torch.ones(2, 3), [Cut("w", 1, 3, (0, 2))]).tolist()
    [[1.0, 0.0, 1.0], [1.0, 0.0, 1.0]]
    """
    places = torch.arange(tensor.numel(), device=tensor.device).reshape(tensor.shape)
    masked = torch.zeros_like(tensor, memory_format=torch.contiguous_format).flatten()
    kept = cut_tensor(places, cuts).flatten()
    masked[kept] = tensor.detach().flatten()[kept]
    return masked.reshape(tensor.shape)


def _cut_rows(tensor: Tensor, cut: Cut, keep: Tensor) -> Tensor:
    """Block r of dimension 0 keeps list r along ``cut.dim`` (>= 1)."""
    blocks = tensor.reshape(cut.rows, -1, *tensor.shape[1:]).movedim(
        cut.dim + 1, 1
    )  # [rows, size, n0/rows, ...]
    row = torch.arange(cut.rows, device=tensor.device).unsqueeze(1)
    return blocks[row, keep].movedim(1, cut.dim + 1).flatten(0, 1)


def _laid_out_like(out: Tensor, like: Tensor) -> Tensor:
    # Outer dimensions first. A size-1 dimension shares the stride of the dimension it lies inside of, so of
    # two dimensions with one stride the larger is the outer: 1x1 and depthwise weights keep their format too.
    if like.dim() == 1:
        return out.contiguous()
    strides, shape = like.stride(), like.shape
    order = sorted(range(like.dim()), key=lambda d: (-strides[d], -shape[d]))
    if order == list(range(like.dim())):
        return out.contiguous()
    inverse = sorted(range(like.dim()), key=order.__getitem__)
    # clone, as contiguous() would keep the strides of size-1 dimensions
    return out.permute(order).clone(memory_format=torch.contiguous_format).permute(inverse)


def set_tensor_data(tensor: Tensor, new: Tensor) -> None:
    """Put ``new`` under the same tensor object; its shape may differ, its ``grad`` is dropped.

    Optimizers, tied modules, tensor hooks and lists of parameters keep holding the right object.

    Args:
        tensor: Leaf that keeps its identity: parameter or buffer.
        new: What it holds afterwards, same dtype and device; not copied.

    >>> weight = nn.Parameter(torch.zeros(4, 2))
    >>> set_tensor_data(weight, torch.ones(3, 2))
    >>> tuple(weight.shape), weight.requires_grad
    ((3, 2), True)
    """
    if tensor.is_leaf:
        tensor.grad = None  # torch does not notice a gradient of the old shape
    if tensor.requires_grad or isinstance(tensor, nn.Parameter):
        # Autograd caches a leaf's shape in its AccumulateGrad node, which a kept loss or DDP holds alive. A
        # change of dtype makes it forget that node; a change of shape alone fails at the next backward.
        tensor.data = torch.empty(0, dtype=_another_dtype(tensor), device=tensor.device)
    tensor.data = new


def _another_dtype(tensor: Tensor) -> torch.dtype:
    if tensor.device.type == "mps":  # has no float64
        return torch.float32 if tensor.dtype == torch.float16 else torch.float16
    return torch.float32 if tensor.dtype == torch.float64 else torch.float64
