"""Row ``growth``: time of analysis and of a step against depth, as the exponent of a power law."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from benchmarks.clock import Job, Spread, in_turns
from benchmarks.contenders import ours
from benchmarks.figure import Figure, Settings
from benchmarks.subjects import FAMILIES, Subject


def growth(settings: Settings) -> Iterator[Figure]:
    """Fit ``time = c * depth ** exponent`` per family; ``--models resnet50`` means the family of ResNets."""
    asked = settings.models or tuple(FAMILIES)
    for family, (make, depths) in FAMILIES.items():
        if not any(name.startswith(family) for name in asked):
            continue
        taken: dict[str, list[list[float]]] = {"analysis": [], "step": []}
        for depth in depths:
            subject = make(depth, device=settings.device)
            found = _times(subject, max(3, settings.rounds // 3), settings.device)
            for what, seconds in found.items():
                taken[what].append(seconds)
        for what, table in taken.items():
            yield _figure(family, what, depths, table)


def _times(subject: Subject, rounds: int, device: str) -> dict[str, list[float]]:
    def fresh() -> Job:
        return ours(subject, copy.deepcopy(subject.model)).step

    jobs: dict[str, Callable[[], Job]] = {"analysis": lambda: lambda: ours(subject), "step": fresh}
    return in_turns(jobs, rounds=rounds, device=device)


def _figure(family: str, what: str, depths: Sequence[int], table: list[list[float]]) -> Figure:
    exponents = [exponent(depths, seconds) for seconds in zip(*table, strict=True)]
    times = {str(d): Spread.of(seconds).times(1e3) for d, seconds in zip(depths, table, strict=True)}
    label = f"{what} time against depth, {depths[0]} to {depths[-1]}: exponent"
    return Figure("growth", family, label, Spread.of(exponents), "", 1.15, times)


def exponent(depths: Sequence[int], seconds: Sequence[float]) -> float:
    """Slope of the line through the logarithms.

    >>> round(exponent([1, 2, 4], [3.0, 12.0, 48.0]), 6)
    2.0
    """
    return float(np.polyfit(np.log(depths), np.log(seconds), 1)[0])
