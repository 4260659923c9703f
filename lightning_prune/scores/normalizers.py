"""Normalisers: they bring the scores of different groups to one scale, and never change an order.

They shape ranking scores alone; the regulariser works on the raw sums.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, TypeAlias

import torch
from torch import Tensor

from lightning_prune.errors import OptionError

__all__ = ["NORMALIZERS", "Normalizer", "check_normalizer", "normalize"]

Normalizer: TypeAlias = Callable[[Tensor], Tensor]


def by_mean(scores: Tensor) -> Tensor:
    """Divide by the mean magnitude, so that an average unit scores 1.

    Args:
        scores: [n], finite.

    Returns:
        [n]. Scores that are all zero stay so.

    >>> by_mean(torch.tensor([1.0, 3.0]))
    tensor([0.5000, 1.5000])
    """
    # Dividing by the maximum first keeps the mean of huge or tiny scores from overflowing or vanishing.
    scaled = by_max(scores)
    mean = scaled.abs().mean()
    return scaled / torch.where(mean > 0, mean, 1)


def by_max(scores: Tensor) -> Tensor:
    """Divide by the largest magnitude, as in DepGraph's experiments (CVPR 2023): the best unit scores 1.

    Args:
        scores: [n], finite.

    Returns:
        [n]. Scores that are all zero stay so.

    >>> by_max(torch.tensor([1.0, 4.0]))
    tensor([0.2500, 1.0000])
    """
    largest = scores.abs().amax()
    return scores / torch.where(largest > 0, largest, 1)


def by_nothing(scores: Tensor) -> Tensor:
    """Leave the scores as they are: groups then compete by absolute size.

    Args:
        scores: [n], finite.
    """
    return scores


NORMALIZERS: Mapping[str, Normalizer] = MappingProxyType({"mean": by_mean, "max": by_max, "none": by_nothing})


def normalize(scores: Tensor, normalizer: str | Normalizer | None) -> Tensor:
    """Normalise the finite scores of a group; units that have none come out as -inf, last of all.

    Args:
        scores: [n_units], higher = keep.
        normalizer: A name in ``NORMALIZERS``, None, or a callable ``scores [n] -> scores [n]``, which
            sees finite scores only.

    Returns:
        [n_units] floating point; -inf where ``scores`` was not finite.

    Raises:
        OptionError: If the name is unknown, or a callable returns another shape or non-finite values.

    >>> normalize(torch.tensor([1.0, float("nan"), 3.0]), "mean")
    tensor([0.5000,   -inf, 1.5000])
    """
    function = _resolve(normalizer)
    finite = scores.isfinite()
    out = torch.full_like(scores, -torch.inf)
    if not bool(finite.any()):
        return out
    given = scores[finite]
    found = function(given)
    if not isinstance(found, Tensor) or found.shape != given.shape or not bool(found.isfinite().all()):
        what = f"shape {list(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
        raise OptionError(
            f"normalizer {normalizer!r} must turn {len(given)} finite scores into as many finite scores, "
            f"got {what}; guard it against groups whose scores are equal or zero"
        )
    out[finite] = found.to(out)
    return out


def check_normalizer(normalizer: Any) -> None:
    """Refuse what is neither the name of a normaliser, None nor a callable.

    Raises:
        OptionError: With the names there are.
    """
    known = isinstance(normalizer, str) and normalizer in NORMALIZERS
    if not (known or normalizer is None or callable(normalizer)):
        raise OptionError(
            f"normalizer must be one of {', '.join(NORMALIZERS)}, None or a callable, got {normalizer!r}"
        )


def _resolve(normalizer: str | Normalizer | None) -> Normalizer:
    check_normalizer(normalizer)
    if isinstance(normalizer, str):
        return NORMALIZERS[normalizer]
    return normalizer or by_nothing
