"""Schedules: how the ratio grows over the steps.

A schedule is a function ``(target, steps) -> steps + 1`` cumulative ratios, from 0 to the target. A ratio is
the share removed so far of what there was before the first step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from numbers import Real
from types import MappingProxyType
from typing import Any, TypeAlias

from lightning_prune.errors import OptionError

__all__ = ["SCHEDULES", "Schedule", "resolve"]

Schedule: TypeAlias = Callable[[float, int], Sequence[float]]
# What arithmetic on ratios may lose; far below one unit in a million.
TOLERANCE = 1e-9


def linear(target: float, steps: int) -> list[float]:
    """Remove the same share of the original at every step.

    >>> linear(0.5, 2)
    [0.0, 0.25, 0.5]
    """
    return [target * i / steps for i in range(steps + 1)]


def cubic(target: float, steps: int) -> list[float]:
    """Remove much while there is much, little at the end: ``target * (1 - (1 - i / steps) ** 3)``.

    The gradual schedule of Zhu and Gupta, "To prune, or not to prune" (2017), equation 1.

    >>> cubic(0.5, 2)
    [0.0, 0.4375, 0.5]
    """
    return [target * (1 - (1 - i / steps) ** 3) for i in range(steps + 1)]


def exponential(target: float, steps: int) -> list[float]:
    """Remove the same share of *what is left* at every step: ``1 - (1 - target) ** (i / steps)``.

    >>> exponential(0.75, 2)
    [0.0, 0.5, 0.75]
    """
    return [1 - (1 - target) ** (i / steps) for i in range(steps + 1)]


def one_shot(target: float, steps: int) -> list[float]:
    """Remove everything at the first step; later steps change nothing.

    >>> one_shot(0.5, 2)
    [0.0, 0.5, 0.5]
    """
    return [0.0, *[target] * steps]


SCHEDULES: Mapping[str, Schedule] = MappingProxyType(
    {"linear": linear, "cubic": cubic, "exponential": exponential, "one_shot": one_shot}
)


def resolve(schedule: str | Schedule, target: float, steps: int) -> list[float]:
    """Give the checked cumulative ratios of a schedule.

    Args:
        schedule: A name in ``SCHEDULES`` or a callable ``(target, steps) -> steps + 1`` ratios.
        target: Share removed in the end, in [0, 1).
        steps: Number of steps, >= 1.

    Returns:
        ``steps + 1`` ratios, non-decreasing, the first exactly 0 and the last exactly ``target``.

    Raises:
        OptionError: If the name is unknown, ``target`` or ``steps`` is out of range, or a callable's
            result has the wrong length, start, end, order or values.

    >>> resolve("linear", 0.5, 2)
    [0.0, 0.25, 0.5]
    """
    _check_request(target, steps)
    if isinstance(schedule, str):
        if schedule not in SCHEDULES:
            raise OptionError(
                f"the schedule must be one of {', '.join(SCHEDULES)} or a callable (target, steps) -> "
                f"ratios, got {schedule!r}"
            )
        found: Any = SCHEDULES[schedule](target, steps)
    elif callable(schedule):
        found = schedule(target, steps)
    else:
        raise OptionError(f"the schedule must be a name or a callable, got {type(schedule).__name__}")
    ratios = _numbers(found, target, steps)
    _check_course(ratios, target, steps)
    # Exact ends, and no step back by rounding.
    inner = [min(max(r, 0.0), target) for r in ratios[1:-1]]
    return [0.0, *(max([0.0, *inner[: i + 1]]) for i in range(len(inner))), float(target)]


def _check_request(target: Any, steps: Any) -> None:
    if isinstance(target, bool) or not isinstance(target, Real) or not 0 <= float(target) < 1:
        raise OptionError(f"a pruning ratio must be a number in [0, 1), got {target!r}")
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise OptionError(f"iterative_steps must be a whole number of at least 1, got {steps!r}")


def _numbers(found: Any, target: float, steps: int) -> list[float]:
    asked = f"the schedule for ratio {target} in {steps} step(s) must give {steps + 1} numbers"
    try:
        ratios = [float(r) for r in found]
    except (TypeError, ValueError) as error:
        raise OptionError(f"{asked}, got {found!r}") from error
    if len(ratios) != steps + 1:
        raise OptionError(f"{asked}, the first 0 and the last {target}; got {len(ratios)}: {_short(ratios)}")
    return ratios


def _check_course(ratios: list[float], target: float, steps: int) -> None:
    asked = f"the schedule for ratio {target} in {steps} step(s) must"
    for i, r in enumerate(ratios):
        if not math.isfinite(r) or not -TOLERANCE <= r < 1:
            raise OptionError(f"{asked} stay in [0, 1), got {r} at step {i}")
    if abs(ratios[0]) > TOLERANCE:
        raise OptionError(f"{asked} start at 0, got {ratios[0]}")
    for i, (before, after) in enumerate(pairwise(ratios), start=1):
        if after < before - TOLERANCE:
            raise OptionError(f"{asked} never decrease, got {before} and then {after} at step {i}")
    if abs(ratios[-1] - target) > TOLERANCE:
        raise OptionError(f"{asked} end at {target}, got {ratios[-1]}")


def _short(ratios: list[float]) -> str:
    shown = ", ".join(f"{r:g}" for r in ratios[:8])
    return f"[{shown}{', ...' if len(ratios) > 8 else ''}]"
