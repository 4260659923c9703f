"""The penalty of the regulariser, element by element, in autograd's hands; and groups of every shape."""

from __future__ import annotations

import numpy as np
import torch

from lightning_prune.graph.groups import Group, Member

SHAPES = {
    "conv.weight": (6, 3, 3, 3),
    "conv.bias": (6,),
    "bn.weight": (6,),
    "bn.bias": (6,),
    "depthwise.weight": (6, 1, 5),
    "grouped.weight": (4, 3, 2),  # two groups of two outputs, each reading three of six channels
    "transposed.weight": (6, 4, 2, 2),
    "square.weight": (6, 6),
    "embedding.weight": (7, 6),
    "position": (1, 3, 6),
    "fc.weight": (5, 12),  # reads six channels of two pixels
    "experts": (2, 6, 4),
}


def member(tensor, dim, index, unit, size, rows=1, is_buffer=False):
    return Member(tensor, dim, rows, size, np.asarray(index), np.asarray(unit), is_buffer)


def whole(tensor, dim, **more):
    size = SHAPES[tensor][dim]
    return member(tensor, dim, range(size), range(size), size, **more)


def group(name, *members, kind="channel"):
    return Group(name, kind, np.arange(int(max(m.unit.max() for m in members)) + 1), members, "")


def channels():
    """Six units with a member of every kind; the square weight is held by both of its dimensions."""
    shuffled = [10, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 1]
    return group(
        "channels",
        whole("conv.weight", 0),
        whole("conv.bias", 0),
        whole("bn.weight", 0),
        whole("bn.bias", 0),
        whole("depthwise.weight", 0),
        member("grouped.weight", 1, range(6), [3, 4, 5, 0, 1, 2], 3, rows=2),
        whole("transposed.weight", 0),
        whole("square.weight", 0),
        whole("square.weight", 1),
        whole("embedding.weight", 1),
        whole("position", 2),
        member("fc.weight", 1, shuffled, [i // 2 for i in range(12)], 12),
        whole("experts", 1),
        member("bn.running_mean", 0, range(6), range(6), 6, is_buffer=True),
    )


def others():
    """Groups that meet the first one in the other dimension of its weights, and two in one dimension."""
    return [
        group("convin", whole("conv.weight", 1)),
        group("grouped", whole("grouped.weight", 0), whole("transposed.weight", 1), whole("experts", 2)),
        group("fc:low", member("fc.weight", 0, [0, 1], [1, 0], 5)),
        group("fc:high", member("fc.weight", 0, [3, 2, 4], [0, 1, 1], 5)),
    ]


def parameters(dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, shape in SHAPES.items():
        p = torch.nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype))
        p.grad = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
        found[name] = p
    return found


def owned(m, tensor):
    """Per position of a member, the elements that it owns as (unit, tensor of elements)."""
    for position, unit in zip(m.index.tolist(), m.unit.tolist(), strict=True):
        row, i = divmod(position, m.size)
        block = len(tensor) // m.rows
        rows = tensor[row * block : (row + 1) * block] if m.rows > 1 else tensor
        yield unit, rows.select(m.dim, i)


def naive_units(g, tensors, include_bias):
    """``I_k`` of every unit, in autograd's hands."""
    sums = [torch.zeros((), dtype=torch.float64) for _ in g.units]
    for m in g.members:
        if not m.is_buffer and (include_bias or not m.tensor.endswith("bias")):
            for unit, elements in owned(m, tensors[m.tensor]):
                sums[unit] = sums[unit] + (elements.double() ** 2).sum()
    return sums


def naive_penalty(groups, tensors, reg, alpha, include_bias=False):
    total = torch.zeros((), dtype=torch.float64)
    for g in groups:
        sums = naive_units(g, tensors, include_bias)
        squares = [float(s.detach()) for s in sums]
        low, high = min(squares), max(squares)
        for s, square in zip(sums, squares, strict=True):
            gamma = 1.0 if high == low else 2.0 ** (alpha * (high - square) / (high - low))
            total = total + reg / 2 * gamma * s
    return total


def naive_gradients(groups, tensors, reg=1e-4, alpha=4.0, include_bias=False):
    names = list(tensors)
    penalty = naive_penalty(groups, tensors, reg, alpha, include_bias)
    grads = torch.autograd.grad(penalty, [tensors[n] for n in names], allow_unused=True)
    return {n: torch.zeros_like(tensors[n]) if g is None else g for n, g in zip(names, grads, strict=True)}


def before(tensors):
    return {n: None if t.grad is None else t.grad.clone() for n, t in tensors.items()}


def assert_added(tensors, start, added, rtol=1e-9):
    for name, t in tensors.items():
        torch.testing.assert_close(
            t.grad, start[name] + added[name], rtol=rtol, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}"
        )


def two_layers():
    """Two tensors, three groups: the inner one joins them."""
    tensors = {}
    for name, shape in {"a": (3, 2), "b": (4, 3)}.items():
        tensors[name] = torch.nn.Parameter(torch.randn(shape, dtype=torch.float64))
        tensors[name].grad = torch.zeros(shape, dtype=torch.float64)
    outer = group("a:1", member("a", 1, range(2), range(2), 2))
    inner = group("a:0", member("a", 0, range(3), range(3), 3), member("b", 1, range(3), range(3), 3))
    last = group("b:0", member("b", 0, range(4), range(4), 4))
    return [outer, inner, last], tensors
