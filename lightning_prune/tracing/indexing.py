"""Look-ups: the indexed dimension stays, the others move."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

from lightning_prune.tracing.labels import Label, Tags
from lightning_prune.tracing.movement import pass_through
from lightning_prune.tracing.rules import Arguments, rule
from lightning_prune.tracing.tracer import Tracer

INDEXED = "looked up by index"


@rule("embedding")
def embedding(t: Tracer, a: Arguments, out: Tensor) -> None:
    """[vocabulary, width][indices] -> [*indices, width]."""
    weight = a["weight"]
    tags = t.tags(weight)
    t.freeze(tags.dims[0], INDEXED)
    t.freeze_tensor(a["indices"], "indices stay")
    label = tags.dims[1]
    dims: list[Label | None] = [None] * (out.ndim - 1)
    if label is not None:
        dims.append(t.ledger.collapse(label, [0], t.why(INDEXED)).reshape((1,) * (out.ndim - 1) + (-1,)))
    else:
        dims.append(None)
    t.put(out, Tags(tuple(dims), (False,) * (out.ndim - 1) + (tags.zero[1],)))


@rule("index", "_unsafe_index")
def index(t: Tracer, a: Arguments, out: Tensor) -> None:
    """Advanced indexing: ``None`` entries pass, indexed ones stay."""
    x = a["self"]
    indices = list(a["indices"]) + [None] * (x.ndim - len(a["indices"]))
    indexed: list[int] = []
    d = 0
    for entry in indices[: x.ndim]:
        width = (
            entry.ndim
            if isinstance(entry, Tensor) and entry.dtype.is_floating_point is False and _is_mask(entry)
            else 1
        )
        if entry is not None:
            t.freeze_tensor(entry, "indices stay")
            indexed += range(d, d + width)
        d += width
    _picked(t, x, out, indexed, _is_consecutive(indexed))


def _is_mask(entry: Tensor) -> bool:
    return str(entry.dtype) in ("torch.bool", "torch.uint8")


def _is_consecutive(dims: list[int]) -> bool:
    return dims == list(range(dims[0], dims[0] + len(dims))) if dims else True


def _picked(t: Tracer, x: Tensor, out: Tensor, indexed: list[int], in_place: bool) -> None:
    tags = t.tags(x)
    rest = [d for d in range(x.ndim) if d not in indexed]
    for d in indexed:
        t.freeze(tags.dims[d], INDEXED)
    new = out.ndim - len(rest)
    at = indexed[0] if in_place and indexed else 0
    why = t.why(INDEXED)
    dims: list[Label | None] = []
    zero: list[bool] = []
    for d in rest:
        label = tags.dims[d]
        zero.append(tags.zero[d])
        dims.append(
            None if label is None else _insert_ones(t.ledger.collapse(label, indexed, why), indexed, at, new)
        )
    dims[at:at] = [None] * new
    zero[at:at] = [False] * new
    t.put(out, Tags(tuple(dims), tuple(zero), tags.statistics))


def _insert_ones(label: Label, indexed: list[int], at: int, new: int) -> Label:
    rest = np.squeeze(label, tuple(indexed))
    return rest.reshape(rest.shape[:at] + (1,) * new + rest.shape[at:])


@rule("index_select")
def index_select(t: Tracer, a: Arguments, out: Tensor) -> None:
    """Pick along one dimension."""
    x = a["self"]
    t.freeze_tensor(a["index"], "indices stay")
    dim = a["dim"] % x.ndim
    pass_through(t, x, out, [d for d in range(x.ndim) if d != dim], INDEXED)


@rule("gather", "take_along_dim")
def gather(t: Tracer, a: Arguments, out: Tensor) -> None:
    """Every dimension of the index is counted."""
    x, where = a["self"], a["index"]
    dim = a["dim"] % x.ndim
    labels = t.tags(where)
    kept = []
    for d in range(x.ndim):
        label, other = t.tags(x).dims[d], labels.dims[d]
        if d != dim and label is not None and other is not None:
            t.ledger.tie(label, other, t.why(INDEXED))
            kept.append(d)
        else:
            t.freeze(other, "indices stay")
    pass_through(t, x, out, kept, INDEXED)


@rule(
    "scatter",
    "scatter_add",
    "scatter_reduce",
    "index_add",
    "index_copy",
    "index_fill",
    "index_put",
    "_index_put_impl",
)
def scatter(t: Tracer, a: Arguments, out: Any) -> None:
    """Write by index: dimensions that pass whole tie; the indexed one stays."""
    target = a["self"]
    value = a.get("src") if a.get("src") is not None else a.get("source", a.get("values"))
    dim = a.get("dim")
    tags = t.tags(target)
    dims = list(tags.dims)
    if dim is None and isinstance(value, Tensor):
        _scatter_by_indices(t, a, dims, value)
    else:
        for d, label in enumerate(dims):
            value_label = (
                t.tags(value).dims[d] if isinstance(value, Tensor) and value.ndim == target.ndim else None
            )
            same = (
                isinstance(value, Tensor)
                and d != dim % target.ndim
                and label is not None
                and value_label is not None
            )
            if (
                same
                and value is not None
                and value.shape[d] == target.shape[d]
                and not t.op.startswith("scatter")
            ):
                t.ledger.tie(label, value_label, t.why("written"))  # type: ignore[arg-type]
            elif isinstance(value, Tensor) or d == dim % target.ndim:
                t.freeze(label, "written by index")
                t.freeze(value_label, "written by index")
                dims[d] = None
    t.soil(target)
    t.put(out, Tags(tuple(dims), (False,) * target.ndim))


def _scatter_by_indices(t: Tracer, a: Arguments, dims: list[Label | None], value: Tensor) -> None:
    indices = list(a["indices"]) + [None] * (len(dims) - len(a["indices"]))
    for d, entry in enumerate(indices[: len(dims)]):
        own = d - len(dims) + value.ndim
        other = t.tags(value).dims[own] if own >= 0 else None
        label = dims[d]
        if entry is None and label is not None and other is not None and value.shape[own] == label.shape[d]:
            scopes = [k for k in range(other.ndim) if k != own]
            why = t.why("written")
            flat = t.ledger.collapse(other, scopes, why).reshape(-1)
            mine = t.ledger.collapse(label, [k for k in range(len(dims)) if k != d], why).reshape(-1)
            t.ledger.tie(mine, flat, why)
        elif entry is not None or not (own < 0 or value.shape[own] == 1):
            t.freeze(label, "written by index")
            t.freeze(other, "written by index")
            dims[d] = None


@rule("nonzero", "_local_scalar_dense", "item", "equal", "is_nonzero", "_unique2", "bincount", "one_hot")
def read(t: Tracer, a: Arguments, out: Any) -> None:
    """Python reads values: what they depend on stays."""
    t.freeze_tensor(a["self"], "its values are read by Python")


@rule(
    "sym_size", "sym_stride", "sym_numel", "sym_storage_offset", "_assert_async", "_assert_tensor_metadata",
    "new_empty", "new_zeros", "new_ones", "new_full", "new_empty_strided",
)  # fmt: skip
def nothing(t: Tracer, a: Arguments, out: Any) -> None:
    """No data moves from the arguments to the result."""
