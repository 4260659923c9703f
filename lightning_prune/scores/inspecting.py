"""Finding tensors that hold a NaN or an infinity, on a device that is not waited for."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

from lightning_prune.scores.backends import Backend, backend_for, on
from lightning_prune.scores.members import answers_at_once, facts_of, real
from lightning_prune.scores.sheets import Addresses, numbered

__all__ = ["Inspector", "judge"]

SETS = 8  # of tensors whose tables are kept: which gradients there are may change from step to step


@dataclass(frozen=True, eq=False)
class Round:
    """The tensors of one type.

    Args:
        at: [n] their numbers among all, on the device.
        numbers: The same as a list.
        sizes: [n] elements of each.
        tiles: [programs, 2] tensor and place of what each program looks at.
        like: Of the type.
        addresses: Where the tensors lie.
    """

    at: Tensor
    numbers: list[int]
    sizes: Tensor
    tiles: Tensor
    like: Tensor
    addresses: Addresses

    @staticmethod
    def of(tensors: Sequence[Tensor], numbers: list[int], backend: Backend) -> Round:
        """Lay out the tensors of these numbers, which are of one type and device."""
        first = tensors[numbers[0]]
        sizes = [tensors[i].numel() for i in numbers]
        at_once = backend.sizes.inspect
        tiles = torch.cat([numbered(n, -(-size // at_once)) for n, size in enumerate(sizes)])
        at, sizes_there = (torch.tensor(t, dtype=torch.int64, device=first.device) for t in (numbers, sizes))
        there = tiles.to(first.device)
        addresses = Addresses(first.device, needed=False)
        return Round(at, numbers, sizes_there, there, first.new_empty(0), addresses)


class Inspector:
    """Says of each of some tensors whether it holds something that is not finite.

    Args:
        fused: Whether kernels do it in one launch; None where they compile.
    """

    def __init__(self, *, fused: bool | None) -> None:
        self._fused = fused
        self._last: object = None
        self._rounds: list[Round] = []
        self._known: dict[object, list[Round]] = {}

    def look(self, tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Give a flag for each, [tensors], and one for all; there must be at least one.

        Both are 0 or 1 and lie on the device of the first.
        """
        backend = backend_for(tensors[0].device, fused=self._fused)
        if backend is None:
            return judge(tensors)
        facts = facts_of(tensors)
        if facts != self._last:
            self._rounds, self._last = self._lay_out(tensors, tuple(map(tuple, facts)), backend), facts
        if not self._rounds:
            return judge(tensors)
        flags = torch.zeros(len(tensors) + 1, dtype=torch.uint8, device=tensors[0].device)
        for turn in self._rounds:
            alone = len(self._rounds) == 1
            where = turn.addresses.of(tensors if alone else [tensors[i] for i in turn.numbers])
            with on(flags.device):
                backend.kernels.find_non_finite(
                    len(turn.tiles),
                    where,
                    turn.sizes,
                    turn.at,
                    turn.tiles,
                    flags,
                    len(tensors),
                    turn.like,
                    backend.sizes.inspect,
                )
        return flags[:-1], flags[-1]

    def _lay_out(self, tensors: Sequence[Tensor], facts: object, backend: Backend) -> list[Round]:
        """Make the tables; they wait for the device, so those of a set that comes again are kept."""
        if facts not in self._known:
            if len(self._known) == SETS:
                self._known.clear()
            walkable = _can_be_walked(tensors, backend.dtypes)
            kinds = dict.fromkeys(t.dtype for t in tensors) if walkable else ()
            numbers = [[i for i, t in enumerate(tensors) if t.dtype == kind] for kind in kinds]
            self._known[facts] = [Round.of(tensors, n, backend) for n in numbers]
        return self._known[facts]


def judge(tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Do what ``Inspector.look`` does, by PyTorch."""
    if all(answers_at_once(t.device) for t in tensors):
        return _by_sums(tensors)
    # The largest magnitude is finite exactly if all elements are.
    norms = torch._foreach_norm([t if t.numel() else t.new_zeros(1) for t in tensors], math.inf)
    kind = reduce(torch.promote_types, (norm.dtype for norm in norms))
    wrong = ~torch.stack([n.to(norms[0].device, kind, non_blocking=True) for n in norms]).isfinite()
    return wrong.to(torch.uint8), wrong.any().to(torch.uint8)


def _by_sums(tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Judge on a CPU: a plain sum takes a third of the time of a norm, and NaN and infinity survive it.

    It overflows before the elements do, so those whose sums are not finite are looked at one by one.
    """
    sums = [real(t.resolve_conj()).sum(dtype=torch.float32) for t in tensors]
    wrong = ~torch.stack(sums).isfinite()
    for i in wrong.nonzero().flatten().tolist():
        wrong[i] = not tensors[i].isfinite().all()
    return wrong.to(torch.uint8), wrong.any().to(torch.uint8)


def _can_be_walked(tensors: Sequence[Tensor], dtypes: Sequence[torch.dtype]) -> bool:
    """Whether kernels for these types can walk all of them, element after element in memory."""
    device = tensors[0].device
    return all(
        t.device == device and t.dtype in dtypes and (t.is_contiguous() or _is_dense(t)) for t in tensors
    )


def _is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill a piece of memory, in whatever order."""
    filled = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1 and stride != filled:
            return False
        filled *= size
    return True
