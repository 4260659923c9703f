"""Curves of a metric against the share removed, one small picture per part."""

from __future__ import annotations

from collections.abc import Mapping
from math import ceil
from typing import TYPE_CHECKING

from lightning_prune.reporting.curves import layer_of
from lightning_prune.reporting.pictures.channels import shorten
from lightning_prune.reporting.pictures.style import COLOURS, GREY, WIDTH, plain_axes, styled

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["sensitivity_figure", "sensitivity_png"]

COLUMNS = 4


def sensitivity_figure(
    curves: Mapping[str, Mapping[float, float]],
    baseline: float,
    *,
    metric: str,
    chosen: Mapping[str, float] | None = None,
) -> Figure:
    """Draw every part's curve on equal axes; the dashed line is the network as it is.

    Args:
        curves: Part -> share removed -> metric.
        baseline: Metric of the network as it is.
        metric: Its name.
        chosen: Part -> share that a budget takes, marked on its curve.
    """
    from matplotlib.figure import Figure

    rows = max(1, ceil(len(curves) / COLUMNS))
    figure = Figure(figsize=(WIDTH, 1.45 * rows + 0.5), layout="constrained")
    axes = figure.subplots(rows, COLUMNS, sharex=True, sharey=True, squeeze=False)
    names = shorten([layer_of(name) for name in curves])
    for place, (name, short) in enumerate(zip(curves, names, strict=True)):
        each = axes[place // COLUMNS][place % COLUMNS]
        points = sorted({0.0: baseline, **curves[name]}.items())
        each.axhline(baseline, color=GREY, linewidth=0.7, linestyle="--")
        each.plot(
            *zip(*points, strict=True), color=COLOURS["blue"], marker="o", markersize=2.5, linewidth=1.2
        )
        if chosen and name in chosen:
            each.axvline(chosen[name], color=COLOURS["vermilion"], linewidth=1.0, linestyle=":")
        each.set_title(short, fontsize=7)
        plain_axes(each)
        each.tick_params(labelbottom=place + COLUMNS >= len(curves))  # the lowest of its column
    for empty in axes.flat[len(curves) :]:
        empty.set_visible(False)
    figure.supxlabel("share of units removed", fontsize=8)
    figure.supylabel(metric, fontsize=8)
    return figure


def sensitivity_png(
    curves: Mapping[str, Mapping[float, float]],
    baseline: float,
    *,
    metric: str,
    chosen: Mapping[str, float] | None = None,
) -> bytes:
    """Give the picture as a PNG file; the arguments are those of ``sensitivity_figure``."""
    from io import BytesIO

    file = BytesIO()
    with styled():
        sensitivity_figure(curves, baseline, metric=metric, chosen=chosen).savefig(
            file, format="png", dpi=160
        )
    return file.getvalue()
