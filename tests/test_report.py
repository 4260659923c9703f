"""The report in every form. ``RENEW_GOLDEN=1 pytest tests/test_report.py`` rewrites tests/golden."""

import builtins
import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.image import imread
from rich.console import Console
from torch import nn

from lightning_prune.errors import PruneError, TraceError
from lightning_prune.graph.explaining import Frozen
from lightning_prune.measuring import measured
from lightning_prune.measuring.latency import Latency
from lightning_prune.measuring.measured import Measured, measure_pair
from lightning_prune.reporting.console import print_report
from lightning_prune.reporting.history import ClassScores, Cut, Spread
from lightning_prune.reporting.markdown import to_markdown
from lightning_prune.reporting.pictures import drawing
from lightning_prune.reporting.pictures.channels import channels_figure, shorten
from lightning_prune.reporting.report import Metric, Report, Target
from lightning_prune.reporting.writing import write_report

TEXTS = ["report.html", "report.md", "report.json"]
GOLDEN = Path(__file__).parent / "golden"
DENSE = Measured(0.9740, 175_258, 9_123_456, 701_032, 1.430, 0.020, 1_404_032, 710_000)
PRUNED = Measured(0.9700, 61_111, 4_561_728, 244_444, 1.0, 0.015, 700_000, 255_000)
CUT = Cut(
    epoch=1,
    edges=(0.1, 1.0, 10.0),
    classes=(
        ClassScores("stem", (1, 6), (7, 0), 0.75),
        ClassScores("layer1.0.conv1 and 1 like it", (3, 5), (8, 0), 0.5),
    ),
    unscored=1,
    notes=("round_to=8: layer1.0.conv1 keeps 8 of 16",),
)


def sample(**changes: Any) -> Report:
    whole: dict[str, Any] = {
        "dense": DENSE,
        "pruned": PRUNED,
        "dense_is": "A twin trained without pruning: same seed, same epochs.",
        "split": "test",
        "others": (Metric("loss", "min", 0.1, 0.12), Metric("f1", None, 0.97, 0.98)),
        "inputs": "one sample, 1x3x32x32 float32",
        "channels": {
            "stem": (16, 9),
            "layer1.0.conv1": (16, 8),
            "layer2.0.conv1": (1024, 512),
            "a|b": (32, 32),
        },
        "targets": (Target("units removed", 0.5, 0.4985), Target("MACs kept", 0.5, 0.5)),
        "seed": 7,
        "versions": {"python": "3.11.7", "torch": "2.13.0"},
        "machine": {"cpu": "Example CPU", "threads": 2, "device": "cpu"},
        "config": {"pruning": {"pruning_ratio": 0.5, "ignored_layers": ["fc"]}},
        "timeline": (
            {"epoch": 0, "phase": "dense", "sparsity": 0.0, "macs": 1.0, "accuracy": 0.91},
            {"epoch": 1, "phase": "prune", "sparsity": 0.4985, "macs": 0.5},
        ),
        "cuts": (CUT,),
        "spreads": (
            Spread(0, (0.5, 0.6, 0.8, 1.0, 1.2, 1.5, 2.0)),
            Spread(1, (0.0, 0.1, 0.7, 1.0, 1.3, 1.8, 2.5)),
        ),
        "frozen": (
            Frozen("fc.weight", 0, 10, 10, "an output of the model: output"),
            Frozen("fc.bias", 0, 10, 10, "an output of the model: output"),
            Frozen(
                "layer2.0.conv1.weight",
                1,
                3,
                16,
                "padded along a labelled dimension: pad in layer2 (net.py:12)",
            ),
        ),
    }
    return Report(**{**whole, **changes})


def console_text(shown: Report, width: int = 80) -> str:
    console = Console(width=width, record=True, file=open(os.devnull, "w"), color_system=None)  # noqa: PTH123, SIM115
    with console.file:
        print_report(shown, console)
    return "\n".join(line.rstrip() for line in console.export_text().splitlines()) + "\n"


def markdown_cells(text: str, heading: str) -> list[list[str]]:
    """Read the lines of the table under a heading, without its head."""
    table = text.split(f"{heading}\n", 1)[1].strip().split("\n\n", 1)[0]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in table.splitlines()[2:]]


@pytest.mark.parametrize(
    ("name", "render"),
    [
        (
            "report.md",
            lambda: to_markdown(sample(), pictures={"channels": "channels.png"}, remarks=["One remark."]),
        ),
        ("report.txt", lambda: console_text(sample())),
        ("report.json", lambda: sample().to_json()),
    ],
)
def test_the_report_reads_as_agreed(name: str, render: Callable[[], str]) -> None:
    if os.environ.get("RENEW_GOLDEN"):
        (GOLDEN / name).write_text(render(), encoding="utf-8")
    assert render() == (GOLDEN / name).read_text(encoding="utf-8")


def test_channel_columns_add_up_to_their_totals() -> None:
    *layers, total = markdown_cells(to_markdown(sample()), "## Channels per layer")
    for column in (1, 2):
        assert sum(int(line[column].replace(",", "")) for line in layers) == int(
            total[column].replace(",", "")
        )
    assert total == ["total", "1,088", "561", "52%"]


def test_json_holds_plain_numbers_under_the_agreed_names() -> None:
    data = json.loads(sample().to_json())
    for side, expected in (("dense", DENSE), ("pruned", PRUNED)):
        names = ("accuracy", "parameters", "macs", "latency_ms", "memory_bytes")
        assert [data[side][name] for name in names] == [getattr(expected, name) for name in names]
        assert all(type(data[side][name]) in (int, float) for name in names)
    assert data["metric"] == {"name": "accuracy", "direction": "max", "split": "test"}
    assert {"dense_is", "seed", "versions", "machine", "config"} <= data.keys()


def test_a_report_comes_back_from_its_json() -> None:
    again = Report.from_dict(json.loads(sample().to_json()))
    assert again == sample()
    old = {k: v for k, v in sample().as_dict().items() if k not in ("cuts", "spreads", "frozen", "speed")}
    assert Report.from_dict(old) == sample(cuts=(), spreads=(), frozen=())


@pytest.mark.parametrize("data", [{}, [], {"dense": 3}, {**sample().as_dict(), "channels": {"a": 1}}])
def test_what_is_no_report_is_refused(data: Any) -> None:
    with pytest.raises(PruneError, match="no report of a prune"):
        Report.from_dict(data)


def test_sentences_on_speed_take_the_place_of_the_rule_of_thumb() -> None:
    slow = {"pruned": replace(PRUNED, latency_ms=2.0)}
    assert "less than half" in sample(**slow).notes()[0]
    assert sample(**slow, speed=("Calls take longer than sums.",)).notes() == (
        "Calls take longer than sums.",
    )


def test_a_latency_that_varies_more_than_it_changes_is_no_ground_for_an_explanation() -> None:
    noisy = sample(pruned=replace(PRUNED, latency_ms=2.0, latency_iqr_ms=0.6), speed=("Slow layers.",))
    assert noisy.notes() == (
        "The latency varied more than it changed, so it says nothing of the speed-up; measure on a machine "
        "that does nothing else.",
    )


def test_each_reason_is_said_once_with_all_that_it_holds() -> None:
    lines = markdown_cells(to_markdown(sample()), "These positions were never up for removal.\n")
    assert lines == [
        ["an output of the model: output", "fc.weight dim 0, fc.bias dim 0"],
        [
            "padded along a labelled dimension: pad in layer2 (net.py:12)",
            "layer2.0.conv1.weight dim 1 (3 of 16)",
        ],
    ]


def test_json_survives_what_json_cannot_say() -> None:
    odd = {
        "path": Path("a/b"),
        "nan": float("nan"),
        "tensor": torch.tensor(3),
        "set": (1, np.float64(0.5)),
        3: nn.ReLU,
    }
    config = json.loads(sample(config=odd, pruned=replace(PRUNED, accuracy=float("inf"))).to_json())["config"]
    assert config == {"path": "a/b", "nan": None, "tensor": 3, "set": [1, 0.5], "3": str(nn.ReLU)}


@pytest.mark.parametrize(
    ("label", "dense", "pruned", "change"),
    [
        ("accuracy (test)", {"accuracy": 0.97}, {"accuracy": 0.974}, "0.40 points higher"),
        ("accuracy (test)", {"accuracy": 0.97}, {"accuracy": 0.97}, "the same"),
        ("parameters", {"parameters": 100}, {"parameters": 103}, "3.0% more"),
        ("MACs", {"macs": 0}, {"macs": 3}, "none before"),
        ("MACs", {"macs": 3}, {"macs": 3}, "the same"),
        ("latency, ms (IQR)", {"latency_ms": 0.9}, {"latency_ms": 1.0}, "0.90x: slower"),
        ("latency, ms (IQR)", {"latency_iqr_ms": 0.5}, {}, "1.43x: within the spread"),
        ("latency, ms (IQR)", {"latency_iqr_ms": None}, {"latency_iqr_ms": None}, "1.43x faster"),
        ("latency, ms (IQR)", {}, {"latency_ms": 0.0}, "too short to measure"),
        ("peak memory", {"peak_memory_bytes": 100}, {"peak_memory_bytes": 75}, "25.0% less"),
        ("saved weights", {"disk_bytes": 200}, {"disk_bytes": 150}, "25.0% less"),
    ],
)
def test_changes_are_worded_honestly(
    label: str, dense: dict[str, Any], pruned: dict[str, Any], change: str
) -> None:
    shown = sample(dense=replace(DENSE, **dense), pruned=replace(PRUNED, **pruned))
    assert {row.label: row.change for row in shown.rows()}[label] == change


def test_another_metric_keeps_its_scale_and_its_direction() -> None:
    changes = {"metric": "val_loss", "direction": "min", "split": "val"}
    shown = sample(dense=replace(DENSE, accuracy=2.5), pruned=replace(PRUNED, accuracy=2.75), **changes)
    row = shown.rows()[0]
    assert (row.label, row.dense, row.pruned, row.change) == (
        "val_loss (val)",
        "2.5",
        "2.75",
        "0.25 higher (worse)",
    )
    assert "The metrics are those of the val split, which may have guided training." in shown.notes()
    alone = replace(shown, others=())
    assert "The val_loss is that of the val split, which may have guided training." in alone.notes()


def test_metrics_beside_the_main_one_come_after_it_and_survive_json() -> None:
    nan = sample(others=(Metric("loss", "min", 0.1, float("nan")), Metric("f1", None, 0.9, 0.8)))
    again = Report.from_dict(json.loads(nan.to_json()))
    for shown in (nan, again):
        assert [row.label for row in shown.rows()[:4]] == [
            "accuracy (test)",
            "loss (test)",
            "f1 (test)",
            "parameters",
        ]
        assert shown.rows()[1].pruned == "nan"
        assert shown.rows()[2].change == "0.1 lower"  # not called worse: nothing says which way is better
    assert again.others[1] == nan.others[1]
    without = sample(dense=replace(DENSE, accuracy=None), pruned=replace(PRUNED, accuracy=None))
    assert [row.label for row in without.rows()[:2]] == ["loss (test)", "f1 (test)"]
    old = json.loads(sample().to_json())
    del old["others"], old["inputs"]
    assert Report.from_dict(old) == sample(others=(), inputs="")


def test_what_was_not_measured_has_no_row() -> None:
    unknown = {"latency_ms": None, "peak_memory_bytes": None, "disk_bytes": None}
    shown = sample(split=None, dense=replace(DENSE, **unknown), pruned=replace(PRUNED, **unknown))
    assert [row.label for row in shown.rows()] == ["parameters", "MACs", "parameter memory"]
    assert shown.notes() == (
        "No metric was measured on held-out data: nothing is known of the model's quality.",
    )


@pytest.mark.parametrize(
    ("latency_ms", "said"),
    [
        (1.430 * 0.74, None),
        (1.430 * 0.76, "MACs fell by 50%, latency by 24%: less than half"),
        (1.430 * 1.10, "MACs fell by 50%, latency rose by 10%: less than half"),
    ],
    ids=["more than half", "less than half", "slower"],
)
def test_latency_that_falls_short_of_the_macs_is_flagged(latency_ms: float, said: str | None) -> None:
    shown = sample(pruned=replace(PRUNED, latency_ms=latency_ms))
    if said is None:
        assert shown.notes() == ()
    else:
        assert shown.notes()[0].startswith(said)
        assert said in " ".join(console_text(shown).split())
        assert f"> {said}" in to_markdown(shown)


def test_names_with_brackets_and_bars_are_shown_as_they_are() -> None:
    shown = sample(
        dense_is="[bold]not markup[/bold]", channels={"a|b": (1, 1)}, targets=(Target("[x]", 0, 0),)
    )
    assert "[bold]not markup[/bold]" in console_text(shown)
    assert "[red]accuracy (test)" in console_text(replace(shown, metric="[red]accuracy"))
    assert "[x]: asked 0.00%" in console_text(shown)
    assert r"| a\|b  |" in to_markdown(shown)


def test_write_leaves_three_whole_files(tmp_path: Path) -> None:
    paths = write_report(sample(), tmp_path / "new" / "folder")
    assert [path.name for path in paths] == [
        *(f"{name}.png" for name in ("timeline", "channels", "importance", "spread")),
        *("report.html", "report.md", "report.json"),
    ]
    assert sorted(path.name for path in (tmp_path / "new" / "folder").iterdir()) == sorted(
        p.name for p in paths
    )
    assert all(imread(path).shape[1] > 800 for path in paths[:4])
    assert all(f"({path.name})" in paths[5].read_text() for path in paths[:4])
    assert json.loads(paths[6].read_text())["seed"] == 7


def test_no_file_is_written_in_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names: list[str] = []
    original = Path.write_bytes

    def note(path: Path, data: bytes) -> int:
        names.append(path.name)
        return original(path, data)

    monkeypatch.setattr(Path, "write_bytes", note)
    write_report(sample(channels={}, timeline=(), cuts=(), spreads=()), tmp_path)
    assert len(names) == 3
    assert {path.name for path in tmp_path.iterdir()} == set(TEXTS)
    assert not set(TEXTS) & set(names)


def test_a_missing_matplotlib_costs_the_figure_not_the_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    original = builtins.__import__

    def refuse(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    assert [path.name for path in write_report(sample(), tmp_path)] == TEXTS
    for text in ((tmp_path / name).read_text() for name in TEXTS[:2]):
        assert "lightning-prune[plots]" in text
        assert "channels.png" not in text
        assert "<img" not in text
    assert "lightning-prune[plots]" in caplog.text


def test_a_figure_that_fails_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError("no paper")

    monkeypatch.setattr(drawing, "channels_figure", fail)
    write_report(sample(), tmp_path)
    remark = "No picture of channels: drawing it failed with ZeroDivisionError: no paper"
    assert f"> {remark}" in (tmp_path / "report.md").read_text()
    assert remark in (tmp_path / "report.html").read_text()
    assert (tmp_path / "timeline.png").exists()


def test_an_interrupted_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "report.md").write_text("old")

    def half(path: Path, data: bytes) -> None:
        path.write_text("half")
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_bytes", half)
    with pytest.raises(KeyboardInterrupt):
        write_report(sample(channels={}, timeline=(), cuts=(), spreads=()), tmp_path)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"report.md": "old"}


def test_the_smallest_report_renders() -> None:
    shown = Report(dense=Measured(None, 1, 1, 4), pruned=Measured(None, 1, 1, 4), dense_is="Itself.")
    assert to_markdown(shown).count("##") == 0
    assert "the same" in console_text(shown)


def test_the_figure_has_a_bar_and_its_numbers_for_every_layer() -> None:
    channels = {f"net.blocks.{i}.conv": (64 + i, 32) for i in range(120)}
    figure = channels_figure(channels)
    assert len(figure.axes) == 3
    bars = [bar.get_width() for axes in figure.axes for kind in axes.containers for bar in kind]
    assert sorted(bars) == sorted([64 + i for i in range(120)] + [32] * 120)
    assert [text.get_text() for text in figure.axes[2].texts][-1] == "32 of 183"
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()][:2] == [
        "blocks.0.conv",
        "blocks.1.conv",
    ]
    with pytest.raises(ValueError, match="at least one layer"):
        channels_figure({})


@pytest.mark.parametrize(
    ("names", "length", "expected"),
    [
        (["conv1"], 34, ["conv1"]),
        (["a.conv1"], 34, ["a.conv1"]),
        (["net.0.conv1", "net.1.conv1"], 34, ["net.0.conv1", "net.1.conv1"]),
        (["model.net.stem", "model.net.layer.conv"], 34, ["stem", "layer.conv"]),
        (["encoder.10.alpha", "decoder.10.alpha"], 12, ["e.10.alpha", "d.10.alpha"]),
        (["encoder.alpha", "encoder_b.alpha"], 10, ["encoder.alpha", "encoder_b.alpha"]),
        (["abcdefghijklmnopqrstuvwxyz", "b"], 10, ["abc…uvwxyz", "b"]),
    ],
    ids=[
        "one word",
        "alone",
        "a number keeps its word",
        "shared start",
        "initials",
        "would be equal",
        "one long word",
    ],
)
def test_names_are_shortened_but_stay_apart(names: list[str], length: int, expected: list[str]) -> None:
    assert shorten(names, length=length) == expected


def test_a_pair_is_measured_in_one_go(monkeypatch: pytest.MonkeyPatch) -> None:
    times = {"dense": Latency(2.0, 0.2, 10, 5, 1), "pruned": Latency(1.0, 0.1, 10, 5, 1)}
    monkeypatch.setattr(measured, "measure_latency", lambda *_, **__: times)
    dense, pruned = measure_pair(
        nn.Linear(8, 4),
        nn.Linear(8, 2),
        {"any": "object", "x": torch.ones(3, 8)},
        accuracies=(0.9, None),
        forward_fn=lambda model, given: model(given["x"]),
    )
    assert replace(dense, disk_bytes=0) == Measured(0.9, 36, 96, 144, 2.0, 0.2, 144 + 48, 0)
    assert replace(pruned, disk_bytes=0) == Measured(None, 18, 48, 72, 1.0, 0.1, 72 + 24, 0)


def test_the_size_on_disk_is_that_of_the_file(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(8, 4), nn.BatchNorm1d(4))
    torch.save(net.state_dict(), tmp_path / "archive")  # the name goes into the file
    assert measured.saved_bytes(net) == (tmp_path / "archive").stat().st_size


def test_a_pair_that_cannot_run_is_an_error_of_ours() -> None:
    with pytest.raises(TraceError, match="measuring Linear"):
        measure_pair(nn.Linear(8, 4), nn.Linear(8, 4), torch.ones(3, 7))
