"""The commands. Each is one line here and one file with a ``run(words)`` beside this one."""

from __future__ import annotations

__all__ = ["COMMANDS", "DEFAULT", "listed"]

DEFAULT = "train"  # where the first word names no command
# Name -> what it does. The file of the same name is loaded when the command is called.
COMMANDS = {
    "train": "train, prune, fine-tune and report; what runs where no command is named",
    "plan": "show what would be cut, what stays and why; train nothing",
    "sensitivity": "prune each part of a trained network alone and see what it costs; ratios for a budget",
    "report": "make the pages of a finished run again, or compare several runs",
    "tune": "search for good settings; stop and go on at any time",
}


def listed() -> str:
    """Give the commands as lines for a help text.

    >>> listed().splitlines()[0].split()[:2]
    ['lightning-prune', 'train']
    """
    width = max(map(len, COMMANDS))
    return "\n".join(f"  lightning-prune {name:<{width}}  {does}" for name, does in COMMANDS.items())
