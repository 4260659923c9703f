"""Several reports beside each other: one line per run."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_prune.files import write_whole
from lightning_prune.reporting.console import wide_console
from lightning_prune.reporting.page import page_template
from lightning_prune.reporting.report import Report
from lightning_prune.reporting.wording import cell, faster, markdown_table, milliseconds, percent

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["comparison_cells", "print_comparison", "write_comparison"]

HEAD = ("run", "metric", "dense", "pruned", "params left", "MACs left", "latency, ms (IQR)", "speed-up")
TITLE = "Comparison of prunes"


def comparison_cells(reports: Mapping[str, Report]) -> list[tuple[str, ...]]:
    """Give one line per run, under ``HEAD``; what was not measured is empty.

    Args:
        reports: Name of the run -> its report.
    """
    names = _without_shared_start(list(reports))
    return [_line(name, report) for name, report in zip(names, reports.values(), strict=True)]


def print_comparison(reports: Mapping[str, Report], console: Console | None = None) -> None:
    """Print the table to a console.

    Args:
        reports: Name of the run -> its report.
        console: Where to; None = standard output.
    """
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(title=TITLE, box=box.SIMPLE_HEAD, pad_edge=False, title_justify="left")
    for place, name in enumerate(HEAD):
        table.add_column(name, justify="left" if place < 2 else "right", overflow="fold")
    for line in comparison_cells(reports):
        table.add_row(*map(Text, line))
    (console or wide_console()).print(table)


def write_comparison(reports: Mapping[str, Report], folder: str | os.PathLike[str]) -> tuple[Path, ...]:
    """Write comparison.html, comparison.md and comparison.json; each appears whole or not at all.

    Args:
        reports: Name of the run -> its report.
        folder: Where to; made if missing.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    lines = comparison_cells(reports)
    data = {name: report.as_dict() for name, report in reports.items()}
    files = {
        "comparison.html": page_template("comparison.html").render(title=TITLE, head=HEAD, lines=lines),
        "comparison.md": f"# {TITLE}\n\n{markdown_table(HEAD, lines)}\n",
        "comparison.json": json.dumps(data, indent=2, allow_nan=False) + "\n",
    }
    return tuple(write_whole(folder / name, text.encode()) for name, text in files.items())


def _line(name: str, report: Report) -> tuple[str, ...]:
    dense, pruned = report.dense, report.pruned
    score = next(iter(report.rows()))
    has_score = score.label != "parameters"
    speed = ""
    if dense.latency_ms and pruned.latency_ms:
        speed = faster((dense.latency_ms, dense.latency_iqr_ms), (pruned.latency_ms, pruned.latency_iqr_ms))
    return (
        name,
        score.label if has_score else "",
        score.dense if has_score else "",
        score.pruned if has_score else "",
        _left(dense.parameters, pruned.parameters),
        _left(dense.macs, pruned.macs),
        milliseconds(pruned.latency_ms, pruned.latency_iqr_ms),
        speed,
    )


def _left(before: int, after: int) -> str:
    return f"{cell(after)} ({percent(after / before)})" if before else cell(after)


def _without_shared_start(names: Sequence[str]) -> list[str]:
    """Leave out the folders that all runs share, so that the names tell them apart.

    >>> _without_shared_start(["multirun/a/0", "multirun/a/1"])
    ['0', '1']
    """
    parts = [Path(name).parts for name in names]
    shared = 0
    while all(len(p) > shared + 1 for p in parts) and len({p[shared] for p in parts}) == 1:
        shared += 1
    return [str(Path(*p[shared:])) for p in parts]
