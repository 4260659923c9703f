"""Contractions: contracted dimensions tie, batch dimensions tie, the result takes the rest.

Shape legend: operands are described by letters, one per dimension, as in ``einsum``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from lightning_prune.tracing.labels import Ints, Label, Tags
from lightning_prune.tracing.rules import Arguments, rule, unknown
from lightning_prune.tracing.tracer import Tracer

MEETS = "contracted with a dimension that must stay"
NOT_ZERO = "contracted where neither side is zero once its units are gone"


@dataclass
class Operand:
    """One side of a contraction: labels over the axes of all letters."""

    tensor: Tensor
    letters: str
    labels: dict[str, Label | None]
    zero: dict[str, bool]
    is_parameter: bool


def operand(t: Tracer, tensor: Tensor, letters: str, alphabet: str) -> Operand:
    """Spread a tensor's labels over the axes of the whole alphabet."""
    tags = t.tags(tensor)
    for statistic in tags.statistics:
        t.freeze(statistic, "a mean over these channels feeds a contraction")
    labels: dict[str, Label | None] = {}
    for letter, label in zip(letters, tags.dims, strict=True):
        labels[letter] = None if label is None else _spread(label, letters, alphabet)
    zero = dict(zip(letters, tags.zero, strict=True))
    return Operand(tensor, letters, labels, zero, id(tensor) in t.names)


def _spread(label: Label, letters: str, alphabet: str) -> Label:
    order = [letters.index(letter) for letter in alphabet if letter in letters]
    shape = [label.shape[letters.index(letter)] if letter in letters else 1 for letter in alphabet]
    return label.transpose(order).reshape(shape)


def contract(
    t: Tracer, x: Tensor, x_letters: str, y: Tensor, y_letters: str, out: Tensor, out_letters: str
) -> None:
    """State what a contraction does: ``x_letters,y_letters->out_letters``."""
    alphabet = "".join(sorted(set(x_letters + y_letters)))
    a, b = operand(t, x, x_letters, alphabet), operand(t, y, y_letters, alphabet)
    length = {**dict(zip(x_letters, x.shape, strict=True))}
    for letter, n in zip(y_letters, y.shape, strict=True):
        length[letter] = max(n, length.get(letter, 1))
    shared = set(x_letters) & set(y_letters)
    for o in (a, b):
        if o.is_parameter:
            t.inputs |= {(t.names[id(o.tensor)], o.letters.index(k)) for k in shared if k not in out_letters}
    for letter in alphabet:
        if letter in shared:
            _tie_letter(t, a, b, letter, alphabet, shared, out_letters)
        elif letter not in out_letters:
            _sum_letter(t, a if letter in x_letters else b, letter)
    _mark_heads(t, a, b, shared, alphabet, out_letters)
    _label_result(t, a, b, alphabet, out, out_letters)
    t.count_work(1, [(_either(a, b, k), alphabet.index(k), int(length[k])) for k in alphabet])


def _either(a: Operand, b: Operand, letter: str) -> Label | None:
    label = a.labels.get(letter)
    return b.labels.get(letter) if label is None else label


def _tie_letter(
    t: Tracer, a: Operand, b: Operand, letter: str, alphabet: str, shared: set[str], out_letters: str
) -> None:
    left, right = a.labels[letter], b.labels[letter]
    n = [o.tensor.shape[o.letters.index(letter)] for o in (a, b)]
    if (left is None and right is None) or n[0] != n[1]:
        return
    contracted = letter not in out_letters
    why = t.why("contracted" if contracted else "paired")
    loose = [i for i, k in enumerate(alphabet) if k not in shared]
    if left is None or right is None:
        for label in (left, right):
            t.freeze(label, MEETS)
        a.labels[letter] = b.labels[letter] = None
        return
    left, right = t.ledger.collapse(left, loose, why), t.ledger.collapse(right, loose, why)
    t.ledger.tie(left, right, why)
    a.labels[letter] = b.labels[letter] = left if left.size <= right.size else right
    if contracted and not (a.zero[letter] or b.zero[letter]):
        t.freeze(left, NOT_ZERO)


def _sum_letter(t: Tracer, o: Operand, letter: str) -> None:
    label = o.labels[letter]
    if label is not None and not o.zero[letter]:
        t.freeze(label, "summed where removed units are not zero")


def _mark_heads(t: Tracer, a: Operand, b: Operand, shared: set[str], alphabet: str, out_letters: str) -> None:
    """A head is a labelled batch dimension of a contraction of two activations."""
    if a.is_parameter or b.is_parameter:
        return
    for letter in shared & set(out_letters):
        label = _either(a, b, letter)
        if label is None or not label.any():
            continue
        t.ledger.head_rows.append(label.ravel())
        axis = alphabet.index(letter)
        if any(1 in o.tensor.shape[-2:] and o.letters.index(letter) < o.tensor.ndim - 2 for o in (a, b)):
            t.ledger.narrow_heads.append(label.ravel())
        for o in (a, b):
            for other, cells in o.labels.items():
                if other != letter and cells is not None and cells.shape[axis] > 1:
                    t.ledger.head_cells.append(cells.ravel())


def _label_result(t: Tracer, a: Operand, b: Operand, alphabet: str, out: Tensor, out_letters: str) -> None:
    why = t.why("the same for all contracted positions")
    gone = [i for i, k in enumerate(alphabet) if k not in out_letters]
    dims: list[Label | None] = []
    zero: list[bool] = []
    for letter in out_letters:
        label = _either(a, b, letter)
        zero.append(a.zero.get(letter, False) or b.zero.get(letter, False))
        if label is None:
            dims.append(None)
            continue
        label = t.ledger.collapse(label, gone, why)
        kept = [alphabet.index(k) for k in out_letters]
        dims.append(label.transpose(kept + gone).reshape([label.shape[i] for i in kept]))
    t.put(out, Tags(tuple(dims), tuple(zero)))


@rule("mm")
def mm(t: Tracer, a: Arguments, out: Tensor) -> None:
    """[n, k] @ [k, m]."""
    contract(t, a["self"], "nk", a["mat2"], "km", out, "nm")


@rule("addmm")
def addmm(t: Tracer, a: Arguments, out: Tensor) -> None:
    """Bias + [n, k] @ [k, m]."""
    contract(t, a["mat1"], "nk", a["mat2"], "km", out, "nm")
    add_bias(t, a["self"], out)


@rule("bmm")
def bmm(t: Tracer, a: Arguments, out: Tensor) -> None:
    """[b, n, k] @ [b, k, m]."""
    contract(t, a["self"], "bnk", a["mat2"], "bkm", out, "bnm")


@rule("baddbmm")
def baddbmm(t: Tracer, a: Arguments, out: Tensor) -> None:
    """Bias + [b, n, k] @ [b, k, m]."""
    contract(t, a["batch1"], "bnk", a["batch2"], "bkm", out, "bnm")
    if a["beta"] != 0:
        add_bias(t, a["self"], out)


@rule("mv")
def mv(t: Tracer, a: Arguments, out: Tensor) -> None:
    """[n, k] @ [k]."""
    contract(t, a["self"], "nk", a["vec"], "k", out, "n")


@rule("dot", "vdot")
def dot(t: Tracer, a: Arguments, out: Tensor) -> None:
    """[k] @ [k]."""
    contract(t, a["self"], "k", a["tensor" if "tensor" in a else "other"], "k", out, "")


@rule("_grouped_mm")
def grouped_mm(t: Tracer, a: Arguments, out: Tensor) -> None:
    """Rows of [s, k] by the matrix of their expert in [e, k, n]: experts are counted by offsets and stay."""
    x, weight = a["self"], a["mat2"]
    if x.ndim != 2 or weight.ndim != 3:
        unknown(t, [x, weight])
        return
    t.freeze(t.tags(weight).dims[0], "experts are told apart by offsets")
    contract(t, x, "sk", weight, "ekn", out, "sn")


@rule("outer", "ger")
def outer(t: Tracer, a: Arguments, out: Tensor) -> None:
    """[n] x [m]."""
    contract(t, a["self"], "n", a["vec2"], "m", out, "nm")


def add_bias(t: Tracer, bias: Tensor, out: Tensor) -> None:
    """Tie a broadcast addend to a result."""
    tags, result = t.tags(bias), t.tags(out)
    for d in range(out.ndim):
        own = d - out.ndim + bias.ndim
        if own < 0 or out.shape[d] == 1 or bias.shape[own] != out.shape[d]:
            continue
        label, there = tags.dims[own], result.dims[d]
        if label is not None and there is not None:
            t.ledger.tie(label.reshape((1,) * (out.ndim - bias.ndim) + label.shape), there, t.why("bias of"))
        else:
            t.freeze(label, "bias of a dimension that must stay")
            t.freeze(there, "has a bias that must stay")
    bias_zero = [
        d - out.ndim + bias.ndim >= 0 and tags.zero[d - out.ndim + bias.ndim] for d in range(out.ndim)
    ]
    zero = tuple(z and b for z, b in zip(result.zero, bias_zero, strict=True))
    t.put(out, Tags(result.dims, zero))


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
    window = int(np.prod(weight.shape[2:])) * int(np.prod(x.shape[:channel]))
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
    steps = [int(s) for s in stride] if isinstance(stride, (tuple, list)) else [int(stride)]
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
