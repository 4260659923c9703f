"""Numbers as a reader meets them: units, honest comparisons, Markdown tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

__all__ = [
    "cell",
    "faster",
    "fewer",
    "figure",
    "is_share",
    "less",
    "markdown_table",
    "mebibytes",
    "milliseconds",
    "number",
    "percent",
    "saved",
    "within_spread",
]

Timing = tuple[float | None, float | None]


def saved(before: float | None, after: float | None) -> float | None:
    """Give the share saved, negative where it grew; None where one is unknown or there was nothing.

    >>> saved(4, 3)
    0.25
    """
    return None if not before or after is None else 1 - after / before


def fewer(before: int, after: int) -> str:
    """Compare two counts in words.

    >>> fewer(200, 100), fewer(100, 103), fewer(7, 7)
    ('50.0% fewer', '3.0% more', 'the same')
    """
    return _compare(before, after, "fewer")


def less(before: int, after: int) -> str:
    """Compare two amounts in words.

    >>> less(200, 100)
    '50.0% less'
    """
    return _compare(before, after, "less")


def _compare(before: int, after: int, down: str) -> str:
    share = saved(before, after)
    if before == after or share is None:
        return "the same" if before == after else "none before"
    return f"{100 * abs(share):.1f}% {down if share > 0 else 'more'}"


def within_spread(before: Timing, after: Timing) -> bool:
    """Tell whether two latencies, each (median, interquartile range or None), differ no more than they vary.

    >>> within_spread((1.0, 0.1), (0.95, 0.0)), within_spread((1.0, 0.01), (0.95, 0.0))
    (True, False)
    """
    return abs((before[0] or 0.0) - (after[0] or 0.0)) <= max(before[1] or 0.0, after[1] or 0.0)


def faster(before: Timing, after: Timing) -> str:
    """Compare two latencies, each (median, interquartile range or None), in words.

    A difference no larger than the wider spread is called that and nothing more.

    >>> faster((1.43, 0.01), (1.0, 0.01)), faster((0.9, 0.01), (1.0, 0.02)), faster((1.0, 0.1), (0.95, 0.0))
    ('1.43x faster', '0.90x: slower', '1.05x: within the spread')
    """
    old, new = before[0] or 0.0, after[0] or 0.0
    if new <= 0:
        return "too short to measure"
    times = f"{old / new:.2f}x"
    if within_spread(before, after):
        return f"{times}: within the spread"
    return f"{times} faster" if old > new else f"{times}: slower"


def milliseconds(median: float | None, spread: float | None) -> str:
    """Write a median latency with its interquartile range.

    >>> milliseconds(1.23456, 0.05)
    '1.235 (0.050)'
    """
    if median is None:
        return ""
    return f"{median:,.3f}" if spread is None else f"{median:,.3f} ({spread:.3f})"


def mebibytes(count: int) -> str:
    """Write bytes in MiB, small ones in KiB.

    >>> mebibytes(3 * 2**20), mebibytes(512)
    ('3.00 MiB', '0.50 KiB')
    """
    return f"{count / 2**20:,.2f} MiB" if count >= 2**20 / 10 else f"{count / 2**10:,.2f} KiB"


def percent(share: float) -> str:
    """Write a share.

    >>> percent(0.9725)
    '97.25%'
    """
    return f"{100 * share:.2f}%"


def is_share(metric: str, *values: float) -> bool:
    """Tell whether values of a metric read best as percentages: those of an accuracy in [0, 1].

    >>> is_share("val/acc", 0.9, 1.0), is_share("val/acc", 90.0), is_share("val/loss", 0.9)
    (True, False, False)
    """
    return "acc" in metric.lower() and all(0 <= value <= 1 for value in values)


def figure(metric: str, value: float) -> str:
    """Write a value of a metric.

    >>> figure("val/acc", 0.5), figure("val/loss", 0.5)
    ('50.00%', '0.5')
    """
    return percent(value) if is_share(metric, value) else number(value)


def number(value: float) -> str:
    """Write a figure of any scale to four digits.

    >>> number(0.123456), number(12345.6)
    ('0.1235', '1.235e+04')
    """
    return f"{value:.4g}"


def cell(value: Any) -> str:
    """Write whatever stands in a table.

    >>> cell(None), cell(0.5), cell(12345), cell("fine-tune")
    ('', '0.5', '12,345', 'fine-tune')
    """
    if value is None:
        return ""
    if isinstance(value, float):
        return number(value)
    return f"{value:,}" if isinstance(value, int) else str(value)


def markdown_table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Lay out a Markdown table, also readable as plain text: first column left, all others right.

    >>> print(markdown_table(("layer", "kept"), [("conv1", "9"), ("conv2", "1,024")]))
    | layer |  kept |
    |:------|------:|
    | conv1 |     9 |
    | conv2 | 1,024 |
    """
    cells = [[text.replace("|", r"\|").replace("\n", " ") for text in line] for line in (head, *lines)]
    widths = [max(3, *map(len, column)) for column in zip(*cells, strict=True)]
    rule = "|".join(f":{'-' * w}-" if i == 0 else f"-{'-' * w}:" for i, w in enumerate(widths))
    first, *rest = [" | ".join(map(_pad, line, widths, range(len(line)))) for line in cells]
    return "\n".join([f"| {first} |", f"|{rule}|", *(f"| {line} |" for line in rest)])


def _pad(text: str, width: int, column: int) -> str:
    return text.ljust(width) if column == 0 else text.rjust(width)
