"""What a command says when it cannot go on: one message and an exit code instead of a traceback."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from difflib import get_close_matches

from hydra.core.utils import env_override
from hydra.errors import HydraException, OverrideParseException
from omegaconf.errors import OmegaConfBaseException

from lightning_prune.errors import PruneError
from lightning_prune.leaving import CTRL_C

__all__ = ["USER_ERRORS", "Refused", "Stopped", "answer"]

FULL_ERROR = "HYDRA_FULL_ERROR"  # Hydra's own switch between messages and tracebacks
USAGE = 2  # argparse ends with it when it has printed the usage and what is wrong
USER_ERRORS = (
    PruneError,
    HydraException,
    OmegaConfBaseException,
)  # what the words on the command line can mend


class Refused(BaseException):
    """An error on its way past Hydra, which would print a line of its own about any ``Exception``."""

    def __init__(self, error: Exception) -> None:
        super().__init__(str(error))
        self.error = error


class Stopped(KeyboardInterrupt):
    """Ctrl-C, with what is left to go on from."""


def answer(run: Callable[[], None]) -> int:
    """Call ``run``; whatever the user can mend becomes one message instead of a traceback.

    Returns:
        The exit code: 0 = done, 1 = refused, 130 = Ctrl-C.

    >>> answer(lambda: None)
    0
    """
    wants_traceback = os.environ.get(FULL_ERROR) == "1"
    with env_override({FULL_ERROR: "1"}):  # Hydra then hands errors on instead of printing them itself
        try:
            run()
        except KeyboardInterrupt as stop:
            print(str(stop) or "Stopped.", file=sys.stderr)
            return CTRL_C
        except BrokenPipeError:  # whoever reads, such as `head`, has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # so that the exit is silent too
            return 1
        except SystemExit as end:
            if end.code != USAGE:
                raise
            print(
                "`lightning-prune --help` lists commands and values, and so does that of a command.",
                file=sys.stderr,
            )
            return 1
        except (Refused, *USER_ERRORS) as raised:
            error = raised.error if isinstance(raised, Refused) else raised
            if wants_traceback:
                raise error from None
            print(_explain(error), file=sys.stderr)
            return 1
    return 0


def _explain(error: BaseException) -> str:
    """Give the message of the error that says most: ours, wherever libraries have wrapped it."""
    causes = list(_causes(error))
    for cause in causes:
        if isinstance(cause, PruneError):
            return str(cause)
    parts = [f"{error.override}: {error}" if isinstance(error, OverrideParseException) else str(error)]
    for cause in causes:
        if isinstance(cause, OmegaConfBaseException) and cause.parent_node is not None:
            near = get_close_matches(str(cause.key), [str(key) for key in cause.parent_node], n=3)
            parts += [f"The nearest names are: {', '.join(near)}."] if near else []
    parts.append("`lightning-prune --cfg job` shows every value, `lightning-prune --help` how to change one.")
    return "\n".join(dict.fromkeys(parts))


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
