"""Two processes: the same bits as one, death and restart of a rank, and pruning before sharding."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy
from processes import TIMEOUT, asked_for, run_each
from ranks_worker import KINDS, digest, single
from test_callback import build, pytestmark  # noqa: F401 - same filters

from lightning_prune.errors import StrategyError
from lightning_prune.training.strategies import check_set_up

WORKER = Path(__file__).with_name("ranks_worker.py")
STARTED, SPAWNED = ([f"{how}-{kind}" for kind in KINDS] for how in ("popen", "spawn"))
multiprocess, patiently = pytest.mark.multiprocess, pytest.mark.timeout(3 * TIMEOUT)


@pytest.fixture(scope="module")
def ended(request, tmp_path_factory):
    """Give the folder of all variants, and per variant the exit code and what was said.

    One that must fail ends its processes, so those are the last ones, and the one that goes on gets new ones.
    """
    folder = tmp_path_factory.mktemp("variants")
    orders = [["whole", *STARTED, "broken", "killed", "restarted", "sharded", "refused"], SPAWNED]
    started, spawned = (run_each(WORKER, folder, asked_for(request, order)) for order in orders)
    return folder, started | spawned


def held(variant, ended):
    """Give what each rank of a variant held in the end, once it has ended well."""
    folder, outcomes = ended
    code, said = outcomes[variant]
    assert code == 0, f"{variant} ended with {code}: {said[-8000:]}"
    return [(folder / f"{variant}-{rank}.txt").read_text().split() for rank in (0, 1)]


def said_by(variant, ended):
    """Give what a variant said that ended before any of its ranks was through."""
    folder, outcomes = ended
    code, said = outcomes[variant]
    assert code, f"{variant} did not fail"
    assert list(folder.glob(f"{variant}-*")) == []
    return said


@multiprocess
@patiently
@pytest.mark.parametrize("variant", ["whole", *STARTED, *SPAWNED])
def test_two_ranks_give_the_bits_of_one_process(ended, variant):
    model = single()
    assert model.conv.out_channels == 4
    expected = digest(model)
    assert held(variant, ended) == [[expected, "4", "4", "Parameter"]] * 2
    if variant != "whole":
        assert (ended[0] / f"{variant}-main.txt").read_text() == expected
    with torch.no_grad():
        model.fc.bias[0] += 1e-6
    assert digest(model) != expected  # the comparison can fail


@multiprocess
@patiently
@pytest.mark.parametrize(("died", "again"), [("killed", "restarted")])
def test_one_of_two_ranks_may_die(ended, died, again):
    said_by(died, ended)
    first, second = held(again, ended)
    assert (ended[0] / died / "found.txt").read_text() == "epoch=0.ckpt epoch=1.ckpt"
    assert first == second
    assert first[0] == digest(single())


@multiprocess
@patiently
@pytest.mark.parametrize("variant", ["broken"])
def test_without_rebuilding_the_wrapper_the_bits_are_others(ended, variant):
    """Guards the tests above: they can fail."""
    first, second = held(variant, ended)
    assert first != second
    assert digest(single()) not in (first[0], second[0])


@multiprocess
@patiently
@pytest.mark.parametrize("variant", ["sharded"])
def test_a_network_pruned_before_sharding_trains(ended, variant):
    expected = [digest(single(pruned_before=True)), "4", "4", "DTensor"]
    assert held(variant, ended) == [expected, expected]


@multiprocess
@patiently
@pytest.mark.parametrize("variant", ["refused"])
def test_pruning_after_sharding_is_refused_at_set_up(ended, variant):
    said = said_by(variant, ended)
    assert "found ModelParallelStrategy" in said
    assert "prune before sharding (in configure_model), or use DDP" in said


@pytest.mark.parametrize("kind", [FSDPStrategy, DeepSpeedStrategy])
def test_sharding_strategies_that_need_a_gpu_are_refused_by_name(kind):
    class Sharding(Trainer):
        strategy = kind.__new__(kind)  # neither can be set up on a CPU

    trainer = Sharding.__new__(Sharding)
    with pytest.raises(StrategyError, match=f"found {kind.__name__}.*prune before sharding"):
        check_set_up(trainer, build())
