"""Channels per layer before and after, with the numbers beside the bars."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import ceil
from typing import TYPE_CHECKING

from lightning_prune.reporting.pictures.style import COLOURS, INK, LIGHT, WIDTH

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["channels_figure", "shorten"]

BEFORE, AFTER = LIGHT, COLOURS["blue"]
ROWS_PER_COLUMN = 40
MAX_COLUMNS = 3  # more would be too small on a printed page
MAX_NAME = 34


def channels_figure(channels: Mapping[str, tuple[int, int]], *, title: str = "") -> Figure:
    """Draw one bar per layer: what there was, and on it what is left.

    Args:
        channels: Layer -> (before, after), at least one, drawn from top to bottom.
        title: Heading; "" = none.

    Returns:
        A figure of its own, tied to no window; ``savefig`` writes it, ``add_figure`` of a logger takes it.

    Raises:
        ImportError: If matplotlib is not installed.
        ValueError: If there is no layer.

    >>> figure = channels_figure({"conv1": (64, 32), "conv2": (64, 64)})
    >>> [text.get_text() for text in figure.axes[0].texts]
    ['32 of 64', '64']
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    if not channels:
        raise ValueError("expected at least one layer to draw but got none")
    names = shorten(list(channels))
    counts = list(channels.values())
    columns = min(MAX_COLUMNS, ceil(len(counts) / ROWS_PER_COLUMN))
    rows = ceil(len(counts) / columns)
    widest = max(max(pair) for pair in counts)
    figure = Figure(
        figsize=(WIDTH if columns == 1 else 4.4 * columns, 1.3 + 0.22 * rows), layout="constrained"
    )
    grid = figure.subplots(1, columns, sharex=True, squeeze=False)[0]
    for column, axes in enumerate(grid):
        part = slice(column * rows, (column + 1) * rows)
        _draw_column(axes, names[part], counts[part], widest)
        axes.set_ylim(rows - 0.4, -0.6)  # the first layer on top; columns of equal height
        axes.set_xlim(0, (1.2 if columns == 1 else 1.45) * widest)  # room for the numbers
        axes.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
    handles, labels = grid[0].get_legend_handles_labels()
    if title:
        figure.suptitle(title, fontsize=11, color=INK)
    figure.legend(handles[::-1], labels[::-1], loc="outside lower center", ncols=2, frameon=False, fontsize=8)
    return figure


def _draw_column(axes: Axes, names: Sequence[str], counts: Sequence[tuple[int, int]], widest: int) -> None:
    places = range(len(names))
    axes.barh(places, [before for before, _ in counts], height=0.72, color=BEFORE, label="removed")
    axes.barh(places, [after for _, after in counts], height=0.72, color=AFTER, label="kept")
    for place, (before, after) in enumerate(counts):
        text = f"{after:,}" if after == before else f"{after:,} of {before:,}"
        axes.text(
            max(before, after) + 0.015 * widest, place, text, va="center_baseline", fontsize=7, color=INK
        )
    axes.set_yticks(places, names, fontsize=7, color=INK)
    axes.tick_params(axis="y", length=0)
    axes.tick_params(axis="x", labelsize=7, colors=INK)
    axes.set_xlabel("channels", fontsize=8, color=INK)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)


def shorten(names: Sequence[str], *, length: int = MAX_NAME) -> list[str]:
    """Shorten dotted names so that they fit and stay apart.

    What all names start with goes first, then leading words shrink to a letter, numbers never. A name that
    is still too long loses its middle. Where two names would become equal, all stay whole.

    Args:
        names: Distinct dotted names.
        length: Longest name allowed, in characters.

    >>> shorten(["net.stem", "net.layer1.0.conv1", "net.layer1.0.conv2"])
    ['stem', 'layer1.0.conv1', 'layer1.0.conv2']
    >>> shorten(["vision.encoder.blocks.10.attention.qkv", "text.encoder.blocks.10.mlp.fc1"], length=20)
    ['v.e.b.10.a.qkv', 't.e.b.10.mlp.fc1']
    """
    shared = _shared_words(names)
    short = [_fit(name.split(".")[shared:], length) for name in names]
    return short if len(set(short)) == len(short) else list(names)


def _shared_words(names: Sequence[str]) -> int:
    """Count the leading words that all names have, leaving each a last word and a number its own word."""
    words = [name.split(".") for name in names]
    shared = 0
    while len(words) > 1 and all(len(w) > shared + 1 for w in words) and len({w[shared] for w in words}) == 1:
        shared += 1
    return shared - 1 if shared and any(w[shared].isdigit() for w in words) else shared


def _fit(words: Sequence[str], length: int) -> str:
    words = list(words)
    for place in range(len(words) - 1):
        if len(".".join(words)) <= length:
            break
        if not words[place].isdigit():
            words[place] = words[place][:1]
    name = ".".join(words)
    if len(name) <= length:
        return name
    tail = (length - 1) * 2 // 3  # the end of a name says more than its start
    return f"{name[: length - 1 - tail]}…{name[-tail:]}"
