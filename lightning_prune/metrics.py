"""Metrics of a prune, for logging: what share of the initial network is gone, or is left.

They are levels, not averages: the last update counts. Every rank knows the same numbers, so reducing
over ranks changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_prune.errors import OptionError

__all__ = ["ChannelSparsity", "KeptMacs", "ParameterSparsity", "kept_share", "removed_share"]


def kept_share(kept: int, initial: int) -> float:
    """Give the share that is left, in [0, 1].

    Args:
        kept: What is left now, in [0, initial].
        initial: What there was before the first cut, >= 1.

    Raises:
        OptionError: If a count is no whole number or out of range.

    >>> kept_share(30, 40)
    0.75
    """
    _check(kept, initial)
    return kept / initial


def removed_share(kept: int, initial: int) -> float:
    """Give the share that is gone, in [0, 1].

    Args:
        kept: What is left now, in [0, initial].
        initial: What there was before the first cut, >= 1.

    Raises:
        OptionError: If a count is no whole number or out of range.

    >>> removed_share(30, 40)
    0.25
    """
    _check(kept, initial)
    return (initial - kept) / initial


def _check(kept: int, initial: int) -> None:
    whole = all(isinstance(n, int) and not isinstance(n, bool) for n in (kept, initial))
    if not whole or not 0 <= kept <= initial or initial < 1:
        raise OptionError(
            "expected whole numbers 0 <= kept <= initial and initial >= 1 but got "
            f"kept={kept!r}, initial={initial!r}; initial is the count before the first cut"
        )


class _Level(Metric):
    """A pair of counts, kept as whole numbers and divided once: no rank and no dtype can round them."""

    is_differentiable = False
    higher_is_better = None
    full_state_update = True  # ``forward`` would otherwise merge the new count with the old one by maximum
    plot_lower_bound = 0.0
    plot_upper_bound = 1.0
    kept: Tensor
    initial: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("kept", torch.tensor(0, dtype=torch.int64), dist_reduce_fx="max")
        self.add_state("initial", torch.tensor(0, dtype=torch.int64), dist_reduce_fx="max")

    def update(self, kept: int, initial: int) -> None:
        """Take the count that is left and the count before the first cut; the last call counts."""
        _check(kept, initial)
        self.kept = torch.full_like(self.kept, kept)
        self.initial = torch.full_like(self.initial, initial)

    def _share(self, function: Callable[[int, int], float]) -> Tensor:
        kept, initial = int(self.kept), int(self.initial)
        share = function(kept, initial) if initial else float("nan")
        return torch.tensor(share, dtype=torch.float32, device=self.kept.device)


class ParameterSparsity(_Level):
    """Share of the initial parameters that is gone, in [0, 1].

    ``update(kept, initial)`` takes the number of parameters now and before the first cut;
    ``compute()`` gives a float32 scalar, NaN before the first update.

    Args:
        kwargs: Keyword arguments of ``torchmetrics.Metric``.

    >>> sparsity = ParameterSparsity()
    >>> sparsity.update(300, 400)
    >>> sparsity.compute()
    tensor(0.2500)
    """

    def compute(self) -> Tensor:
        """Give the share of parameters removed so far."""
        return self._share(removed_share)


class ChannelSparsity(_Level):
    """Share of the initial units (channels, heads, head dims) that is gone, in [0, 1].

    ``update(kept, initial)`` takes the number of units now and before the first cut;
    ``compute()`` gives a float32 scalar, NaN before the first update.

    Args:
        kwargs: Keyword arguments of ``torchmetrics.Metric``.

    >>> sparsity = ChannelSparsity()
    >>> sparsity(48, 64)
    tensor(0.2500)
    """

    def compute(self) -> Tensor:
        """Give the share of units removed so far."""
        return self._share(removed_share)


class KeptMacs(_Level):
    """Share of the initial multiply-accumulates that is left, in [0, 1].

    ``update(kept, initial)`` takes the MACs of a forward now and before the first cut;
    ``compute()`` gives a float32 scalar, NaN before the first update.

    Args:
        kwargs: Keyword arguments of ``torchmetrics.Metric``.

    >>> kept = KeptMacs()
    >>> kept.update(600, 800)
    >>> kept.compute()
    tensor(0.7500)
    """

    def compute(self) -> Tensor:
        """Give the share of MACs that is left."""
        return self._share(kept_share)
