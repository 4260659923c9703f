"""Latency of a choice from a table of layers, measured once on the device in use, kept in a file."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lightning_prune.budgets.subject import Bools, Subject
from lightning_prune.errors import BudgetError, OptionError
from lightning_prune.files import write_whole
from lightning_prune.measuring.clock import clock_of
from lightning_prune.measuring.forwards import measured_forward
from lightning_prune.measuring.latency import measure_latency
from lightning_prune.measuring.measured import describe_machine
from lightning_prune.plan import Plan
from lightning_prune.selection.choosing import Choice

__all__ = ["CACHE", "TOLERANCE", "LatencyTable", "aim_by_the_clock", "build_table", "sizes_after"]

CACHE = "LIGHTNING_PRUNE_CACHE"  # folder of the tables; without it the user's cache folder
RATIOS = (0.0, 0.15, 0.3, 0.45, 0.6, 0.75, 0.9)
ROUNDS = 15
REST = ""  # what no layer with a weight takes: activations, attention, Python
TOLERANCE = 0.05
ATTEMPTS = 8
SECONDS = 0.6  # on the clock, per network and attempt
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LatencyTable:
    """How long each layer of one network takes at several sizes, on one machine.

    Args:
        machine: What the times depend on beside the network.
        layers: Per layer with a weight, pairs (elements of the weight, milliseconds), smallest first. "" is
            all the rest, by elements of all weights together.
    """

    machine: Mapping[str, Any]
    layers: Mapping[str, Sequence[tuple[int, float]]]

    def milliseconds(self, sizes: Mapping[str, int]) -> float:
        """Give the time of one forward.

        Args:
            sizes: Elements of the weight per layer. Between two measured sizes the time lies on a line.
        """
        everything = {**sizes, REST: sum(sizes.values())}
        return float(sum(_on_the_line(self.layers[name], everything[name]) for name in self.layers))

    def __str__(self) -> str:
        rows = [f"{'layer':<40} {'elements':>12} {'ms':>9}   {'elements':>12} {'ms':>9}"]
        for name, points in self.layers.items():
            (least, fast), (most, slow) = points[0], points[-1]
            rows.append(f"{name or 'the rest':<40} {least:>12,} {fast:>9.4f}   {most:>12,} {slow:>9.4f}")
        where = ", ".join(f"{key} {value}" for key, value in self.machine.items())
        return "\n".join([f"Latency by layer, at the smallest and the largest size ({where})", *rows])

    def as_dict(self) -> dict[str, Any]:
        """Give plain data, for JSON and checkpoints."""
        data = asdict(self)
        return {**data, "layers": {name: [list(p) for p in points] for name, points in self.layers.items()}}

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> LatencyTable:
        """Read what ``as_dict`` wrote."""
        layers = {n: tuple((int(w), float(ms)) for w, ms in points) for n, points in data["layers"].items()}
        return LatencyTable(dict(data["machine"]), layers)


def build_table(subject: Subject) -> LatencyTable:
    """Measure the table, or read it where the same network was measured on the same machine before.

    Copies of the network are cut at several ratios, as a prune would cut them, and run in turns; hooks take
    the time of each layer. The result goes to ``$LIGHTNING_PRUNE_CACHE/latency``, by default
    ``~/.cache/lightning_prune/latency``, in a file named after everything the times depend on.

    Raises:
        OptionError: If the network has no weights to run with, or its parts lie on several devices.
    """
    devices = {p.device for p in subject.model.parameters()}
    if len(devices) != 1 or next(iter(devices)).type == "meta":
        raise OptionError(
            "budget latency is measured on the device in use, and the network is on "
            f"{sorted(map(str, devices))}; put all of it on one device first"
        )
    machine = {**describe_machine(next(iter(devices))), "torch": torch.__version__}
    keeps = {keep.tobytes(): keep for keep in map(subject.choose, RATIOS)}.values()
    sizes = [sizes_after(subject.model, subject.plan(keep)) for keep in keeps]
    file = _file([machine, _shapes(subject.inputs), *sizes, type(subject.model).__qualname__])
    if file.exists():
        table = LatencyTable.from_dict(json.loads(file.read_text(encoding="utf-8")))
        log.info("Latencies by layer are those of %s", file)
    else:
        table = LatencyTable(machine, _measure(subject, list(keeps), sizes))
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, json.dumps(table.as_dict(), indent=1).encode())
        log.info("Latencies by layer were measured and are kept in %s", file)
    log.info("%s", table)
    return table


def aim_by_the_clock(
    subject: Subject, meet: Callable[[float], Choice], now: float, wanted: float, dense: float
) -> tuple[Choice, float]:
    """Meet a latency by the table, look at the clock, and aim again by as much as it missed.

    Args:
        subject: The network as it is.
        meet: Milliseconds by the table -> choice.
        now: Milliseconds of the network as it is, by the table.
        wanted: Milliseconds to reach.
        dense: Milliseconds of the dense network, by the table.

    Returns:
        The choice, and the share of the dense latency that a copy cut by it took.

    Raises:
        BudgetError: If no attempt comes within five percentage points of the dense latency.
    """
    aim = wanted
    tried: list[tuple[float, float, Choice]] = []  # aim, milliseconds on the clock, choice
    for _ in range(ATTEMPTS):
        try:
            choice = meet(aim)
        except BudgetError:
            if not tried:
                raise
            break  # a better aim is out of reach
        pair = {"now": subject.model, "then": subject.pruned(choice.keep)}
        taken = measure_latency(pair, subject.inputs, forward_fn=subject.forward_fn, min_run_time_s=SECONDS)
        found = now * taken["then"].median_ms / taken["now"].median_ms
        tried.append((aim, found, choice))
        if abs(found - wanted) <= TOLERANCE / 2 * dense:
            break
        aim = _aim_again([(a, f) for a, f, _ in tried], wanted, now)
    _, found, choice = min(tried, key=lambda each: abs(each[1] - wanted))
    if abs(found - wanted) > TOLERANCE * dense:
        raise BudgetError(
            f"budget latency: {wanted / dense:.3f} was asked, and the nearest that a pruned copy took on "
            f"this device is {found / dense:.3f} of the dense network's time; ask for a larger share, wait "
            "until the machine is quiet, or budget macs instead"
        )
    return choice, found / dense


def _aim_again(tried: Sequence[tuple[float, float]], wanted: float, most: float) -> float:
    """Aim between the nearest aims that were too high and too low, else in proportion to the miss.

    >>> _aim_again([(10.0, 12.0)], 6.0, 20.0), _aim_again([(10.0, 12.0), (5.0, 4.0)], 6.0, 20.0)
    (5.0, 6.25)
    """
    above = min((each for each in tried if each[1] > wanted), default=None)
    below = max((each for each in tried if each[1] <= wanted), default=None)
    if above is None or below is None or above[1] == below[1]:
        aim, found = tried[-1]
        return min(most, aim * wanted / found)
    return below[0] + (above[0] - below[0]) * (wanted - below[1]) / (above[1] - below[1])


def sizes_after(model: nn.Module, plan: Plan) -> dict[str, int]:
    """Count the elements of every layer's weight once a plan is applied."""
    cuts = plan.by_tensor()
    sizes = {}
    for name, layer in _layers(model):
        shape = list(layer.weight.shape)  # type: ignore[arg-type]
        for cut in cuts.get(f"{name}.weight" if name else "weight", ()):
            shape[cut.dim] = cut.kept
        sizes[name or "the network"] = int(np.prod(shape))
    return sizes


def _layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, layer in model.named_modules():
        if isinstance(getattr(layer, "weight", None), Tensor) and not list(layer.children()):
            yield name, layer


def _measure(
    subject: Subject, keeps: Sequence[Bools], sizes: Sequence[Mapping[str, int]]
) -> dict[str, tuple[tuple[int, float], ...]]:
    """Run the copies in turns; a slow spell of the machine then lies on all of them."""
    runs: list[dict[str, list[float]]] = [{} for _ in keeps]
    copies = [subject.pruned(keep) for keep in keeps]
    for number in range(ROUNDS + 1):
        for copy, seen in zip(copies, runs, strict=True):
            clock = clock_of(copy)
            with measured_forward(copy, subject.inputs, subject.forward_fn) as forward:
                with _stopwatch(copy, clock) as taken:
                    forward()
                start = clock()
                forward()
                taken[REST] = clock() - start - sum(taken.values())
            if number:  # the first round allocates and picks kernels
                for name, seconds in taken.items():
                    seen.setdefault(name, []).append(1e3 * seconds)
    layers: dict[str, tuple[tuple[int, float], ...]] = {}
    for name in (*sizes[0], REST):
        points: dict[int, list[float]] = {}
        for size, seen in zip(sizes, runs, strict=True):
            if name in seen:
                work = sum(size.values()) if name == REST else size[name]
                points.setdefault(work, []).extend(seen[name])
        if points:
            order = sorted(points)
            medians = np.maximum.accumulate([max(0.0, statistics.median(points[work])) for work in order])
            layers[name] = tuple(zip(order, map(float, medians), strict=True))
    return layers


@contextmanager
def _stopwatch(model: nn.Module, clock: Callable[[], float]) -> Iterator[dict[str, float]]:
    """Take the time of every layer meanwhile, in seconds, all its calls together."""
    taken: dict[str, float] = {}
    started: dict[str, float] = {}
    hooks = []
    for name, layer in _layers(model):
        key = name or "the network"

        def enter(*_: Any, key: str = key) -> None:
            started[key] = clock()

        def leave(*_: Any, key: str = key) -> None:
            taken[key] = taken.get(key, 0.0) + clock() - started[key]

        hooks += [layer.register_forward_pre_hook(enter), layer.register_forward_hook(leave)]
    try:
        yield taken
    finally:
        for hook in hooks:
            hook.remove()


def _on_the_line(points: Sequence[tuple[int, float]], work: int) -> float:
    sizes, times = zip(*points, strict=True)
    return float(np.interp(work, sizes, times))


def _shapes(inputs: Any) -> list[str]:
    leaves = tree_leaves(dict(inputs) if isinstance(inputs, Mapping) else inputs)
    return [f"{x.dtype}{list(x.shape)}" if isinstance(x, Tensor) else type(x).__name__ for x in leaves]


def _file(facts: Sequence[Any]) -> Path:
    name = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:24]
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lightning_prune"
    return Path(os.environ.get(CACHE) or home) / "latency" / f"{name}.json"
