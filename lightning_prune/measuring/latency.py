"""How long a forward takes: models measured in turns, so that a drifting machine is unfair to none."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from math import ceil
from typing import Any

import torch
from torch import nn
from torch.utils.benchmark import Timer

from lightning_prune.errors import OptionError
from lightning_prune.measuring.clock import clock_of
from lightning_prune.measuring.forwards import ForwardFn, measured_forward

__all__ = ["Latency", "measure_latency", "summarize_latency"]


@dataclass(frozen=True)
class Latency:
    """Time of one forward pass in eval mode without gradients.

    Args:
        median_ms: Median over the rounds, in milliseconds.
        iqr_ms: Distance between the first and the third quartile over the rounds, in milliseconds.
        runs: Number of timed forwards, all rounds together.
        rounds: Number of rounds; each gives one mean.
        threads: CPU threads within an operation.
    """

    median_ms: float
    iqr_ms: float
    runs: int
    rounds: int
    threads: int


def measure_latency(
    models: Mapping[str, nn.Module],
    example_inputs: Any,
    *,
    rounds: int = 15,
    min_run_time_s: float = 0.5,
    num_threads: int | None = None,
    forward_fn: ForwardFn | None = None,
) -> dict[str, Latency]:
    """Measure the latency of several models on the same inputs, A B A B ...

    Every round times each model once; a slow spell of the machine then lies on all of them. All models
    are called once before the first round.

    Args:
        models: Name -> module; each is left as it was found.
        example_inputs: A tensor, a tuple of positional arguments or a mapping of keyword arguments; moved
            to the model's device where the model has only one.
        rounds: Number of rounds, at least 3.
        min_run_time_s: Time to spend on each model at least, over all rounds, in seconds.
        num_threads: CPU threads within an operation while timing; None = as set now.
        forward_fn: ``forward_fn(model, example_inputs)`` replaces the call.

    Returns:
        Name -> latency, in the order of ``models``.

    Raises:
        OptionError: If an option is out of range.
        TraceError: If a forward fails.

    >>> tiny = {"wide": nn.Linear(8, 8), "narrow": nn.Linear(8, 2)}
    >>> [(name, taken.rounds) for name, taken in measure_latency(tiny, torch.ones(1, 8), rounds=3).items()]
    [('wide', 3), ('narrow', 3)]
    """
    _check(models, rounds, min_run_time_s, num_threads)
    threads = torch.get_num_threads() if num_threads is None else num_threads
    seconds: dict[str, list[float]] = {name: [] for name in models}
    clock = clock_of(*models.values())
    with ExitStack() as stack:
        timers: dict[str, Timer] = {}
        for name, model in models.items():
            forward = stack.enter_context(measured_forward(model, example_inputs, forward_fn))
            timers[name] = Timer("forward()", globals={"forward": forward}, num_threads=threads, timer=clock)
        numbers = {name: _runs_per_round(timers[name].timeit, min_run_time_s / rounds) for name in models}
        for _ in range(rounds):
            for name in models:
                seconds[name].append(float(timers[name].timeit(numbers[name]).mean))
    return {
        name: summarize_latency(seconds[name], runs=rounds * numbers[name], threads=threads)
        for name in models
    }


def summarize_latency(seconds: Sequence[float], *, runs: int, threads: int) -> Latency:
    """Give median and spread of the rounds' means.

    Args:
        seconds: [rounds] mean time of one forward per round, in seconds; at least two.
        runs: Number of timed forwards, all rounds together.
        threads: CPU threads within an operation.

    >>> summarize_latency([0.001, 0.002, 0.003, 0.004, 0.005], runs=50, threads=1)
    Latency(median_ms=3.0, iqr_ms=2.0, runs=50, rounds=5, threads=1)
    """
    first, median, third = statistics.quantiles([1e3 * s for s in seconds], n=4, method="inclusive")
    return Latency(median, third - first, runs, len(seconds), threads)


def _runs_per_round(timeit: Callable[[int], Any], seconds: float) -> int:
    timeit(1)  # the first call allocates, picks kernels, compiles
    taken = float(timeit(3).mean)
    return max(1, ceil(seconds / taken)) if taken > 0 else 1


def _check(
    models: Mapping[str, nn.Module], rounds: int, min_run_time_s: float, num_threads: int | None
) -> None:
    if not isinstance(models, Mapping) or not models:
        raise OptionError(
            f'expected a mapping {{"name": model}} of at least one model but got {type(models).__name__}'
        )
    if rounds < 3:
        raise OptionError(f"expected rounds >= 3, fewer have no spread, but got {rounds}")
    if not 0 < min_run_time_s < float("inf"):
        raise OptionError(
            f"expected min_run_time_s to be a positive number of seconds but got {min_run_time_s}"
        )
    if num_threads is not None and num_threads < 1:
        raise OptionError(f"expected num_threads >= 1 or None but got {num_threads}")
