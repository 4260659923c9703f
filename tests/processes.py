"""Starts workers of a test, and leaves none behind, whatever happens to the test."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from contextlib import suppress

TIMEOUT = 400  # seconds; every rank imports torch, which takes long where other tests do so too


def run(*words):
    """Give the exit code of a Python worker and what it said; ranks that it leaves behind are ended."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1"}
    command = [sys.executable, *map(str, words)]
    with subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as worker:
        try:
            _, said = worker.communicate(timeout=TIMEOUT)
        finally:
            with suppress(ProcessLookupError):  # its group is empty: all have ended
                os.killpg(worker.pid, signal.SIGKILL)
    return worker.returncode, said
