"""Measure speed: ``python tests/benchmarks/bench.py [--only ROW] [--models A,B] [--rounds N]``."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # not this folder: its names are plain words
    # Before lightning, which imports any torchvision that it finds, and fails on one without its operators.
    import_module("zoo.operators").import_torchvision()
    import_module("benchmarks.command").main()
