"""The walk over all weights by a few launches, where PyTorch takes five or more for every tensor.

On an accelerator a launch takes longer than the work on most tensors; on a CPU each operation is one more
pass over the memory.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lightning_prune.graph.groups import Group
from lightning_prune.scores.backends import Backend, on
from lightning_prune.scores.gammas import Gammas
from lightning_prune.scores.layout import Block, place
from lightning_prune.scores.members import answers_at_once
from lightning_prune.scores.positions import Positions
from lightning_prune.scores.sheets import Table, sheets_of
from lightning_prune.scores.walks import Walk, grad_of

__all__ = ["KernelGammas", "KernelWalk"]


class KernelWalk:
    """Walks the blocks that the kernels serve in three launches per type, and the others by PyTorch.

    Served are contiguous real tensors whose positions lie along one axis or two, at the first block of each
    tensor: nearly all that convolutions, linear layers and norms own.

    Args:
        blocks: As ``plan_blocks`` places them, at least one.
        parameters: By name; those that the blocks name lie on one device.
        dtype: Precision of sums and factors.
        backend: Of that device.
    """

    def __init__(
        self, blocks: Sequence[Block], parameters: Mapping[str, Tensor], dtype: torch.dtype, backend: Backend
    ) -> None:
        self._blocks, self._dtype, self._backend = blocks, dtype, backend
        self._tensors = [parameters[b.tensor] for b in blocks]
        self._parameters = parameters
        self._count = max(s.stop for b in blocks for s in b.slots)
        self._device = self._tensors[0].device
        sheets = list(sheets_of(blocks, self._tensors, backend.dtypes))
        self._tables = [
            Table([s for s in sheets if self._tensors[s.number].dtype == kind], self._tensors, backend.sizes)
            for kind in dict.fromkeys(self._tensors[s.number].dtype for s in sheets)
        ]
        self._rest = sorted(set(range(len(blocks))) - {s.number for s in sheets})
        self._parts: dict[tuple[int, ...], tuple[Walk, Tensor]] = {}

    def sums(self, *, clean: bool) -> Tensor:
        """Do what ``Walk.sums`` does."""
        flat = torch.empty(self._count, dtype=self._dtype, device=self._device)
        kernels, sizes = self._backend.kernels, self._backend.sizes
        for table in self._tables:
            partial = torch.empty(table.room, dtype=self._dtype, device=self._device)
            where = table.weights.of(table.tensors)
            with on(self._device):
                kernels.square_sums(
                    table.n_tiles,
                    where,
                    table.facts,
                    table.tiles,
                    partial,
                    table.like,
                    int(clean),
                    *sizes.tile,
                )
                kernels.collect(table.n_chunks, partial, table.jobs, table.chunks, flat, *sizes.collect)
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
                self._backend.kernels.add_products(
                    table.n_tiles,
                    weights,
                    targets,
                    table.facts,
                    table.tiles,
                    flat,
                    table.like,
                    *self._backend.sizes.tile,
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
            walk = Walk(place(blocks), self._parameters, self._dtype)
            self._parts[key] = walk, at.to(self._device, non_blocking=True)
        return self._parts[key]


class KernelGammas(Gammas):
    """Gammas in three launches."""

    def __init__(
        self,
        positions: Positions,
        groups: Sequence[Group],
        *,
        reg: float,
        alpha: float,
        dtype: torch.dtype,
        backend: Backend,
    ) -> None:
        super().__init__(positions, groups, reg=reg, alpha=alpha, dtype=dtype)
        self._backend = backend
        self._constants = torch.tensor([reg, alpha], dtype=dtype, device=self.device)
        spans = torch.tensor([0, *self.sizes], dtype=torch.int64, device="cpu").cumsum(0)
        self._spans = spans.to(self.device, non_blocking=True)
        self._owners, self._owner_ends = positions.by_position()

    def refresh(self, sums: Tensor, raw: Tensor, *, keep: bool = False) -> None:
        """Do what ``Gammas.refresh`` does."""
        kernels, sizes, n_units = self._backend.kernels, self._backend.sizes, len(self.gamma)
        scores, resting = torch.empty_like(self.scores), torch.empty_like(self.resting)
        gamma = self.gamma if keep else torch.empty_like(self.gamma)
        with on(self.device):
            kernels.unit_sums(
                -(-n_units // sizes.units[0]),
                sums,
                self.positions.take,
                self.positions.ends,
                scores,
                n_units,
                *sizes.units,
            )
            kernels.press(
                len(resting),
                scores,
                self._spans,
                gamma,
                resting.view(torch.uint8),
                self.rested.view(torch.uint8),
                self._constants,
                int(keep),
                sizes.group,
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
        n, at_once = len(self.factors), self._backend.sizes.spread
        with on(self.device):
            self._backend.kernels.spread(
                -(-n // at_once),
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
                at_once,
            )
