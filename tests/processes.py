"""Starts workers of a test, and leaves none behind, whatever happens to the test."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from contextlib import suppress
from itertools import takewhile

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


def run_each(worker, folder, variants):
    """Run variants in turn in one worker; give for each the exit code and what was said.

    To start takes seconds, a variant a part of one. The worker is called with the folder and the variants,
    and calls ``note_end`` after each. One that ends the worker has failed (with None for a code where the
    worker calls that well), and those after it get a new worker: so each has run, and is judged by itself.
    """
    found, left = {}, list(variants)
    while left:
        try:
            code, said = run(worker, folder, *left)
        except subprocess.TimeoutExpired as error:
            error.add_note(f"in {next((v for v in left if not _end(folder, v).exists()), left[-1])}")
            raise
        ended = list(takewhile(lambda variant: _end(folder, variant).exists(), left))
        found |= dict.fromkeys(ended, (0, said))
        if len(ended) == len(left):
            found[left[-1]] = code, said  # what follows the last one is of the last one
        else:
            found[left[len(ended)]] = code or None, said
        left = left[len(ended) + 1 :]
    return found


def note_end(folder, variant):
    """Note, in the process that was started, that every rank is through with a variant."""
    _end(folder, variant).touch()


def _end(folder, variant):
    return folder / f"{variant}.ended"


def asked_for(request, variants):
    """Choose the variants that are arguments of the tests to run, so that one test does not wait for all."""
    calls = [
        item.callspec
        for item in request.session.items
        if item.path == request.path and hasattr(item, "callspec")
    ]
    asked = [value for call in calls for value in call.params.values()]
    return [variant for variant in variants if variant in asked]
