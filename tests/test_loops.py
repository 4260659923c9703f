"""Numba's loops, in what they alone depend on: cores, threads, processes and a place for what was compiled.

What they compute is compared in the tests of the kernels and of the regulariser.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from naive_penalty import assert_added, before, channels, naive_gradients, others, parameters
from torch import nn

import lightning_prune
from lightning_prune import OptionError, PruningOptions
from lightning_prune.scores.backends import NUMBA, backend_for
from lightning_prune.scores.inspecting import Inspector
from lightning_prune.scores.launching import KernelWalk
from lightning_prune.scores.layout import plan_blocks
from lightning_prune.scores.loops import compiled
from lightning_prune.scores.regularizer import Regularizer

CPU = torch.device("cpu")


def walk_over(weight):
    blocks = plan_blocks({"w": weight}, [("w", 0, 1), ("w", 1, 1)])
    return KernelWalk(blocks, {"w": weight}, torch.float32, NUMBA)


def test_one_core_and_two_give_the_same_bits():
    weight = nn.Parameter(torch.randn(667, 300))
    walk, found = walk_over(weight), []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        try:
            weight.grad = torch.zeros_like(weight)
            sums = walk.sums(clean=False)
            walk.add(sums, clean=False)
        finally:
            torch.set_num_threads(1)
        found.append([sums, weight.grad])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


THREADS = """
import torch
from lightning_prune.scores.inspecting import Inspector
torch.set_num_threads(1)
Inspector(fused=True).look([torch.ones(9)])
print(torch.get_num_threads())
"""


def test_pytorch_keeps_its_number_of_threads():
    """The first use in a process makes a pool of threads for all that uses OpenMP, hence a new process."""
    done = subprocess.run([sys.executable, "-c", THREADS], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "1"


def press_again(regularizer, tensors, state):
    regularizer.load_state_dict(state)
    regularizer.apply()
    assert backend_for(CPU, fused=True) is None
    assert not Inspector(fused=True).look(list(tensors.values()))[1]
    start = {n: t.grad - t.grad for n, t in tensors.items() if t.grad is not None}
    assert all((tensors[n].grad != start[n]).any() for n in ("conv.weight", "fc.weight"))


def test_a_fork_of_a_process_that_ran_them_is_left_to_pytorch():
    """OpenMP would end it with a signal."""
    tensors, groups = parameters(), [channels(), *others()]
    regularizer = Regularizer(groups, tensors, reg=0.1, fused=True)
    regularizer.apply()
    fork = multiprocessing.get_context("fork").Process(
        target=press_again, args=(regularizer, tensors, regularizer.state_dict())
    )
    fork.start()
    fork.join(60)
    assert fork.exitcode == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_types_that_they_do_not_have_are_left_to_pytorch(dtype):
    weight = nn.Parameter(torch.randn(8, 6).to(dtype))
    assert walk_over(weight)._rest == [0]


def test_a_mixed_model_equals_autograd():
    tensors, groups = parameters(), [channels(), *others()]
    start = before(tensors)
    Regularizer(groups, tensors, reg=0.1, fused=True).apply()
    assert_added(tensors, start, naive_gradients(groups, tensors, 0.1))


NOWHERE = """
import sys, torch
sys.path.insert(0, sys.argv[1])
from lightning_prune.scores import loops
assert loops.__file__.startswith(sys.argv[1])
from lightning_prune.scores.inspecting import Inspector
print(Inspector(fused=True).look([torch.tensor([1.0, float("nan")])])[0].tolist())
"""


def test_they_run_where_nothing_may_be_kept(tmp_path):
    """Neither beside the package nor in a home: what is compiled is then compiled again each time."""
    shutil.copytree(Path(lightning_prune.__file__).parent, tmp_path / "lightning_prune")
    shutil.rmtree(tmp_path / "lightning_prune/scores/__pycache__", ignore_errors=True)
    (tmp_path / "lightning_prune/scores/__pycache__").write_text("in the way of a folder")
    (tmp_path / "home").write_text("not a folder either")
    surroundings = {**os.environ, "HOME": str(tmp_path / "home"), "XDG_CACHE_HOME": str(tmp_path / "home")}
    done = subprocess.run(
        [sys.executable, "-c", NOWHERE, str(tmp_path)],
        env=surroundings,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.strip() == "[1]", done.stderr


def test_without_numba_the_option_is_refused_at_once(monkeypatch):
    monkeypatch.setattr("lightning_prune.options.find_spec", lambda name: None)
    assert PruningOptions().fused is None
    with pytest.raises(OptionError, match=r"fused=True needs numba.*pip install 'lightning-prune\[fused\]'"):
        PruningOptions(fused=True)


def test_a_numba_that_compiles_nothing_is_not_used(monkeypatch):
    numba = pytest.importorskip("numba")
    monkeypatch.setattr(numba.config, "DISABLE_JIT", 1)
    with pytest.raises(ImportError, match="NUMBA_DISABLE_JIT is set"):
        compiled.__wrapped__()
