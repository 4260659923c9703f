"""Before and after a prune, as one value. Every rendering of it is a function of the ``Report`` alone."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

from lightning_prune.errors import PruneError
from lightning_prune.graph.explaining import Frozen
from lightning_prune.measuring.measured import Measured
from lightning_prune.reporting.history import Cut, Spread
from lightning_prune.reporting.wording import (
    faster,
    fewer,
    is_share,
    less,
    mebibytes,
    milliseconds,
    number,
    percent,
    saved,
    within_spread,
)

__all__ = ["Measured", "Metric", "Report", "Row", "Target", "plain"]

BEFORE_AFTER = ("", "dense", "pruned", "change")


@dataclass(frozen=True)
class Target:
    """What was asked of a prune and what came out, both shares in [0, 1].

    Args:
        what: In words: "units removed", "MACs kept".
        asked: Share asked for.
        reached: Share reached.
    """

    what: str
    asked: float
    reached: float


@dataclass(frozen=True)
class Metric:
    """A logged metric of both networks.

    Args:
        name: Without the split.
        direction: "max" if more of it is better, "min" if less is, None if that is not known.
        dense: Value of the network before.
        pruned: Value of the network after.
    """

    name: str
    direction: Literal["max", "min"] | None
    dense: float
    pruned: float


@dataclass(frozen=True)
class Row:
    """One line of the before/after table, as text."""

    label: str
    dense: str
    pruned: str
    change: str


@dataclass(frozen=True, kw_only=True)
class Report:
    """All that is said of one prune.

    Args:
        dense: The network that the pruned one is compared with.
        pruned: The network at the end.
        dense_is: One sentence: which network ``dense`` is.
        metric: Name of what ``accuracy`` holds; another metric than accuracy keeps its own scale.
        direction: "max" if more of the metric is better, "min" if less is.
        split: Data it was computed on ("test", "val"); None = no data, the table then has no such row.
        others: Metrics beside that one, on the same data.
        inputs: What MACs, latency and peak memory are those of, in words: "one sample, 1x3x32x32 float32".
        channels: Layer -> (before, after).
        targets: Asked against reached.
        seed: Seed of the run, None if none was set.
        versions: Package -> version.
        machine: What it was measured on, as names and values.
        config: The resolved configuration.
        timeline: One mapping per epoch with "epoch" and any of "phase", "sparsity" (share of the parameters
            removed), "macs" (share left) and "accuracy".
        cuts: What each cut chose by.
        spreads: How far unit norms lay apart, per epoch.
        frozen: What stayed whatever was asked, and why.
        speed: Why the pruned network is not as much faster as its MACs promise, in sentences.

    >>> small, large = Measured(0.9, 50, 500, 200), Measured(0.9, 100, 1000, 400)
    >>> report = Report(dense=large, pruned=small, dense_is="The model before the first cut.")
    >>> [(row.label, row.change) for row in report.rows()]
    [('parameters', '50.0% fewer'), ('MACs', '50.0% fewer'), ('parameter memory', '50.0% less')]
    """

    dense: Measured
    pruned: Measured
    dense_is: str
    metric: str = "accuracy"
    direction: Literal["max", "min"] = "max"
    split: str | None = None
    others: Sequence[Metric] = ()
    inputs: str = ""
    channels: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    targets: Sequence[Target] = ()
    seed: int | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    machine: Mapping[str, Any] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    timeline: Sequence[Mapping[str, Any]] = ()
    cuts: Sequence[Cut] = ()
    spreads: Sequence[Spread] = ()
    frozen: Sequence[Frozen] = ()
    speed: Sequence[str] = ()

    def rows(self) -> tuple[Row, ...]:
        """Give the lines of the before/after table; what was not measured has no line."""
        a, b = self.dense, self.pruned
        return (
            *_score_rows(self),
            Row("parameters", f"{a.parameters:,}", f"{b.parameters:,}", fewer(a.parameters, b.parameters)),
            Row("MACs", f"{a.macs:,}", f"{b.macs:,}", fewer(a.macs, b.macs)),
            *_latency_rows(a, b),
            Row(
                "parameter memory",
                mebibytes(a.memory_bytes),
                mebibytes(b.memory_bytes),
                less(a.memory_bytes, b.memory_bytes),
            ),
            *_byte_rows("peak memory", a.peak_memory_bytes, b.peak_memory_bytes),
            *_byte_rows("saved weights", a.disk_bytes, b.disk_bytes),
        )

    def notes(self) -> tuple[str, ...]:
        """Say what the table alone would hide."""
        notes = []
        if not _score_rows(self):
            notes.append("No metric was measured on held-out data: nothing is known of the model's quality.")
        elif self.split != "test":
            whose = "metrics are those" if len(_score_rows(self)) > 1 else f"{self.metric} is that"
            notes.append(f"The {whose} of the {self.split} split, which may have guided training.")
        macs = saved(self.dense.macs, self.pruned.macs)
        latency = saved(self.dense.latency_ms, self.pruned.latency_ms)
        times = [(each.latency_ms, each.latency_iqr_ms) for each in (self.dense, self.pruned)]
        if latency is not None and within_spread(*times):
            notes.append(
                "The latency varied more than it changed, so it says nothing of the speed-up; measure on a "
                "machine that does nothing else."
            )
        elif self.speed:
            notes += self.speed
        elif macs is not None and latency is not None and macs > 0 and latency < macs / 2:
            notes.append(
                f"MACs fell by {macs:.0%}, latency {'by' if latency >= 0 else 'rose by'} {abs(latency):.0%}: "
                "less than half of what the MACs promise. Small layers are bound by memory and overhead; try "
                "larger batches, round_to=8, or measure on the device that it will run on."
            )
        return tuple(notes)

    def as_dict(self) -> dict[str, Any]:
        """Give plain numbers, strings, lists and dicts; numbers that JSON lacks become None."""
        data = {
            "dense": asdict(self.dense),
            "pruned": asdict(self.pruned),
            "dense_is": self.dense_is,
            "metric": {"name": self.metric, "direction": self.direction, "split": self.split},
            "others": [asdict(each) for each in self.others],
            "inputs": self.inputs,
            "targets": [asdict(target) for target in self.targets],
            "channels": self.channels,
            "notes": self.notes(),
            "seed": self.seed,
            "versions": self.versions,
            "machine": self.machine,
            "config": self.config,
            "timeline": self.timeline,
            "cuts": [asdict(cut) for cut in self.cuts],
            "spreads": [asdict(spread) for spread in self.spreads],
            "frozen": [asdict(each) for each in self.frozen],
            "speed": self.speed,
        }
        return {key: plain(value) for key, value in data.items()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Report:
        """Read what ``as_dict`` or ``to_json`` wrote, by this version or an earlier one.

        Raises:
            PruneError: If it is no report.
        """
        try:
            return cls(
                dense=_measured(data["dense"]),
                pruned=_measured(data["pruned"]),
                dense_is=data["dense_is"],
                metric=data["metric"]["name"],
                direction=data["metric"]["direction"],
                split=data["metric"]["split"],
                others=tuple(_metric(each) for each in data.get("others", ())),
                inputs=data.get("inputs", ""),
                channels={name: (before, after) for name, (before, after) in data["channels"].items()},
                targets=tuple(Target(**target) for target in data["targets"]),
                seed=data["seed"],
                versions=data["versions"],
                machine=data["machine"],
                config=data["config"],
                timeline=tuple(data["timeline"]),
                cuts=tuple(Cut.of(cut) for cut in data.get("cuts", ())),
                spreads=tuple(Spread.of(spread) for spread in data.get("spreads", ())),
                frozen=tuple(Frozen(**each) for each in data.get("frozen", ())),
                speed=tuple(data.get("speed", ())),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise PruneError(f"this is no report of a prune: {type(error).__name__}: {error}") from error

    def to_json(self) -> str:
        """Give the JSON of ``as_dict``."""
        return json.dumps(self.as_dict(), indent=2, allow_nan=False) + "\n"


def _score_rows(report: Report) -> list[Row]:
    if report.split is None:
        return []
    before, after = report.dense.accuracy, report.pruned.accuracy
    known = before is not None and after is not None
    main = [Metric(report.metric, report.direction, before, after)] if known else []  # type: ignore[arg-type]
    return [_score_row(each, report.split) for each in (*main, *report.others)]


def _score_row(metric: Metric, split: str) -> Row:
    before, after = metric.dense, metric.pruned
    show, gap = (
        (percent, f"{100 * abs(after - before):.2f} points")
        if is_share(metric.name, before, after)
        else (number, number(abs(after - before)))
    )
    change = "the same"
    if show(before) != show(after):
        change = f"{gap} {'higher' if after > before else 'lower'}"
        if metric.direction == "min":  # a reader expects more to be better
            change += " (better)" if after < before else " (worse)"
    return Row(f"{metric.name} ({split})", show(before), show(after), change)


def _latency_rows(dense: Measured, pruned: Measured) -> list[Row]:
    if dense.latency_ms is None or pruned.latency_ms is None:
        return []
    before, after = (dense.latency_ms, dense.latency_iqr_ms), (pruned.latency_ms, pruned.latency_iqr_ms)
    return [Row("latency, ms (IQR)", milliseconds(*before), milliseconds(*after), faster(before, after))]


def _byte_rows(label: str, a: int | None, b: int | None) -> list[Row]:
    return [] if a is None or b is None else [Row(label, mebibytes(a), mebibytes(b), less(a, b))]


def _measured(data: Mapping[str, Any]) -> Measured:
    known = {field.name for field in fields(Measured)}
    return Measured(**{name: value for name, value in data.items() if name in known})


def _metric(data: Mapping[str, Any]) -> Metric:
    """Read a metric; JSON has no NaN, so what is missing was one."""
    dense, pruned = (math.nan if data[key] is None else data[key] for key in ("dense", "pruned"))
    return Metric(data["name"], data["direction"], dense, pruned)


def plain(value: Any) -> Any:
    """Reduce to what JSON knows."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if hasattr(value, "item") and getattr(value, "ndim", 0) == 0:  # a scalar of torch or numpy
        value = value.item()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, (str, int, bool)) else str(value)
