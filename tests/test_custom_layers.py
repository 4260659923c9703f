"""``customized_pruners``: a layer that no rule knows is frozen until its owner says how it ties."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from nets import draw, randomise
from oracle import assert_exact
from torch import Tensor, nn

from lightning_prune import GroupNormPruner, Plan
from lightning_prune.errors import OptionError

X = draw(4, 5)


@torch.library.custom_op("judge::wave", mutates_args=())
def wave(x: Tensor, weight: Tensor) -> Tensor:
    """An operation that nobody has heard of; every channel by itself."""
    return x.sin() * weight


@wave.register_fake
def _(x: Tensor, weight: Tensor) -> Tensor:
    return torch.empty_like(x)


class Wave(nn.Module):
    """One unknown operation with a weight per channel."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = wave(x, self.weight)
        return out


def build() -> nn.Sequential:
    return randomise(nn.Sequential(nn.Linear(5, 8), Wave(8), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3)), 0)


def by_channel(layer: Any) -> None:
    """Input, output and weight share their channels."""
    layer.carry((layer.inputs[0], 1), (layer.outputs[0], 1))
    layer.tie((layer.inputs[0], 1), ("weight", 0))


def prune(model: nn.Module, **options: Any) -> Plan:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return GroupNormPruner(model, X, **options).step()


def test_an_unknown_operation_freezes_its_inputs_and_says_so() -> None:
    model = build()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pruner = GroupNormPruner(model, X)
    why = pruner.explain("0.weight", 0)
    assert "wave" in why
    assert "test_custom_layers.py" in why
    pruner.step()
    assert (model[0].out_features, model[2].out_features) == (8, 3)


@pytest.mark.parametrize("key", [Wave, "1", "[1]"], ids=str)
def test_a_rule_says_how_the_layer_ties(key: Any) -> None:
    model = build()
    dense = copy.deepcopy(model)
    plan = prune(model, customized_pruners={key: by_channel})
    cuts = {(c.tensor, c.dim): c.kept for c in plan.cuts}
    first = {("0.weight", 0): 4, ("0.bias", 0): 4, ("1.weight", 0): 4, ("2.weight", 1): 4}
    assert cuts == first | {("2.weight", 0): 3, ("2.bias", 0): 3, ("4.weight", 1): 3}
    assert_exact(dense, model, plan, X)


def test_a_rule_beats_what_the_trace_would_find() -> None:
    """The second linear layer is told to keep its inputs, and its outputs follow nothing."""
    model = randomise(nn.Sequential(nn.Linear(5, 8), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3)), 0)

    def closed(layer: Any) -> None:
        layer.freeze((layer.inputs[0], 1), ("weight", 0), (layer.module.weight, 1))

    prune(model, customized_pruners={"1": closed})
    assert (model[0].out_features, model[1].out_features) == (8, 6)


@pytest.mark.parametrize(
    "value", [{"nope": by_channel}, {Wave: 3}, [by_channel]], ids=["unknown name", "no rule", "no mapping"]
)
def test_wrong_customized_pruners(value: Any) -> None:
    with pytest.raises(OptionError):
        GroupNormPruner(build(), X, customized_pruners=value)
