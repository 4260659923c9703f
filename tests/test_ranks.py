"""Two processes: the same bits as one, death and restart of a rank, and pruning before sharding."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy
from processes import TIMEOUT, run
from ranks_worker import KINDS, digest, single
from test_callback import build, pytestmark  # noqa: F401 - same filters

from lightning_prune.errors import StrategyError
from lightning_prune.training.strategies import check_set_up

WORKER = Path(__file__).with_name("ranks_worker.py")
multiprocess, patiently = pytest.mark.multiprocess, pytest.mark.timeout(3 * TIMEOUT)


def start(mode, folder):
    """Give the exit code, what was said, and per rank what it held in the end."""
    code, said = run(WORKER, mode, folder)
    return code, said, [file.read_text().split() for file in sorted(Path(folder).glob(f"{mode}?.txt"))]


@multiprocess
@patiently
def test_two_ranks_give_the_bits_of_one_process_and_one_may_die(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    code, said, ranks = start("whole", whole)
    assert code == 0, said[-3000:]
    assert ranks[0] == ranks[1]
    model = single()
    assert model.conv.out_channels == 4
    assert ranks[0] == [digest(model), "4", "4", "Parameter"]
    with torch.no_grad():
        model.fc.bias[0] += 1e-6
    assert digest(model) != ranks[0][0]  # the comparison can fail
    code, _, ranks = start("killed", killed)
    assert code != 0
    assert ranks == []
    assert sorted(file.name for file in killed.iterdir()) == ["epoch=0.ckpt", "epoch=1.ckpt"]
    code, said, again = start("restarted", killed)
    assert code == 0, said[-3000:]
    assert again[0] == again[1]
    assert again[0][0] == digest(single())


@multiprocess
@patiently
@pytest.mark.parametrize("start_method", ["popen", "spawn"])
def test_every_kind_of_ddp_gives_the_bits_of_one_process(tmp_path, start_method):
    code, said, _ = start(start_method, tmp_path)
    assert code == 0, said[-3000:]
    expected = digest(single())
    for kind in KINDS:
        held = [(tmp_path / f"{start_method}-{kind}-{who}.txt").read_text() for who in ("0", "1", "main")]
        assert held == [f"{expected} 4 4 Parameter", f"{expected} 4 4 Parameter", expected], kind


@multiprocess
@patiently
def test_without_rebuilding_the_wrapper_the_bits_are_others(tmp_path):
    """Guards the test above: it can fail."""
    code, said, ranks = start("broken", tmp_path)
    assert code == 0, said[-3000:]
    assert ranks[0] != ranks[1]
    assert digest(single()) not in {rank[0] for rank in ranks}


@multiprocess
@patiently
def test_a_network_pruned_before_sharding_trains(tmp_path):
    code, said, ranks = start("sharded", tmp_path)
    assert code == 0, said[-3000:]
    assert ranks[0] == ranks[1]
    assert ranks[0] == [digest(single(pruned_before=True)), "4", "4", "DTensor"]


@multiprocess
@patiently
def test_pruning_after_sharding_is_refused_at_set_up(tmp_path):
    code, said, ranks = start("refused", tmp_path)
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
