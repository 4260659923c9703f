"""The report as a page: complete, self-contained, safe, and laid out by a real browser."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from matplotlib.colors import to_rgb
from matplotlib.image import imread
from test_report import markdown_cells, sample

from lightning_prune.reporting.comparison import comparison_cells, write_comparison
from lightning_prune.reporting.markdown import to_markdown
from lightning_prune.reporting.page import to_html
from lightning_prune.reporting.pictures.drawing import draw
from lightning_prune.reporting.pictures.style import COLOURS
from lightning_prune.reporting.report import Report

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
]
PICTURES = ["timeline", "channels", "importance", "spread"]
MEASURE = """<script>addEventListener("load", () => {
  const boxes = [...document.images].map((image) => [image.naturalWidth, image.getBoundingClientRect()])
  document.title = JSON.stringify(boxes.map(([natural, box]) => [natural, box.width, box.height]))
})</script></body>"""


class Page(HTMLParser):
    """What a page holds: tags with their attributes, and tables as lists of lines."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.tables: list[list[list[str]]] = []
        self._cell: list[str] | None = None
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self._cell = []

    def handle_data(self, data: str) -> None:
        if self._cell is not None:
            self._cell.append(data)

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th") and self._cell is not None:
            self.tables[-1][-1].append("".join(self._cell))
            self._cell = None


def page(report: Report) -> str:
    pictures, remarks = draw(report)
    assert remarks == ()
    return to_html(report, pictures)


def test_the_page_asks_nobody_for_anything() -> None:
    text = page(sample())
    for tag, attributes in Page(text).tags:
        assert tag not in ("script", "link", "iframe", "object", "embed", "base")
        for name in ("src", "href", "srcset", "action", "data"):
            assert attributes.get(name, "data:").startswith("data:"), (tag, name)
    outside = re.sub(r'src="data:[^"]*"', "", text)
    assert "//" not in outside
    assert "@import" not in outside
    assert "url(" not in outside
    assert "default-src 'none'" in text  # and a browser holds it to that


def test_every_picture_says_in_words_what_it_shows() -> None:
    images = [attributes for tag, attributes in Page(page(sample())).tags if tag == "img"]
    assert [image["src"].partition(",")[0] for image in images] == ["data:image/svg+xml;base64"] * 4
    alts = [image["alt"] for image in images]
    assert "1 cuts marked" in alts[0]
    assert alts[1] == "Bars of 4 layers: 561 of 1,088 channels are kept in all."
    assert "stem: 7 of 14 units removed; layer1.0.conv1 and 1 like it: 8 of 16 units removed" in alts[2]
    assert "below 0.6 of its group's mean at first and 0.1 at last" in alts[3]


def test_page_and_markdown_hold_the_same_tables() -> None:
    text = to_markdown(sample())
    found = Page(page(sample())).tables
    tables = [
        table.replace(r"\|", "\0").splitlines() for table in re.findall(r"(?:^\|.*\n?)+", text, re.MULTILINE)
    ]
    assert len(found) == len(tables) > 6
    for shown, lines in zip(found, tables, strict=True):
        cells = [[c.strip().replace("\0", "|") for c in line.strip("|").split("|")] for line in lines]
        assert [line for line in shown if any(line)] == [line for line in (cells[0], *cells[2:]) if any(line)]


def test_names_of_layers_cannot_break_out() -> None:
    nasty = "</td><script>alert('x')</script>&"
    text = page(sample(channels={nasty: (4, 2)}, dense_is=nasty))
    assert "<script" not in text
    assert any(nasty in line for table in Page(text).tables for line in table)


def test_a_page_without_pictures_shows_the_numbers() -> None:
    text = to_html(sample(), remarks=["No pictures: nothing draws."])
    assert "<img" not in text
    assert "<b>Note.</b> No pictures: nothing draws." in text
    assert "<summary>The same as numbers" not in text


def test_the_same_report_gives_the_same_page() -> None:
    assert page(sample()) == page(sample())


def test_a_report_of_little_has_a_page_too() -> None:
    report = sample(
        split=None, channels={}, targets=(), timeline=(), cuts=(), spreads=(), frozen=(), config={}, seed=None
    )
    bare = replace(report, versions={}, machine={})
    assert len(Page(page(bare)).tables) == 1


def test_several_runs_become_one_table(tmp_path: Path) -> None:
    runs = {
        "sweep/0": sample(),
        "sweep/1": sample(split=None, pruned=replace(sample().pruned, parameters=87_629, latency_ms=None)),
    }
    lines = [
        (
            "0",
            "accuracy (test)",
            "97.40%",
            "97.00%",
            "61,111 (34.87%)",
            "4,561,728 (50.00%)",
            "1.000 (0.015)",
            "1.43x faster",
        ),
        ("1", "", "", "", "87,629 (50.00%)", "4,561,728 (50.00%)", "", ""),
    ]
    assert comparison_cells(runs) == lines
    paths = write_comparison(runs, tmp_path / "out")
    assert [path.name for path in paths] == ["comparison.html", "comparison.md", "comparison.json"]
    assert [tuple(line) for line in Page(paths[0].read_text()).tables[0][1:]] == lines
    assert [tuple(line) for line in markdown_cells(paths[1].read_text(), "# Comparison of prunes\n")] == lines
    assert Report.from_dict(json.loads(paths[2].read_text())["sweep/0"]) == sample()


@pytest.mark.multiprocess
@pytest.mark.skipif(BROWSER is None, reason="needs Chromium, to open the page as a reader does")
@pytest.mark.parametrize("width", [1200, 500])
def test_a_browser_lays_out_every_picture(tmp_path: Path, width: int) -> None:
    file, measured, shot = tmp_path / "report.html", tmp_path / "measured.html", tmp_path / "shot.png"
    text = page(sample())
    file.write_text(text, encoding="utf-8")
    without_policy = re.sub(r"<meta http-equiv[^>]*>", "", text)
    measured.write_text(without_policy.replace("</body>", MEASURE), encoding="utf-8")

    def browse(*words: str) -> str:
        profile = tmp_path / "profile"
        command = [str(BROWSER), *FLAGS, f"--user-data-dir={profile}", f"--window-size={width},3600", *words]
        return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout

    found = re.search(r"<title>(.*?)</title>", browse("--dump-dom", measured.as_uri()))
    assert found is not None
    sizes = json.loads(found[1])
    assert len(sizes) == len(PICTURES)
    for natural, wide, high in sizes:
        assert natural > 400
        assert wide >= min(width * 0.6, 570)
        assert high > 150
    browse(f"--screenshot={shot}", file.as_uri())
    pixels = imread(shot)[..., :3]
    for colour in ("blue", "vermilion"):  # bars and lines, with the policy in force
        assert (abs(pixels - to_rgb(COLOURS[colour])).max(-1) < 0.02).sum() > 100, colour
