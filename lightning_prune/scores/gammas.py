"""Gammas: how hard each unit is pressed, from the sums of squares of what it owns."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_prune.graph.groups import Group
from lightning_prune.scores.positions import Positions

__all__ = ["Gammas"]


class Gammas:
    """Numbers per unit and per group, and the factors per position that follow from them.

    Args:
        positions: Of the groups' units in the flat vector.
        groups: The groups.
        reg: Strength, >= 0.
        alpha: Shape, in [0, 64].
        dtype: Precision.

    Attributes:
        scores: [n_units] sums of squares, 0 where they are not finite.
        gamma: [n_units] how hard each is pressed; 0 where its group rests.
        resting: [n_groups] whether a group holds something that is not finite.
        dirty: Whether anything that was summed last is not finite, a scalar.
        rested: [n_groups] whether a group has ever rested.
        seen: Whether anything was not finite since this was last set to False, a scalar.
        factors: [positions] ``reg * gamma``, added up over the units that own a position.
    """

    def __init__(
        self, positions: Positions, groups: Sequence[Group], *, reg: float, alpha: float, dtype: torch.dtype
    ) -> None:
        self.positions, self.reg, self.alpha, self.dtype = positions, reg, alpha, dtype
        self.sizes, self.device = [g.n_units for g in groups], positions.take.device
        self.gamma = torch.ones(sum(self.sizes), dtype=dtype, device=self.device)
        self.scores = torch.zeros_like(self.gamma)
        self.resting = torch.zeros(len(groups), dtype=torch.bool, device=self.device)
        self.rested = self.resting.clone()
        self.seen = torch.zeros((), dtype=torch.bool, device=self.device)
        self.dirty = self.seen.clone()
        self.factors = torch.zeros(positions.count, dtype=dtype, device=self.device)

    def per_group(self) -> list[Tensor]:
        """Give the gammas group by group, each [n_units]."""
        return list(torch.split(self.gamma, self.sizes)) if self.sizes else []

    def refresh(self, sums: Tensor, raw: Tensor, *, keep: bool = False) -> None:
        """Find scores and gammas anew, and what rests; note what was found.

        Args:
            sums: [positions] sums of squares.
            raw: The same before anything was cleaned away.
            keep: Whether to keep scores and gammas, and only find what rests.
        """
        self.dirty = ~raw.isfinite().all()
        scores = self.positions.sums(sums)
        finite = scores.isfinite()
        self.resting = self.positions.any_unit(~finite)
        if not keep:
            self.scores = torch.where(finite, scores, 0)
            self.gamma = torch.where(self.resting[self.positions.group_of], 0, self._gamma())
        self.spread()
        self.note()

    def rest(self, resting: Tensor) -> None:
        """Let other groups rest from now on, [n_groups]; gammas stay what they are."""
        self.resting = resting
        self.spread()

    def restore(self, gamma: Tensor, scores: Tensor) -> None:
        """Go on with the gammas and scores of another run, each [n_units]."""
        self.gamma, self.scores = (v.to(self.device, self.dtype) for v in (gamma, scores))
        # A gamma is 2 to some power; 0 marks a group that rests.
        self.rest(self.positions.any_unit(self.gamma == 0))

    def _gamma(self) -> Tensor:
        lowest, highest = self.positions.extremes(self.scores)
        span = highest - lowest
        # Equal units: 0 / 1, so gamma is 1.
        weakness = (highest - self.scores) / torch.where(span > 0, span, 1)
        return torch.exp2(self.alpha * weakness)

    def spread(self) -> None:
        """Add up per position what the groups that reach it ask for."""
        active = torch.where(self.resting[self.positions.group_of], 0, self.gamma)
        self.factors = self.positions.spread(active).mul_(self.reg)

    def note(self) -> None:
        """Remember on the device what was found, for whoever asks later."""
        self.seen |= self.dirty
        self.rested |= self.resting
