"""Two gloo processes: ranks hold the same bits after every cut, in every kind of DDP."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from processes import TIMEOUT, run

pytestmark = [pytest.mark.multiprocess, pytest.mark.timeout(TIMEOUT + 20)]
WORKER = Path(__file__).with_name("ddp_worker.py")
KINDS = ["default", "unused", "static", "static_manual", "views", "accumulated", "spawn"]


@pytest.mark.parametrize("variant", [*KINDS, "taylor", "hessian", "activation", "distilled"])
def test_ranks_agree_after_every_cut(tmp_path, variant):
    code, said = run(WORKER, tmp_path / "rows.json", variant)
    assert code == 0, said[-3000:]
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [epoch for epoch, *_ in rows] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert all(agree for _, agree, *_ in rows)
    assert [width for _, _, width, *_ in rows] == [8, 8, 7, 7, 5, 5, 4, 4]
    assert all(wrapped for *_, wrapped, _ in rows)
    assert all(gone for *_, gone in rows), "an old DDP wrapper is still alive"
    if variant == "spawn":
        assert json.loads((tmp_path / "rows.json.main").read_text()) == [4, 3, 3, 3]


def test_without_rebuilding_the_wrapper_ranks_drift_apart(tmp_path):
    """Guards the test above: it can fail."""
    code, said = run(WORKER, tmp_path / "rows.json", "broken")
    assert code == 0, said[-3000:]
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert not all(agree for _, agree, *_ in rows)


def test_spawned_processes_need_a_prepared_model(tmp_path):
    code, said = run(WORKER, tmp_path / "rows.json", "unprepared")
    assert code != 0
    assert "call lightning_prune.prepare(model) before trainer.fit" in said


def test_a_failure_on_rank_zero_ends_every_rank(tmp_path):
    code, _ = run(WORKER, tmp_path / "rows.json", "raises")
    assert code != 0
    assert [(tmp_path / f"rows.json.{rank}").read_text() for rank in (0, 1)] == [
        "ZeroDivisionError: division by zero",
        "PruneError: rank 0 could not plan the cut: ZeroDivisionError: division by zero",
    ]
