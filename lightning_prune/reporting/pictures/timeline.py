"""Sparsity, MACs and the task's metric over the epochs, with phases and cuts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

from lightning_prune.reporting.pictures.style import COLOURS, GREY, INK, WIDTH, mark_cuts, plain_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["timeline_figure"]

# Phase -> (colour, hatch); the name stands above the band.
PHASES = {
    "dense": ("#ffffff", ""),
    "sparse": ("#dbeef9", ""),
    "prune": ("#fbe3b4", "////"),
    "fine-tune": ("#d6efe6", ""),
}
NARROW = 0.07  # share of the width below which a band's name does not fit


def timeline_figure(timeline: Sequence[Mapping[str, Any]], *, metric: str = "accuracy") -> Figure:
    """Draw the course of a fit.

    Args:
        timeline: One mapping per epoch, as in a report; at least one.
        metric: What "accuracy" holds.

    Returns:
        A figure of its own, tied to no window.

    Raises:
        ImportError: If matplotlib is not installed.
        ValueError: If there is no epoch.
    """
    from matplotlib.figure import Figure

    if not timeline:
        raise ValueError("expected at least one epoch to draw but got none")
    has_metric = any(isinstance(epoch.get("accuracy"), (int, float)) for epoch in timeline)
    figure = Figure(figsize=(WIDTH, 4.2 if has_metric else 2.6), layout="constrained")
    rows = figure.subplots(2 if has_metric else 1, 1, sharex=True, squeeze=False)[:, 0]
    cuts = [epoch["epoch"] for epoch in timeline if epoch.get("phase") == "prune"]
    for axes in rows:
        _shade(axes, timeline)
        mark_cuts(axes, cuts)
        plain_axes(axes)
        axes.grid(axis="y", color="#ffffff", lw=0.8)
        axes.set_axisbelow(True)
    if has_metric:
        _line(rows[0], timeline, "accuracy", metric, COLOURS["black"], "o")
        rows[0].set_ylabel(metric)
    shares = rows[-1]
    _line(shares, timeline, "sparsity", "parameters removed", COLOURS["vermilion"], "s")
    _line(shares, timeline, "macs", "MACs left", COLOURS["blue"], "^")
    shares.set_ylim(-0.03, 1.05)
    shares.set_ylabel("share of the dense network")
    shares.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    _label_epochs(shares, timeline)
    handles, labels = shares.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    _name_phases(rows[0], timeline)
    return figure


def _shade(axes: Axes, timeline: Sequence[Mapping[str, Any]]) -> None:
    for phase, first, last in _bands(timeline):
        colour, hatch = PHASES.get(phase, ("#ffffff", ""))
        axes.axvspan(
            first - 0.5,
            last + 0.5,
            facecolor=colour,
            edgecolor="#d8b25a" if hatch else "none",
            hatch=hatch,
            lw=0,
        )


def _bands(timeline: Sequence[Mapping[str, Any]]) -> list[tuple[str, int, int]]:
    """Give (phase, first epoch, last epoch) of every stretch of one phase."""
    found = []
    for phase, epochs in groupby(timeline, key=lambda epoch: str(epoch.get("phase", ""))):
        numbers = [int(epoch["epoch"]) for epoch in epochs]
        found.append((phase, numbers[0], numbers[-1]))
    return found


def _name_phases(axes: Axes, timeline: Sequence[Mapping[str, Any]]) -> None:
    """Write each phase above its widest band."""
    first, last = int(timeline[0]["epoch"]) - 0.5, int(timeline[-1]["epoch"]) + 0.5
    widest: dict[str, tuple[int, int]] = {}
    for phase, begin, end in _bands(timeline):
        if phase not in widest or end - begin > widest[phase][1] - widest[phase][0]:
            widest[phase] = (begin, end)
    for phase, (begin, end) in widest.items():
        is_narrow = end - begin + 1 < NARROW * (last - first)
        axes.annotate(
            phase,
            ((begin + end) / 2, 1.0),
            (0, 3),
            xycoords=("data", "axes fraction"),
            textcoords="offset points",
            ha="left" if is_narrow else "center",
            va="bottom",
            rotation=35 if is_narrow else 0,
            color=INK,
        )


def _line(
    axes: Axes, timeline: Sequence[Mapping[str, Any]], key: str, label: str, colour: str, marker: str
) -> None:
    points = [(epoch["epoch"], epoch[key]) for epoch in timeline if isinstance(epoch.get(key), (int, float))]
    every = max(1, len(points) // 30)
    xs, ys = [x for x, _ in points], [y for _, y in points]
    axes.plot(xs, ys, color=colour, marker=marker, ms=3.5, markevery=every, lw=1.4, label=label, zorder=3)


def _label_epochs(axes: Axes, timeline: Sequence[Mapping[str, Any]]) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_xlim(int(timeline[0]["epoch"]) - 0.5, int(timeline[-1]["epoch"]) + 0.5)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=12, integer=True))
    axes.set_xlabel("epoch (0-based)")
    axes.tick_params(axis="x", color=GREY)
