"""What the cuts chose by: scores of the units of every isomorphism class, with the line of the cut."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from lightning_prune.reporting.history import ClassScores, Cut
from lightning_prune.reporting.pictures.channels import shorten
from lightning_prune.reporting.pictures.style import COLOURS, INK, WIDTH, plain_axes, scale

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["importance_figure"]

ORDER = ("blue", "vermilion", "green", "purple", "sky", "orange", "yellow", "black")
DASHES = ("-", "--", "-.", ":")


def importance_figure(cuts: Sequence[Cut]) -> Figure:
    """Draw the first and the last cut: one row per class, one column per cut.

    Kept units are filled, removed ones hatched, and a line in the colour of the class stands at the strongest
    unit that went.

    Args:
        cuts: In order, at least one.

    Returns:
        A figure of its own, tied to no window.

    Raises:
        ImportError: If matplotlib is not installed.
        ValueError: If there is no cut.
    """
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    if not cuts:
        raise ValueError("expected at least one cut to draw but got none")
    shown = [cuts[0]] if len(cuts) == 1 else [cuts[0], cuts[-1]]
    names = list(dict.fromkeys(each.name for cut in shown for each in cut.classes))
    figure = Figure(figsize=(WIDTH, 1.25 + 0.95 * len(names)), layout="constrained")
    grid = figure.subplots(len(names), len(shown), sharex="col", squeeze=False)
    for column, cut in enumerate(shown):
        found = {each.name: each for each in cut.classes}
        for row, name in enumerate(names):
            axes = grid[row][column]
            if name in found:
                _draw(axes, found[name], cut.edges, row)
            else:
                axes.set_axis_off()
        grid[0][column].annotate(
            f"cut before epoch {cut.epoch}",
            (0.5, 1.0),
            (0, 19),
            xycoords="axes fraction",
            textcoords="offset points",
            ha="center",
            fontsize=9,
        )
        grid[-1][column].set_xlabel("importance of a unit")
    for row, name in enumerate(_titles(names)):
        grid[row][0].set_title(name, loc="left", fontsize=8, pad=6)
    handles = [
        Patch(facecolor=COLOURS["blue"], edgecolor=INK, lw=0.4, label="stays"),
        Patch(facecolor="#ffffff", edgecolor=COLOURS["blue"], hatch="////", label="removed"),
        Line2D([], [], color=COLOURS["blue"], marker="v", mec=INK, mew=0.6, label="strongest unit removed"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False)
    return figure


def _draw(axes: Axes, scores: ClassScores, edges: Sequence[float], row: int) -> None:
    from matplotlib.ticker import MaxNLocator

    colour = COLOURS[ORDER[row % len(ORDER)]]
    lefts, widths = edges[:-1], [b - a for a, b in pairwise(edges)]
    axes.bar(
        lefts,
        scores.removed,
        widths,
        align="edge",
        facecolor="#ffffff",
        edgecolor=colour,
        hatch="////",
        lw=0.5,
    )
    axes.bar(
        lefts,
        scores.kept,
        widths,
        bottom=scores.removed,
        align="edge",
        facecolor=colour,
        edgecolor=INK,
        lw=0.4,
    )
    if scores.line is not None:
        dash = DASHES[row // len(ORDER) % len(DASHES)]
        line = min(max(scores.line, edges[0]), edges[-1])
        axes.axvline(line, color=INK, lw=3.0, zorder=3)
        axes.axvline(line, color=colour, lw=1.8, ls=dash, zorder=4)
        top: Any = {"transform": axes.get_xaxis_transform(), "clip_on": False, "zorder": 5}
        axes.plot([line], [1.0], marker="v", ms=7, color=colour, mec=INK, mew=0.6, **top)
    scale(axes, "x", edges[0], edges[-1])
    axes.set_xlim(edges[0], edges[-1])
    axes.yaxis.set_major_locator(MaxNLocator(nbins=2, integer=True, min_n_ticks=2))
    axes.set_ylabel("units")
    plain_axes(axes)


def _titles(names: Sequence[str]) -> list[str]:
    """Shorten the names of layers in the names of classes."""
    places = [name.split(" ", 1) for name in names]
    firsts = [place[0] for place in places]
    short = shorten(firsts, length=48) if len(set(firsts)) == len(firsts) else firsts
    return [" ".join([first, *place[1:]]) for first, place in zip(short, places, strict=True)]
