"""Verdicts shared by the processes of one test run: each case is judged once, whoever asks."""

from __future__ import annotations

import json
import time
from pathlib import Path

from zoo.judge import Verdict
from zoo.server import Server


class Board:
    """A folder of verdicts and a worker that makes those that are missing.

    Args:
        folder: Shared by all processes of the run.
        server: This process's worker.
    """

    def __init__(self, folder: Path, server: Server) -> None:
        self.folder = folder
        self.server = server
        folder.mkdir(parents=True, exist_ok=True)

    def forget_claims(self) -> None:
        """Let go what a run that was cut off had begun."""
        for claim in self.folder.glob("*.claim"):
            if not claim.with_suffix(".json").exists():
                claim.unlink()

    def verdict(self, name: str) -> Verdict:
        """Judge a case, or wait for the process that is at it."""
        done = self.folder / f"{name.replace('/', '-')}.json"
        try:
            done.with_suffix(".claim").touch(exist_ok=False)
        except FileExistsError:
            while not done.exists():
                time.sleep(0.2)
            return Verdict(**json.loads(done.read_text()))
        verdict = self.server.verdict(name)
        fresh = done.with_suffix(".fresh")
        fresh.write_text(json.dumps(verdict.as_dict()))
        fresh.rename(done)  # at once, so that nobody reads half of it
        return verdict
