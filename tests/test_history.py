"""What a fit notes for its report, against numbers worked out by hand."""

from __future__ import annotations

import copy
from dataclasses import asdict

import numpy as np
import pytest
import torch
from torch import nn

from lightning_prune import GroupNormPruner
from lightning_prune.graph.couplings import Coupling
from lightning_prune.graph.groups import Group, Member
from lightning_prune.models import ViT
from lightning_prune.reporting.history import Cut, Spread, record_cut, record_spread


def group(name, n, isomorphism="one"):
    rows = Member(f"{name}.weight", 0, 1, n, np.arange(n), np.arange(n))
    return Group(f"{name}.weight:0", "channel", np.arange(n), (rows,), isomorphism)


class Block(nn.Module):
    """The residual block of docs/design.md."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 1, bias=False)
        self.conv1 = nn.Conv2d(4, 6, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(6)
        self.conv2 = nn.Conv2d(6, 4, 3, padding=1, bias=False)
        self.fc = nn.Linear(4, 2)

    def forward(self, x):
        x = self.stem(x)
        y = self.conv2(self.bn(self.conv1(x)).relu())
        return self.fc((x + y).mean((2, 3)))


def test_the_spread_is_that_of_norms_by_their_groups_mean():
    weights = {"a.weight": torch.tensor([[1.0], [2.0], [3.0]]), "b.weight": torch.tensor([[0.0], [10.0]])}
    found = record_spread(4, [group("a", 3), group("b", 2)], weights)
    # a: 1, 4, 9 by 14/3; b: 0, 100 by 50
    values = sorted([3 / 14, 12 / 14, 27 / 14, 0, 2])
    assert found.epoch == 4
    assert found.quantiles[0] == 0
    assert found.quantiles[3] == pytest.approx(values[2])
    assert found.quantiles[2] == pytest.approx(values[1])
    assert found.quantiles[1] == pytest.approx(0.2 * values[1])
    assert found.quantiles[6] == 2


def test_lone_units_and_what_is_not_finite_say_nothing_of_the_spread():
    assert record_spread(0, [group("a", 1)], {"a.weight": torch.ones(1, 1)}) is None
    weights = {"a.weight": torch.tensor([[1.0], [float("nan")]]), "b.weight": torch.tensor([[1.0], [1.0]])}
    assert record_spread(0, [group("a", 2), group("b", 2)], weights).quantiles == (1,) * 7
    assert record_spread(0, [group("a", 2)], {"a.weight": torch.zeros(2, 1)}) is None


def test_a_cut_counts_what_stays_and_goes_per_class():
    groups = [group("a", 3), group("b", 2), group("c", 1, "other")]
    scores = [np.array([1.0, 2.0, 16.0]), np.array([-np.inf, 4.0]), np.array([3.0])]
    kept = [np.array([False, False, True]), np.array([False, True]), np.array([True])]
    cut = record_cut(7, groups, scores, kept, ["a note"])
    assert (cut.epoch, cut.unscored, cut.notes) == (7, 1, ("a note",))
    assert (cut.edges[0], cut.edges[-1], len(cut.edges)) == (1.0, pytest.approx(16.0), 25)
    assert np.allclose(np.diff(np.log(cut.edges)), np.log(16) / 24)
    first, second = cut.classes
    assert (first.name, second.name) == ("a and 1 like it", "c")
    assert (sum(first.removed), sum(first.kept), first.line) == (2, 2, 2.0)
    assert [i for i, n in enumerate(first.removed) if n] == [0, 6]  # 2 is a quarter of the way, in octaves
    assert (second.removed, second.line) == ((0,) * 24, None)


def test_scores_below_zero_get_equal_steps_and_tiny_ones_the_lowest_bin():
    cut = record_cut(0, [group("a", 3)], [np.array([-1.0, 0.0, 1.0])], [np.ones(3, bool)])
    assert np.allclose(np.diff(cut.edges), 2 / 24)
    cut = record_cut(0, [group("a", 3)], [np.array([0.0, 1e-30, 1.0])], [np.ones(3, bool)])
    assert cut.edges[0] == 1e-6
    assert (cut.classes[0].kept[0], cut.classes[0].kept[-1]) == (2, 1)
    assert record_cut(0, [group("a", 1)], [np.array([np.nan])], [np.ones(1, bool)]) is None
    assert sum(record_cut(0, [group("a", 2)], [np.ones(2)], [np.ones(2, bool)]).classes[0].kept) == 2


def test_many_classes_are_gathered_but_no_unit_is_lost():
    groups = [group(f"l{i}", i + 1, isomorphism=str(i)) for i in range(12)]
    cut = record_cut(
        0, groups, [np.ones(g.n_units) for g in groups], [np.ones(g.n_units, bool) for g in groups]
    )
    assert [each.name for each in cut.classes] == [*(f"l{i}" for i in range(11, 4, -1)), "l4 and 4 others"]
    assert sum(sum(each.kept) for each in cut.classes) == 78


def test_records_come_back_from_plain_data():
    cut = record_cut(1, [group("a", 2)], [np.array([1.0, 2.0])], [np.array([False, True])])
    assert Cut.of(asdict(cut)) == cut
    assert Spread.of({"epoch": 3, "quantiles": [1.0] * 7}) == Spread(3, (1.0,) * 7)


def test_what_is_foreseen_comes_true_and_touches_nothing():
    net, x = Block().eval(), torch.ones(1, 3, 5, 5)
    before = copy.deepcopy(net.state_dict())
    pruner = GroupNormPruner(net, x, pruning_ratio=0.5, iterative_steps=2)
    seen = list(pruner.foresee())
    assert [(each.step, each.kept) for each in seen] == [(0, (4, 6)), (1, (3, 5)), (2, (2, 3))]
    # by hand for 3 and 5 channels on 5 x 5 places: stem 9, conv 2 x 135, fc 6; batch norm 10, bias 2
    assert [each.parameters for each in seen] == [466, 297, 126]
    assert [each.macs for each in seen] == [11108, 25 * (9 + 270) + 6, 2854]
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    for each in seen[1:]:
        pruner.step()
        assert tuple(g.n_units for g in pruner.groups()) == each.kept
        assert sum(p.numel() for p in net.parameters()) == each.parameters


def test_units_that_go_with_their_heads_do_not_count_as_left():
    torch.manual_seed(0)
    net = ViT(dim=16, depth=1, num_heads=4)
    pruner = GroupNormPruner(
        net, torch.ones(1, 1, 8, 8), pruning_ratio=0.25, prune_num_heads=True, head_pruning_ratio=0.5
    )
    foreseen = dict(zip((g.name for g in pruner.groups()), list(pruner.foresee())[-1].kept, strict=True))
    pruner.step()
    assert {g.name: g.n_units for g in pruner.groups()} == foreseen
    assert foreseen["blocks.0.attn.qkv.weight:0/head"] == 2


def test_foreseeing_draws_nothing_from_random_scores():
    plans = []
    for looks in (0, 1):
        torch.manual_seed(0)
        pruner = GroupNormPruner(Block().eval(), torch.ones(1, 3, 5, 5), importance="random")
        for _ in range(looks):
            list(pruner.foresee())
        plans.append(pruner.step(dry_run=True))
    assert plans[0] == plans[1]


def test_couplings_of_a_residual_stream():
    pruner = GroupNormPruner(Block().eval(), torch.ones(1, 3, 5, 5))
    found = pruner.couplings(pruner.groups()[0])
    assert [Coupling(c.left, c.right, c.reason.partition(" (")[0]) for c in found] == [
        Coupling(("stem.weight", 0), ("conv1.weight", 1), "contracted: conv2d in conv1"),
        Coupling(("conv2.weight", 0), ("stem.weight", 0), "tied elementwise: add"),
        Coupling(("stem.weight", 0), ("fc.weight", 1), "contracted: linear in fc"),
    ]


def test_couplings_of_heads_lead_through_splits_and_merges():
    pruner = GroupNormPruner(ViT(dim=16, depth=1), torch.ones(1, 1, 8, 8), prune_num_heads=True)
    (heads,) = (group for group in pruner.groups() if group.kind == "head")
    attn = "blocks.0.attn"
    assert [Coupling(c.left, c.right, c.reason.partition(" (")[0]) for c in pruner.couplings(heads)] == [
        Coupling((f"{attn}.qkv.bias", 0), (f"{attn}.qkv.weight", 0), f"bias of: linear in {attn}.qkv"),
        Coupling((f"{attn}.qkv.weight", 0), (f"{attn}.proj.weight", 1), f"contracted: linear in {attn}.proj"),
    ]


def test_what_is_frozen_is_counted_with_its_reason():
    pruner = GroupNormPruner(Block().eval(), torch.ones(1, 3, 5, 5))
    found = {
        (each.tensor, each.dim): (each.stays, each.size, each.reason.partition(" (")[0])
        for each in pruner.frozen()
    }
    assert found == {
        ("stem.weight", 1): (3, 3, "contracted with a dimension that must stay: conv2d in stem"),
        ("fc.weight", 0): (2, 2, "an output of the model: output"),
        ("fc.bias", 0): (2, 2, "an output of the model: output <- bias of: linear in fc"),
    }
