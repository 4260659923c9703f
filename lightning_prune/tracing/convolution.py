"""Convolutions of any rank: channels are contracted, what lies behind them passes or stays."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from operator import index
from typing import Any

import numpy as np
from torch import Tensor

from lightning_prune.tracing.contraction import MEETS, NOT_ZERO
from lightning_prune.tracing.labels import Ints, Label, Tags
from lightning_prune.tracing.rules import Arguments, rule
from lightning_prune.tracing.tracer import Tracer


@rule("convolution", "_convolution", "convolution_overrideable", "mkldnn_convolution")
def convolution(t: Tracer, a: Arguments, out: Tensor) -> None:
    """Convolution of any rank, grouped and transposed."""
    is_transposed = bool(a.get("transposed", False))
    convolve(t, a["input"], a["weight"], a["bias"], a["stride"], int(a["groups"]), is_transposed, out)


def convolve(
    t: Tracer,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Any,
    groups: int,
    transposed: bool,
    out: Tensor,
) -> Label | None:
    """State what a convolution does; gives the label of its groups where they may go."""
    spatial = weight.ndim - 2
    channel = x.ndim - spatial - 1
    ragged = _ragged(t, weight, groups) if groups > 1 else None
    read_whole = t.whole if ragged is None else set(t.whole)
    x_tags, w_tags = t.tags(x), t.tags(weight)
    t.whole = read_whole
    passing = _passing(x, weight, stride, out)
    _spatial_stays(t, x_tags, w_tags, channel, passing)
    source = _flat(t, x_tags.dims[channel], channel)
    if groups == 1:
        ins, outs = (w_tags.dims[0], w_tags.dims[1]) if transposed else (w_tags.dims[1], w_tags.dims[0])
        _meet(t, source, _flat(t, ins, 0 if transposed else 1))
        rows, result = None, _flat(t, outs, 1 if transposed else 0)
    else:
        grouped = _Grouped(t, weight, w_tags, groups, transposed, ragged)
        rows, result = grouped.follow(source)
    in_dim, out_dim = (0, 1) if transposed else (1, 0)
    if id(weight) in t.names:
        t.inputs.add((t.names[id(weight)], in_dim))
    if source is not None and not (x_tags.zero[channel] or w_tags.zero[in_dim]):
        t.freeze(source, NOT_ZERO)
    is_zero = w_tags.zero[out_dim] if groups == 1 else w_tags.zero[0] and w_tags.zero[1]
    channels = {channel: (_along(result, out.ndim, channel), is_zero)}
    _label_convolved(t, x_tags, out, channels | _carried(t, x_tags, passing, is_linear=bias is None))
    if bias is not None:
        _bias(t, bias, out, channel)
    dims, lengths = t.tags(out).dims, x.shape if transposed else out.shape
    positions = [(dims[d], d, int(lengths[d])) for d in range(channel + 1, out.ndim)]
    window = math.prod(weight.shape[2:]) * math.prod(x.shape[:channel])
    columns = w_tags.dims[1] if ragged is None else ragged
    t.count_work(
        window, [(w_tags.dims[0], 0, int(weight.shape[0])), (columns, 1, int(weight.shape[1])), *positions]
    )
    return rows


def _carried(
    t: Tracer, x: Tags, passing: Sequence[int], *, is_linear: bool
) -> dict[int, tuple[Label | None, bool]]:
    """Label of each dimension that passes, and whether its zeros do; a bias fills them."""
    why = t.why("the same for all channels")
    found: dict[int, tuple[Label | None, bool]] = {}
    for d in passing:
        label = x.dims[d]
        if label is not None:
            others = [k for k in range(label.ndim) if k != d]
            found[d] = t.ledger.collapse(label, others, why), x.zero[d] and is_linear
    return found


def _label_convolved(t: Tracer, x: Tags, out: Tensor, known: dict[int, tuple[Label | None, bool]]) -> None:
    nothing: tuple[Label | None, bool] = (None, False)
    found = [known.get(d, nothing) for d in range(out.ndim)]
    if 0 not in known and 1 in known and x.dims[0] is not None and len(x.dims) == out.ndim:
        why = t.why("the same for all channels")
        found[0] = t.ledger.collapse(x.dims[0], range(1, out.ndim), why), False
    t.put(out, Tags(tuple(label for label, _ in found), tuple(is_zero for _, is_zero in found)))


def _passing(x: Tensor, weight: Tensor, stride: Any, out: Tensor) -> list[int]:
    """Dimensions along which every position is mapped by itself: kernel and stride 1, nothing padded."""
    spatial = weight.ndim - 2
    steps = [index(s) for s in (stride if isinstance(stride, (tuple, list)) else (stride,))]
    steps = steps * spatial if len(steps) == 1 else steps
    first = x.ndim - spatial
    return [
        first + i
        for i in range(spatial)
        if weight.shape[2 + i] == steps[i] == 1 and x.shape[first + i] == out.shape[first + i]
    ]


def _bias(t: Tracer, bias: Tensor, out: Tensor, channel: int) -> None:
    tags = t.tags(bias)
    result = t.tags(out)
    _meet(t, None if tags.dims[0] is None else tags.dims[0], _flat(t, result.dims[channel], channel))
    if not tags.zero[0]:
        t.put(out, Tags(result.dims, tuple(False for _ in result.zero)))


def _spatial_stays(t: Tracer, x: Tags, weight: Tags, channel: int, passing: Sequence[int]) -> None:
    for statistic in (*x.statistics, *weight.statistics):
        t.freeze(statistic, "a mean over these channels feeds a convolution")
    for d in range(channel + 1, len(x.dims)):
        if d not in passing:
            t.freeze(x.dims[d], "convolved along this dimension")
    for label in weight.dims[2:]:
        t.freeze(label, "position in a kernel")


def _flat(t: Tracer, label: Label | None, dim: int) -> Ints | None:
    """A label as one row of atoms: the same for all positions of its scopes."""
    if label is None:
        return None
    scopes = [d for d in range(label.ndim) if d != dim]
    return t.ledger.collapse(label, scopes, t.why("the same for all positions")).reshape(-1)


def _along(row: Ints | None, rank: int, dim: int) -> Label | None:
    if row is None:
        return None
    shape = [1] * rank
    shape[dim] = -1
    return row.reshape(shape)


def _meet(t: Tracer, left: Ints | None, right: Ints | None) -> None:
    if left is not None and right is not None:
        t.ledger.tie(left, right, t.why("contracted"))
    else:
        t.freeze(left, MEETS)
        t.freeze(right, MEETS)


def _ragged(t: Tracer, weight: Tensor, groups: int) -> Ints | None:
    """Columns of a grouped weight have atoms per group, as long as nothing else reads the parameter."""
    name = t.names.get(id(weight))
    if name is None or weight.shape[1] == 1:
        return None
    if name not in t.ragged:
        t.ragged[name] = t.ledger.new((groups, weight.shape[1]))
    return t.ragged[name] if len(t.ragged[name]) == groups else None


@dataclass
class _Grouped:
    """The grouped case: a group is a row, its channels are cells."""

    t: Tracer
    weight: Tensor
    tags: Tags
    groups: int
    transposed: bool
    ragged: Ints | None

    def follow(self, source: Ints | None) -> tuple[Ints | None, Ints | None]:
        """Tie rows and cells; give (label of the groups, label of the output channels)."""
        t = self.t
        why = t.why("groups of a convolution")
        leaf = _flat(t, self.tags.dims[0], 0)
        columns = self.ragged if self.ragged is not None else _flat(t, self.tags.dims[1], 1)
        if leaf is None:
            for label in (source, columns):
                t.freeze(label, MEETS)
            return None, None
        w_row, w_cell = self._rows(leaf, why)
        if source is None:
            t.freeze(w_row, MEETS)
            t.freeze(w_cell if self.transposed else columns, MEETS)
            return None, self._result(w_row, columns) if self.transposed else leaf
        row, cell = self._rows(source, why)
        t.ledger.tie(row, w_row, why)
        if self.ragged is not None:
            t.ledger.grids.append((self.ragged, w_row, why))
        ins, outs = (w_cell, columns) if self.transposed else (columns, w_cell)
        if cell is not None and outs is not None:
            t.ledger.depthwise.append((cell, outs))
        if cell is None:
            t.freeze(outs, "outputs of one channel of a depthwise convolution go together")
        elif ins is None:
            t.freeze(cell, MEETS)
        else:
            t.ledger.tie(cell, ins, why)
        if not self.transposed:
            return (row if cell is None else None), leaf
        return (row if cell is None else None), self._result(row, outs)

    def _result(self, row: Ints, outs: Ints | None) -> Ints:
        """Output channels of a transposed convolution: row AND column."""
        if outs is None:
            return row
        spread = np.broadcast_to(row[:, None], (self.groups, self.weight.shape[1]))
        return self.t.ledger.both(spread, np.broadcast_to(outs, spread.shape)).reshape(-1)

    def _rows(self, flat: Ints, why: int) -> tuple[Ints, Ints | None]:
        if len(flat) == self.groups:
            return flat, None
        return self.t.ledger.divide(flat, self.groups, why)
