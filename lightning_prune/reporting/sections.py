"""What a report says, section by section: the same for Markdown and for a page."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from lightning_prune.graph.explaining import Frozen
from lightning_prune.reporting.history import LEVELS, Cut
from lightning_prune.reporting.report import Report, Target
from lightning_prune.reporting.wording import cell, number, percent

__all__ = ["Section", "frozen_cells", "sections", "target_cells"]

Lines = Sequence[Sequence[str]]
TIMELINE = ("epoch", "phase", "sparsity", "macs", "accuracy")
MANY = 6  # names of one reason that are written out


@dataclass(frozen=True)
class Section:
    """One section.

    Args:
        title: Heading.
        text: How to read it, in a sentence or two; "" = it speaks for itself.
        picture: Name of the picture that belongs here; "" = none.
        head: Heads of the columns of its table.
        lines: Its lines; none = no table.
        is_detail: Whether the picture says it already, so that a page folds the table away.
        is_text: Whether the cells are sentences.
    """

    title: str
    text: str = ""
    picture: str = ""
    head: tuple[str, ...] = ()
    lines: Lines = ()
    is_detail: bool = False
    is_text: bool = False


def target_cells(targets: Sequence[Target]) -> Lines:
    """Write what was asked and what came out."""
    return [(target.what, percent(target.asked), percent(target.reached)) for target in targets]


def _channel_cells(channels: Mapping[str, tuple[int, int]]) -> Lines:
    if not channels:
        return []
    before, after = (sum(pair[side] for pair in channels.values()) for side in (0, 1))
    lines = [*((name, *pair) for name, pair in channels.items()), ("total", before, after)]
    return [(name, f"{a:,}", f"{b:,}", f"{b / a:.0%}" if a else "") for name, a, b in lines]


def _cut_cells(cuts: Sequence[Cut]) -> Lines:
    return [
        (
            cell(cut.epoch),
            each.name,
            cell(sum(each.kept) + sum(each.removed)),
            cell(sum(each.removed)),
            cell(each.line),
        )
        for cut in cuts
        for each in cut.classes
    ]


def frozen_cells(frozen: Sequence[Frozen]) -> Lines:
    """Say each reason once, with everything that it holds."""
    places: dict[str, list[str]] = {}
    for each in frozen:
        part = "" if each.stays == each.size else f" ({each.stays} of {each.size})"
        places.setdefault(each.reason, []).append(f"{each.tensor} dim {each.dim}{part}")
    return [
        (reason, ", ".join(names[:MANY]) + (f" and {len(names) - MANY} more" if len(names) > MANY else ""))
        for reason, names in places.items()
    ]


def _note_cells(cuts: Sequence[Cut]) -> Lines:
    return [(cell(cut.epoch), note) for cut in cuts for note in cut.notes]


def _run_cells(report: Report) -> Lines:
    seed = {} if report.seed is None else {"seed": report.seed}
    return [(str(name), str(value)) for name, value in {**seed, **report.versions, **report.machine}.items()]


# Every section in order, with what fills its lines.
_EVERY: tuple[tuple[Section, Callable[[Report], Lines]], ...] = (
    (
        Section("Asked and reached", head=("", "asked", "reached")),
        lambda report: target_cells(report.targets),
    ),
    (
        Section(
            "Epochs",
            "Sparsity is the share of the parameters removed, MACs the share left. A cut falls at the start "
            "of its epoch; the values are those at its end.",
            "timeline",
            TIMELINE,
            is_detail=True,
        ),
        lambda report: [[cell(epoch.get(key)) for key in TIMELINE] for epoch in report.timeline],
    ),
    (
        Section(
            "Channels per layer",
            picture="channels",
            head=("layer", "before", "after", "kept"),
            is_detail=True,
        ),
        lambda report: _channel_cells(report.channels),
    ),
    (
        Section(
            "Importance at the cuts",
            "Every unit has a score; the weakest go. Where the removed ones lie well apart from those that "
            "stay, the cut costs little. Groups that look alike form one class.",
            "importance",
            ("epoch", "class", "units", "removed", "strongest removed"),
            is_detail=True,
        ),
        lambda report: _cut_cells(report.cuts),
    ),
    (
        Section(
            "Spread of unit norms",
            "The squared norm of every unit by the mean of its group. Sparse learning works where the "
            "weakest sink towards zero before the cuts while the strongest stay.",
            "spread",
            ("epoch", *(f"{level:.0%}" for level in LEVELS)),
            is_detail=True,
        ),
        lambda report: [[cell(spread.epoch), *map(number, spread.quantiles)] for spread in report.spreads],
    ),
    (
        Section(
            "What stayed, and why",
            "These positions were never up for removal.",
            head=("reason", "where"),
            is_text=True,
        ),
        lambda report: frozen_cells(report.frozen),
    ),
    (
        Section("Where it came out otherwise than asked", head=("epoch", "note"), is_text=True),
        lambda report: _note_cells(report.cuts),
    ),
    (Section("Run", head=("", ""), is_text=True), _run_cells),
)


def sections(report: Report) -> tuple[Section, ...]:
    """Give the sections of a report that have something to say, in order."""
    filled = (replace(section, lines=lines_of(report)) for section, lines_of in _EVERY)
    return tuple(section for section in filled if section.lines)
