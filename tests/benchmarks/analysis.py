"""Rows ``analysis`` and ``step``: from a model to its groups, and from its groups to a smaller model."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

from benchmarks.clock import Job, Spread, in_turns, ratio
from benchmarks.contenders import cannot, ours, theirs
from benchmarks.figure import Figure, Settings
from benchmarks.subjects import ALL, Subject, build

LISTED = ("resnet50", "densenet121", "vit_b_16", "swin_t", "convnext_tiny", "llama")


def analysis(settings: Settings) -> Iterator[Figure]:
    """Graph build and group listing: the construction of either pruner does both."""
    for name in settings.pick(LISTED):
        subject = build(name, seed=settings.seed, device=settings.device)
        jobs = {
            "ours": partial(partial, ours, subject),
            "theirs": partial(partial, theirs, subject),
        }
        yield _compare("analysis", "analysis, ours / theirs", subject, jobs, settings)


def step(settings: Settings) -> Iterator[Figure]:
    """Score, select, cut; ours also certifies. Every round prunes a fresh copy."""
    ratios = []
    for name in settings.pick(ALL):
        subject = build(name, seed=settings.seed, device=settings.device)

        def prepared(make: Callable[..., Any], subject: Subject = subject) -> Callable[[], Job]:
            return lambda: make(subject, copy.deepcopy(subject.model)).step

        jobs = {"ours": prepared(ours), "theirs": prepared(theirs)}
        figure = _compare("step", "score, select, cut, certificate: ours / theirs", subject, jobs, settings)
        if figure.value is not None:
            ratios.append(figure.value.median)
        yield figure
    if ratios:
        mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
        value = Spread(min(ratios), mean, max(ratios))
        yield Figure("step", "geometric mean", "the same, smallest to largest model", value, "x", 1.0)


def _compare(
    row: str, what: str, subject: Subject, jobs: Mapping[str, Callable[[], Job]], settings: Settings
) -> Figure:
    """Time both, or only ours where Torch-Pruning cannot prune the model."""
    limit = 1.0 if row == "analysis" else None  # a step is judged by the geometric mean
    reason = cannot(subject, copy.deepcopy(subject.model))
    if reason:
        jobs = {"ours": jobs["ours"]}
    taken = in_turns(jobs, rounds=settings.rounds, device="cpu")
    value = None if reason else ratio(taken["ours"], taken["theirs"])
    times = {name: Spread.of(t).times(1e3) for name, t in taken.items()}
    return Figure(row, subject.name, what, value, "x", limit, times, reason)
