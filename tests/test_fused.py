"""The native loops of the regulariser: where they serve, and what they may not depend on.

That they compute what PyTorch's operations compute is shown by every test of the regulariser, which run both.
"""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from naive_penalty import assert_added, before, channels, naive_gradients, others, parameters

from lightning_prune import GroupNormPruner, OptionError, PruningOptions
from lightning_prune.scores import fused
from lightning_prune.scores.layout import Block, plan_blocks
from lightning_prune.scores.regularizer import Regularizer


def block_of(weight, *dims):
    (block,) = plan_blocks({"w": weight}, [("w", dim, 1) for dim in dims])
    return block


@pytest.mark.parametrize("dims", [(0, 1), (0,), (1,)])
@pytest.mark.parametrize("shape", [(5, 7), (64, 3), (2, 9), (9, 2), (16, 8, 3, 3), (33, 5, 3, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sums_and_products_equal_a_plain_formula(dtype, shape, dims):
    weight, grad = torch.randn(shape, dtype=dtype), torch.randn(shape, dtype=dtype)
    block = block_of(weight, *dims)
    view = block.look(weight)
    assert fused.serves(block, view)
    factors = {dim: torch.rand(shape[dim], dtype=dtype) for dim in dims}
    want, added = [], torch.zeros_like(weight)
    for dim in dims:
        want.append(weight.square().movedim(dim, 0).flatten(1).sum(1))
        added += weight * factors[dim].view([-1 if d == dim else 1 for d in range(len(shape))])
    for found, sums in zip(fused.sums(block, view), want, strict=True):
        torch.testing.assert_close(found, sums)
    target = grad.clone()
    flat = torch.cat([factors[dim] for dim in dims])
    fused.add_scaled(block, block.look(target), view, block.spread(flat))
    torch.testing.assert_close(target, grad + added)


def test_convolutions_and_linear_layers_are_served():
    for shape in ((64, 32, 3, 3), (64, 32, 1, 1), (10, 64)):
        weight = torch.randn(shape)
        block = block_of(weight, 0, 1)
        assert fused.serves(block, block.look(weight))


@pytest.mark.parametrize(
    ("weight", "dims"),
    [
        (torch.randn(8, 6, dtype=torch.bfloat16), (0, 1)),
        (torch.randn(8, 6, 5, 5), (0, 2)),  # three axes
        (torch.randn(8, 6, device="meta"), (0, 1)),
    ],
    ids=["bf16", "axes", "meta"],
)
def test_what_the_loops_cannot_do_is_left_to_pytorch(weight, dims):
    block = block_of(weight, *dims)
    assert not fused.serves(block, block.look(weight))


def test_a_gradient_of_another_type_or_layout_is_left_to_pytorch():
    weight = torch.randn(8, 6)
    block = block_of(weight, 0, 1)
    assert fused.serves(block, weight, torch.randn(8, 6))
    assert not fused.serves(block, weight, torch.randn(8, 6, dtype=torch.float64))
    assert not fused.serves(block, weight, torch.randn(6, 8).t())


def test_asked_for_they_are_what_runs(monkeypatch):
    def never(*_, **__):
        raise AssertionError("PyTorch was asked")

    monkeypatch.setattr(Block, "sums", never)
    monkeypatch.setattr(Block, "add_scaled", never)
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.Conv2d(8, 4, 1))
    for p in net.parameters():
        p.grad = torch.zeros_like(p)
    GroupNormPruner(net, torch.randn(1, 3, 8, 8), reg=0.1, fused=True).regularize()
    assert net[0].weight.grad.abs().sum() > 0
    with pytest.raises(AssertionError, match="PyTorch was asked"):
        GroupNormPruner(net, torch.randn(1, 3, 8, 8), reg=0.1).regularize()


def test_one_core_and_two_give_the_same_bits():
    torch.manual_seed(0)
    tensors = {"w": torch.randn(67, 300).requires_grad_()}
    block = block_of(tensors["w"], 0, 1)
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        try:
            target = torch.zeros(67, 300)
            sums = fused.sums(block, tensors["w"].detach())
            fused.add_scaled(block, target, tensors["w"].detach(), block.spread(torch.cat(sums)))
        finally:
            torch.set_num_threads(1)
        found.append([*sums, target])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


THREADS = """
import torch
from lightning_prune.scores import fused
from lightning_prune.scores.layout import plan_blocks
torch.set_num_threads(1)
weight = torch.randn(64, 300)
(block,) = plan_blocks({"w": weight}, [("w", 0, 1), ("w", 1, 1)])
fused.sums(block, weight)
print(torch.get_num_threads())
"""


def test_pytorch_keeps_its_number_of_threads():
    """The first use in a process makes a pool of threads for all that uses OpenMP, hence a new process."""
    done = subprocess.run([sys.executable, "-c", THREADS], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "1"


def test_a_mixed_model_equals_autograd():
    tensors, groups = parameters(), [channels(), *others()]
    start = before(tensors)
    Regularizer(groups, tensors, reg=0.1, fused=True).apply()
    assert_added(tensors, start, naive_gradients(groups, tensors, 0.1))


def test_a_fork_of_a_process_that_ran_them_is_left_to_pytorch(monkeypatch):
    """OpenMP would end it with a signal."""
    weight = torch.randn(8, 6)
    block = block_of(weight, 0, 1)
    fused.sums(block, weight)
    monkeypatch.setattr(fused.os, "getpid", lambda: -1)
    assert not fused.serves(block, weight)


def test_without_numba_the_option_is_refused_at_once(monkeypatch):
    monkeypatch.setattr("lightning_prune.options.find_spec", lambda name: None)
    assert PruningOptions().fused is None
    with pytest.raises(OptionError, match=r"fused=True needs numba.*pip install 'lightning-prune\[fused\]'"):
        PruningOptions(fused=True)
