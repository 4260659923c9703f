"""Row ``latency``: whether half of the MACs is half of the time, and what is at fault where it is not."""

from __future__ import annotations

import copy
from collections.abc import Iterator

from benchmarks.clock import Spread
from benchmarks.contenders import ours
from benchmarks.figure import Figure, Settings
from benchmarks.subjects import ALL, Subject, build
from torch import nn

from lightning_prune.measuring.cost import measure_cost
from lightning_prune.measuring.latency import Latency, measure_latency
from lightning_prune.measuring.speedup import account_for_speed

BATCHES = (1, 32)
MULTIPLE = 8


def latency(settings: Settings) -> Iterator[Figure]:
    """Dense over pruned time at half of the MACs, widths in multiples of 8."""
    for name in settings.pick(ALL):
        subject = build(name, seed=settings.seed, device=settings.device)
        pruned = copy.deepcopy(subject.model)
        ours(subject, pruned, budget={"macs": 0.5}, round_to=MULTIPLE).step()
        macs = [measure_cost(m, subject.inputs).macs for m in (subject.model, pruned)]
        for batch in BATCHES:
            yield _figure(subject, pruned, batch, macs[1] / macs[0], settings)


def _figure(subject: Subject, pruned: nn.Module, batch: int, kept: float, settings: Settings) -> Figure:
    inputs = subject.inputs.repeat(batch, *[1] * (subject.inputs.dim() - 1))
    rounds = settings.rounds if batch == 1 else max(3, settings.rounds // 3)
    models = {"dense": subject.model, "pruned": pruned}
    taken = measure_latency(models, inputs, rounds=rounds, min_run_time_s=0.3)
    share = taken["pruned"].median_ms / taken["dense"].median_ms
    blurred = (
        taken["pruned"].iqr_ms / taken["pruned"].median_ms + taken["dense"].iqr_ms / taken["dense"].median_ms
    ) / 2
    value = Spread((1 - blurred) * share, share, (1 + blurred) * share)
    limit = 1 - (1 - kept) / 2  # half of the time that the MACs promise to save
    why = account_for_speed(
        subject.model, pruned, inputs, time=share, macs=kept, rounds=7 if batch == 1 else 2
    )
    note = " ".join([f"{kept:.2f} of the MACs.", *why])
    what = f"pruned / dense latency at half the MACs, batch {batch}"
    return Figure(
        "latency", subject.name, what, value, "x", limit, {n: _spread(t) for n, t in taken.items()}, note
    )


def _spread(taken: Latency) -> Spread:
    half = taken.iqr_ms / 2
    return Spread(taken.median_ms - half, taken.median_ms, taken.median_ms + half)
