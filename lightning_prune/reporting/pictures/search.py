"""The picture of a search: how it went with one objective, what can be had with several."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING

from lightning_prune.reporting.pictures.style import COLOURS, GREY, INK, WIDTH, plain_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["Tried", "search_figure"]


@dataclass(frozen=True)
class Tried:
    """One trial.

    Args:
        number: Of the trial, 0-based.
        values: Of the objectives; of a trial that was stopped, the last one seen.
        is_best: Whether no other trial beats it in every objective.
        was_stopped: Whether it ended early.
    """

    number: int
    values: tuple[float, ...]
    is_best: bool = False
    was_stopped: bool = False


def search_figure(trials: Sequence[Tried], objectives: Sequence[str], directions: Sequence[str]) -> Figure:
    """Draw the trials of a search.

    Args:
        trials: At least one.
        objectives: Their names; of more than two, the first two are drawn.
        directions: "maximize" or "minimize" for each.

    Returns:
        A figure of its own, tied to no window.

    Raises:
        ImportError: If matplotlib is not installed.

    >>> trials = [Tried(0, (0.9, 0.5), is_best=True), Tried(1, (0.8, 0.6))]
    >>> search_figure(trials, ["val/acc", "macs"], ["maximize", "minimize"]).axes[0].get_xlabel()
    'macs (less is better)'
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, 4.2), layout="constrained")
    axes = figure.subplots()
    names = [
        f"{name} ({'more' if way == 'maximize' else 'less'} is better)"
        for name, way in zip(objectives, directions, strict=True)
    ]
    if len(objectives) == 1:
        _draw_course(axes, trials, best=max if directions[0] == "maximize" else min)
        axes.set(xlabel="trial", ylabel=names[0])
    else:
        _draw_front(axes, trials)
        axes.set(xlabel=names[1], ylabel=names[0])
    axes.margins(0.08)
    axes.grid(color="#e8e8e8", lw=0.6)
    axes.set_axisbelow(True)
    plain_axes(axes)
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    return figure


def _draw_course(axes: Axes, trials: Sequence[Tried], *, best: Callable[[float, float], float]) -> None:
    done = [trial for trial in trials if not trial.was_stopped]
    stopped = [trial for trial in trials if trial.was_stopped]
    if done:
        numbers, values = [t.number for t in done], [t.values[0] for t in done]
        axes.step(
            numbers,
            list(accumulate(values, best)),
            where="post",
            color=COLOURS["blue"],
            lw=1.4,
            label="best so far",
        )
        axes.plot(numbers, values, "o", color=COLOURS["blue"], ms=5, label="finished")
    if stopped:
        axes.plot(
            [t.number for t in stopped],
            [t.values[0] for t in stopped],
            "x",
            color=GREY,
            ms=6,
            label="stopped early, at its last value",
        )
    for trial in done:
        if trial.is_best:
            _number(axes, trial, (trial.number, trial.values[0]))


def _draw_front(axes: Axes, trials: Sequence[Tried]) -> None:
    others = [trial.values for trial in trials if not trial.is_best]
    if others:
        axes.plot(
            [v[1] for v in others], [v[0] for v in others], "o", color=GREY, ms=4, label="beaten by another"
        )
    best = sorted((trial for trial in trials if trial.is_best), key=lambda trial: trial.values[1])
    axes.plot(
        [t.values[1] for t in best],
        [t.values[0] for t in best],
        "D-",
        color=COLOURS["orange"],
        mec=INK,
        ms=6,
        lw=1.2,
        label="front: nothing is better in both",
    )
    for trial in best:
        _number(axes, trial, (trial.values[1], trial.values[0]))


def _number(axes: Axes, trial: Tried, at: tuple[float, float]) -> None:
    axes.annotate(str(trial.number), at, xytext=(5, 6), textcoords="offset points", fontsize=8, color=INK)
