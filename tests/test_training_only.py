"""Layers that run in training alone: auxiliary heads are cut along, and training goes on."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from nets import conv, image, randomise
from oracle import assert_exact
from torch import Tensor, nn

from lightning_prune import GroupNormPruner, Plan


class Auxiliary(nn.Module):
    """Two convolutions and a head; in training a second head on the first convolution."""

    def __init__(self, *, hidden: bool = True) -> None:
        super().__init__()
        self.a, self.b = conv(3, 8), conv(8, 6)
        self.head = nn.Linear(6, 2)
        self.aux_conv = conv(8, 10) if hidden else nn.Identity()
        self.aux_bn = nn.BatchNorm2d(10) if hidden else nn.Identity()
        self.aux_head = nn.Linear(10 if hidden else 8, 2)

    def forward(self, x: Tensor) -> Any:
        x = torch.relu(self.a(x))
        main = self.head(torch.relu(self.b(x)).mean((2, 3)))
        if not self.training:
            return main
        aux = self.aux_head(torch.relu(self.aux_bn(self.aux_conv(x))).mean((2, 3)))
        return main, aux


class OnlyInTraining(nn.Module):
    """A layer between two others that is skipped in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.noise, self.b = nn.Linear(5, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.a(x))
        if self.training:
            x = x + self.noise(x)
        out: Tensor = self.b(x)
        return out


def prune(model: nn.Module, inputs: Any, **options: Any) -> Plan:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return GroupNormPruner(model, inputs, **options).step()


def parameter_cuts(model: nn.Module, plan: Plan) -> dict[str, int]:
    names = {n for n, _ in model.named_parameters()}
    return {f"{c.tensor}:{c.dim}": c.kept for c in plan.cuts if c.tensor in names}


SHARED = {"a.weight:0": 4, "a.bias:0": 4, "b.weight:1": 4, "b.weight:0": 3, "b.bias:0": 3, "head.weight:1": 3}


def test_an_auxiliary_head_is_cut_along() -> None:
    model = randomise(Auxiliary(hidden=False), 0)
    dense = copy.deepcopy(model)
    plan = prune(model, image())
    assert parameter_cuts(dense, plan) == {**SHARED, "aux_head.weight:1": 4}
    assert_exact(dense, model, plan, image())


def test_layers_of_an_auxiliary_head_are_pruned_too() -> None:
    model = randomise(Auxiliary(), 0)
    dense = copy.deepcopy(model)
    plan = prune(model, image())
    inner = {"aux_conv.weight:0": 5, "aux_conv.bias:0": 5, "aux_bn.weight:0": 5, "aux_bn.bias:0": 5}
    assert parameter_cuts(dense, plan) == {
        **SHARED, **inner, "aux_conv.weight:1": 4, "aux_head.weight:1": 5
    }  # fmt: skip
    assert (model.aux_conv.in_channels, model.aux_conv.out_channels) == (4, 5)
    assert (model.aux_bn.num_features, model.aux_head.in_features) == (5, 5)
    assert_exact(dense, model, plan, image())


@pytest.mark.parametrize("hidden", [False, True], ids=["head alone", "head with a convolution"])
def test_training_goes_on_after_the_cut(hidden: bool) -> None:
    model = randomise(Auxiliary(hidden=hidden), 0)
    prune(model, image())
    main, aux = model.train()(image())
    assert (main.shape, aux.shape) == ((2, 2), (2, 2))
    (main.square().sum() + aux.square().sum()).backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in model.parameters())


def test_the_training_forward_is_the_masked_one() -> None:
    """Without batch statistics the auxiliary output can be held against the original by hand."""
    model = randomise(Auxiliary(hidden=False), 0)
    dense = copy.deepcopy(model)
    plan = prune(model, image())
    keep = {(c.tensor, c.dim): list(c.keep) for c in plan.cuts}["aux_head.weight", 1]
    with torch.no_grad():
        mean = torch.relu(dense.a(image())).mean((2, 3))[:, keep]
        want = mean @ dense.aux_head.weight[:, keep].T + dense.aux_head.bias
        torch.testing.assert_close(model.train()(image())[1], want)


def test_a_residual_branch_of_training_ties_what_it_adds_to() -> None:
    model = randomise(OnlyInTraining(), 0)
    dense = copy.deepcopy(model)
    x = torch.ones(4, 5)
    plan = prune(model, x)
    keep = {(c.tensor, c.dim): c.keep for c in plan.cuts}
    assert keep["a.weight", 0] == keep["noise.weight", 0] == keep["noise.weight", 1] == keep["b.weight", 1]
    assert_exact(dense, model, plan, x)
    assert model.train()(x).shape == (4, 3)


@pytest.mark.parametrize("training", [False, True])
def test_the_mode_of_every_module_and_its_statistics_stay(training: bool) -> None:
    model = randomise(Auxiliary(), 0).train(training)
    model.b.train(not training)
    before = {name: m.training for name, m in model.named_modules()}
    statistics = model.aux_bn.running_mean.clone()
    GroupNormPruner(model, image())
    assert {name: m.training for name, m in model.named_modules()} == before
    assert torch.equal(model.aux_bn.running_mean, statistics)
    assert int(model.aux_bn.num_batches_tracked) == 0


class FailsInTraining(Auxiliary):
    """Wants labels in training, which example inputs do not bring."""

    def forward(self, x: Tensor) -> Any:
        if self.training:
            raise ValueError("no labels")
        return super().forward(x)


def test_a_training_forward_that_fails_leaves_its_layers_whole() -> None:
    model = randomise(FailsInTraining(), 0)
    dense = copy.deepcopy(model)
    plan = prune(model, image())
    assert parameter_cuts(dense, plan) == SHARED
    assert_exact(dense, model, plan, image())
