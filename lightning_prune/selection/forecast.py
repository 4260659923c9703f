"""What a choice of units will cost, known before anything is cut."""

from __future__ import annotations

from dataclasses import dataclass

from lightning_prune.graph.analysis import Analysis
from lightning_prune.selection.choosing import Choice

__all__ = ["Forecast", "foresee"]


@dataclass(frozen=True)
class Forecast:
    """What is left after one step of a prune.

    Args:
        step: Number of the step, 0 = before the first.
        kept: Units left, per group.
        parameters: Parameter elements left.
        macs: Multiply-accumulates of one forward of the example inputs that are left.
        notes: What rounding, caps and grids have changed about what was asked.
    """

    step: int
    kept: tuple[int, ...]
    parameters: int
    macs: int
    notes: tuple[str, ...] = ()


def foresee(analysis: Analysis, step: int, choice: Choice) -> Forecast:
    """Count what a choice leaves.

    Args:
        analysis: Of the network as it is.
        step: Number of the step.
        choice: Units that stay.
    """
    keep = choice.keep
    kept = tuple(int(keep[group.units].sum()) for group in analysis.groups)
    return Forecast(step, kept, analysis.parameters(keep), analysis.macs(keep), choice.notes)
