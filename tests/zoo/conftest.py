"""One board of verdicts for every test of the zoo."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from zoo.board import Board
from zoo.server import Server


@pytest.fixture(scope="session")
def board(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Board]:
    base = tmp_path_factory.getbasetemp()
    run = os.environ.get("PYTEST_XDIST_TESTRUNUID")
    with Server(reasons=True) as server:
        yield Board(base.parent / f"zoo-{run}" if run else base / "zoo", server)
