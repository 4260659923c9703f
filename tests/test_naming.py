"""What an option may name, and what a name stands for."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from lightning_prune.errors import OptionError
from lightning_prune.graph.groups import Group, Member
from lightning_prune.selection.naming import is_named, tensors_named, type_named


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(4)
        self.act = nn.ReLU()


class Model(nn.Module):
    """Two blocks, a head whose weight is tied to the embedding, a module with two names, a bare parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = Block()
        self.layers = nn.Sequential(Block(), Block())
        self.embed = nn.Embedding(4, 6)
        self.head = nn.Linear(6, 4, bias=False)
        self.head.weight = self.embed.weight
        self.alias = self.stem.conv1
        self.scale = nn.Parameter(torch.ones(3))


BN = ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]
STEM = {"stem.conv1.weight", *(f"stem.bn1.{n}" for n in BN)}
NORMS = {f"{block}.bn1.{n}" for block in ("stem", "layers.0", "layers.1") for n in BN}
CONVS = {f"{block}.conv1.weight" for block in ("stem", "layers.0", "layers.1")}

MODEL = Model()

NAMED: dict[str, tuple[Any, set[str]]] = {
    "module": (MODEL.stem, STEM),
    "inner module": (MODEL.layers[1].bn1, {f"layers.1.bn1.{n}" for n in BN}),
    "parameter": (MODEL.scale, {"scale"}),
    "buffer": (MODEL.stem.bn1.running_var, {"stem.bn1.running_var"}),
    "type": (nn.BatchNorm2d, NORMS),
    "type by its name": ("torch.nn.BatchNorm2d", NORMS),
    "base class": (nn.modules.conv._ConvNd, CONVS),
    "module name": ("stem", STEM),
    "parameter name": ("scale", {"scale"}),
    "glob of modules": ("layers.*.conv1", {"layers.0.conv1.weight", "layers.1.conv1.weight"}),
    "glob of parameters": ("*.conv1.weight", CONVS),
    "glob of a whole subtree": ("layers.0*", {n.replace("stem", "layers.0") for n in STEM}),
    "character class": ("layers.[1-9].bn1.weight", {"layers.1.bn1.weight"}),
    "second name of a module": ("alias", {"stem.conv1.weight"}),
    "parameter under a module's second name": ("alias.weight", {"stem.conv1.weight"}),
    "second owner of a tied parameter": ("head", {"embed.weight"}),
    "second name of a tied parameter": ("head.weight", {"embed.weight"}),
    "tied parameter": (MODEL.head.weight, {"embed.weight"}),
    "module without tensors": (MODEL.stem.act, set()),
    "type without tensors": (nn.ReLU, set()),
}


@pytest.mark.parametrize("name", NAMED)
def test_a_name_stands_for_these_tensors(name: str) -> None:
    what, expected = NAMED[name]
    assert tensors_named(MODEL, what, "ignored_layers") == expected


def test_a_name_is_no_prefix() -> None:
    model = nn.ModuleDict({"layer1": nn.Linear(2, 2), "layer10": nn.Linear(2, 2)})
    assert tensors_named(model, "layer1", "ignored_layers") == {"layer1.weight", "layer1.bias"}


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("stem.conv", "ignored_layers: 'stem.conv' matches no module or parameter of Model. .*: stem.conv1"),
        (nn.LSTM, "'LSTM' is no module, name, glob, type or parameter of Model"),
        ("torch.nn.LSTM", "'torch.nn.LSTM' matches no module or parameter"),
        (nn.Linear(2, 2), "'a Linear' is no module, name, glob, type or parameter of Model"),
        (nn.Parameter(torch.ones(3)), "'a Parameter' is no module"),
        (3, "'a int' is no module, name, glob, type or parameter"),
        ("", "'' matches no module or parameter"),
    ],
    ids=["typo", "type", "type by name", "stranger", "strange parameter", "number", "nothing"],
)
def test_a_name_that_matches_nothing_is_refused_with_the_nearest(what: Any, message: str) -> None:
    with pytest.raises(OptionError, match=message) as caught:
        tensors_named(MODEL, what, "ignored_layers")
    assert "Nearest names: " in str(caught.value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("torch.nn.Linear", nn.Linear),
        ("torch.nn.modules.conv.Conv2d", nn.Conv2d),
        ("collections.OrderedDict", __import__("collections").OrderedDict),
        ("torch.nn.functional", None),
        ("torch.nn.NoSuchLayer", None),
        ("no.such.module.Linear", None),
        (".Linear", None),
        ("Linear", None),
        ("layers.0", None),
        ("", None),
    ],
    ids=str,
)
def test_type_named(text: str, expected: type | None) -> None:
    assert type_named(text) is expected


def test_is_named() -> None:
    layer = nn.Linear(2, 2)
    assert is_named("a.fc", layer, layer)
    assert not is_named("a.fc", nn.Linear(2, 2), layer)
    assert is_named("a.fc", layer, nn.Linear)
    assert is_named("a.fc", layer, "*.fc")
    assert is_named("a.fc", layer, "torch.nn.Linear")
    assert not is_named("a.fc", layer, "a")
    assert not is_named("", layer, "*")
    assert not is_named("a.fc", layer, 3)


def member(tensor: str, dim: int, unit: list[int], *, is_buffer: bool = False) -> Member:
    index = np.arange(len(unit))
    return Member(tensor, dim, 1, len(unit), index, np.array(unit), is_buffer)


def groups() -> tuple[Group, ...]:
    """Group 1: units 0 to 2, between layers a and b. Group 2: units 3 and 4, of which b's bias holds one."""
    first = (
        member("a.weight", 0, [0, 1, 2]),
        member("a.bias", 0, [0, 1, 2]),
        member("b.weight", 1, [0, 1, 2]),
    )
    second = (member("b.weight", 0, [0, 1]), member("b.bias", 0, [1]), member("c.weight", 1, [0, 1]))
    return (
        Group("a.weight:0", "channel", np.array([0, 1, 2]), first, "x"),
        Group("b.weight:0", "channel", np.array([3, 4]), second, "y"),
    )
