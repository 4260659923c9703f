"""What a sensitivity has found, as a table: a line per part, a column per share removed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from lightning_prune.reporting.console import print_table, wide_console
from lightning_prune.reporting.wording import figure, percent

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["curve_cells", "layer_of", "print_curves"]

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
    [('stem', '', '91.00%'), ('fc', '90.00%', '')]
    """
    ratios = sorted({ratio for curve in curves.values() for ratio in curve})
    head = ("part", *(f"{100 * ratio:.4g}%" for ratio in ratios))
    short = [layer_of(name) for name in curves]
    names = short if len(set(short)) == len(short) else list(curves)
    values = [
        tuple(figure(metric, curve[ratio]) if ratio in curve else "" for ratio in ratios)
        for curve in curves.values()
    ]
    if chosen is None:
        return head, [(name, *line) for name, line in zip(names, values, strict=True)]
    taken = [percent(chosen[name]) if name in chosen else "" for name in curves]
    return (*head, "chosen"), [(n, *line, last) for n, line, last in zip(names, values, taken, strict=True)]


def layer_of(part: str) -> str:
    """Name a part by its layer.

    >>> layer_of("a.qkv.weight:0/head_dim"), layer_of("position:2")
    ('a.qkv head dim', 'position')
    """
    place, _, kind = part.partition("/")
    return f"{place.partition(':')[0].removesuffix('.weight')} {kind.replace('_', ' ')}".strip()


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
