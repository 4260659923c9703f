"""One board of verdicts for every test of the zoo."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from zoo.board import Board
from zoo.server import Server


@pytest.fixture(scope="session")
def board(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Board]:
    base = tmp_path_factory.getbasetemp()
    run = os.environ.get("PYTEST_XDIST_TESTRUNUID")
    judged = os.environ.get("ZOO_BOARD")  # verdicts of tests/zoo/run.py --board
    own = base.parent / f"zoo-{run}" if run else base / "zoo"
    with Server(reasons=True) as server:
        yield Board(Path(judged) if judged else own, server)
