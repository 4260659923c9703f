"""One look for all pictures: dark on light, told apart without colour, and safe for colour-blind eyes.

The colours are those of Okabe and Ito (2008). Whatever a colour says, a label, a marker or a hatch says too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["COLOURS", "GREY", "INK", "LIGHT", "WIDTH", "mark_cuts", "plain_axes", "scale", "styled"]

INK, GREY, LIGHT = "#222222", "#6b6b6b", "#d3d3d3"
COLOURS = {
    "blue": "#0072b2",
    "orange": "#e69f00",
    "green": "#009e73",
    "vermilion": "#d55e00",
    "sky": "#56b4e9",
    "purple": "#cc79a7",
    "yellow": "#f0e442",
    "black": "#000000",
}
DECADE = 10
WIDTH = 7.4  # inches; a page shows it about 1.6 times as large, which makes 8 points comfortable to read

LOOK: Any = {
    "font.size": 8,
    "axes.titlesize": 9,
    "axes.labelsize": 8,
    "xtick.labelsize": 7.5,
    "ytick.labelsize": 7.5,
    "legend.fontsize": 7.5,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": GREY,
    "xtick.color": INK,
    "ytick.color": INK,
    "hatch.linewidth": 0.6,
    "axes.linewidth": 0.7,
    "svg.fonttype": "path",  # no font of the reader's is needed
    "svg.hashsalt": "lightning-prune",  # the same report gives the same file
}


@contextmanager
def styled() -> Iterator[None]:
    """Draw and save within this: the user's own matplotlib settings neither matter nor change."""
    import matplotlib

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(LOOK)
        yield


def plain_axes(axes: Axes) -> None:
    """Leave out what only frames."""
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def scale(axes: Axes, which: Literal["x", "y"], low: float, high: float) -> None:
    """Set a logarithmic axis where values span more than a decade, else a linear one, with plain numbers.

    Args:
        axes: Whose axis.
        which: Of its two.
        low: Smallest value, > 0 for a logarithmic axis.
        high: Largest value.
    """
    from matplotlib.ticker import LogLocator, NullLocator

    if low > 0 and high / low > DECADE:
        (axes.set_xscale if which == "x" else axes.set_yscale)("log")
        axis = axes.xaxis if which == "x" else axes.yaxis
        axis.set_major_locator(LogLocator(numticks=7))
        axis.set_minor_locator(NullLocator())
        axis.set_major_formatter(lambda value, _: f"{value:g}")


def mark_cuts(axes: Axes, cuts: Sequence[int]) -> None:
    """Mark the start of every epoch that begins with a cut."""
    for number, epoch in enumerate(cuts):
        axes.axvline(epoch - 0.5, color=INK, lw=0.8, ls=(0, (3, 2)), zorder=1, label="" if number else "cut")
