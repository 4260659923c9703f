"""Time several jobs in turns, so that a drifting machine is unfair to none."""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch

Job = Callable[[], Any]


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of a sample."""

    low: float
    median: float
    high: float

    @staticmethod
    def of(values: Sequence[float]) -> Spread:
        """Summarize at least one value.

        >>> Spread.of([1.0, 2.0, 3.0])
        Spread(low=1.5, median=2.0, high=2.5)
        """
        if len(values) == 1:
            return Spread(values[0], values[0], values[0])
        return Spread(*statistics.quantiles(values, n=4, method="inclusive"))

    def times(self, factor: float) -> Spread:
        """Give the same spread in another unit."""
        return Spread(self.low * factor, self.median * factor, self.high * factor)


LEAST = 3  # rounds that even the slowest jobs get
PATIENCE = 45.0  # seconds after which the rest is left out


def in_turns(jobs: Mapping[str, Callable[[], Job]], *, rounds: int, device: str) -> dict[str, list[float]]:
    """Time each job once per round, after one round that does not count.

    Args:
        jobs: Name -> preparation, which is not timed and gives the function that is.
        rounds: Number of rounds, >= 1; slow jobs get fewer.
        device: ``cpu`` reads the wall clock, ``cuda`` the events of its stream.

    Returns:
        Name -> [rounds] seconds.
    """
    seconds: dict[str, list[float]] = {name: [] for name in jobs}
    began = perf_counter()
    for turn in range(rounds + 1):
        if turn > LEAST and perf_counter() - began > PATIENCE:
            break
        for name, prepare in jobs.items():
            job = prepare()
            gc.collect()  # nobody pays for another's garbage
            taken = _on_cuda(job) if device == "cuda" else _on_cpu(job)
            if turn:
                seconds[name].append(taken)
    return seconds


def ratio(over: Sequence[float], under: Sequence[float]) -> Spread:
    """Spread of the ratios round by round: what slows both down cancels.

    >>> ratio([1.0, 4.0, 9.0], [1.0, 2.0, 3.0]).median
    2.0
    """
    return Spread.of([a / b for a, b in zip(over, under, strict=True)])


class Marks:
    """Moments of a run that nobody may hold up: read from the wall, or noted by the stream of a GPU."""

    def __init__(self, device: str) -> None:
        self._is_cuda = device == "cuda"
        self._marks: list[Any] = []

    def note(self) -> None:
        """Note this moment."""
        if self._is_cuda:
            event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            event.record()
            self._marks.append(event)
        else:
            self._marks.append(perf_counter())

    def seconds(self) -> list[float]:
        """Give the time between neighbours; waits for a GPU."""
        pairs = zip(self._marks, self._marks[1:], strict=False)
        if not self._is_cuda:
            return [b - a for a, b in pairs]
        torch.cuda.synchronize()
        return [float(a.elapsed_time(b)) / 1e3 for a, b in pairs]


def _on_cpu(job: Job) -> float:
    start = perf_counter()
    job()
    return perf_counter() - start


def _on_cuda(job: Job) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    torch.cuda.synchronize()
    start.record()
    job()
    end.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(end)) / 1e3
