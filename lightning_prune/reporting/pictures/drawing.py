"""The pictures of a report, by name: when there is one, what it shows in words, and how it is drawn."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from io import BytesIO
from typing import TYPE_CHECKING

from lightning_prune.reporting.pictures.channels import channels_figure
from lightning_prune.reporting.pictures.importance import importance_figure
from lightning_prune.reporting.pictures.spread import spread_figure
from lightning_prune.reporting.pictures.style import styled
from lightning_prune.reporting.pictures.timeline import timeline_figure
from lightning_prune.reporting.report import Report
from lightning_prune.reporting.wording import number, percent

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Drawn", "draw", "drawings"]

INSTALL = "matplotlib is not installed. `pip install 'lightning-prune[plots]'` adds it."
PNG_DPI = 150


@dataclass(frozen=True)
class Picture:
    """One picture.

    Args:
        has_data: Whether a report holds what it shows.
        figure: Report -> figure.
        alt: Report -> what it shows, for those who do not see it.
    """

    has_data: Callable[[Report], bool]
    figure: Callable[[Report], Figure]
    alt: Callable[[Report], str]


@dataclass(frozen=True)
class Drawn:
    """A picture that was drawn.

    Args:
        name: Of the picture.
        alt: What it shows, in words.
        svg: As a vector graphic.
        png: As pixels.
    """

    name: str
    alt: str
    svg: bytes
    png: bytes


def _cut_epochs(report: Report) -> list[int]:
    return [int(epoch["epoch"]) for epoch in report.timeline if epoch.get("phase") == "prune"]


def _timeline_alt(report: Report) -> str:
    last = report.timeline[-1]
    values = [
        f"{name} {percent(last[key])}"
        for key, name in (("sparsity", "parameters removed"), ("macs", "MACs left"))
        if isinstance(last.get(key), float)
    ]
    if isinstance(last.get("accuracy"), float):
        values.append(f"{report.metric} {number(last['accuracy'])}")
    return (
        f"Lines over {len(report.timeline)} epochs with the phases of pruning shaded and "
        f"{len(_cut_epochs(report))} cuts marked. At the end: {', '.join(values)}."
    )


def _channels_alt(report: Report) -> str:
    before, after = (sum(pair[side] for pair in report.channels.values()) for side in (0, 1))
    return f"Bars of {len(report.channels)} layers: {after:,} of {before:,} channels are kept in all."


def _importance_alt(report: Report) -> str:
    last = report.cuts[-1]
    lines = [
        f"{each.name}: {sum(each.removed)} of {sum(each.removed) + sum(each.kept)} units removed"
        for each in last.classes
    ]
    return f"Histograms of unit scores per class. Cut before epoch {last.epoch}: {'; '.join(lines)}."


def _spread_alt(report: Report) -> str:
    first, last = report.spreads[0], report.spreads[-1]
    return (
        "Bands of quantiles of unit norms over the epochs. The weakest twentieth lies below "
        f"{number(first.quantiles[1])} of its group's mean at first and {number(last.quantiles[1])} at last."
    )


PICTURES = {
    "timeline": Picture(
        lambda report: bool(report.timeline),
        lambda report: timeline_figure(report.timeline, metric=report.metric),
        _timeline_alt,
    ),
    "channels": Picture(
        lambda report: bool(report.channels), lambda report: channels_figure(report.channels), _channels_alt
    ),
    "importance": Picture(
        lambda report: bool(report.cuts), lambda report: importance_figure(report.cuts), _importance_alt
    ),
    "spread": Picture(
        lambda report: bool(report.spreads),
        lambda report: spread_figure(report.spreads, cuts=_cut_epochs(report)),
        _spread_alt,
    ),
}


def drawings(report: Report) -> Iterator[tuple[str, Figure]]:
    """Draw the pictures of a report one by one.

    Yields:
        Name and figure, for a logger or ``savefig``.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    for name, picture in PICTURES.items():
        if picture.has_data(report):
            with styled():
                figure = picture.figure(report)
            yield name, figure


def draw(report: Report) -> tuple[tuple[Drawn, ...], tuple[str, ...]]:
    """Draw what can be drawn.

    Returns:
        The pictures, and a sentence about each that could not be drawn.
    """
    found: list[Drawn] = []
    remarks: list[str] = []
    for name, picture in PICTURES.items():
        if not picture.has_data(report):
            continue
        try:
            with styled():
                figure = picture.figure(report)
                svg, png = _saved(figure, "svg"), _saved(figure, "png")
            found.append(Drawn(name, picture.alt(report), svg, png))
        except ImportError:
            return (), (f"No pictures: {INSTALL}",)
        except Exception as error:  # a report must not fail for want of a picture
            remarks.append(f"No picture of {name}: drawing it failed with {type(error).__name__}: {error}")
    return tuple(found), tuple(remarks)


def _saved(figure: Figure, kind: str) -> bytes:
    buffer = BytesIO()
    metadata = {"Date": None, "Creator": None} if kind == "svg" else {"Software": None}
    figure.savefig(buffer, format=kind, dpi=PNG_DPI, metadata=metadata)
    return buffer.getvalue()
