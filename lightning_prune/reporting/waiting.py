"""A bar for work of many like parts, with an estimate of the time that is left."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, TypeAlias, TypeVar

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import ProgressColumn

__all__ = ["Advance", "seconds_left", "waiting", "with_bar"]

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
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), _time_left(done))
    # The stream of now: work may send what it prints itself elsewhere meanwhile.
    with Progress(*columns, console=console or Console(file=sys.stderr)) as progress:
        task = progress.add_task(text, total=total, completed=done, at=0.0)

        def advance(parts: int, now: str) -> None:
            progress.update(task, advance=parts, description=now)
            if parts:
                progress.update(task, at=progress.tasks[0].elapsed)

        yield advance


def with_bar(items: Sequence[T], describe: Callable[[T], str], *, done: int = 0) -> Iterator[T]:
    """Pass items on; on a terminal show a bar with the time that is left, elsewhere nothing.

    Args:
        items: What takes its time, one by one.
        describe: Says what an item is, in a word or two.
        done: Items that were done before.
    """
    from rich.console import Console

    console = Console(file=sys.stderr)
    if not console.is_terminal or not items:
        yield from items
        return
    with waiting(done + len(items), done, describe(items[0]), console=console) as advance:
        for item in items:
            advance(0, describe(item))
            yield item
            advance(1, describe(item))


def seconds_left(made: float, missing: float, at: float, now: float) -> float | None:
    """Estimate the time that is left from all parts made so far, however long each takes.

    Args:
        made: Parts made since the start.
        missing: Parts still to make.
        at: When the last part was done, in seconds since the start.
        now: The time of now, in seconds since the start.

    >>> seconds_left(2, 3, 100.0, 120.0), seconds_left(2, 3, 100.0, 900.0), seconds_left(0, 3, 0.0, 9.0)
    (130.0, 0.0, None)
    """
    return max(0.0, missing * at / made - (now - at)) if made else None


def _time_left(done: int) -> ProgressColumn:
    """Make a column for it; rich's own forgets what is older than half a minute, so long parts have none."""
    from rich.progress import ProgressColumn, Task
    from rich.text import Text

    class TimeLeft(ProgressColumn):
        def render(self, task: Task) -> Text:
            now = task.elapsed or 0.0
            left = seconds_left(task.completed - done, task.remaining or 0.0, task.fields["at"], now)
            shown = now if task.finished else left
            return Text(
                "-:--:--" if shown is None else str(timedelta(seconds=int(shown))), "progress.remaining"
            )

    return TimeLeft()
