"""Rows ``regularize`` and ``optimizer``: the penalty of every step, beside theirs and the optimizer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial

import torch
from benchmarks.clock import Job, Spread, in_turns, ratio
from benchmarks.contenders import ours, theirs
from benchmarks.figure import Figure, Settings
from benchmarks.subjects import Subject, build

MODELS = ("resnet50", "vit_b_16")


def regularize(settings: Settings) -> Iterator[Figure]:
    """Both libraries with scores fresh in every step, on the same model and gradients."""
    for name in settings.pick(MODELS):
        subject = build(name, seed=settings.seed, device=settings.device).with_gradients()
        mine, other = ours(subject), theirs(subject)
        jobs: dict[str, Job] = {"ours": mine.regularize, "theirs": partial(other.regularize, subject.model)}
        times = _times(jobs, settings)
        yield _figure("regularize", subject, "regularize(), ours / theirs", times, ("ours", "theirs"), 0.1)


def optimizer(settings: Settings) -> Iterator[Figure]:
    """Ours beside one SGD step of the same model, scores fresh in every step or kept."""
    for name in settings.pick(MODELS):
        subject = build(name, seed=settings.seed, device=settings.device).with_gradients()
        fresh, cached = ours(subject), ours(subject)
        cached.regularizer.update_every = 10**9
        sgd = torch.optim.SGD(subject.model.parameters(), lr=1e-6, momentum=0.9, foreach=True)
        times = _times({"fresh": fresh.regularize, "cached": cached.regularize, "SGD": sgd.step}, settings)
        for kind, limit in (("fresh", 2.0), ("cached", 1.0)):
            what = f"regularize() with {kind} scores / SGD(momentum, foreach).step()"
            yield _figure("optimizer", subject, what, times, (kind, "SGD"), limit)


def _times(jobs: Mapping[str, Job], settings: Settings) -> dict[str, list[float]]:
    prepared = {name: partial(_ready, job) for name, job in jobs.items()}
    return in_turns(prepared, rounds=settings.rounds, device=settings.device)


def _ready(job: Job) -> Job:
    return job


def _figure(
    row: str, subject: Subject, what: str, times: dict[str, list[float]], pair: tuple[str, str], limit: float
) -> Figure:
    value = ratio(times[pair[0]], times[pair[1]])
    shown = {name: Spread.of(times[name]).times(1e3) for name in pair}
    return Figure(row, subject.name, what, value, "x", limit, shown)
