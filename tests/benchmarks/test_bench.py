"""The benchmark itself: one tiny row from the command line to the page."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from benchmarks import command
from benchmarks.clock import Spread
from benchmarks.figure import Figure, Settings
from benchmarks.page import page

pytestmark = pytest.mark.bench
TINY = ["--only", "regularize", "--models", "resnet10", "--rounds", "1"]


@pytest.mark.filterwarnings("default")  # Torch-Pruning's own
def test_a_tiny_row_becomes_page_and_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command.main([*TINY, "--to", str(tmp_path / "page.md")])
    figures = json.loads((tmp_path / "page.json").read_text())["figures"]
    for figure, loops in zip(figures, ("by PyTorch", "fused"), strict=True):
        assert figure["value"]["median"] == pytest.approx(
            figure["times"][loops]["median"] / figure["times"]["theirs"]["median"]
        )
        assert figure["verdict"] == ("PASS" if figure["value"]["median"] <= 0.1 else "MISS")
    text = (tmp_path / "page.md").read_text()
    assert f"| at most 0.1 | {figure['verdict']} |" in text
    assert "torch-pruning 1.6.1" in text
    assert "resnet10" in capsys.readouterr().out
    assert {file.name for file in tmp_path.iterdir()} == {"page.md", "page.json"}


def test_a_part_of_the_rows_leaves_the_page_of_all_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "PAGE", tmp_path / "page.md")
    monkeypatch.setitem(command.ROWS, "idle", _one_figure)
    command.main(["--only", "idle"])
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_leaves_the_old_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(settings: Settings) -> Iterator[Figure]:
        yield from _one_figure(settings)
        raise KeyboardInterrupt

    old = tmp_path / "page.md"
    old.write_text("old")
    monkeypatch.setitem(command.ROWS, "idle", interrupted)
    with pytest.raises(SystemExit) as left:
        command.main(["--only", "idle", "--to", str(old)])
    assert left.value.code == 130
    assert old.read_text() == "old"
    assert list(tmp_path.iterdir()) == [old]


def test_runs_of_some_rows_make_one_page_if_they_are_of_one_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(command.ROWS, "idle", _one_figure)
    pages = [tmp_path / f"{n}.md" for n in "ab"]
    for rounds, path in zip("34", pages, strict=True):
        command.main(["--only", "idle", "--rounds", rounds, "--to", str(path)])
    parts, whole = [str(p.with_suffix(".json")) for p in pages], tmp_path / "whole.md"
    command.main(["--join", *parts, "--to", str(whole)])
    assert "- rounds: 3; 4\n" in whole.read_text()
    joined = json.loads(whole.with_suffix(".json").read_text())["figures"]
    assert [f["value"]["median"] for f in joined] == [3, 4]
    assert joined[:1] == json.loads(pages[0].with_suffix(".json").read_text())["figures"]
    other = pages[1].with_suffix(".json")
    other.write_text(other.read_text().replace('"threads": "', '"threads": "9'))
    with pytest.raises(SystemExit, match="machines or versions differ"):
        command.main(["--join", *parts, "--to", str(whole)])


def test_the_bound_itself_passes_and_more_is_a_miss() -> None:
    def shown(median: float | None) -> str:
        value = None if median is None else Spread(0.0, median, 9.0)
        return page([Figure("row", "net", "ratio", value, "x", 2.0, note="because")], {})

    assert "| 2 [0, 9] | at most 2 | PASS |" in shown(2.0)
    assert "| 2.01 [0, 9] | at most 2 | MISS |" in shown(2.01)
    assert "| not measured | at most 2 |  |  | because |" in shown(None)


def _one_figure(settings: Settings) -> Iterator[Figure]:
    yield Figure("idle", "net", "time", Spread.of([float(settings.rounds)]), "us", 50.0)
