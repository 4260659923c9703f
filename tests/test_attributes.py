"""Paths into modules, and the declarative attributes that follow a cut."""

from __future__ import annotations

from collections import namedtuple
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from torch import nn

from lightning_prune.errors import PlanError
from lightning_prune.plan import Cut, Patch, Plan, Rewrite
from lightning_prune.surgery.applying import apply
from lightning_prune.surgery.attributes import cosmetic_rewrites, get_path, remember, set_path

Pair = namedtuple("Pair", ["rows", "columns"])


class Holder(nn.Module):
    shared: ClassVar = [1, 2]

    def __init__(self):
        super().__init__()
        self.heads = 4
        self.flag = True
        self.size = torch.Size([2, 3])
        self.pair = Pair(5, 6)
        self.nested = [(1, 2), {"x": 7}]
        self.table = {"x": [8, 9]}
        self.config = SimpleNamespace(width=16, sizes=(1, 2), inner=SimpleNamespace(depth=3))


PATHS = {
    "heads": (4, int),
    "size[1]": (3, torch.Size),
    "pair[0]": (5, Pair),
    "nested[0][1]": (2, list),
    "nested[1]['x']": (7, list),
    'table["x"][-1]': (9, dict),
    "config.width": (16, SimpleNamespace),
    "config.sizes[0]": (1, SimpleNamespace),
    "config.inner.depth": (3, SimpleNamespace),
    "shared[0]": (1, list),
}


@pytest.mark.parametrize("path", PATHS)
def test_a_path_is_read_set_and_put_back(path):
    holder, other = Holder(), Holder()
    name = path.replace(".", "[").split("[")[0]
    old = getattr(holder, name)
    before, own = repr(old), name in vars(holder)
    assert get_path(holder, path) == PATHS[path][0]
    undo = remember(holder, path)
    set_path(holder, path, 42)
    assert get_path(holder, path) == 42
    assert type(getattr(holder, name)) is PATHS[path][1]
    assert get_path(other, path) == PATHS[path][0]
    undo()
    undo()
    assert getattr(holder, name) is old
    assert repr(old) == before
    assert (name in vars(holder)) is own


def test_items_are_rebuilt_so_that_other_holders_of_the_container_do_not_change():
    first, second = Holder(), Holder()
    second.nested = first.nested
    set_path(first, "nested[1]['x']", 0)
    assert second.nested == [(1, 2), {"x": 7}]


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("", "is no path"),
        ("[0]", "is no path"),
        (".heads", "is no path"),
        ("heads[", "is no path"),
        ("heads.", "is no path"),
        ("a b", "is no path"),
        ("absent", "Holder.absent: not found"),
        ("size[7]", r"Holder.size\[7\]: not found"),
        ("heads[0]", "not found"),
        ("table['y']", "not found"),
        ("flag", "no flag follows a size"),
    ],
)
def test_paths_that_lead_nowhere_are_refused(path, message):
    with pytest.raises(PlanError, match=message):
        set_path(Holder(), path, 1)


def test_bool_values_are_refused():
    with pytest.raises(PlanError, match="no flag follows a size"):
        set_path(Holder(), "heads", True)


def cut(name, dim, size, kept):
    return Cut(name, dim, size, tuple(range(kept)))


TABLE = {
    "linear": (nn.Linear(4, 6), [("weight", 0, 5), ("weight", 1, 3)], {"in_features": 3, "out_features": 5}),
    "bilinear": (
        nn.Bilinear(4, 5, 6),
        [("weight", 0, 1), ("weight", 1, 2), ("weight", 2, 3)],
        {"in1_features": 2, "in2_features": 3, "out_features": 1},
    ),
    "conv": (nn.Conv2d(4, 6, 3), [("weight", 0, 5), ("weight", 1, 3)], {"in_channels": 3, "out_channels": 5}),
    "grouped": (nn.Conv1d(8, 6, 3, groups=2), [("weight", 1, 3)], {"in_channels": 6}),
    "transposed": (
        nn.ConvTranspose2d(4, 6, 3, groups=2),
        [("weight", 0, 2), ("weight", 1, 1)],
        {"in_channels": 2, "out_channels": 2},
    ),
    "batch norm": (nn.BatchNorm1d(4), [("weight", 0, 3), ("running_mean", 0, 3)], {"num_features": 3}),
    "plain batch norm": (nn.BatchNorm2d(4, affine=False), [("running_mean", 0, 3)], {"num_features": 3}),
    "sync batch norm": (nn.SyncBatchNorm(4), [("weight", 0, 3)], {"num_features": 3}),
    "instance norm": (nn.InstanceNorm2d(4, affine=True), [("weight", 0, 3)], {"num_features": 3}),
    "layer norm": (nn.LayerNorm((4, 6)), [("weight", 0, 3), ("weight", 1, 5)], {"normalized_shape": (3, 5)}),
    "rms norm": (nn.RMSNorm(4), [("weight", 0, 3)], {"normalized_shape": (3,)}),
    "group norm": (nn.GroupNorm(2, 4), [("weight", 0, 2)], {"num_channels": 2}),
    "embedding": (nn.Embedding(4, 6), [("weight", 1, 5)], {"num_embeddings": 4, "embedding_dim": 5}),
    "embedding bag": (nn.EmbeddingBag(4, 6), [("weight", 0, 3)], {"num_embeddings": 3, "embedding_dim": 6}),
    "prelu": (nn.PReLU(4), [("weight", 0, 3)], {"num_parameters": 3}),
    "lstm": (
        nn.LSTM(4, 6),
        [("weight_ih_l0", 1, 3), ("weight_ih_l0", 0, 20), ("weight_hh_l0", 0, 20), ("weight_hh_l0", 1, 5)],
        {"input_size": 3, "hidden_size": 5},
    ),
    "lstm with projection": (
        nn.LSTM(4, 6, proj_size=3),
        [("weight_hr_l0", 0, 2), ("weight_hh_l0", 1, 2)],
        {"input_size": 4, "hidden_size": 6, "proj_size": 2},
    ),
    "gru cell": (nn.GRUCell(4, 6), [("weight_ih", 0, 15)], {"hidden_size": 5}),
    "rnn": (nn.RNN(4, 6), [("weight_ih_l0", 0, 5)], {"hidden_size": 5, "input_size": 4}),
    "attention": (
        nn.MultiheadAttention(8, 2),
        [("in_proj_weight", 1, 6)],
        {"embed_dim": 6, "kdim": 6, "vdim": 6},
    ),
    "cross attention": (
        nn.MultiheadAttention(8, 2, kdim=4, vdim=6),
        [("k_proj_weight", 1, 3), ("v_proj_weight", 1, 5)],
        {"embed_dim": 8, "kdim": 3, "vdim": 5},
    ),
}


@pytest.mark.parametrize(("module", "cuts", "expected"), TABLE.values(), ids=TABLE)
def test_declared_sizes_follow_the_tensors(module, cuts, expected):
    shapes = {k: t.shape for k, t in (*module.named_parameters(), *module.named_buffers())}
    plan = Plan(tuple(cut(f"0.{name}", dim, shapes[name][dim], kept) for name, dim, kept in cuts))
    model = nn.Sequential(module)
    found = cosmetic_rewrites(model, plan)
    apply(model, Plan(plan.cuts, found))
    assert {name: getattr(module, name) for name in expected} == expected
    assert cosmetic_rewrites(model, Plan()) == ()


def test_only_what_changes_is_listed_and_what_the_plan_says_is_left():
    model = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6))
    cuts = (cut("0.weight", 0, 6, 5), cut("1.weight", 0, 6, 5))
    decided = (Rewrite("1", "normalized_shape[0]", 6, 5),)
    assert cosmetic_rewrites(model, Plan(cuts, decided)) == (Rewrite("0", "out_features", 6, 5),)


def test_groups_are_those_that_the_plan_leaves():
    model = nn.Sequential(nn.Conv2d(8, 8, 3, groups=8))
    plan = Plan((cut("0.weight", 0, 8, 5),), (Rewrite("0", "groups", 8, 5),))
    assert set(cosmetic_rewrites(model, plan)) == {
        Rewrite("0", "out_channels", 8, 5),
        Rewrite("0", "in_channels", 8, 5),
    }


def test_heads_are_those_of_the_attention_patch():
    model = nn.MultiheadAttention(8, 4)
    values = (("num_heads", 3), ("head_dim", 2), ("v_head_dim", 2), ("scale", 0.5))
    found = cosmetic_rewrites(model, Plan(patches=(Patch("", "attention", values),)))
    assert found == (Rewrite("", "num_heads", 4, 3),)


def test_an_attribute_that_means_something_else_is_left_alone():
    class Odd(nn.Linear):
        def __init__(self):
            super().__init__(4, 6)
            self.out_features = 99

    assert cosmetic_rewrites(Odd(), Plan((cut("weight", 0, 6, 5),))) == ()


def test_lookalikes_are_recognised_by_their_attributes():
    class MyNorm(nn.Module):
        def __init__(self):
            super().__init__()
            self.num_features = 4
            self.weight = nn.Parameter(torch.ones(4))

    assert cosmetic_rewrites(MyNorm(), Plan((cut("weight", 0, 4, 3),))) == (
        Rewrite("", "num_features", 4, 3),
    )


def test_parametrized_weights_are_seen_through():
    model = nn.utils.parametrizations.weight_norm(nn.Linear(4, 6))
    names = ("parametrizations.weight.original0", "parametrizations.weight.original1")
    plan = Plan(tuple(cut(name, 0, 6, 5) for name in names))
    assert cosmetic_rewrites(model, plan) == (Rewrite("", "out_features", 6, 5),)


def test_tied_weights_change_both_modules():
    model = nn.ModuleDict({"a": nn.Embedding(5, 4), "b": nn.Linear(4, 5, bias=False)})
    model["b"].weight = model["a"].weight
    assert set(cosmetic_rewrites(model, Plan((cut("a.weight", 1, 4, 3),)))) == {
        Rewrite("a", "embedding_dim", 4, 3),
        Rewrite("b", "in_features", 4, 3),
    }
