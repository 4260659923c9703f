"""Two gloo processes: ranks hold the same bits after every cut, in every kind of DDP."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from processes import TIMEOUT, asked_for, run_each

pytestmark = [pytest.mark.multiprocess, pytest.mark.timeout(3 * TIMEOUT)]
WORKER = Path(__file__).with_name("ddp_worker.py")
KINDS = ["default", "unused", "static", "static_manual", "views", "accumulated"]
AGREEING = [*KINDS, "taylor", "hessian", "activation", "distilled"]
STARTED = [
    *AGREEING,
    "broken",
    "raises",
]  # by Lightning as processes with the same command; the last one fails
SPAWNED = ["spawn", "unprepared"]


@pytest.fixture(scope="module")
def ended(request, tmp_path_factory):
    """Give the folder of all variants, and per variant the exit code and what was said."""
    folder = tmp_path_factory.mktemp("variants")
    started, spawned = (run_each(WORKER, folder, asked_for(request, each)) for each in (STARTED, SPAWNED))
    return folder, started | spawned


def rows_of(variant, ended):
    """Give what the ranks of a variant noted, once it has ended well."""
    folder, outcomes = ended
    code, said = outcomes[variant]
    assert code == 0, f"{variant} ended with {code}: {said[-8000:]}"
    return json.loads((folder / f"{variant}.json").read_text())


@pytest.mark.parametrize("variant", [*AGREEING, "spawn"])
def test_ranks_agree_after_every_cut(ended, variant):
    rows = rows_of(variant, ended)
    assert [epoch for epoch, *_ in rows] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert all(agree for _, agree, *_ in rows)
    assert [width for _, _, width, *_ in rows] == [8, 8, 7, 7, 5, 5, 4, 4]
    assert all(wrapped for *_, wrapped, _ in rows)
    assert all(gone for *_, gone in rows), "an old DDP wrapper is still alive"
    if variant == "spawn":
        assert json.loads((ended[0] / "spawn.json.main").read_text()) == [4, 3, 3, 3]


@pytest.mark.parametrize("variant", ["broken"])
def test_without_rebuilding_the_wrapper_ranks_drift_apart(ended, variant):
    """Guards the test above: it can fail."""
    assert not all(agree for _, agree, *_ in rows_of(variant, ended))


@pytest.mark.parametrize("variant", ["unprepared"])
def test_spawned_processes_need_a_prepared_model(ended, variant):
    code, said = ended[1][variant]
    assert code, f"{variant} did not fail"
    assert "call lightning_prune.prepare(model) before trainer.fit" in said


@pytest.mark.parametrize("variant", ["raises"])
def test_a_failure_on_rank_zero_ends_every_rank(ended, variant):
    folder, outcomes = ended
    assert outcomes[variant][0], f"{variant} did not fail"
    assert [(folder / f"{variant}.json.{rank}").read_text() for rank in (0, 1)] == [
        "ZeroDivisionError: division by zero",
        "PruneError: rank 0 could not plan the cut: ZeroDivisionError: division by zero",
    ]
