"""A report on the console. rich is imported when it prints."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from lightning_prune.reporting.report import BEFORE_AFTER, Report
from lightning_prune.reporting.sections import target_cells

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["print_report", "print_table", "wide_console"]

PIPE_WIDTH = 160  # of lines that go to no terminal


def wide_console() -> Console:
    """Give standard output; where it is no terminal, lines are long enough for wide tables."""
    from rich.console import Console

    console = Console()
    return console if console.is_terminal else Console(width=PIPE_WIDTH)


def print_table(
    console: Console,
    title: str,
    head: Sequence[str],
    lines: Sequence[Sequence[str]],
    *,
    words: int,
    names: int = 0,
) -> None:
    """Print a table of numbers; without lines nothing.

    Args:
        console: Where to.
        title: Above it.
        head: Heads of the columns.
        lines: Its lines.
        words: How many of the last columns are words.
        names: How many of the first are.
    """
    from rich import box
    from rich.table import Table
    from rich.text import Text

    if not lines:
        return
    console.print(Text(title, style="bold"))
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for place, name in enumerate(head):
        is_number = names <= place < len(head) - words
        justify: Literal["left", "right"] = "right" if is_number else "left"
        table.add_column(name, justify=justify, overflow="fold")
    for line in lines:
        table.add_row(*map(Text, line))
    console.print(table)


def print_report(report: Report, console: Console | None = None) -> None:
    """Print table, targets and notes of a report.

    Args:
        report: What to print.
        console: Where to; None = standard output.
    """
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = console or Console()
    table = Table(title="Before and after pruning", box=box.SIMPLE_HEAD, pad_edge=False, title_justify="left")
    table.add_column("")
    for name in BEFORE_AFTER[1:]:
        table.add_column(name, justify="right")
    for row in report.rows():
        table.add_row(Text(row.label), Text(row.dense), Text(row.pruned, style="bold"), Text(row.change))
    console.print(table)
    for label, asked, reached in target_cells(report.targets):
        console.print(Text(f"{label}: asked {asked}, reached {reached}"))
    console.print(Text(f"dense: {report.dense_is}"))
    if report.inputs:
        console.print(Text(f"MACs, latency and peak memory: those of {report.inputs}."))
    for note in report.notes():
        console.print(Text.assemble(("Note: ", "bold yellow"), note))
