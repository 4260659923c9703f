"""The command behind ``make bench``: which rows, which models, where the page goes."""

from __future__ import annotations

import argparse
import logging
import os
import shlex
import sys
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

from benchmarks.analysis import analysis, step
from benchmarks.figure import Figure, Row, Settings
from benchmarks.growth import growth
from benchmarks.latency import latency
from benchmarks.page import join, line, save
from benchmarks.regularize import optimizer, regularize
from benchmarks.training import idle, memory, training

from lightning_prune.measuring.measured import describe_machine

PAGE = Path(__file__).resolve().parents[2] / "docs" / "benchmarks.md"
ROWS: dict[str, Row] = {
    "regularize": regularize,
    "optimizer": optimizer,
    "training": training,
    "idle": idle,
    "memory": memory,
    "analysis": analysis,
    "step": step,
    "growth": growth,
    "latency": latency,
}
LIBRARIES = ("lightning-prune", "torch", "lightning", "torch-pruning", "torchvision", "transformers", "numpy")


def main(words: Sequence[str] | None = None) -> None:
    """Run the rows; write the page when all of them are there, or where ``--to`` says."""
    given = _arguments(words)
    if given.join:
        join(given.join, given.to)
        return
    settings = Settings(given.models, given.rounds, given.device, given.seed)
    began, load = time.time(), os.getloadavg()[0]
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    try:
        figures = measure(given.only, settings)
    except KeyboardInterrupt:
        sys.stderr.write("\ninterrupted; no page was written\n")
        raise SystemExit(130) from None
    if given.to is not None:
        facts = describe(given, sys.argv[1:] if words is None else words, load)
        save(figures, {**facts, "duration": f"{time.time() - began:.0f} s"}, given.to)
        sys.stdout.write(f"wrote {given.to.name} and {given.to.with_suffix('.json').name}\n")
    missed = sum(f.verdict == "MISS" for f in figures)
    sys.stdout.write(f"{len(figures)} figures, {missed} missed their target\n")


def measure(rows: Sequence[str], settings: Settings) -> list[Figure]:
    """Run the rows one after the other and print each figure when it is there."""
    figures = []
    for row in rows:
        sys.stdout.write(f"{row}\n")
        sys.stdout.flush()
        for figure in ROWS[row](settings):
            figures.append(figure)
            sys.stdout.write(f"  {line(figure)}\n")
            sys.stdout.flush()
    return figures


def describe(given: argparse.Namespace, words: Sequence[str], load: float) -> dict[str, str]:
    """Say where and how it was measured."""
    return {
        "date": time.strftime("%Y-%m-%d"),
        "command": f"`{shlex.join(['python', 'tests/benchmarks/bench.py', *_without_place(words)])}`",
        **{name: str(value) for name, value in describe_machine(given.device).items()},
        "load average": f"{load:.1f} at the start, {os.getloadavg()[0]:.1f} at the end",
        "versions": ", ".join(f"{name} {metadata.version(name)}" for name in LIBRARIES),
        "rounds": str(given.rounds),
        "seed": str(given.seed),
    }


def _without_place(words: Sequence[str]) -> list[str]:
    """Leave out where the page goes, which is a matter of the machine."""
    kept = list(words)
    if "--to" in kept:
        at = kept.index("--to")
        del kept[at : at + 2]
    return kept


def _arguments(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench.py", description="Measure what speed is promised.")
    parser.add_argument("--only", choices=ROWS, action="append", help="this row; can be given several times")
    parser.add_argument("--models", type=lambda text: tuple(text.split(",")), help="names, joined by commas")
    parser.add_argument("--rounds", type=int, default=15, help="turns that each contender gets (15)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--to", type=Path, help="page to write; a run of all rows writes docs/benchmarks.md")
    parser.add_argument(
        "--join", type=Path, nargs="+", metavar="JSON", help="make one page of several runs' JSON, for --to"
    )
    given = parser.parse_args(words)
    if given.join and given.to is None:
        parser.error("--join needs --to")
    if given.rounds < 1:
        parser.error(f"--rounds must be at least 1, got {given.rounds}")
    if given.to is None and not given.only and not given.models:
        given.to = PAGE
    given.only = given.only or list(ROWS)
    return given
