"""Options about heads, groups, bare parameters and budgets."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from nets import Net, conv, image, randomise
from nets_attention import Fused, Patches, Separate, Vit, tokens
from nets_language import Llama, ids
from oracle import assert_exact
from torch import nn

from lightning_prune import GroupNormPruner
from lightning_prune.errors import BudgetError, OptionError
from lightning_prune.selection.requests import key, reaches_all

NO_HEADS: dict[str, Any] = {"pruning_ratio": 0.0, "prune_num_heads": True}


def vit(heads: int = 4, dim: int = 16) -> nn.Module:
    """Two attention layers in a row, named "a1" and "a2"."""
    return randomise(
        nn.Sequential(
            _named(embed=nn.Linear(6, dim), a1=Fused(dim, heads), a2=Fused(dim, heads), fc=nn.Linear(dim, 3))
        ),
        0,
    )


def _named(**parts: nn.Module) -> nn.Module:
    def run(m: Net, x: torch.Tensor) -> torch.Tensor:
        x = m.embed(x)
        x = x + m.a1(x)
        out: torch.Tensor = m.fc(x + m.a2(x))
        return out

    return Net(run, **parts)


def head_sizes(model: nn.Module) -> list[tuple[int, int]]:
    """Report (heads, width of qkv) of both layers."""
    return [(m.heads, m.qkv.out_features) for m in model.modules() if isinstance(m, Fused)]


def test_head_dims_are_cut_in_every_head_by_the_same_count() -> None:
    model = vit()
    GroupNormPruner(model, tokens(), pruning_ratio=0.5).step()
    assert head_sizes(model) == [(4, 24), (4, 24)]


REACHES: dict[str, tuple[dict[str, Any], bool]] = {
    "the ratio": ({}, False),  # the heads stay
    "heads too": ({"prune_num_heads": True}, True),
    "heads by their own ratio": ({"prune_num_heads": True, "head_pruning_ratio": 0.25}, True),
    "no head dimensions": ({"prune_num_heads": True, "prune_head_dims": False}, False),
    "no ratio": ({"prune_num_heads": True, "pruning_ratio": 0.0}, False),
    "ignored": ({"prune_num_heads": True, "ignored_layers": ["0.embed"]}, False),
    "a ratio of its own": ({"prune_num_heads": True, "pruning_ratio_dict": {"0.embed": 0.0}}, False),
    "heads with one": ({"prune_num_heads": True, "head_pruning_ratio_dict": {"0.a1": 0.0}}, False),
}


@pytest.mark.parametrize(("options", "all_of_them"), REACHES.values(), ids=REACHES)
def test_which_options_reach_every_group_is_known_without_a_model(
    options: dict[str, Any], all_of_them: bool
) -> None:
    pruner = GroupNormPruner(vit(), tokens(), **options)
    assert (pruner.pressed_groups() == pruner.groups()) is all_of_them
    keys = [key(group) for group in pruner.groups()]
    assert reaches_all(pruner.options, pruner.pruning_ratio, keys) is all_of_them


def test_without_heads_there_are_none_to_leave_out() -> None:
    pruner = GroupNormPruner(nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 3)), tokens())
    assert pruner.pressed_groups() == pruner.groups() != ()
    assert reaches_all(pruner.options, pruner.pruning_ratio, [key(group) for group in pruner.groups()])


def test_prune_head_dims_off_leaves_them() -> None:
    model = vit()
    dense = copy.deepcopy(model)
    plan = GroupNormPruner(model, tokens(), pruning_ratio=0.5, prune_head_dims=False).step()
    assert head_sizes(model) == [(4, 48), (4, 48)]
    assert model[0].embed.out_features == 8
    assert_exact(dense, model, plan, tokens())


def test_heads_are_cut_at_their_own_ratio_without_any_other() -> None:
    model = vit()
    GroupNormPruner(model, tokens(), **NO_HEADS, head_pruning_ratio=0.25).step()
    assert head_sizes(model) == [(3, 36), (3, 36)]
    assert model[0].embed.out_features == 16


def test_heads_take_the_pruning_ratio_when_theirs_is_zero() -> None:
    model = vit()
    GroupNormPruner(model, tokens(), pruning_ratio=0.5, prune_num_heads=True, prune_head_dims=False).step()
    assert head_sizes(model) == [(2, 24), (2, 24)]
    assert model[0].embed.out_features == 8


def test_heads_and_head_dims_together() -> None:
    model = vit()
    dense = copy.deepcopy(model)
    plan = GroupNormPruner(
        model, tokens(), pruning_ratio=0.5, prune_num_heads=True, head_pruning_ratio=0.25
    ).step()
    assert head_sizes(model) == [(3, 18), (3, 18)]
    assert_exact(dense, model, plan, tokens())


@pytest.mark.parametrize("ranked", [False, True])
def test_heads_head_dims_and_channels_in_steps(ranked: bool) -> None:
    model = vit()
    dense = copy.deepcopy(model)
    options: dict[str, Any] = {"prune_num_heads": True, "head_pruning_ratio": 0.5, "global_pruning": ranked}
    pruner = GroupNormPruner(model, tokens(), pruning_ratio=0.5, iterative_steps=2, **options)
    pruner.step()
    pruner.step()
    if not ranked:
        assert head_sizes(model) == [(2, 12), (2, 12)]
        assert model[0].embed.out_features == 8
    assert sum(h for h, _ in head_sizes(model)) == 4
    assert_exact(dense, model, pruner.plan, tokens())


def test_head_pruning_ratio_dict() -> None:
    model = vit()
    GroupNormPruner(
        model, tokens(), **NO_HEADS, head_pruning_ratio=0.25, head_pruning_ratio_dict={"*.a1*": 0.5}
    ).step()
    assert head_sizes(model) == [(2, 24), (3, 36)]


def test_head_ratio_without_prune_num_heads_cuts_no_head() -> None:
    model = vit()
    GroupNormPruner(model, tokens(), pruning_ratio=0.5, head_pruning_ratio=0.5).step()
    assert [h for h, _ in head_sizes(model)] == [4, 4]


@pytest.mark.parametrize("ratio", [1.0, -0.5, "x"])
def test_a_wrong_head_pruning_ratio(ratio: Any) -> None:
    with pytest.raises(OptionError):
        GroupNormPruner(vit(), tokens(), prune_num_heads=True, head_pruning_ratio=ratio)


def test_kv_heads_go_with_their_query_heads() -> None:
    model = randomise(Llama(heads=8, kv_heads=4), 0)
    dense = copy.deepcopy(model)
    plan = GroupNormPruner(model, ids(), **NO_HEADS, head_pruning_ratio=0.5).step()
    assert (model.heads, model.kv_heads, model.head_dim) == (4, 2, 4)
    assert (model.q.out_features, model.k.out_features, model.o.in_features) == (16, 8, 16)
    kept = {
        c.tensor: sorted({i // 4 for i in c.keep})
        for c in plan.cuts
        if c.tensor in ("q.weight", "k.weight") and c.dim == 0
    }
    assert kept["q.weight"] == [q for k in kept["k.weight"] for q in (2 * k, 2 * k + 1)]
    assert_exact(dense, model, plan, ids())


def test_num_heads_given_right_is_accepted_and_wrong_is_an_error_with_both() -> None:
    GroupNormPruner(vit(), tokens(), num_heads={"0.a1.qkv": 4})
    with pytest.raises(OptionError, match=r"(?s)(8.*4|4.*8)"):
        GroupNormPruner(vit(), tokens(), num_heads={"0.a1.qkv": 8})


def _grouped() -> nn.Module:
    return randomise(
        Net(lambda m, x: m.c2(m.g(m.c1(x))), c1=conv(3, 8), g=conv(8, 12, groups=2), c2=conv(12, 3)), 0
    )


@pytest.mark.parametrize("option", ["in_channel_groups", "out_channel_groups"])
def test_channel_groups_are_checked_against_the_trace(option: str) -> None:
    GroupNormPruner(_grouped(), image(), **{option: {"g": 2}})
    with pytest.raises(OptionError, match=r"(?s)(4.*2|2.*4)"):
        GroupNormPruner(_grouped(), image(), **{option: {"g": 4}})
    with pytest.raises(OptionError, match="nope"):
        GroupNormPruner(_grouped(), image(), **{option: {"nope": 2}})


@pytest.mark.parametrize("as_pairs", [False, True])
@pytest.mark.parametrize("by_name", [False, True])
@pytest.mark.parametrize(("dim", "cut"), [(2, True), (1, False)])
def test_unwrapped_parameters(dim: int, cut: bool, by_name: bool, as_pairs: bool) -> None:
    """``pos`` is [1, tokens, channels]; told that tokens are its channels, the stream may not be cut."""
    model = randomise(Patches(), 0)
    key: Any = "pos" if by_name else model.pos
    GroupNormPruner(model, image(), unwrapped_parameters=[(key, dim)] if as_pairs else {key: dim}).step()
    assert model.pos.shape == ((1, 10, 4) if cut else (1, 10, 8))


@pytest.mark.parametrize("value", [{"pos": 3}, {"nope": 0}, {"pos": "a"}])
def test_wrong_unwrapped_parameters(value: Any) -> None:
    with pytest.raises(OptionError):
        GroupNormPruner(randomise(Patches(), 0), image(), unwrapped_parameters=value)


# --- budgets ---


def wide() -> nn.Module:
    """A residual net wide enough for budgets to be met closely."""

    def run(m: Net, x: torch.Tensor) -> torch.Tensor:
        x = m.stem(x).relu()
        x = (x + m.c2(m.c1(x).relu())).relu()
        out: torch.Tensor = m.fc(x.mean((2, 3)))
        return out

    return randomise(
        Net(
            run,
            stem=conv(3, 48),
            c1=conv(48, 64),
            c2=conv(64, 48),
            fc=nn.Linear(48, 10),
        ),
        0,
    )


def naive_macs(model: nn.Module, inputs: Any) -> int:
    """Count multiply-adds of convolutions and linear layers with hooks, for one batch."""
    total = 0

    def count(module: nn.Module, _: Any, out: torch.Tensor) -> None:
        nonlocal total
        if isinstance(module, nn.Conv2d):
            total += out.numel() * module.weight[0].numel()
        elif isinstance(module, nn.Linear):
            total += out.numel() * module.weight.shape[1]

    hooks = [m.register_forward_hook(count) for m in model.modules()]
    with torch.no_grad():
        model(inputs)
    for hook in hooks:
        hook.remove()
    return total


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def _share(model: nn.Module, dense: nn.Module, kind: str) -> float:
    if kind == "params":
        return parameters(model) / parameters(dense)
    return naive_macs(model, image()) / naive_macs(dense, image())


@pytest.mark.parametrize("share", [0.3, 0.5, 0.8])
@pytest.mark.parametrize("kind", ["macs", "params"])
@pytest.mark.parametrize(
    "options", [{}, {"global_pruning": True}, {"isomorphic": True}], ids=["local", "global", "isomorphic"]
)
def test_budget_is_met_within_a_point(kind: str, share: float, options: dict[str, Any]) -> None:
    model = wide()
    dense = copy.deepcopy(model)
    GroupNormPruner(model, image(), pruning_ratio=0.1, budget={kind: share}, **options).step()
    assert abs(_share(model, dense, kind) - share) <= 0.0101


def test_budget_is_reached_in_equal_parts() -> None:
    model = wide()
    dense = copy.deepcopy(model)
    pruner = GroupNormPruner(model, image(), budget={"params": 0.4}, iterative_steps=3)
    shares = []
    for _ in range(3):
        pruner.step()
        shares.append(_share(model, dense, "params"))
    assert shares == pytest.approx([0.8, 0.6, 0.4], abs=0.0101)


def test_budget_composes_with_ignored_layers() -> None:
    model = wide()
    dense = copy.deepcopy(model)
    GroupNormPruner(model, image(), budget={"macs": 0.6}, ignored_layers=["stem"]).step()
    assert model.stem.out_channels == 48
    assert abs(_share(model, dense, "macs") - 0.6) <= 0.0101


def test_an_unreachable_budget_fails_at_construction_with_what_is_reachable() -> None:
    model = wide()
    with pytest.raises(BudgetError, match=r"0?\.0*5|5(\.\d+)? ?%") as caught:
        GroupNormPruner(model, image(), budget={"params": 0.05}, max_pruning_ratio=0.2)
    assert any(ch.isdigit() for ch in str(caught.value))
    assert model.c1.out_channels == 64


@pytest.mark.parametrize(
    "budget",
    [{"flops": 0.5}, {"macs": 0.0}, {"macs": 1.5}, {"params": "x"}, {"macs": 0.5, "params": 0.5}, 0.5],
)
def test_a_wrong_budget(budget: Any) -> None:
    with pytest.raises(OptionError):
        GroupNormPruner(wide(), image(), budget=budget)


def test_head_dims_of_separate_projections_stay_matched() -> None:
    """q, k and v keep equally many dimensions in every head, and q and k the same ones."""
    model = randomise(Vit(Separate(8, 2)), 0)
    plan = GroupNormPruner(model, tokens(), pruning_ratio=0.5).step()
    keep = {c.tensor: sorted(c.keep) for c in plan.cuts if c.dim == 0}
    assert keep["att.q.weight"] == keep["att.k.weight"] == keep["att.q.bias"]
    for name in ("q", "v"):
        assert [i // 4 for i in keep[f"att.{name}.weight"]] == [0, 0, 1, 1]
