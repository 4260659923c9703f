"""Two processes: the same bits as one, death and restart of a rank, and pruning before sharding."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy
from ranks_worker import KINDS, digest, single
from test_callback import build, pytestmark  # noqa: F401 - same filters

from lightning_prune.errors import StrategyError
from lightning_prune.training.strategies import check_set_up

WORKER = Path(__file__).with_name("ranks_worker.py")
multiprocess = pytest.mark.multiprocess
slowly = pytest.mark.timeout(420)  # every spawned process imports torch again


def run(mode, folder):
    """Give the exit code, what was said, and per rank what it held in the end."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1"}
    command = [sys.executable, str(WORKER), mode, str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400, check=False)
    files = sorted(Path(folder).glob(f"{mode}?.txt"))
    return done.returncode, done.stderr, [file.read_text().split() for file in files]


@multiprocess
def test_two_ranks_give_the_bits_of_one_process_and_one_may_die(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    code, said, ranks = run("whole", whole)
    assert code == 0, said[-3000:]
    assert ranks[0] == ranks[1]
    model = single()
    assert model.conv.out_channels == 4
    assert ranks[0] == [digest(model), "4", "4", "Parameter"]
    with torch.no_grad():
        model.fc.bias[0] += 1e-6
    assert digest(model) != ranks[0][0]  # the comparison can fail
    code, _, ranks = run("killed", killed)
    assert code != 0
    assert ranks == []
    assert sorted(file.name for file in killed.iterdir()) == ["epoch=0.ckpt", "epoch=1.ckpt"]
    code, said, again = run("restarted", killed)
    assert code == 0, said[-3000:]
    assert again[0] == again[1]
    assert again[0][0] == digest(single())


@multiprocess
@slowly
@pytest.mark.parametrize("start_method", ["popen", "spawn"])
def test_every_kind_of_ddp_gives_the_bits_of_one_process(tmp_path, start_method):
    code, said, _ = run(start_method, tmp_path)
    assert code == 0, said[-3000:]
    expected = digest(single())
    for kind in KINDS:
        held = [(tmp_path / f"{start_method}-{kind}-{who}.txt").read_text() for who in ("0", "1", "main")]
        assert held == [f"{expected} 4 4 Parameter", f"{expected} 4 4 Parameter", expected], kind


@multiprocess
def test_without_rebuilding_the_wrapper_the_bits_are_others(tmp_path):
    """Guards the test above: it can fail."""
    code, said, ranks = run("broken", tmp_path)
    assert code == 0, said[-3000:]
    assert ranks[0] != ranks[1]
    assert digest(single()) not in {rank[0] for rank in ranks}


@multiprocess
def test_a_network_pruned_before_sharding_trains(tmp_path):
    code, said, ranks = run("sharded", tmp_path)
    assert code == 0, said[-3000:]
    assert ranks[0] == ranks[1]
    assert ranks[0][1:] == ["4", "4", "DTensor"]


@multiprocess
def test_pruning_after_sharding_is_refused_at_set_up(tmp_path):
    code, said, ranks = run("refused", tmp_path)
    assert code != 0
    assert ranks == []
    assert "found ModelParallelStrategy" in said
    assert "prune before sharding (in configure_model), or use DDP" in said


@pytest.mark.parametrize("kind", [FSDPStrategy, DeepSpeedStrategy])
def test_sharding_strategies_that_need_a_gpu_are_refused_by_name(kind):
    class Sharding(Trainer):
        strategy = kind.__new__(kind)  # neither can be set up on a CPU

    trainer = Sharding.__new__(Sharding)
    with pytest.raises(StrategyError, match=f"found {kind.__name__}.*prune before sharding"):
        check_set_up(trainer, build())
