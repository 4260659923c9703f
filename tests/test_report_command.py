"""lightning-prune report: pages made again from what a run has left, and runs beside each other."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from test_cli import command, logs  # noqa: F401 - fixtures
from test_report import TEXTS, sample

from lightning_prune.reporting.writing import write_report

PICTURES = [f"{name}.png" for name in ("timeline", "channels", "importance", "spread")]


def written(folder: Path, **changes: object) -> Path:
    write_report(sample(**changes), folder)
    return folder


def test_pages_are_made_again_from_the_json_alone(command, tmp_path):
    folder = written(tmp_path / "run")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    for path in folder.iterdir():
        if path.name != "report.json":
            path.unlink()
    code, out, err = command("report", "run")
    assert code == 0, err
    assert "accuracy (test)            97.40%          97.00%" in out
    assert out.splitlines()[-7:] == [f"run/{name}" for name in (*PICTURES, *TEXTS)]
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_they_go_where_they_are_wanted(command, tmp_path):
    written(tmp_path / "run")
    code, _, err = command("report", "run/report.json", "--out", "web/page")
    assert code == 0, err
    assert {path.name for path in (tmp_path / "web" / "page").iterdir()} == {*PICTURES, *TEXTS}


def test_several_runs_are_compared_and_written_only_where_asked(command, tmp_path):
    written(tmp_path / "sweep" / "0")
    written(tmp_path / "sweep" / "1", pruned=replace(sample().pruned, accuracy=0.5))
    before = sorted(tmp_path.rglob("*"))
    code, out, err = command("report", "sweep")
    assert code == 0, err
    assert [line.split()[0] for line in out.splitlines() if "(test)" in line] == ["0", "1"]
    assert "50.00%" in out
    assert sorted(tmp_path.rglob("*")) == before
    code, _, err = command("report", "sweep/0", "sweep/1", "--out", "both")
    assert code == 0, err
    assert json.loads((tmp_path / "both" / "comparison.json").read_text()).keys() == {"sweep/0", "sweep/1"}


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        (None, ["nowhere", "no such folder", "outputs/<date>/<time>"]),
        ("", ["report.json", "to be read as a report"]),
        ('{"dense"', ["report.json", "to be read as a report"]),
        ('{"dense": 3}', ["report.json", "no report of a prune"]),
    ],
)
def test_what_is_no_report_is_named(command, tmp_path, content, parts):
    name = "nowhere"
    if content is not None:
        name = "run"
        (tmp_path / name).mkdir()
        (tmp_path / name / "report.json").write_text(content)
    code, out, err = command("report", name)
    assert (code, out) == (1, "")
    assert all(part in err for part in parts)
    assert "Traceback" not in err


def test_a_run_that_was_stopped_says_how_to_go_on(command, tmp_path):
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    code, _, err = command("report", "run")
    assert code == 1
    assert "no report.json in or below" in err
    assert "ckpt_path=" in err


@pytest.mark.multiprocess
def test_a_reader_that_has_seen_enough_is_no_error(tmp_path):
    code = "import sys; from lightning_prune.commands.entry import main; main()"
    write = [sys.executable, "-c", code, "report", "--help"]
    with subprocess.Popen(write, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=tmp_path) as process:
        process.stdout.close()
        said = process.stderr.read().decode()
    assert "Traceback" not in said
    assert "BrokenPipe" not in said


def test_its_help_teaches(command):
    code, out, _ = command("report", "--help")
    assert code == 0
    assert out.count("lightning-prune report ") >= 4
