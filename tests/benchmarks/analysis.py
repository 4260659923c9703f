"""Rows ``analysis`` and ``step``: from a model to its groups, and from its groups to a smaller model."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

from benchmarks.clock import Job, Spread, in_turns, ratio
from benchmarks.contenders import (
    PATIENCE,
    cannot_list,
    cannot_prune,
    our_groups,
    ours,
    ran_out_of_time,
    their_groups,
    theirs,
)
from benchmarks.figure import Figure, Settings
from benchmarks.subjects import ALL, Subject, build

LISTED = ("resnet50", "densenet121", "vit_b_16", "swin_t", "convnext_tiny", "llama")


def analysis(settings: Settings) -> Iterator[Figure]:
    """Graph build and one listing of groups, also where Torch-Pruning then cuts a model that cannot run.

    Where it was stopped, the time that it had is a lower bound of what it needs: a mean without such models
    and one with the bounds are given.
    """
    ratios, bounds = [], []
    for name in settings.pick(LISTED):
        subject = build(name, seed=settings.seed, device=settings.device)
        unlisted = cannot_list(subject)
        note = unlisted or cannot_prune(subject)
        jobs: dict[str, Callable[[], Job]] = {
            "ours": partial(partial, our_groups, subject),
            "theirs": partial(partial, their_groups, subject),
        }
        if unlisted:
            del jobs["theirs"]
        taken = in_turns(jobs, rounds=settings.rounds, device=settings.device)
        if ran_out_of_time(unlisted):
            note = f"Torch-Pruning was stopped after {PATIENCE:.0f} s, which count as its time: at most this."
            taken = {**taken, "theirs": [PATIENCE] * len(taken["ours"])}
        figure = _compared("analysis", "analysis, ours / theirs", name, taken, limit=2.0, note=note)
        if figure.value is not None:
            (bounds if unlisted else ratios).append(figure.value.median)
        yield figure
    yield from _geometric_mean("analysis", "of those that both finish", ratios)
    if bounds:
        yield from _geometric_mean("analysis", "of all, with the bounds", ratios + bounds)


def step(settings: Settings) -> Iterator[Figure]:
    """Score, select, cut; ours also certifies. Every round prunes a fresh copy."""
    ratios = []
    for name in settings.pick(ALL):
        subject = build(name, seed=settings.seed, device=settings.device)

        def prepared(make: Callable[..., Any], subject: Subject = subject) -> Callable[[], Job]:
            return lambda: make(subject, copy.deepcopy(subject.model)).step

        jobs = {"ours": prepared(ours), "theirs": prepared(theirs)}
        reason = cannot_prune(subject)
        if reason:
            del jobs["theirs"]
        taken = in_turns(jobs, rounds=settings.rounds, device=settings.device)
        what = "score, select, cut, certificate: ours / theirs"
        figure = _compared("step", what, name, taken, limit=None, note=reason)  # the mean is judged
        if figure.value is not None:
            ratios.append(figure.value.median)
        yield figure
    yield from _geometric_mean("step", "of those that both finish", ratios)


def _geometric_mean(row: str, which: str, ratios: list[float]) -> Iterator[Figure]:
    """Sum a row up; in brackets the smallest and the largest model's ratio."""
    if ratios:
        mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
        value = Spread(min(ratios), mean, max(ratios))
        yield Figure(row, "geometric mean", f"the same {which}, smallest to largest ratio", value, "x", 1.0)


def _compared(
    row: str, what: str, name: str, taken: Mapping[str, list[float]], *, limit: float | None, note: str
) -> Figure:
    """Make the figure of two times, or of ours alone."""
    value = ratio(taken["ours"], taken["theirs"]) if "theirs" in taken else None
    times = {who: Spread.of(seconds).times(1e3) for who, seconds in taken.items()}
    return Figure(row, name, what, value, "x", limit, times, note)
