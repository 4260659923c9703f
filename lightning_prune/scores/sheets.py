"""Sheets: tensors of all shapes as matrices that kernels walk tile by tile, with the tables that say so."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from operator import attrgetter

import torch
from torch import Tensor

from lightning_prune.errors import PruneError
from lightning_prune.scores.backends import Sizes
from lightning_prune.scores.layout import Block, Slot
from lightning_prune.scores.members import facts_of
from lightning_prune.scores.walks import grad_of

__all__ = ["Addresses", "Sheet", "Table", "numbered", "sheet_of", "sheets_of"]

_GRAD, _LIVE = attrgetter("grad"), attrgetter("requires_grad")
NONE = -1


@dataclass(frozen=True)
class Sheet:
    """A block as the kernels see it: rows whose elements have ``(i // repeat) % period`` as their column.

    Args:
        number: Of the block in the walk.
        height: Rows.
        width: Elements per row.
        repeat: Neighbours in a row that share a column, as the taps of a kernel do.
        period: Columns; they come again until the row ends, as where channels lie last in memory.
        row: The slot with a position per row, if there is one.
        column: The slot with a position per column, if there is one.
    """

    number: int
    height: int
    width: int
    repeat: int
    period: int
    row: Slot | None
    column: Slot | None

    def tiles(self, tile: tuple[int, int]) -> tuple[int, int]:
        """Count tiles down and across."""
        return -(-self.height // tile[0]), -(-self.width // tile[1])


def sheet_of(number: int, block: Block, tensor: Tensor, dtypes: Sequence[torch.dtype]) -> Sheet | None:
    """Lay a block out for kernels that serve these types; None if they cannot walk it."""
    view = block.look(tensor) if tensor.dtype in dtypes and not tensor.is_neg() else None
    if view is None or not view.is_contiguous() or not view.numel():
        return None
    if block.is_vector:
        return Sheet(number, 1, len(view), 1, len(view), None, block.slots[0])
    if len(block.view) not in (2, 3):
        return None
    height, *inner = block.view
    slots = {slot.reduce: slot for slot in block.slots}
    row = slots.pop(tuple(range(1, len(block.view))), None)
    column = slots.pop((0, *range(2, len(block.view))), None)  # the first axis of a row
    last = slots.pop((0, 1), None) if column is None and len(inner) == 2 else None
    if slots or (row is not None and row.repeat != 1) or (last is not None and last.repeat != 1):
        return None
    width = math.prod(inner)
    if last is not None:
        return Sheet(number, height, width, 1, inner[1], row, last)
    repeat = inner[1] if len(inner) == 2 else column.repeat if column is not None else 1
    return Sheet(number, height, width, repeat, width // repeat, row, column)


def sheets_of(
    blocks: Sequence[Block], tensors: Sequence[Tensor], dtypes: Sequence[torch.dtype]
) -> Iterator[Sheet]:
    """Lay out what kernels serve; a second block of a tensor would write where the first one does."""
    seen: set[str] = set()
    for number, (block, tensor) in enumerate(zip(blocks, tensors, strict=True)):
        sheet = sheet_of(number, block, tensor, dtypes) if block.tensor not in seen else None
        if sheet is not None:
            seen.add(block.tensor)
            yield sheet


def numbered(at: int, *sizes: int) -> Tensor:
    """Count through a grid, each place behind a number of the whole: [places, 1 + axes], on the CPU.

    >>> numbered(7, 2, 2).tolist()
    [[7, 0, 0], [7, 0, 1], [7, 1, 0], [7, 1, 1]]
    """
    axes = [torch.arange(size, dtype=torch.int32, device="cpu") for size in sizes]
    return torch.cartesian_prod(torch.full((1,), at, dtype=torch.int32, device="cpu"), *axes)


class Addresses:
    """Where tensors lie, on a device, which is told only of changes.

    Args:
        device: That of the tensors.
        needed: Whether none of them may be without memory.
    """

    def __init__(self, device: torch.device, *, needed: bool) -> None:
        self._device, self._needed, self._known = device, needed, list[int]()
        self._there = torch.empty(0, dtype=torch.int64, device=device)

    def of(self, tensors: Sequence[Tensor]) -> Tensor:
        """Give the address of each, 0 for an empty one, [tensors].

        Raises:
            PruneError: If memory that is needed was given back.
        """
        now = list(map(Tensor.data_ptr, tensors))
        if now != self._known:
            if self._needed and 0 in now:
                raise PruneError(
                    "the memory of a weight was given back (its storage has no bytes), so the penalty cannot "
                    "be computed; keep the weights whole during the optimizer's step"
                )
            fresh = torch.tensor(now, dtype=torch.int64, device="cpu")
            if self._device.type == "cuda":
                fresh = fresh.pin_memory()  # else the copy would be waited for
            self._there, self._known = fresh.to(self._device, non_blocking=True), now
        return self._there


class Table:
    """Everything that the kernels look up for the sheets of one type, on the device.

    Args:
        sheets: At least one.
        tensors: Of all blocks; those of the sheets are of one type.
        sizes: How much one program does.
    """

    def __init__(self, sheets: Sequence[Sheet], tensors: Sequence[Tensor], sizes: Sizes) -> None:
        self.sheets, self.tensors = sheets, [tensors[s.number] for s in sheets]
        self.like = torch.empty_like(self.tensors[0][:0])
        device = self.like.device
        facts, tiles, jobs, used = [], [], [], 0
        for at, s in enumerate(sheets):
            down, across = s.tiles(sizes.tile)
            rows = columns = NONE
            if s.row is not None:
                rows, used = used, used + across * s.height
                jobs.append((s.row.start, s.height, rows, across, s.height, 1, 1, 1))
            if s.column is not None:
                columns, used = used, used + down * s.width
                # A column's elements are neighbours, or a period apart.
                apart = (s.repeat, s.repeat, 1) if s.repeat > 1 else (s.width // s.period, 1, s.period)
                jobs.append((s.column.start, s.period, columns, down, s.width, *apart))
            starts = [NONE if slot is None else slot.start for slot in (s.row, s.column)]
            facts.append((s.height, s.width, s.repeat, s.period, rows, columns, *starts))
            tiles.append(numbered(at, down, across))
        chunks = [
            numbered(at, -(-positions // sizes.collect[0])) for at, (_, positions, *_) in enumerate(jobs)
        ]
        self.facts, self.jobs = (torch.tensor(t, dtype=torch.int64, device=device) for t in (facts, jobs))
        self.tiles, self.chunks = torch.cat(tiles).to(device), torch.cat(chunks).to(device)
        self.room, self.n_tiles, self.n_chunks = used, len(self.tiles), len(self.chunks)
        self.weights, self.grads = Addresses(device, needed=True), Addresses(device, needed=False)
        self._known: object = None

    def gradients(self, blocks: Sequence[Block]) -> tuple[list[Tensor], list[int]]:
        """Give what the kernels may write to, an empty tensor in place of the others, and their numbers.

        Where the gradients look as they did before, nothing is asked of them one by one.
        """
        grads = list(map(_GRAD, self.tensors))
        facts = list(map(_LIVE, self.tensors)), _looks_of(grads)
        if facts != self._known:
            self._left_out = [
                i
                for i, (sheet, t) in enumerate(zip(self.sheets, self.tensors, strict=True))
                if not _fits(blocks[sheet.number], t)
            ]
            self._known = facts
        for i in self._left_out:
            grads[i] = self.like
        return grads, [self.sheets[i].number for i in self._left_out]


def _fits(block: Block, tensor: Tensor) -> bool:
    """Whether the gradient lies in memory as its tensor does, and is of the same type."""
    grad = grad_of(tensor)
    if grad is None or grad.is_neg() or grad.dtype != tensor.dtype or grad.device != tensor.device:
        return False  # negated in name alone, for one: its memory says otherwise
    try:
        return block.look(grad).is_contiguous()
    except RuntimeError:
        return False


def _looks_of(grads: Sequence[Tensor | None]) -> object:
    try:
        return facts_of(grads)
    except (AttributeError, TypeError, RuntimeError):  # None, or a layout without strides
        plain = [g if g is not None and g.layout == torch.strided else None for g in grads]
        return [g is not None and facts_of([g]) for g in plain]
