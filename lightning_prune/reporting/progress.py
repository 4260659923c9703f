"""How far a long measurement is, and how long it will still take."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeVar

__all__ = ["with_bar"]

T = TypeVar("T")


def with_bar(items: Sequence[T], title: str) -> Iterator[T]:
    """Pass items on; on a terminal show a bar with the time that is left, elsewhere nothing.

    Args:
        items: What takes its time, one by one.
        title: A word or two before the bar.
    """
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    console = Console(stderr=True)
    columns = (
        TextColumn(title),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        yield from bar.track(items)
