"""The caller's side of ``worker``: a process that is asked for verdicts by name."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from zoo.judge import Verdict


class Server:
    """A worker process, started at the first question; a context manager.

    Args:
        reasons: Whether verdicts say why dimensions stay.
    """

    def __init__(self, *, reasons: bool = False) -> None:
        self._options = ["--reasons"] if reasons else []
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is not None:
            self._process.communicate()  # ends its standard input, and so the process

    def verdict(self, name: str) -> Verdict:
        """Judge a case."""
        process = self._started()
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(f"{name}\n")
        process.stdin.flush()
        line = process.stdout.readline()
        if line:
            return Verdict(**json.loads(line))
        self._process = None
        return Verdict(name, "crash", "the worker process died")

    def _started(self) -> subprocess.Popen[str]:
        if self._process is None:
            self._process = subprocess.Popen(
                [sys.executable, str(Path(__file__).with_name("worker.py")), *self._options],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
            )
        return self._process
