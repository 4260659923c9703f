"""A model too big to run here is planned all the same, in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SECONDS = 60  # of processor time
GIB = 4.0

# By hand. Half of every channel goes: width 2048, 7168 inner channels, heads of 64.
_LAYER = 2048 * (32 * 64 + 2 * 8 * 64 + 32 * 64 + 3 * 7168)
_LAYERS = 32 * (_LAYER + 2 * 2048)
_PARAMETERS = _LAYERS + 2048 + 2 * 128256 * 2048
# 128 tokens: each weight but the embedding's once per token, and two products of 128 x 128 per head.
_MACS = 128 * (32 * _LAYER + 2048 * 128256) + 32 * 32 * 2 * 128 * 128 * 64


@pytest.mark.zoo
@pytest.mark.timeout(900)
def test_a_llama_of_eight_billion_parameters_is_planned() -> None:
    ran = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("big.py"))],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    facts = json.loads(ran.stdout.splitlines()[-1])
    assert facts["parameters"] == [8_030_261_248, _PARAMETERS]
    assert facts["macs"][1] == _MACS
    assert (
        facts["groups"] == 2 + 32 * 3
    )  # width and rotary pairs of all layers; heads, values, inner channels
    assert facts["units"] == 4096 + 64 + 32 * (8 + 8 * 128 + 14336)
    assert facts["seconds_to_build"] + facts["seconds_to_plan"] < SECONDS
    assert facts["peak_gib"] < GIB
