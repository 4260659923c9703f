"""Layout: how each tensor is walked, so that sums and updates run at the speed of memory.

A tensor is seen as a contiguous array of few axes (its *view*), in the order in which it lies in memory. A
slot is a dimension whose positions carry numbers; all slots together make one flat vector. Large tensors are
walked in chunks along the first axis, so that temporaries stay in the cache and no memory is held.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import repeat

import torch
from torch import Tensor

__all__ = ["PIECES", "Block", "Slot", "place", "plan_blocks", "unrepeat"]

# Trailing axes shorter than this are folded into the one before: loops over 9 elements of a 3x3 kernel cost
# three times as much as one loop over a row.
FOLD_BELOW = 64
# Sums over the first axis are made in as many parts, so that a core reads the rows that it has just written.
# The number is fixed: the last digits must not depend on the machine.
PIECES = 8


@dataclass(frozen=True)
class Slot:
    """Positions of one dimension of a tensor.

    Args:
        dim: The dimension.
        rows: Number of blocks of dimension 0 with positions of their own, 1 = one for all.
        start: Where its positions start in the flat vector.
        stop: Where they end.
        shape: Shape of its numbers, broadcast against the block's view, before ``repeat``.
        reduce: Axes of the view to sum over.
        repeat: How often each position stands in a row of the view's last axis.
    """

    dim: int
    rows: int
    start: int
    stop: int
    shape: tuple[int, ...]
    reduce: tuple[int, ...]
    repeat: int


@dataclass(frozen=True)
class Block:
    """One tensor with the slots that one view of it can serve.

    Args:
        tensor: Its name.
        shape: Its shape; a tensor that has another one is not the tensor this was made for.
        order: Permutation to memory order, None where that is the order it has.
        view: Sizes of the view.
        slots: Slots, at least one.
    """

    tensor: str
    shape: tuple[int, ...]
    order: tuple[int, ...] | None
    view: tuple[int, ...]
    slots: tuple[Slot, ...]

    @property
    def is_vector(self) -> bool:
        """Whether every element is a position of the only slot."""
        return len(self.slots) == 1 and not self.slots[0].reduce and self.slots[0].repeat == 1

    def step(self, limit: int) -> int:
        """Rows of the view per chunk of at most ``limit`` elements, at least one."""
        return max(1, min(self.view[0], limit // max(1, math.prod(self.view[1:]))))

    def look(self, tensor: Tensor) -> Tensor:
        """View a tensor of this block's shape.

        Raises:
            RuntimeError: If it lies otherwise in memory, so that no such view exists.
        """
        return (tensor if self.order is None else tensor.permute(self.order)).view(self.view)

    def sums(self, tensor: Tensor, scratch: Tensor, step: int) -> list[Tensor]:
        """Sum the squares per position of every slot, in one pass; a vector's squares are its sums already.

        Args:
            tensor: Seen through ``look``.
            scratch: [>= step * elements per row of the view], overwritten; gives the precision.
            step: Rows per chunk.

        Returns:
            Per slot, [positions].
        """
        parts: list[list[Tensor]] = [[] for _ in self.slots]
        for chunk in torch.split(tensor, step) if step < len(tensor) else (tensor,):
            squares = scratch[: chunk.numel()].view(chunk.shape)
            if chunk.dtype == scratch.dtype:
                torch.mul(chunk, chunk, out=squares)
            else:
                squares.copy_(chunk).square_()
            for slot, found in zip(self.slots, parts, strict=True):
                part = _summed(squares, slot)
                if found and 0 in slot.reduce and found[0].shape == part.shape:
                    found[0] += part
                else:
                    found.append(part)
        totals = [_joined(found, slot) for found, slot in zip(parts, self.slots, strict=True)]
        return [unrepeat(total, s.repeat) for s, total in zip(self.slots, totals, strict=True)]

    def spread(self, flat: Tensor) -> list[Tensor]:
        """Shape one number per position, [all positions], for broadcasting against the view; one per slot."""
        found = []
        for slot in self.slots:
            numbers = flat[slot.start : slot.stop].view(slot.shape)
            if slot.repeat > 1:
                numbers = numbers.unsqueeze(-1).expand(*slot.shape, slot.repeat).flatten(-2)
            found.append(numbers)
        return found

    def add_scaled(
        self,
        target: Tensor,
        tensor: Tensor,
        factors: Sequence[Tensor],
        scratch: Tensor,
        *,
        step: int,
        clean: bool,
    ) -> None:
        """Add ``tensor * sum(factors)`` to the target, in one pass.

        Args:
            target: Seen through ``look``; changed in place.
            tensor: Seen through ``look``.
            factors: From ``spread``.
            scratch: [>= step * elements per row of the view], overwritten; gives the precision.
            step: Rows per chunk.
            clean: Whether to count elements that are not finite as 0.
        """
        if step >= len(tensor):
            self._add_chunk(target, tensor, factors, scratch, clean=clean)
            return
        per_chunk = [torch.split(f, step) if len(f) > 1 else repeat(f) for f in factors]
        for into, chunk, *here in zip(
            torch.split(target, step), torch.split(tensor, step), *per_chunk, strict=False
        ):
            self._add_chunk(into, chunk, here, scratch, clean=clean)

    def _add_chunk(
        self, into: Tensor, chunk: Tensor, factors: Sequence[Tensor], scratch: Tensor, *, clean: bool
    ) -> None:
        source = chunk.nan_to_num(0, 0, 0) if clean else chunk
        if len(factors) == 1:
            into.addcmul_(source, factors[0])
            return
        # Added up in the cache first: the gradient, which lies in memory, is then written once.
        shape = torch.broadcast_shapes(*(f.shape for f in factors))  # type: ignore[no-untyped-call]
        total = scratch[: math.prod(shape)].view(shape)
        torch.add(factors[0], factors[1], out=total)
        for factor in factors[2:]:
            total += factor
        into.addcmul_(source, total)


def _summed(squares: Tensor, slot: Slot) -> Tensor:
    """Sum over what a slot has no positions along, [positions]; over the first axis [pieces, positions]."""
    if 0 not in slot.reduce:
        return squares.sum(slot.reduce).flatten()  # never of no axis: such a block is a vector
    pieces = PIECES if len(squares) % PIECES == 0 else 1
    split = squares.view(pieces, len(squares) // pieces, *squares.shape[1:])
    return split.sum([axis + 1 for axis in slot.reduce]).flatten(1)


def _joined(found: Sequence[Tensor], slot: Slot) -> Tensor:
    """Give the sums of all chunks, [positions]."""
    if 0 not in slot.reduce:
        return found[0] if len(found) == 1 else torch.cat(list(found))
    total = found[0].sum(0)
    for part in found[1:]:
        total += part.sum(0)
    return total


def unrepeat(total: Tensor, times: int) -> Tensor:
    """Add up the places at which each position stands."""
    return total.view(-1, times).sum(1) if times > 1 else total


def plan_blocks(tensors: Mapping[str, Tensor], wanted: Iterable[tuple[str, int, int]]) -> list[Block]:
    """Lay out the walk over the given dimensions.

    Args:
        tensors: By name, real.
        wanted: (tensor, dim, rows) triples; repeats are ignored.

    Returns:
        Blocks, vectors first; the slots follow each other without gaps in the order of the blocks.
    """
    table: dict[tuple[str, int], list[tuple[int, int]]] = {}
    by_tensor: dict[str, set[tuple[int, int]]] = {}
    for name, dim, rows in wanted:
        by_tensor.setdefault(name, set()).add((dim, rows))
    for name, dims in by_tensor.items():
        splits = sorted({rows for _, rows in dims if rows > 1}) or [1]
        # One view splits dimension 0 in one way; dimensions without rows of their own fit into any.
        for i, split in enumerate(splits):
            table[name, split] = sorted(d for d in dims if d[1] == split or (d[1] == 1 and i == 0))
    drafts = [_draft(name, tensors[name], split, dims) for (name, split), dims in table.items()]
    drafts.sort(key=lambda block: not block.is_vector)
    return place(drafts)


def place(blocks: Sequence[Block]) -> list[Block]:
    """Give the slots their places in the flat vector."""
    placed, start = [], 0
    for block in blocks:
        slots = []
        for s in block.slots:
            stop = start + math.prod(s.shape)
            slots.append(Slot(s.dim, s.rows, start, stop, s.shape, s.reduce, s.repeat))
            start = stop
        placed.append(Block(block.tensor, block.shape, block.order, block.view, tuple(slots)))
    return placed


Axis = tuple[int, frozenset[int]]  # size, which slots have positions along it


def _draft(name: str, tensor: Tensor, split: int, dims: Sequence[tuple[int, int]]) -> Block:
    """Choose the view of a tensor for the given (dim, rows) pairs; the places of the slots come later."""
    order = _memory_order(tensor)
    if split > 1 and order[0] != 0:
        order = tuple(range(tensor.dim()))
    axes: list[Axis] = []
    for dim in order:
        here = frozenset(i for i, (d, _) in enumerate(dims) if d == dim)
        if dim == 0 and split > 1:
            axes.append((split, here | {i for i, (_, rows) in enumerate(dims) if rows == split}))
            axes.append((tensor.shape[0] // split, here))
        else:
            axes.append((tensor.shape[dim], here))
    times = 1
    if tensor.permute(order).is_contiguous():
        axes = _merged(axes)
        if len(axes) > 2 and not axes[-1][1] and axes[-1][0] < FOLD_BELOW:
            times = axes[-1][0]
            axes = [*axes[:-2], (axes[-2][0] * times, axes[-2][1])]
    slots = tuple(_slot(i, dim, rows, axes, times) for i, (dim, rows) in enumerate(dims))
    straight = order == tuple(range(tensor.dim()))
    return Block(name, tuple(tensor.shape), None if straight else order, tuple(s for s, _ in axes), slots)


def _slot(i: int, dim: int, rows: int, axes: Sequence[Axis], times: int) -> Slot:
    touched = [i in owners for _, owners in axes]
    times = times if touched[-1] else 1
    shape = [size if t else 1 for (size, _), t in zip(axes, touched, strict=True)]
    shape[-1] //= times
    reduce = tuple(a for a, t in enumerate(touched) if not t)
    return Slot(dim, rows, 0, 0, tuple(shape), reduce, times)


def _memory_order(tensor: Tensor) -> tuple[int, ...]:
    """Sort the dimensions by stride, outermost first; dimensions of size 1 stay where they are."""
    strides = tensor.stride()
    order = [d for d in range(tensor.dim()) if tensor.shape[d] != 1]
    order.sort(key=lambda d: -strides[d])
    single = [d for d in range(tensor.dim()) if tensor.shape[d] == 1]
    if single[:1] == [0]:
        return (0, *order, *single[1:])
    return (*order, *single)


def _merged(axes: Sequence[Axis]) -> list[Axis]:
    """Drop axes of one element that no slot has, and join neighbours that the same slots have."""
    out: list[Axis] = []
    for size, owners in axes:
        if size == 1 and not owners:
            continue
        if out and out[-1][1] == owners:
            out[-1] = (out[-1][0] * size, owners)
        else:
            out.append((size, owners))
    return out
