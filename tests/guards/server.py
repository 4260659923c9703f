"""Runs pytest in children of one process that has imported what takes long: torch, Lightning and the like.

Each line of the standard input holds the arguments of one run as JSON; the answer is ``done`` or ``late``.
Of the tree that is tested only ``conftest.py`` runs here, and its names are thrown away: every child begins
with the files as they are then.
"""

from __future__ import annotations

import gc
import json
import os
import runpy
import signal
import sys
import time
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import NoReturn

LIMIT = 1200  # seconds for one run; each test has its own, shorter one


def main() -> None:
    """Serve until the input ends; the working directory is the root of the tree."""
    sys.path.remove(str(Path(__file__).resolve().parent))  # its names are plain words
    runpy.run_path("tests/conftest.py")
    for name in ("lightning.pytorch", "hydra", "hypothesis", "scipy.optimize"):
        import_module(name)
    gc.freeze()  # no child looks for garbage in what was imported
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            run(json.loads(line))
        sys.stdout.write(wait(child) + "\n")
        sys.stdout.flush()


def run(arguments: list[str]) -> NoReturn:
    """Be pytest, in a session of its own and without a word."""
    import pytest

    os.setsid()
    null = os.open(os.devnull, os.O_RDWR)
    for stream in range(3):
        os.dup2(null, stream)
    # What was imported before it began, pytest cannot rewrite and says so.
    sys.exit(pytest.main(["-W", "ignore::pytest.PytestAssertRewriteWarning", *arguments]))


def wait(child: int) -> str:
    """Wait for a run, and end it and what it left behind."""
    end, done = time.monotonic() + LIMIT, 0
    try:
        while not done and time.monotonic() < end:
            time.sleep(0.02)
            done, _ = os.waitpid(child, os.WNOHANG)
    finally:  # Ctrl-C too
        with suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)
    if not done:
        os.waitpid(child, 0)
    return "done" if done else "late"


if __name__ == "__main__":
    main()
