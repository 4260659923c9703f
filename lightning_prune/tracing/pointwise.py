"""Pointwise operations: dimensions of full length tie, a broadcast of length 1 does not."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_prune.tracing.labels import Label, Tags, along
from lightning_prune.tracing.rules import Arguments, rule, tensors_in
from lightning_prune.tracing.tracer import Tracer

_ZERO: dict[Any, bool] = {}


# The first stands for all operations that torch itself tags as pointwise; these it forgot.
@rule(
    "pointwise", "masked_fill", "copy", "lerp", "threshold", "nan_to_num", "bernoulli", "_to_copy",
    "native_dropout", "hardswish", "_prelu_kernel", "log_sigmoid_forward", "floor_divide", "fill",
    "zero", "conj", "real", "imag", "polar", "complex", "isclose", "alpha_dropout", "uniform", "normal",
    "exponential", "type_as",
)  # fmt: skip
def pointwise(t: Tracer, a: Arguments, out: Any) -> None:
    """Tie what meets; the result carries the labels."""
    values = [v for k, v in a.items() if k not in ("func", "out")]
    inputs = tensors_in(values)
    results = tensors_in((out,))
    tags = [t.tags(x) for x in inputs]
    first = results[0]
    dims = meet(t, inputs, tags, first)
    zero = tuple(
        label is not None and _keeps_zero(a, inputs, tags, first.ndim, d) for d, label in enumerate(dims)
    )
    statistics = _statistics(tags)
    for result in results:
        if any(result is x for x in inputs):
            _note_lost_zeros(t, result, zero)
        if result.shape == first.shape:
            t.put(result, Tags(dims, zero, statistics))


def meet(t: Tracer, inputs: list[Tensor], tags: list[Tags], out: Tensor) -> tuple[Label | None, ...]:
    """Tie operands dimension by dimension, aligned at the last; give the labels of the result."""
    dims: list[Label | None] = []
    for d in range(out.ndim):
        length = out.shape[d]
        labels, is_opaque = [], False
        for x, tag in zip(inputs, tags, strict=True):
            own = d - out.ndim + x.ndim
            if length > 1 and own >= 0 and x.shape[own] == length:
                label = tag.dims[own]
                is_opaque |= label is None
                if label is not None:
                    labels.append(label.reshape((1,) * (out.ndim - x.ndim) + label.shape))
        dims.append(_one_label(t, labels, is_opaque))
    return tuple(dims)


def _one_label(t: Tracer, labels: list[Label], is_opaque: bool) -> Label | None:
    if not labels:
        return None
    if is_opaque:
        for label in labels:
            t.freeze(label, "meets a dimension that must stay")
        return None
    smallest = min(labels, key=lambda label: label.size)
    if len(labels) > 1:
        why = t.why("tied elementwise")
        for label in labels:
            if label is not smallest:
                t.ledger.tie(label, smallest, why)
    return smallest


def _statistics(tags: list[Tags]) -> tuple[Label, ...]:
    """A mean over channels is used up where it meets the channels it was taken over."""
    left: list[Label] = []
    for i, tag in enumerate(tags):
        for statistic in tag.statistics:
            others = [d for j, other in enumerate(tags) if j != i for d in other.dims if d is not None]
            if not any(label is statistic or _covers(label, statistic) for label in others):
                left.append(statistic)
    return tuple(left)


def _covers(label: Label, statistic: Label) -> bool:
    if label.size < statistic.size:
        return False
    dim = max(range(label.ndim), key=lambda d: label.shape[d])
    atoms, wanted = set(along(label, dim).ravel().tolist()), set(statistic.ravel().tolist())
    return wanted <= atoms


def _keeps_zero(a: Arguments, inputs: list[Tensor], tags: list[Tags], rank: int, d: int) -> bool:
    """True if the result is zero wherever the operands of removed positions are."""
    pattern = []
    for x, tag in zip(inputs, tags, strict=True):
        own = d - rank + x.ndim
        pattern.append(own >= 0 and tag.dims[own] is not None and tag.zero[own])
    if not any(pattern):
        return False
    key = (a["func"], tuple(pattern), tuple(x.dtype for x in inputs), _constants(a))
    if key not in _ZERO:
        _ZERO[key] = _try_zero(a, inputs, pattern)
    return _ZERO[key]


def _constants(a: Arguments) -> str:
    return repr([(k, v) for k, v in a.items() if k != "func" and not tensors_in((v,))])


def _try_zero(a: Arguments, inputs: list[Tensor], pattern: list[bool]) -> bool:
    """Run the operation on zeros where zeros come in and on arbitrary numbers elsewhere."""
    for sample in (0.7, -1.3):
        probes = iter(
            torch.zeros((), dtype=x.dtype) if is_zero else torch.tensor(sample).to(x.dtype)
            for x, is_zero in zip(inputs, pattern, strict=True)
        )
        bound = {k: _probe(v, probes) for k, v in a.items() if k not in ("func", "out")}
        try:
            result = tensors_in((a["func"](**bound),))[0]
        except (RuntimeError, TypeError, ValueError):
            return False
        if result.count_nonzero().item():
            return False
    return True


def _probe(value: Any, probes: Any) -> Any:
    if isinstance(value, Tensor):
        return next(probes)
    if isinstance(value, (list, tuple)) and tensors_in((value,)):
        return [_probe(v, probes) for v in value]
    if isinstance(value, torch.device):
        return torch.device("cpu")
    return value


def _note_lost_zeros(t: Tracer, tensor: Tensor, zero: tuple[bool, ...]) -> None:
    before = t.tags(tensor).zero
    if any(was and not now for was, now in zip(before, zero, strict=True)):
        t.soil(tensor)
