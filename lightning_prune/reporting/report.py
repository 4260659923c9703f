"""Before and after a prune: one value, shown as console table, Markdown, JSON and figure.

Every rendering is a function of the ``Report`` alone. rich and matplotlib are imported when they are used.
"""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lightning_prune.measuring.measured import Measured
from lightning_prune.reporting.figures import channels_figure
from lightning_prune.reporting.wording import (
    cell,
    faster,
    fewer,
    less,
    markdown_table,
    mebibytes,
    milliseconds,
    number,
    percent,
    saved,
)

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["Measured", "Report", "Row", "Target"]

log = logging.getLogger(__name__)
BEFORE_AFTER = ("", "dense", "pruned", "change")
TIMELINE = ("epoch", "phase", "sparsity", "macs", "accuracy")


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
        channels: Layer -> (before, after).
        targets: Asked against reached.
        seed: Seed of the run, None if none was set.
        versions: Package -> version.
        machine: What it was measured on, as names and values.
        config: The resolved configuration.
        timeline: One mapping per epoch with "epoch" and any of "phase", "sparsity", "macs", "accuracy".

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
    channels: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    targets: Sequence[Target] = ()
    seed: int | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    machine: Mapping[str, Any] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    timeline: Sequence[Mapping[str, Any]] = ()

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
            *_peak_rows(a, b),
        )

    def notes(self) -> tuple[str, ...]:
        """Say what the table alone would hide."""
        notes = []
        if not _score_rows(self):
            notes.append("No metric was measured on held-out data: nothing is known of the model's quality.")
        elif self.split != "test":
            notes.append(
                f"The {self.metric} is that of the {self.split} split, which may have guided training."
            )
        macs = saved(self.dense.macs, self.pruned.macs)
        latency = saved(self.dense.latency_ms, self.pruned.latency_ms)
        if macs is not None and latency is not None and macs > 0 and latency < macs / 2:
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
            "targets": [asdict(target) for target in self.targets],
            "channels": self.channels,
            "notes": self.notes(),
            "seed": self.seed,
            "versions": self.versions,
            "machine": self.machine,
            "config": self.config,
            "timeline": self.timeline,
        }
        return {key: _plain(value) for key, value in data.items()}

    def to_json(self) -> str:
        """Give the JSON of ``as_dict``."""
        return json.dumps(self.as_dict(), indent=2, allow_nan=False) + "\n"

    def to_markdown(self, *, figure: str | None = None, remarks: Sequence[str] = ()) -> str:
        """Give the report as Markdown.

        Args:
            figure: Path of the figure of channels, relative to the text; None = leave it out.
            remarks: Further notes.
        """
        parts = [
            "# Before and after pruning",
            f"**dense**: {self.dense_is}",
            markdown_table(BEFORE_AFTER, [(r.label, r.dense, r.pruned, r.change) for r in self.rows()]),
            *(f"> {note}" for note in (*self.notes(), *remarks)),
            *_section("Asked and reached", ("", "asked", "reached"), _target_cells(self.targets)),
            *_section(
                "Channels per layer", ("layer", "before", "after", "kept"), _channel_cells(self.channels)
            ),
            *([f"![Channels per layer before and after]({figure})"] if figure else []),
            *_section(
                "Epochs", TIMELINE, [[cell(epoch.get(key)) for key in TIMELINE] for epoch in self.timeline]
            ),
            *_section("Run", ("", ""), _run_cells(self)),
        ]
        if self.config:
            parts += ["## Configuration", f"```json\n{json.dumps(_plain(self.config), indent=2)}\n```"]
        return "\n\n".join(parts) + "\n"

    def print_rich(self, console: Console | None = None) -> None:
        """Print table, targets and notes to a console.

        Args:
            console: Where to; None = standard output.
        """
        from rich import box
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        console = console or Console()
        table = Table(
            title="Before and after pruning", box=box.SIMPLE_HEAD, pad_edge=False, title_justify="left"
        )
        table.add_column("")
        for name in BEFORE_AFTER[1:]:
            table.add_column(name, justify="right")
        for row in self.rows():
            table.add_row(Text(row.label), Text(row.dense), Text(row.pruned, style="bold"), Text(row.change))
        console.print(table)
        for label, asked, reached in _target_cells(self.targets):
            console.print(Text(f"{label}: asked {asked}, reached {reached}"))
        console.print(Text(f"dense: {self.dense_is}"))
        for note in self.notes():
            console.print(Text.assemble(("Note: ", "bold yellow"), note))

    def write(self, folder: str | os.PathLike[str]) -> tuple[Path, ...]:
        """Write report.md, report.json and channels.png; each appears whole or not at all.

        A figure that cannot be drawn is replaced by a remark that says why.

        Args:
            folder: Where to; made if missing.

        Returns:
            The files written, report.json last: once it is there, the others are.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        files: dict[str, bytes] = {}
        remarks: list[str] = []
        if self.channels:
            try:
                files["channels.png"] = _png(self.channels)
            except Exception as error:  # a report must not fail for want of a picture
                remarks.append(_why_no_figure(error))
                log.warning(remarks[-1])
        figure = "channels.png" if "channels.png" in files else None
        files["report.md"] = self.to_markdown(figure=figure, remarks=remarks).encode()
        files["report.json"] = self.to_json().encode()
        return tuple(_write_whole(folder / name, data) for name, data in files.items())


def _png(channels: Mapping[str, tuple[int, int]]) -> bytes:
    buffer = BytesIO()
    channels_figure(channels, title="Channels per layer before and after").savefig(
        buffer, format="png", dpi=150
    )
    return buffer.getvalue()


def _why_no_figure(error: Exception) -> str:
    if isinstance(error, ImportError):
        return "No figure: matplotlib is not installed. `pip install 'lightning-prune[plots]'` adds it."
    return f"No figure: drawing it failed with {type(error).__name__}: {error}"


def _write_whole(path: Path, data: bytes) -> Path:
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.write_bytes(data)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    return path


def _score_rows(report: Report) -> list[Row]:
    before, after = report.dense.accuracy, report.pruned.accuracy
    if report.split is None or before is None or after is None:
        return []
    is_share = "acc" in report.metric.lower() and 0 <= min(before, after) <= max(before, after) <= 1
    show, gap = (
        (percent, f"{100 * abs(after - before):.2f} points")
        if is_share
        else (number, number(abs(after - before)))
    )
    change = "the same"
    if show(before) != show(after):
        change = f"{gap} {'higher' if after > before else 'lower'}"
        if report.direction == "min":  # a reader expects more to be better
            change += " (better)" if after < before else " (worse)"
    return [Row(f"{report.metric} ({report.split})", show(before), show(after), change)]


def _latency_rows(dense: Measured, pruned: Measured) -> list[Row]:
    if dense.latency_ms is None or pruned.latency_ms is None:
        return []
    before, after = (dense.latency_ms, dense.latency_iqr_ms), (pruned.latency_ms, pruned.latency_iqr_ms)
    return [Row("latency, ms (IQR)", milliseconds(*before), milliseconds(*after), faster(before, after))]


def _peak_rows(dense: Measured, pruned: Measured) -> list[Row]:
    a, b = dense.peak_memory_bytes, pruned.peak_memory_bytes
    return [] if a is None or b is None else [Row("peak memory", mebibytes(a), mebibytes(b), less(a, b))]


def _target_cells(targets: Sequence[Target]) -> list[Sequence[str]]:
    return [(target.what, percent(target.asked), percent(target.reached)) for target in targets]


def _channel_cells(channels: Mapping[str, tuple[int, int]]) -> list[Sequence[str]]:
    if not channels:
        return []
    before, after = (sum(pair[side] for pair in channels.values()) for side in (0, 1))
    lines = [*((name, *pair) for name, pair in channels.items()), ("total", before, after)]
    return [(name, f"{a:,}", f"{b:,}", f"{b / a:.0%}" if a else "") for name, a, b in lines]


def _run_cells(report: Report) -> list[Sequence[str]]:
    seed = {} if report.seed is None else {"seed": report.seed}
    return [(str(name), str(value)) for name, value in {**seed, **report.versions, **report.machine}.items()]


def _section(title: str, head: Sequence[str], lines: Sequence[Sequence[str]]) -> list[str]:
    return [f"## {title}", markdown_table(head, lines)] if lines else []


def _plain(value: Any) -> Any:
    """Reduce to what JSON knows."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if hasattr(value, "item") and getattr(value, "ndim", 0) == 0:  # a scalar of torch or numpy
        value = value.item()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, (str, int, bool)) else str(value)
