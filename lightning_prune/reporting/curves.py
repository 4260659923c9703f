"""What a sensitivity has found, as a table: a line per part, a column per share removed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from lightning_prune.reporting.console import print_table, wide_console
from lightning_prune.reporting.wording import figure, percent

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["curve_cells", "print_curves"]

Curves = Mapping[str, Mapping[float, float]]


def curve_cells(
    curves: Curves, metric: str, chosen: Mapping[str, float] | None = None
) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Give the head and the lines of the table.

    Args:
        curves: Part -> share removed -> metric.
        metric: Its name.
        chosen: Part -> share that a budget takes from it, None = no budget was given.

    >>> head, lines = curve_cells({"stem.weight:0": {0.5: 0.91}, "fc.weight:0": {0.25: 0.9}}, "val/acc")
    >>> head
    ('part', '25%', '50%')
    >>> lines
    [('stem.weight:0', '', '91.00%'), ('fc.weight:0', '90.00%', '')]
    """
    ratios = sorted({ratio for curve in curves.values() for ratio in curve})
    head = ("part", *(f"{100 * ratio:.4g}%" for ratio in ratios))
    lines = [
        (name, *(figure(metric, curve[ratio]) if ratio in curve else "" for ratio in ratios))
        for name, curve in curves.items()
    ]
    if chosen is None:
        return head, lines
    return (*head, "chosen"), [
        (*line, percent(chosen[line[0]]) if line[0] in chosen else "") for line in lines
    ]


def print_curves(
    curves: Curves,
    baseline: float,
    metric: str,
    chosen: Mapping[str, float] | None = None,
    console: Console | None = None,
) -> None:
    """Print the table.

    Args:
        curves: Part -> share removed -> metric.
        baseline: The metric of the network as it is.
        metric: Its name.
        chosen: Part -> share that a budget takes from it, None = no budget was given.
        console: Where to; None = standard output.
    """
    from rich.text import Text

    console = console or wide_console()
    console.print(Text(f"{metric} of the network as it is: {figure(metric, baseline)}\n"))
    title = f"{metric} when a share of one part alone is removed"
    if chosen is not None:
        title += "; chosen: the share that goes for the budget"
    print_table(console, title, *curve_cells(curves, metric, chosen), words=0, names=1)
