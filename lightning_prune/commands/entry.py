"""Where ``lightning-prune`` begins: the first word names a command, all others are for that command."""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence
from difflib import get_close_matches
from importlib import import_module

from lightning_prune.commands.answering import answer
from lightning_prune.commands.table import COMMANDS, DEFAULT, listed
from lightning_prune.errors import OptionError
from lightning_prune.leaving import leaving_at_once

__all__ = ["main"]


def main() -> None:
    """Run ``lightning-prune`` with the words of the command line; ends the process with an exit code."""
    first, *rest = sys.argv[1:] or [""]
    is_command = bool(first) and first[0] not in "-+~" and "=" not in first
    name, words = (first, rest) if is_command else (DEFAULT, sys.argv[1:])
    code = answer(lambda: _call(name, words))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # all is said; a Ctrl-C now would only disturb the exit
    sys.exit(code)


def _call(name: str, words: Sequence[str]) -> None:
    """Load the file of a command and run it."""
    if words[:1] == ["--version"]:
        ours = import_module("lightning_prune").__version__  # Hydra would tell its own
        print(f"lightning-prune {ours}")
        return
    if name not in COMMANDS:
        near = get_close_matches(name, COMMANDS, n=1)
        hint = f"; did you mean `lightning-prune {near[0]}`?" if near else "."
        raise OptionError(
            f"`lightning-prune {name}` was asked for, which is no command{hint} There are:\n{listed()}\n"
            "`lightning-prune key=value ...` changes a value of a run, `lightning-prune --help` lists them."
        )
    with leaving_at_once():
        command = import_module(f"lightning_prune.commands.{name}")
    command.run(words)
