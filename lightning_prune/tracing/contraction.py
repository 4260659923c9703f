"""Contractions: contracted dimensions tie, batch dimensions tie, the result takes the rest.

Shape legend: operands are described by letters, one per dimension, as in ``einsum``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from lightning_prune.tracing.labels import Label, Tags
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
    at = [letters.find(letter) for letter in alphabet]
    labels: dict[str, Label | None] = {}
    for letter, label in zip(letters, tags.dims, strict=True):
        labels[letter] = None if label is None else _spread(label, at)
    zero = dict(zip(letters, tags.zero, strict=True))
    return Operand(tensor, letters, labels, zero, id(tensor) in t.names)


def _spread(label: Label, at: Sequence[int]) -> Label:
    """Put axis ``at[j]`` of a label in place j; -1 is an axis of length 1."""
    order = [d for d in at if d >= 0]
    return label.transpose(order).reshape([label.shape[d] if d >= 0 else 1 for d in at])


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
