"""Where in the flat vector of a layout the units of all groups lie, and which group a unit is of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_prune.graph.groups import Group, Member
from lightning_prune.scores.layout import Block

__all__ = ["Positions"]


@dataclass(frozen=True, eq=False)
class Positions:
    """The way from positions to units to groups, and back, as tensors on one device.

    Units are numbered group after group, [n_units] in all.

    Args:
        count: Positions of the flat vector.
        take: [pairs] position of every (position, unit) pair, sorted by unit.
        into: [pairs] unit of every pair.
        ends: [n_units + 1] where the pairs of each unit begin and end.
        group_of: [n_units] group of each unit.
        touch: [touches, 2] every (block, group) pair where the group owns something of the block's tensor.
        n_groups: Number of groups.
    """

    count: int
    take: Tensor
    into: Tensor
    ends: Tensor
    group_of: Tensor
    touch: Tensor
    n_groups: int

    @staticmethod
    def of(
        blocks: Sequence[Block],
        groups: Sequence[Group],
        members: Sequence[Sequence[Member]],
        device: torch.device,
    ) -> Positions:
        """Map the positions of blocks to the units that own them.

        Args:
            blocks: As ``plan_blocks`` gives them.
            groups: The groups.
            members: Per group, those of its members that count; each has a slot in some block.
            device: Where the tensors shall lie.
        """
        starts = {(b.tensor, s.dim, s.rows): s.start for b in blocks for s in b.slots}
        take, into, group_of, base = [], [], [], 0
        for number, (group, mine) in enumerate(zip(groups, members, strict=True)):
            for m in mine:
                take.append(m.index + starts[m.tensor, m.dim, m.rows])
                into.append(m.unit + base)
            group_of.append(np.full(group.n_units, number))
            base += group.n_units
        positions, units = _joined(take), _joined(into)
        # Sorted by unit, so that sums run over segments: the same result on every rank and in every run.
        order = np.argsort(units, kind="stable")
        ends = np.concatenate([[0], np.cumsum(np.bincount(units, minlength=base))])
        rank = {b.tensor: i for i, b in enumerate(blocks)}
        pairs = sorted({(rank[m.tensor], g) for g, mine in enumerate(members) for m in mine})
        return Positions(
            count=max((s.stop for b in blocks for s in b.slots), default=0),
            take=torch.from_numpy(positions[order].astype(np.int32)).to(device),
            into=torch.from_numpy(units[order].astype(np.int32)).to(device),
            ends=torch.from_numpy(ends).to(device),
            group_of=torch.from_numpy(_joined(group_of)).to(device),
            touch=torch.tensor(pairs, dtype=torch.int64, device=device).view(-1, 2),
            n_groups=len(groups),
        )

    def sums(self, values: Tensor) -> Tensor:
        """Add up, per unit, the values of its positions: [count] -> [n_units]."""
        taken = values.index_select(0, self.take)
        return torch.segment_reduce(taken, "sum", offsets=self.ends, initial=0, unsafe=True)

    def spread(self, values: Tensor) -> Tensor:
        """Add up, per position, the values of the units that own it: [n_units] -> [count]."""
        flat = torch.zeros(self.count, dtype=values.dtype, device=values.device)
        return flat.index_add_(0, self.take, values.index_select(0, self.into))

    def by_position(self) -> tuple[Tensor, Tensor]:
        """Give the units that own each position, [pairs], and where those of each begin, [count + 1]."""
        order = torch.argsort(self.take.to("cpu"), stable=True)
        owners = self.into.to("cpu")[order].to(self.into.device)
        counts = torch.bincount(self.take.to("cpu"), minlength=self.count)
        ends = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        return owners, ends.to(self.into.device)

    def extremes(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Give every unit the least and the greatest value of its group: [n_units] -> two of [n_units]."""
        start = values.new_zeros(self.n_groups)
        low, high = (
            start.scatter_reduce(0, self.group_of, values, kind, include_self=False)
            for kind in ("amin", "amax")
        )
        return low[self.group_of], high[self.group_of]

    def any_unit(self, flags: Tensor) -> Tensor:
        """Say of each group whether any of its units is flagged: [n_units] -> [n_groups]."""
        return self._any(self.group_of, flags)

    def any_tensor(self, flags: Tensor) -> Tensor:
        """Say of each group whether it owns something of a flagged block: [blocks] -> [n_groups]."""
        return self._any(self.touch[:, 1], flags[self.touch[:, 0]])

    def _any(self, group: Tensor, flags: Tensor) -> Tensor:
        hits = torch.zeros(self.n_groups, device=flags.device)
        return hits.index_add_(0, group, flags.to(hits.dtype)) > 0


def _joined(parts: Sequence[np.ndarray[Any, Any]]) -> np.ndarray[Any, Any]:
    return np.concatenate(parts) if parts else np.zeros(0, np.int64)
