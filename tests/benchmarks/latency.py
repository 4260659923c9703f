"""Row ``latency``: whether half of the MACs is half of the time, and what is at fault where it is not."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
from benchmarks.clock import Spread
from benchmarks.contenders import ours
from benchmarks.figure import Figure, Settings
from benchmarks.subjects import ALL, Subject, build
from torch import nn
from torch.profiler import ProfilerActivity, profile

from lightning_prune.measuring.cost import measure_cost
from lightning_prune.measuring.latency import Latency, measure_latency

BATCHES = (1, 32)
MULTIPLE = 8
# Operations that multiply: their time follows the MACs.
_PRODUCTS = ("conv", "mm", "linear", "matmul", "attention", "bmm")


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
    note = f"{kept:.2f} of the MACs"
    if share > limit:
        note += f"; gained less than half of what they promise: {at_fault(pruned, inputs)}"
    what = f"pruned / dense latency at half the MACs, batch {batch}"
    return Figure(
        "latency", subject.name, what, value, "x", limit, {n: _spread(t) for n, t in taken.items()}, note
    )


def _spread(taken: Latency) -> Spread:
    half = taken.iqr_ms / 2
    return Spread(taken.median_ms - half, taken.median_ms, taken.median_ms + half)


def at_fault(model: nn.Module, inputs: torch.Tensor) -> str:
    """Name widths that are no multiple of 8 and the operations without products that take the most time."""
    odd = [f"{name} {tuple(p.shape)}" for name, p in model.named_parameters() if _is_odd(p)]
    with torch.no_grad(), profile(activities=[ProfilerActivity.CPU]) as run:
        model(inputs)
    times = {e.key: e.self_cpu_time_total for e in run.key_averages() if e.key.startswith("aten::")}
    bound = {key: t for key, t in times.items() if not any(word in key for word in _PRODUCTS)}
    total = sum(times.values()) or 1.0
    top = sorted(bound, key=lambda key: -bound[key])[:3]
    shares = ", ".join(f"{key} {bound[key] / total:.0%}" for key in top)
    return f"{sum(bound.values()) / total:.0%} of the time in operations without products ({shares})" + (
        f"; odd widths {', '.join(odd[:3])}" if odd else ""
    )


def _is_odd(parameter: nn.Parameter) -> bool:
    return parameter.dim() > 1 and parameter.shape[0] > MULTIPLE and parameter.shape[0] % MULTIPLE != 0
