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
# What presses the weights, and the value of ``fused`` for it.
LOOPS = {"by PyTorch": False, "fused": True}


def regularize(settings: Settings) -> Iterator[Figure]:
    """Both libraries with scores fresh in every step, on the same model and gradients."""
    for name in settings.pick(MODELS):
        subject = build(name, seed=settings.seed, device=settings.device).with_gradients()
        other = theirs(subject)
        jobs: dict[str, Job] = {"theirs": partial(other.regularize, subject.model)}
        for loops, fused in LOOPS.items():
            jobs[loops] = ours(subject, fused=fused).regularize
        times = _times(jobs, settings)
        for loops in LOOPS:
            what = f"regularize() {loops}, ours / theirs"
            yield _figure("regularize", subject, what, times, (loops, "theirs"), 0.1)


def optimizer(settings: Settings) -> Iterator[Figure]:
    """Ours beside one SGD step of the same model, scores fresh in every step or kept."""
    for name in settings.pick(MODELS):
        subject = build(name, seed=settings.seed, device=settings.device).with_gradients()
        sgd = torch.optim.SGD(subject.model.parameters(), lr=1e-6, momentum=0.9, foreach=True)
        jobs: dict[str, Job] = {"SGD": sgd.step}
        for loops, fused in LOOPS.items():
            fresh, cached = ours(subject, fused=fused), ours(subject, fused=fused)
            cached.regularizer.update_every = 10**9
            jobs |= {f"fresh scores, {loops}": fresh.regularize, f"cached scores, {loops}": cached.regularize}
        times = _times(jobs, settings)
        for job in list(jobs)[1:]:
            what = f"regularize() with {job} / SGD(momentum, foreach).step()"
            limit = 2.0 if job.startswith("fresh") else 1.0
            yield _figure("optimizer", subject, what, times, (job, "SGD"), limit)


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
