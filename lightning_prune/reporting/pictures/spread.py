"""How far unit norms lie apart, epoch by epoch: whether sparse learning works."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lightning_prune.reporting.history import LEVELS, Spread
from lightning_prune.reporting.pictures.style import COLOURS, INK, WIDTH, mark_cuts, plain_axes, scale

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["spread_figure"]

FLOOR = 1e-8  # what a logarithmic axis shows in place of zero
# (lower level, upper level, lightness of the fill)
BANDS = ((0.0, 1.0, "#e3eff7"), (0.05, 0.95, "#b7d6ea"), (0.25, 0.75, "#7db6db"))


def spread_figure(spreads: Sequence[Spread], *, cuts: Sequence[int] = ()) -> Figure:
    """Draw quantiles of the unit norms over the epochs.

    Args:
        spreads: In order of epochs, at least one.
        cuts: Epochs that begin with a cut.

    Returns:
        A figure of its own, tied to no window.

    Raises:
        ImportError: If matplotlib is not installed.
        ValueError: If there is no epoch.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    if not spreads:
        raise ValueError("expected at least one epoch to draw but got none")
    figure = Figure(figsize=(WIDTH, 3.0), layout="constrained")
    axes = figure.subplots()
    epochs = [spread.epoch for spread in spreads]
    at = {level: [max(spread.quantiles[i], FLOOR) for spread in spreads] for i, level in enumerate(LEVELS)}
    for low, high, colour in BANDS:
        label = "all units" if low == 0 else f"{low:.0%} to {high:.0%}"
        axes.fill_between(epochs, at[low], at[high], color=colour, lw=0, label=label)
    marker = "o" if len(epochs) < 40 else ""
    axes.plot(epochs, at[0.5], color=COLOURS["blue"], marker=marker, ms=3, lw=1.6, label="median")
    for level, style in ((0.05, "--"), (0.95, ":")):
        axes.plot(epochs, at[level], color=INK, lw=0.9, ls=style, marker="" if len(epochs) > 1 else "_")
    mark_cuts(axes, cuts)
    scale(axes, "y", min(at[0.0]), max(at[1.0]))
    axes.set_xlim(epochs[0] - 0.5, epochs[-1] + 0.5)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=12, integer=True))
    axes.set_xlabel("epoch (0-based)")
    axes.set_ylabel("squared norm of a unit\nby the mean of its group")
    plain_axes(axes)
    figure.legend(loc="outside lower center", ncols=6, frameon=False)
    return figure
