"""A bar for work of many like parts, with an estimate of the time that is left."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeAlias, TypeVar

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["Advance", "waiting", "with_bar"]

T = TypeVar("T")
Advance: TypeAlias = Callable[[int, str], None]


@contextmanager
def waiting(total: int, done: int, text: str, *, console: Console | None = None) -> Iterator[Advance]:
    """Show a bar while the block runs.

    Args:
        total: Parts in all, >= 1.
        done: Parts that were done before.
        text: What is going on.
        console: Where to show it; None is stderr.

    Yields:
        ``advance(parts, text)``: so many more are done, and this is going on now.

    >>> import io
    >>> from rich.console import Console
    >>> out = Console(file=io.StringIO(), width=60)
    >>> with waiting(4, 1, "start", console=out) as advance:
    ...     advance(1, "part 2")
    >>> out.file.getvalue().split()[:2]
    ['part', '2']
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(elapsed_when_finished=True),
    )
    with Progress(*columns, console=console or Console(stderr=True)) as progress:
        task = progress.add_task(text, total=total, completed=done)
        yield lambda parts, now: progress.update(task, advance=parts, description=now)


def with_bar(items: Sequence[T], title: str) -> Iterator[T]:
    """Pass items on; on a terminal show a bar with the time that is left, elsewhere nothing.

    Args:
        items: What takes its time, one by one.
        title: A word or two before the bar.
    """
    from rich.console import Console

    console = Console(stderr=True)
    if not console.is_terminal or not items:
        yield from items
        return
    with waiting(len(items), 0, title, console=console) as advance:
        for item in items:
            yield item
            advance(1, title)
