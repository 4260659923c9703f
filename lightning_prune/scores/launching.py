"""The walk over all weights by a few launches, where PyTorch takes five or more for every tensor.

On an accelerator a launch takes longer than the work on most tensors.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from lightning_prune.errors import OptionError
from lightning_prune.graph.groups import Group
from lightning_prune.scores.gammas import Gammas
from lightning_prune.scores.kernels import compiled
from lightning_prune.scores.layout import Block, Slot, place
from lightning_prune.scores.members import answers_at_once, facts_of
from lightning_prune.scores.positions import Positions
from lightning_prune.scores.walks import Walk, grad_of

__all__ = ["DTYPES", "Addresses", "KernelGammas", "KernelWalk", "numbered", "on", "usable"]

_GRAD, _LIVE = attrgetter("grad"), attrgetter("requires_grad")
DEVICES = ("cuda",)  # PyTorch's ROCm builds say so too
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
# A tile of a tensor: rows and columns that one program reads.
TILE = (32, 128)
# Positions, and tiles at a time, that one program adds up; and units, and positions at a time.
COLLECT = (64, 16)
UNITS = (16, 16)
# Units of a group at a time; positions that one program spreads to.
GROUP, SPREAD = 1024, 128
NONE = -1


def usable(device: torch.device, *, fused: bool | None) -> bool:
    """Whether the kernels run on this device, and may.

    Args:
        device: Where the tensors are.
        fused: True and False decide it for a GPU; None asks whether the kernels can be compiled there.

    Raises:
        OptionError: If ``fused`` is True for a GPU, and there is no Triton, or for a device without loops.

    Warns:
        UserWarning: Once per device, if ``fused`` is None and they cannot be compiled.
    """
    if fused is True and device.type not in (*DEVICES, "cpu", "meta"):
        raise OptionError(
            f"fused=True has loops for CPUs and for CUDA and ROCm GPUs, and the weights lie on {device}; "
            "leave fused=None"
        )
    if fused is False or device.type not in DEVICES:
        return False
    if fused is True and find_spec("triton") is None:
        raise OptionError(
            f"fused=True needs Triton for {device}, and it is not installed; it comes with PyTorch's builds "
            "for GPUs on Linux. Install it, or leave fused=None"
        )
    return fused is True or _compile_on(device)


@cache
def _compile_on(device: torch.device) -> bool:
    one = torch.ones(1, device=device)
    try:
        with on(device):
            compiled().unit_sums[(1,)](
                one, one.int() - 1, torch.arange(2, device=device), one.clone(), 1, *UNITS
            )
    except Exception as error:  # a missing compiler, an unknown card, a broken installation
        reason = str(error).strip().partition("\n")[0]
        warnings.warn(
            f"Triton cannot compile for {device} ({type(error).__name__}: {reason}); PyTorch's operations "
            "press the weights instead, which takes more time. fused=False does so without this message",
            stacklevel=2,
        )
        return False
    return True


def on(device: torch.device) -> AbstractContextManager[Any]:
    """Launch where the tensors are, which need not be the current device."""
    elsewhere = device.type == "cuda" and device.index != torch.cuda.current_device()
    return torch.cuda.device(device) if elsewhere else nullcontext()


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

    @property
    def tiles(self) -> tuple[int, int]:
        """Number of tiles down and across."""
        return -(-self.height // TILE[0]), -(-self.width // TILE[1])


def sheet_of(number: int, block: Block, tensor: Tensor) -> Sheet | None:
    """Lay a block out for the kernels; None if they cannot walk it."""
    view = block.look(tensor) if tensor.dtype in DTYPES else None
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


def numbered(at: int, *sizes: int) -> Tensor:
    """Count through a grid, each place behind a number of the whole: [places, 1 + axes], on the CPU.

    >>> numbered(7, 2, 2).tolist()
    [[7, 0, 0], [7, 0, 1], [7, 1, 0], [7, 1, 1]]
    """
    axes = [torch.arange(size, dtype=torch.int32, device="cpu") for size in sizes]
    return torch.cartesian_prod(torch.full((1,), at, dtype=torch.int32, device="cpu"), *axes)


class Addresses:
    """Where tensors lie, on a device, which is told only of changes."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._known = device, list[int]()
        self._there = torch.empty(0, dtype=torch.int64, device=device)

    def of(self, tensors: Sequence[Tensor]) -> Tensor:
        """Give the address of each, 0 for an empty one, [tensors]."""
        now = list(map(Tensor.data_ptr, tensors))
        if now != self._known:
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
    """

    def __init__(self, sheets: Sequence[Sheet], tensors: Sequence[Tensor]) -> None:
        self.sheets, self.tensors = sheets, [tensors[s.number] for s in sheets]
        self.like = torch.empty_like(self.tensors[0][:0])
        device = self.like.device
        facts, tiles, jobs, chunks, used = [], [], [], [], 0
        for at, s in enumerate(sheets):
            down, across = s.tiles
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
        for at, (_, positions, *_) in enumerate(jobs):
            chunks.append(numbered(at, -(-positions // COLLECT[0])))
        self.facts, self.jobs = (torch.tensor(t, dtype=torch.int64, device=device) for t in (facts, jobs))
        self.tiles, self.chunks = torch.cat(tiles).to(device), torch.cat(chunks).to(device)
        self.room, self.n_tiles, self.n_chunks = used, len(self.tiles), len(self.chunks)
        self.weights, self.grads = Addresses(device), Addresses(device)
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


class KernelWalk:
    """Walks the blocks that the kernels serve in three launches per type, and the others by PyTorch.

    Served are contiguous real tensors whose positions lie along one axis or two, at the first block of each
    tensor: nearly all that convolutions, linear layers and norms own.

    Args:
        blocks: As ``plan_blocks`` places them, at least one.
        parameters: By name; those that the blocks name lie on one device that is ``usable``.
        dtype: Precision of sums and factors.
    """

    def __init__(self, blocks: Sequence[Block], parameters: Mapping[str, Tensor], dtype: torch.dtype) -> None:
        self._blocks, self._dtype = blocks, dtype
        self._tensors = [parameters[b.tensor] for b in blocks]
        self._parameters = parameters
        self._count = max(s.stop for b in blocks for s in b.slots)
        self._device = self._tensors[0].device
        sheets = list(_sheets(blocks, self._tensors))
        self._tables = [
            Table([s for s in sheets if self._tensors[s.number].dtype == kind], self._tensors)
            for kind in dict.fromkeys(self._tensors[s.number].dtype for s in sheets)
        ]
        self._rest = sorted(set(range(len(blocks))) - {s.number for s in sheets})
        self._parts: dict[tuple[int, ...], tuple[Walk, Tensor]] = {}

    def sums(self, *, clean: bool) -> Tensor:
        """Do what ``Walk.sums`` does."""
        flat = torch.empty(self._count, dtype=self._dtype, device=self._device)
        kernels = compiled()
        for table in self._tables:
            partial = torch.empty(table.room, dtype=self._dtype, device=self._device)
            where = table.weights.of(table.tensors)
            with on(self._device):
                kernels.square_sums[(table.n_tiles,)](
                    where, table.facts, table.tiles, partial, table.like, int(clean), *TILE
                )
                kernels.collect[(table.n_chunks,)](partial, table.jobs, table.chunks, flat, *COLLECT)
        if self._rest:
            walk, at = self._part(self._rest)
            flat.index_copy_(0, at, walk.sums(clean=clean))
        return flat

    def add(self, flat: Tensor, *, clean: bool) -> None:
        """Do what ``Walk.add`` does; the kernels are always ``clean``, as that costs them nothing."""
        others = list(self._rest)
        for table in self._tables:
            grads, left_out = table.gradients(self._blocks)
            others += left_out
            weights, targets = table.weights.of(table.tensors), table.grads.of(grads)
            with on(self._device):
                compiled().add_products[(table.n_tiles,)](
                    weights, targets, table.facts, table.tiles, flat, table.like, *TILE
                )
        others = sorted(i for i in others if grad_of(self._tensors[i]) is not None)
        if others:
            walk, at = self._part(others)
            walk.add(flat.index_select(0, at), clean=clean)

    def _part(self, numbers: Sequence[int]) -> tuple[Walk, Tensor]:
        """Give a walk by PyTorch over some of the blocks, and the positions of these in the whole."""
        key = tuple(numbers)
        if key not in self._parts:
            blocks = [self._blocks[i] for i in numbers]
            at = torch.cat([torch.arange(s.start, s.stop, device="cpu") for b in blocks for s in b.slots])
            walk = Walk(place(blocks), self._parameters, self._dtype, fused=False)
            self._parts[key] = walk, at.to(self._device, non_blocking=True)
        return self._parts[key]


def _fits(block: Block, tensor: Tensor) -> bool:
    """Whether the gradient lies in memory as its tensor does, and is of the same type."""
    grad = grad_of(tensor)
    if grad is None or grad.dtype != tensor.dtype or grad.device != tensor.device:
        return False
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


def _sheets(blocks: Sequence[Block], tensors: Sequence[Tensor]) -> Iterator[Sheet]:
    """Lay out what the kernels serve; a second block of a tensor would write where the first one does."""
    seen: set[str] = set()
    for number, (block, tensor) in enumerate(zip(blocks, tensors, strict=True)):
        sheet = sheet_of(number, block, tensor) if block.tensor not in seen else None
        if sheet is not None:
            seen.add(block.tensor)
            yield sheet


class KernelGammas(Gammas):
    """Gammas in three launches."""

    def __init__(
        self, positions: Positions, groups: Sequence[Group], *, reg: float, alpha: float, dtype: torch.dtype
    ) -> None:
        super().__init__(positions, groups, reg=reg, alpha=alpha, dtype=dtype)
        self._constants = torch.tensor([reg, alpha], dtype=dtype, device=self.device)
        spans = torch.tensor([0, *self.sizes], dtype=torch.int64, device="cpu").cumsum(0)
        self._spans = spans.to(self.device, non_blocking=True)
        self._owners, self._owner_ends = positions.by_position()

    def refresh(self, sums: Tensor, raw: Tensor, *, keep: bool = False) -> None:
        """Do what ``Gammas.refresh`` does."""
        kernels, n_units = compiled(), len(self.gamma)
        scores, resting = torch.empty_like(self.scores), torch.empty_like(self.resting)
        gamma = self.gamma if keep else torch.empty_like(self.gamma)
        with on(self.device):
            kernels.unit_sums[(-(-n_units // UNITS[0]),)](
                sums, self.positions.take, self.positions.ends, scores, n_units, *UNITS
            )
            kernels.press[(len(resting),)](
                scores,
                self._spans,
                gamma,
                resting.view(torch.uint8),
                self.rested.view(torch.uint8),
                self._constants,
                int(keep),
                GROUP,
            )
        self.resting = resting
        if not keep:
            self.scores, self.gamma = scores, gamma
        self.dirty = ~raw.isfinite().all() if answers_at_once(self.device) else self.seen
        self._spread(raw)

    def spread(self) -> None:
        """Do what ``Gammas.spread`` does."""
        self._spread(torch.zeros_like(self.factors))

    def _spread(self, raw: Tensor) -> None:
        self.factors = torch.empty_like(self.factors)
        n = len(self.factors)
        with on(self.device):
            compiled().spread[(-(-n // SPREAD),)](
                self.gamma,
                self._owners,
                self._owner_ends,
                self.positions.group_of,
                self.resting.view(torch.uint8),
                self.factors,
                self._constants,
                raw,
                self.seen.view(torch.uint8),
                n,
                SPREAD,
            )
