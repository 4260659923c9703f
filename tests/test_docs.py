"""The pages under docs/: every Python block runs and prints what the page says; the options are complete."""

from __future__ import annotations

import contextlib
import inspect
import io
import re
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pytest
from brevity import measure_briefly

from lightning_prune import GroupNormPruner
from lightning_prune.options import PruningOptions
from lightning_prune.scores.importance import IMPORTANCES
from lightning_prune.scores.normalizers import NORMALIZERS
from lightning_prune.selection.schedules import SCHEDULES
from lightning_prune.tracing.rules import FUNCTIONS, RULES, rule_for
from lightning_prune.training.callback import StructuredPruning

DOCS = Path(__file__).parent.parent / "docs"
PAGES = sorted(DOCS.glob("*.md"))
FENCE = re.compile(r"^```(?P<info>[^\n`]*)\n(?P<body>.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]]*\]\((?P<target>[^)#\s]+)(?:#[^)]*)?\)")
OPTION = re.compile(r"^### `(?P<name>\w+)`\n\n(?P<default>Required|Default `[^`]+`)\.", re.MULTILINE)

pytestmark = [  # Lightning 2.6 on torch 2.13, and advice that a page does not need
    pytest.mark.filterwarnings(f"ignore:{text}")
    for text in (
        ".*LeafSpec",
        ".*does not have many workers",
        ".*number of training batches",
        "Be aware that when using .ckpt_path",
    )
]


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, whether it runs, its code, its first line, what it must print."""

    runs: bool
    code: str
    line: int
    output: str | None


def blocks(text: str) -> Iterator[Block]:
    """A ``python`` block runs unless it says ``no-run``; an ``output`` block behind it is held to it."""
    found = list(FENCE.finditer(text))
    for at, fence in enumerate(found):
        language, *words = fence["info"].split() or [""]
        if language != "python":
            continue
        behind = found[at + 1] if at + 1 < len(found) else None
        follows = behind and behind["info"] == "output" and not text[fence.end() : behind.start()].strip()
        line = text.count("\n", 0, fence.start("body"))
        yield Block("no-run" not in words, fence["body"], line, behind["body"] if follows else None)


def run(block: Block, page: Path, names: dict[str, Any]) -> str:
    """Execute a block as if it stood at its own line of the page; give what it printed."""
    code = compile("\n" * block.line + block.code, str(page), "exec")
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(code, names)
    return printed.getvalue()


@pytest.fixture
def own_rules() -> Iterator[None]:
    """Pages register operations and importances; nobody else may see them."""
    tables: list[dict[Any, Any]] = [RULES, FUNCTIONS, IMPORTANCES]
    before = [dict(table) for table in tables]
    yield
    for table, content in zip(tables, before, strict=True):
        table.clear()
        table.update(content)
    rule_for.cache_clear()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
@pytest.mark.usefixtures("own_rules")
def test_every_block_runs_and_prints_what_the_page_says(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # pages may write checkpoints
    measure_briefly(monkeypatch)  # and do not show it
    names: dict[str, Any] = {"__name__": f"docs_{page.stem.replace('-', '_')}"}
    for block in blocks(page.read_text(encoding="utf-8")):
        if block.runs:
            printed = run(block, page, names)
            assert block.output is None or printed == block.output, f"{page.name}:{block.line}"


def test_the_reader_of_blocks_tells_them_apart() -> None:
    page = "a\n```python\nx = 1\n```\n\n```output\n1\n```\n```python no-run\ny\n```\n```bash\nls\n```\n"
    assert list(blocks(page)) == [Block(True, "x = 1\n", 2, "1\n"), Block(False, "y\n", 9, None)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_link_to_a_file_leads_somewhere(page: Path) -> None:
    targets = [found["target"] for found in LINK.finditer(FENCE.sub("", page.read_text(encoding="utf-8")))]
    dead = [t for t in targets if "://" not in t and not (page.parent / t).exists()]
    assert dead == []


def section(heading: str) -> str:
    """Text of one section of docs/options.md."""
    _, _, rest = (DOCS / "options.md").read_text(encoding="utf-8").partition(f"\n## {heading}\n")
    return re.split(r"^## ", rest, maxsplit=1, flags=re.MULTILINE)[0]


def listed(heading: str) -> list[tuple[str, str]]:
    return [(found["name"], found["default"]) for found in OPTION.finditer(section(heading))]


def declared(callable_: Any) -> list[tuple[str, str]]:
    """Options with their defaults as ``(name, sentence)``, in the order of the signature."""
    parameters = list(inspect.signature(callable_).parameters.values())
    return [
        (p.name, "Required" if p.default is p.empty else f"Default `{p.default!r}`")
        for p in parameters
        if p.name != "self"
    ]


def test_the_page_of_options_lists_every_option_of_the_pruner_with_its_default() -> None:
    assert listed("GroupNormPruner") == declared(GroupNormPruner)


def test_the_page_of_options_lists_every_option_of_the_callback_with_its_default() -> None:
    assert listed("StructuredPruning") == declared(StructuredPruning)


def test_the_options_of_callback_and_pruner_are_the_same_ones() -> None:
    own = {"model", "example_inputs", "pruning_ratio", "iterative_steps"}
    pruner = dict(declared(GroupNormPruner))
    assert {f.name: f"Default `{f.default!r}`" for f in fields(PruningOptions)} == {
        name: default for name, default in pruner.items() if name not in own
    }


@pytest.mark.parametrize(
    ("option", "table"),
    [
        ("importance", IMPORTANCES),
        ("normalizer", NORMALIZERS),
        ("iterative_pruning_ratio_scheduler", SCHEDULES),
    ],
)
def test_the_page_of_options_names_every_entry_of_a_table(option: str, table: dict[str, Any]) -> None:
    _, _, text = section("GroupNormPruner").partition(f"### `{option}`\n")
    missing = [name for name in table if f'`"{name}"`' not in text.partition("\n### ")[0]]
    assert missing == []
