"""Attributes that state a width which no forward reads follow what they speak of, or are left with a note."""

from __future__ import annotations

from typing import Any

import torch
from nets import draw
from torch import Tensor, nn

from lightning_prune import GroupNormPruner


class Backbone(nn.Module):
    """A stream of 8 channels, and a hidden layer that happens to have 8 as well."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.up, self.down = nn.Linear(3, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.neck, self.head = nn.Linear(8, 12), nn.Linear(12, 2)
        self.num_features, self.head_hidden_size = 8, 12
        self.feature_info = [
            {"num_chs": 8, "module": "embed"},
            {"num_chs": 8, "module": "down", "hook_type": "forward_pre"},
            {"num_chs": 99, "module": "nowhere"},
        ]

    def get_classifier(self) -> nn.Module:
        return self.head

    def forward_features(self, x: Tensor) -> Tensor:
        x = self.embed(x).tanh()
        return x + self.down(self.up(x).tanh())

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.neck(self.forward_features(x)).tanh())
        return out


def pruned(model: Any, **ratios: float) -> tuple[Any, tuple[str, ...]]:
    pruner = GroupNormPruner(model, draw(4, 3), pruning_ratio=0.0, pruning_ratio_dict=ratios)
    pruner.step()
    return model, pruner.notes


def test_they_follow_what_the_trace_has_seen_them_speak_of() -> None:
    model, _ = pruned(Backbone(), embed=0.25, up=0.5, neck=0.75)
    assert (model.embed.out_features, model.up.out_features, model.neck.out_features) == (6, 4, 3)
    assert (model.num_features, model.head_hidden_size) == (6, 3)
    assert model.feature_info == [
        {"num_chs": 6, "module": "embed"},
        {"num_chs": 4, "module": "down", "hook_type": "forward_pre"},
        {"num_chs": 99, "module": "nowhere"},
    ]
    assert "forward_features" not in vars(model), "the trace watches a copy"


def test_what_was_seen_to_stay_stays() -> None:
    model, _ = pruned(Backbone(), up=0.5)
    assert model.num_features == 8
    assert [info["num_chs"] for info in model.feature_info] == [8, 4, 99]


def test_a_method_that_only_has_the_name_tells_nothing() -> None:
    class Other(Backbone):
        def get_classifier(self, task: str = "") -> nn.Module:
            return {"digits": self.head}[task]

    model, _ = pruned(Other(), neck=0.75)
    assert (model.neck.out_features, model.head_hidden_size) == (3, 3)


class Unseen(nn.Module):
    """Nothing tells of which 8 the attribute speaks."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(3, 8), nn.Linear(8, 8), nn.Linear(8, 2)
        self.embed_dim = 8

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(self.second(self.first(x).tanh()).tanh())
        return out


def test_unseen_they_follow_only_without_a_doubt() -> None:
    model, notes = pruned(Unseen(), first=0.5, second=0.5)
    assert model.embed_dim == 4
    assert not any("embed_dim" in note for note in notes)


def test_in_doubt_they_are_left_and_that_is_said() -> None:
    model, notes = pruned(Unseen(), first=0.5)
    assert model.embed_dim == 8
    (note,) = [note for note in notes if "embed_dim" in note]
    assert note.startswith("embed_dim still says 8: dimensions of that length keep 4, 8")


def test_own_tensors_speak_before_those_below() -> None:
    class Own(Unseen):
        def __init__(self) -> None:
            super().__init__()
            self.token = nn.Parameter(torch.ones(1, 8))

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.last(self.second((self.first(x) + self.token).tanh()).tanh())
            return out

    model, notes = pruned(Own(), first=0.5)
    assert tuple(model.token.shape) == (1, 4)
    assert model.embed_dim == 4
    assert not any("embed_dim" in note for note in notes)
