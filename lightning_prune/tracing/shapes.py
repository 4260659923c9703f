"""Labels through a reshape: align factors, merge the dimensions of a block, split them again."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lightning_prune.tracing.labels import Dims, Ints, Label, Ledger, compress

Block = tuple[list[int], list[int]]


def blocks(before: Sequence[int], after: Sequence[int]) -> list[Block]:
    """Pair up the shortest runs of dimensions with equal products.

    >>> blocks((2, 6, 4), (2, 2, 3, 4))
    [([0], [0]), ([1], [1, 2]), ([2], [3])]
    """
    found: list[Block] = []
    i = j = 0
    while i < len(before) or j < len(after):
        ins, outs = [], []
        if i < len(before) and before[i] == 1 and not (j < len(after) and after[j] == 1):
            found.append(([i], []))
            i += 1
            continue
        if j < len(after) and after[j] == 1 and not (i < len(before) and before[i] == 1):
            found.append(([], [j]))
            j += 1
            continue
        ins.append(i)
        outs.append(j)
        a, b = before[i], after[j]
        i, j = i + 1, j + 1
        while a != b:
            if a < b:
                a *= before[i]
                ins.append(i)
                i += 1
            else:
                b *= after[j]
                outs.append(j)
                j += 1
        found.append((ins, outs))
    return found


def reshape(ledger: Ledger, dims: Dims, before: Sequence[int], after: Sequence[int], why: int) -> Dims:
    """Labels after ``view``/``reshape`` from one shape to another."""
    out: list[Label | None] = [None] * len(after)
    if 0 in before or all(d is None for d in dims):
        return tuple(out)
    parts = blocks(before, after)
    for part in parts:
        ins, outs = part
        if not outs or all(dims[d] is None for d in ins):
            continue
        labels = [_without_inner_scopes(ledger, dims[d], d, ins, why) for d in ins]
        flat = merge(ledger, labels, ins, [before[d] for d in ins], why)
        flat = _scopes_after(flat, before, after, parts, part)
        for dim, label in zip(outs, divide(ledger, flat, [after[d] for d in outs], why), strict=True):
            if label is not None and label.any():
                out[dim] = compress(_place(label, len(after), outs), dim)
    return tuple(out)


def _without_inner_scopes(
    ledger: Ledger, label: Label | None, dim: int, ins: list[int], why: int
) -> Label | None:
    """An outer dimension that depends on an inner one cannot be merged in order: cut it aligned."""
    if label is None:
        return None
    return ledger.collapse(label, [d for d in ins if d > dim], why)


def merge(ledger: Ledger, labels: list[Label | None], ins: list[int], sizes: list[int], why: int) -> Ints:
    """Merge a block into [input axes, the block's being 1][..., n], n the product of ``sizes``."""
    _settle_elastic(ledger, labels, why)
    leaf: Ints | None = None
    for label in reversed(labels):
        if label is not None and label.any():
            leaf = label if leaf is None else ledger.both(label, leaf)
    if leaf is None:
        leaf = next(label for label in labels if label is not None)
    full = list(leaf.shape)
    for d, n in zip(ins, sizes, strict=True):
        full[d] = n
    rest = [a for a in range(leaf.ndim) if a not in ins]
    shape = [1 if a in ins else full[a] for a in range(leaf.ndim)]
    if leaf.shape != tuple(full):
        leaf = np.broadcast_to(leaf, full)
    return leaf.transpose(rest + ins).reshape(*shape, -1)


def _settle_elastic(ledger: Ledger, labels: list[Label | None], why: int) -> None:
    """A repeat count stays when what it repeats is labelled: kv heads go with all their query heads."""
    present = [label for label in labels if label is not None and label.any()]
    stretched = [label for label in present if ledger.is_elastic(label)]
    if 0 < len(stretched) < len(present):
        for label in stretched:
            ledger.freeze(label, why)


def _scopes_after(
    flat: Ints, before: Sequence[int], after: Sequence[int], parts: list[Block], part: Block
) -> Ints:
    """Re-express the scope axes of a merged label by the reshape of their own blocks."""
    if flat.size == flat.shape[-1]:  # it has none
        return flat.reshape(*[1] * len(after), -1)
    source: list[int] = []
    target: list[int] = []
    for ins, outs in parts:
        varies = (ins, outs) != part and any(flat.shape[d] > 1 for d in ins)
        source += [before[d] if varies else 1 for d in ins]
        target += [after[d] if varies else 1 for d in outs]
    return np.broadcast_to(flat, (*source, flat.shape[-1])).reshape(*target, flat.shape[-1])


def divide(ledger: Ledger, flat: Ints, sizes: list[int], why: int) -> list[Label | None]:
    """Split [scope..., n] into one label per size, each with axes [scope..., *sizes or 1]."""
    if len(sizes) == 1:
        return [flat]
    outer, rest = sizes[0], sizes[1:]
    table = flat.reshape(*flat.shape[:-1], outer, -1)
    if (table == table[..., :1, :]).all():
        inner = divide(ledger, table[..., 0, :], rest, why)
        return [None, *(None if x is None else np.expand_dims(x, flat.ndim - 1) for x in inner)]
    if (table == table[..., :1]).all():
        return [_with_ones(table[..., 0], len(rest)), *([None] * len(rest))]
    row, cell = ledger.divide(flat, outer, why)
    return [_with_ones(row, len(rest)), *divide(ledger, cell, rest, why)]


def _with_ones(label: Ints, count: int) -> Ints:
    return label.reshape(*label.shape, *([1] * count))


def _place(label: Ints, rank: int, outs: list[int]) -> Label:
    """Move the block's axes, kept behind the scope axes, to where they belong."""
    order = [rank + outs.index(d) if d in outs else d for d in range(rank)]
    moved = label.transpose(order + [d for d in range(rank) if d in outs])
    return moved.reshape(moved.shape[:rank])
