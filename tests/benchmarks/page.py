"""docs/benchmarks.md and the JSON beside it, written by the command and never by hand."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.clock import Spread
from benchmarks.figure import Figure

HEAD = """# Benchmarks

`make bench` measures this on a CPU; `make bench BENCH="--device cuda --to docs/benchmarks-gpu.md"` on a GPU,
by the events of its stream. By PyTorch and fused: the option [`fused`](options.md#fused). Both libraries run
in one process on the same model and inputs in turns. A ratio is the median over the rounds of ours by theirs
in that round; in brackets its quartiles. Times are medians in milliseconds.
"""


def page(figures: Sequence[Figure], facts: Mapping[str, str]) -> str:
    """Write the page."""
    parts = [HEAD, *(f"- {name}: {value}" for name, value in facts.items()), ""]
    for row in dict.fromkeys(f.row for f in figures):
        parts += [f"## {row}", "", *_table([f for f in figures if f.row == row]), ""]
    return "\n".join(parts).rstrip() + "\n"


def line(figure: Figure) -> str:
    """One figure in one line, for the console."""
    times = ", ".join(f"{name} {time.median:.3g} ms" for name, time in figure.times.items())
    facts = " | ".join(part for part in (times, figure.note) if part)
    return f"{figure.verdict or '-':4} {figure.subject}: {figure.what} = {_value(figure)} {facts}"


def save(figures: Sequence[Figure], facts: Mapping[str, str], path: Path) -> None:
    """Write page and JSON; until both are whole, the old ones stay."""
    data = {"facts": dict(facts), "figures": [figure.as_dict() for figure in figures]}
    _replace(path.with_suffix(".json"), json.dumps(data, indent=1) + "\n")
    _replace(path, page(figures, facts))


def join(paths: Sequence[Path], path: Path) -> None:
    """Make one page of several runs' JSON, of one machine and the same versions.

    Raises:
        SystemExit: If they are not.
    """
    runs = [json.loads(p.read_text(encoding="utf-8")) for p in paths]
    several = ("command", "duration", "load average", "rounds")
    same = [{k: v for k, v in run["facts"].items() if k not in several} for run in runs]
    if any(facts != same[0] for facts in same):
        raise SystemExit(f"these runs cannot share a page, their machines or versions differ: {same}")
    joined = {k: "; ".join(str(run["facts"][k]) for run in runs) for k in several if k in runs[0]["facts"]}
    figures = [Figure.from_dict(figure) for run in runs for figure in run["figures"]]
    save(figures, {**same[0], **joined}, path)


def _table(figures: Sequence[Figure]) -> Iterable[str]:
    yield "| what | model | measured | target | verdict | times | note |"
    yield "|---|---|--:|--:|---|---|---|"
    for f in figures:
        target = "" if f.limit is None else f"at most {f.limit:.3g}{_unit(f.unit)}"
        times = ", ".join(f"{name} {time.median:.3g}" for name, time in f.times.items())
        cells: list[Any] = [
            f.what,
            f.subject,
            _value(f),
            target,
            f.verdict,
            times,
            f.note.replace("|", "\\|"),
        ]
        yield f"| {' | '.join(map(str, cells))} |"


def _value(figure: Figure) -> str:
    value = figure.value
    if value is None:
        return "not measured"
    number = f"{value.median:.3g}{_unit(figure.unit)}"
    return number if value == Spread.of([value.median]) else f"{number} [{value.low:.3g}, {value.high:.3g}]"


def _unit(unit: str) -> str:
    return "" if unit in ("", "x") else f" {unit}"


def _replace(path: Path, text: str) -> None:
    fresh = path.with_name(path.name + ".part")
    fresh.write_text(text, encoding="utf-8")
    fresh.replace(path)
