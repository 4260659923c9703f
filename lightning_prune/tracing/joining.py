"""Joining: tensors side by side become one, and agree on everything but the dimension they stand along."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from lightning_prune.tracing.labels import Label, Tags, compress
from lightning_prune.tracing.rules import Arguments, rule
from lightning_prune.tracing.tracer import Tracer


@rule("cat", "concat", "concatenate")
def cat(t: Tracer, a: Arguments, out: Tensor) -> None:
    """Put labels one behind the other; the other dimensions tie."""
    pieces = [x for x in a["tensors"] if x.ndim == out.ndim and 0 not in x.shape]
    dim = (a["dim"] or 0) % out.ndim
    tags = [t.tags(x) for x in pieces]
    dims: list[Label | None] = []
    for d in range(out.ndim):
        labels = [tag.dims[d] for tag in tags]
        dims.append(_joined(pieces, labels, dim) if d == dim else _agreed(t, labels, (dim,), "concatenated"))
    zero = tuple(all(tag.zero[d] for tag in tags if tag.dims[d] is not None) for d in range(out.ndim))
    t.put(out, Tags(tuple(dims), zero, tuple(s for tag in tags for s in tag.statistics)))


@rule("stack")
def stack(t: Tracer, a: Arguments, out: Tensor) -> None:
    """A new dimension; the others tie."""
    dim = (a["dim"] or 0) % out.ndim
    tags = [t.tags(x) for x in a["tensors"]]
    dims: list[Label | None] = []
    for d in range(out.ndim - 1):
        label = _agreed(t, [tag.dims[d] for tag in tags], (), "stacked")
        dims.append(None if label is None else np.expand_dims(label, dim))
    dims.insert(dim, None)
    zero = [all(tag.zero[d] for tag in tags) for d in range(out.ndim - 1)]
    zero.insert(dim, False)
    t.put(out, Tags(tuple(dims), tuple(zero), tuple(s for tag in tags for s in tag.statistics)))


def _joined(pieces: Sequence[Tensor], labels: Sequence[Label | None], dim: int) -> Label | None:
    if all(label is None for label in labels):
        return None
    rank = pieces[0].ndim
    shapes = [label.shape for label in labels if label is not None]
    scope = [max(shape[d] for shape in shapes) for d in range(rank)]
    parts = []
    for x, label in zip(pieces, labels, strict=True):
        scope[dim] = x.shape[dim]
        parts.append(np.broadcast_to(np.zeros((1,) * rank, np.int64) if label is None else label, scope))
    return compress(np.concatenate(parts, axis=dim), dim)


def _agreed(t: Tracer, labels: Sequence[Label | None], along: Sequence[int], text: str) -> Label | None:
    """The one label that pieces side by side have; what it may not depend on is the place ``along`` them."""
    why = t.why(text)
    present = [t.ledger.collapse(label, along, why) for label in labels if label is not None]
    if not present or len(present) < len(labels):
        for label in present:
            t.ledger.freeze(label, why)
        return None
    smallest = min(present, key=lambda label: label.size)
    for label in present:
        t.ledger.tie(label, smallest, why)
    return smallest
