"""While a command loads there is nothing to save: Ctrl-C ends it on the spot."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

__all__ = ["CTRL_C", "leaving_at_once"]

CTRL_C = 128 + 2  # exit code that shells give to what SIGINT has ended


@contextmanager
def leaving_at_once() -> Iterator[None]:
    """End the process at a Ctrl-C meanwhile, with one line and exit code 130.

    An exception would not do: half-loaded libraries make others of it, print it, or lose it. A Ctrl-C that
    is ignored, as in a shell's background jobs, or that somebody else has answered, stays so.
    """
    before = signal.getsignal(signal.SIGINT)
    if before is not signal.default_int_handler:
        yield
        return
    signal.signal(signal.SIGINT, _leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _leave(number: int, frame: FrameType | None) -> None:
    os.write(2, b"Stopped.\n")  # print() may be in the middle of a line
    os._exit(CTRL_C)
