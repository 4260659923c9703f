"""Variants that share a worker: each is run and judged by itself, whatever the others do."""

from __future__ import annotations

import subprocess
from pathlib import Path

import processes
import pytest
from processes import run_each

WORKER = f"""
import os, sys, time
from pathlib import Path
sys.path.append({str(Path(__file__).parent)!r})
from processes import note_end

folder, variants = Path(sys.argv[1]), sys.argv[2:]
for variant in variants:
    with (folder / "seen.txt").open("a") as file:
        print(os.getpid(), variant, file=file)
    if variant == "dies":
        sys.exit("worse than ever")
    if variant == "stops":
        sys.exit()
    if variant == "hangs":
        time.sleep(60)
    note_end(folder, variant)
if variant == "late":
    sys.exit("after all")
"""


@pytest.fixture
def outcomes_of(tmp_path):
    """Give a function that runs variants, and gives their outcomes and who ran with whom."""
    (tmp_path / "worker.py").write_text(WORKER)

    def outcomes(*variants):
        found = run_each(tmp_path / "worker.py", tmp_path, variants)
        lines = [line.split() for line in (tmp_path / "seen.txt").read_text().splitlines()]
        return found, [[name for pid, name in lines if pid == each] for each in dict(lines)]

    return outcomes


def test_variants_that_end_well_share_one_worker(outcomes_of):
    assert outcomes_of("a", "b", "c") == ({"a": (0, ""), "b": (0, ""), "c": (0, "")}, [["a", "b", "c"]])


def test_a_failure_is_of_one_variant_and_those_after_it_get_another_worker(outcomes_of):
    found, together = outcomes_of("a", "dies", "b", "c")
    assert {variant: code for variant, (code, _) in found.items()} == {"a": 0, "dies": 1, "b": 0, "c": 0}
    assert found["dies"][1] == "worse than ever\n"
    assert together == [["a", "dies"], ["b", "c"]]


def test_one_that_ends_all_too_soon_has_not_ended_well(outcomes_of):
    found, together = outcomes_of("stops", "b")
    assert found == {"stops": (None, ""), "b": (0, "")}
    assert together == [["stops"], ["b"]]


def test_what_follows_the_last_variant_is_of_the_last_one(outcomes_of):
    assert outcomes_of("a", "late")[0] == {"a": (0, "after all\n"), "late": (1, "after all\n")}


def test_one_that_does_not_end_is_named(outcomes_of, monkeypatch):
    monkeypatch.setattr(processes, "TIMEOUT", 1)
    with pytest.raises(subprocess.TimeoutExpired) as error:
        outcomes_of("hangs", "b")
    assert error.value.__notes__ == ["in hangs"]
