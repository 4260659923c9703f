"""Every option that decides what is cut: each test fails if its option is ignored."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from nets import Net, conv, draw, image, randomise
from torch import Tensor, nn

from lightning_prune import GroupNormPruner, Plan
from lightning_prune.errors import EmptyGroupError, OptionError

X = draw(4, 5)


def mlp(a: int = 8, b: int = 6) -> nn.Sequential:
    """Two hidden layers: units of "0" and units of "2"; "4" is the output."""
    return randomise(
        nn.Sequential(nn.Linear(5, a), nn.ReLU(), nn.Linear(a, b), nn.ReLU(), nn.Linear(b, 3)), 0
    )


def branches(*norms: list[float]) -> nn.Module:
    """Parallel branches ``b0, b1, ...`` of one structure; unit k of branch i has I_k = norms[i][k]."""

    def run(m: Net, x: Tensor) -> Tensor:
        return sum(
            (m.get_submodule(f"o{i}")(m.get_submodule(f"b{i}")(x).relu()) for i in range(len(norms))),
            x[:, :1] * 0,
        )

    net = Net(run)
    for i, values in enumerate(norms):
        net.add_module(f"b{i}", nn.Linear(1, len(values), bias=False))
        net.add_module(f"o{i}", nn.Linear(len(values), 1, bias=False))
    with torch.no_grad():
        for i, values in enumerate(norms):
            net.get_parameter(f"b{i}.weight").copy_(torch.tensor(values).sqrt().view(-1, 1))
            net.get_parameter(f"o{i}.weight").zero_()
    return net.eval()


ONE = torch.ones(2, 1)


def keep_of(plan: Plan, tensor: str, dim: int = 0) -> list[int]:
    """List the kept indices of one dimension, in order."""
    (cut,) = [c for c in plan.cuts if (c.tensor, c.dim) == (tensor, dim)]
    return sorted(cut.keep)


def sizes(model: nn.Module, *names: str) -> list[int]:
    """List the first dimension of each named weight."""
    return [model.get_parameter(f"{n}.weight").shape[0] for n in names]


def prune(model: nn.Module, inputs: Any = X, **options: Any) -> Plan:
    return GroupNormPruner(model, inputs, **options).step()


# --- ratios ---


@pytest.mark.parametrize(
    ("n", "ratio", "kept"),
    [(3, 0.5, 2), (10, 0.9, 1), (100, 0.9, 10), (10, 0.05, 10), (8, 0.25, 6), (2, 0.99, 1), (100, 0.29, 71)],
)
def test_pruning_ratio_removes_the_nearest_count(n: int, ratio: float, kept: int) -> None:
    model = mlp(n, 60)
    prune(model, pruning_ratio=ratio)
    assert sizes(model, "0") == [kept]


@pytest.mark.parametrize("ratio", [1.0, 1.2, -0.1, float("nan"), "half", None])
def test_a_wrong_pruning_ratio_is_an_option_error(ratio: Any) -> None:
    with pytest.raises(OptionError):
        GroupNormPruner(mlp(), X, pruning_ratio=ratio)


def test_the_default_ratio_is_one_half() -> None:
    model = mlp()
    GroupNormPruner(model, X).step()
    assert sizes(model, "0", "2", "4") == [4, 3, 3]


NAMED: list[tuple[str, Any, list[int]]] = [
    ("name", lambda m: {"0": 0.25}, [6, 3]),
    ("glob", lambda m: {"[02]": 0.0}, [8, 6]),
    ("module", lambda m: {m[2]: 0.0}, [4, 6]),
    ("type", lambda m: {nn.Linear: 0.25}, [6, 5]),
    ("type_name", lambda m: {"torch.nn.Linear": 0.25}, [6, 5]),
    ("a name beats nothing else", lambda m: {"0": 0.0, "2": 0.5}, [8, 3]),
]


@pytest.mark.parametrize(("keys", "want"), [n[1:] for n in NAMED], ids=[n[0] for n in NAMED])
@pytest.mark.filterwarnings("ignore")
def test_pruning_ratio_dict(keys: Any, want: list[int]) -> None:
    model = mlp()
    prune(model, pruning_ratio=0.5, pruning_ratio_dict=keys(model))
    assert sizes(model, "0", "2") == want


def test_a_tuple_in_pruning_ratio_dict_is_one_ranking_scope() -> None:
    model = branches([1, 2, 3, 4], [50, 60, 70, 80], [1, 2, 3, 4])
    prune(model, ONE, pruning_ratio=0.25, pruning_ratio_dict={("b0", "b1"): 0.375}, normalizer=None)
    assert sizes(model, "b0", "b1", "b2") == [1, 4, 3]


def test_a_glob_crosses_dots() -> None:
    model = nn.Sequential(mlp(), nn.Linear(3, 2))
    prune(model, pruning_ratio=0.5, pruning_ratio_dict={"*2": 0.0})
    assert sizes(model, "0.0", "0.2") == [4, 6]


def test_a_name_that_matches_nothing_lists_the_nearest() -> None:
    net = nn.Sequential()
    net.add_module("encoder", mlp())
    with pytest.raises(OptionError, match=r"encoder\.2"):
        GroupNormPruner(net, X, pruning_ratio_dict={"encodr.2": 0.1})


@pytest.mark.parametrize("key", ["4", ("4",), "1"])
def test_a_name_without_prunable_unit_is_an_empty_group(key: Any) -> None:
    with pytest.raises(EmptyGroupError):
        GroupNormPruner(mlp(), X, pruning_ratio_dict={key: 0.5})


@pytest.mark.parametrize("value", [1.0, -0.5, "a"])
def test_a_wrong_ratio_in_the_dict_is_an_option_error(value: Any) -> None:
    with pytest.raises(OptionError):
        GroupNormPruner(mlp(), X, pruning_ratio_dict={"0": value})


IGNORED: list[tuple[str, Any, list[int]]] = [
    ("name", lambda m: ["2"], [4, 6]),
    ("glob", lambda m: ["?"], [8, 6]),
    ("type", lambda m: [nn.Linear], [8, 6]),
    ("type_name", lambda m: ["torch.nn.Linear"], [8, 6]),
    ("module", lambda m: [m[0]], [8, 3]),
    ("parameter", lambda m: [m[2].weight], [4, 6]),
    ("tuple", lambda m: ("0", m[2]), [8, 6]),
]


@pytest.mark.parametrize(("layers", "want"), [n[1:] for n in IGNORED], ids=[n[0] for n in IGNORED])
@pytest.mark.filterwarnings("ignore")
def test_ignored_layers(layers: Any, want: list[int]) -> None:
    model = mlp()
    prune(model, ignored_layers=layers(model))
    assert sizes(model, "0", "2") == want


def test_inputs_of_an_ignored_layer_are_still_cut() -> None:
    model = mlp()
    prune(model, ignored_layers=["2"])
    assert model[2].weight.shape == (6, 4)


def test_an_unknown_ignored_layer_is_an_error() -> None:
    with pytest.raises(OptionError, match="nope"):
        GroupNormPruner(mlp(), X, ignored_layers=["nope"])


def test_all_ignored_warns_once_and_changes_nothing() -> None:
    model = mlp()
    before = copy.deepcopy(model.state_dict())
    pruner = GroupNormPruner(model, X, ignored_layers=[nn.Linear])
    with pytest.warns(UserWarning, match="nothing to prune") as caught:
        plan = pruner.step()
    assert len(caught) == 1
    assert not plan
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_max_pruning_ratio_caps_each_group() -> None:
    model = mlp(100, 10)
    with pytest.warns(UserWarning, match=r"max_pruning_ratio|cap") as caught:
        prune(model, pruning_ratio=0.9, max_pruning_ratio=0.5)
    assert len(caught) == 1
    assert sizes(model, "0", "2") == [50, 5]


def test_the_global_cap_takes_the_next_best_elsewhere() -> None:
    model = branches([1, 2, 3, 4, 5, 6, 7, 8], [50, 60, 70, 80, 90, 91, 92, 93])
    plan = prune(model, ONE, pruning_ratio=0.5, max_pruning_ratio=0.75, global_pruning=True, normalizer=None)
    assert keep_of(plan, "b0.weight") == [6, 7]
    assert keep_of(plan, "b1.weight") == [2, 3, 4, 5, 6, 7]


@pytest.mark.filterwarnings("ignore")
def test_the_cap_beats_round_to() -> None:
    model = mlp(10, 60)
    prune(model, pruning_ratio=0.5, max_pruning_ratio=0.3, round_to=4)
    assert 7 <= sizes(model, "0")[0] < 10


# --- steps and schedules ---


def _run_steps(**options: Any) -> list[int]:
    model = mlp(100, 6)
    pruner = GroupNormPruner(model, X, **options)
    out = []
    for i in range(pruner.iterative_steps):
        assert pruner.current_step == i
        pruner.step()
        out += sizes(model, "0")
    return out


def test_linear_steps() -> None:
    assert _run_steps(pruning_ratio=0.5, iterative_steps=5) == [90, 80, 70, 60, 50]


@pytest.mark.parametrize("name", ["cubic", "exponential"])
@pytest.mark.filterwarnings("ignore:There was nothing")
def test_curved_schedules_reach_the_ratio_another_way(name: str) -> None:
    counts = _run_steps(pruning_ratio=0.5, iterative_steps=5, iterative_pruning_ratio_scheduler=name)
    assert counts[-1] == 50
    assert counts == sorted(counts, reverse=True)
    assert counts != [90, 80, 70, 60, 50]


@pytest.mark.filterwarnings("ignore")
def test_one_shot_cuts_all_at_once() -> None:
    assert _run_steps(pruning_ratio=0.5, iterative_steps=3, iterative_pruning_ratio_scheduler="one_shot") == [
        50,
        50,
        50,
    ]


def test_a_schedule_of_ones_own() -> None:
    options = {
        "iterative_steps": 2,
        "iterative_pruning_ratio_scheduler": lambda target, steps: [0.0, target / 5, target],
    }
    assert _run_steps(pruning_ratio=0.5, **options) == [90, 50]


@pytest.mark.parametrize(
    "schedule", ["nonsense", lambda t, n: [0.0, t], lambda t, n: [0.0, 0.4, 0.2, t], lambda t, n: [t] * 4]
)
def test_a_wrong_schedule_fails_at_construction(schedule: Any) -> None:
    with pytest.raises(OptionError):
        GroupNormPruner(mlp(), X, iterative_steps=3, iterative_pruning_ratio_scheduler=schedule)


@pytest.mark.parametrize("steps", [0, -1, 1.5, "3"])
def test_wrong_iterative_steps(steps: Any) -> None:
    with pytest.raises(OptionError):
        GroupNormPruner(mlp(), X, iterative_steps=steps)


def test_a_step_too_many_warns_and_changes_nothing() -> None:
    model = mlp()
    pruner = GroupNormPruner(model, X)
    plan = pruner.step()
    with pytest.warns(UserWarning, match="iterative_steps"):
        assert not pruner.step()
    assert sizes(model, "0", "2") == [4, 3]
    assert pruner.plan == plan


def test_a_step_that_finds_no_unit_left_warns_and_changes_nothing() -> None:
    """Two groups of two channels at .7: the first step leaves one channel per group, and those stay."""
    model = randomise(nn.Sequential(conv(3, 4), nn.GroupNorm(2, 4), conv(4, 3)), 0)
    pruner = GroupNormPruner(model, image(), pruning_ratio=0.7, iterative_steps=2)
    pruner.step()
    assert sizes(model, "0") == [2]
    with pytest.warns(UserWarning, match="nothing to prune"):
        assert not pruner.step()
    assert sizes(model, "0") == [2]


# --- ranking ---


def test_local_ranking_keeps_the_strongest_of_each_group() -> None:
    plan = prune(branches([1, 9, 3, 7], [80, 20, 60, 40]), ONE)
    assert keep_of(plan, "b0.weight") == [1, 3]
    assert keep_of(plan, "b1.weight") == [0, 2]


def test_global_pruning_is_one_pool() -> None:
    plan = prune(branches([1, 2, 3, 40], [30, 20, 4, 50]), ONE, global_pruning=True, normalizer=None)
    assert keep_of(plan, "b0.weight") == [3]
    assert keep_of(plan, "b1.weight") == [0, 1, 3]


def _two_classes() -> nn.Module:
    """Branches b0 and b1 are isomorphic; the convolution before them is of another kind, and weak."""
    net = branches([1, 2, 3, 4], [50, 60, 70, 80])
    weak = nn.Sequential(nn.Conv2d(1, 8, 1, bias=False), nn.ReLU(), nn.Conv2d(8, 1, 1, bias=False))
    model = Net(lambda m, x: m.net(m.weak(x).flatten(1)), net=net, weak=weak)
    with torch.no_grad():
        weak[0].weight.copy_(torch.arange(1, 9).view(8, 1, 1, 1) * 1e-3)
        weak[2].weight.zero_()
    return model.eval()


def test_isomorphic_cuts_each_class_at_the_ratio_and_pools_within_it() -> None:
    model = _two_classes()
    plan = prune(model, torch.ones(2, 1, 1, 1), isomorphic=True, normalizer=None)
    assert sizes(model, "weak.0") == [4]
    assert keep_of(plan, "net.b0.weight") == [3]
    assert keep_of(plan, "net.b1.weight") == [1, 2, 3]


def test_global_without_isomorphic_empties_the_weak_class() -> None:
    model = _two_classes()
    prune(model, torch.ones(2, 1, 1, 1), global_pruning=True, normalizer=None)
    assert sizes(model, "weak.0", "net.b0", "net.b1") == [1, 3, 4]


def _shapes(flat: bool) -> nn.Module:
    """Unit 0 has few large weights, unit 1 many middling ones: l1 and l2 disagree about the weaker."""
    model = nn.Sequential(nn.Linear(3, 2, bias=False), nn.ReLU(), nn.Linear(2, 1, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[3.0, 0, 0], [1.5, 1.5, 1.5]]))
        model[2].weight.zero_()
    return model


@pytest.mark.parametrize(("name", "kept"), [("group_norm", 0), ("l2", 0), ("l1", 1)])
def test_importance_by_name(name: str, kept: int) -> None:
    assert keep_of(prune(_shapes(True), draw(2, 3), importance=name), "0.weight") == [kept]


def test_random_importance_is_not_the_norm() -> None:
    values = [float(i + 1) for i in range(40)]
    kept = keep_of(prune(branches(values), ONE, importance="random"), "b0.weight")
    assert len(kept) == 20
    assert kept != list(range(20, 40))


def test_importance_of_ones_own() -> None:
    seen = []

    def first_is_best(group: Any) -> Tensor:
        seen.append(group.n_units)
        return torch.arange(group.n_units, 0, -1).float()

    plan = prune(branches([1, 2, 3, 4]), ONE, importance=first_is_best)
    assert keep_of(plan, "b0.weight") == [0, 1]
    assert set(seen) == {4}


@pytest.mark.parametrize("importance", ["nonsense", 3, lambda g: torch.ones(g.n_units + 1)])
def test_a_wrong_importance(importance: Any) -> None:
    with pytest.raises(OptionError):
        prune(mlp(), importance=importance)


@pytest.mark.parametrize(
    ("normalizer", "scale", "cut"),
    [("mean", 0.1, "b0"), (None, 0.1, "b1"), ("max", 10, "b1"), (None, 10, "b0")],
)
def test_normalizer(normalizer: Any, scale: float, cut: str) -> None:
    """b0 is flat, b1 peaked: b0's weakest is 0.87 of its mean and 0.83 of its maximum, b1's 0.92 and 0.75."""
    model = branches([1, 1.2, 1.2, 1.2], [3 * scale, 3.01 * scale, 3.02 * scale, 4 * scale])
    prune(model, ONE, pruning_ratio=0.125, global_pruning=True, normalizer=normalizer)
    assert {n: sizes(model, n)[0] for n in ("b0", "b1")} == {"b0": 4, "b1": 4, cut: 3}


def test_normalizer_of_ones_own() -> None:
    plan = prune(branches([1, 2, 3, 4]), ONE, normalizer=lambda scores: -scores)
    assert keep_of(plan, "b0.weight") == [0, 1]


def test_include_bias() -> None:
    def build() -> nn.Sequential:
        model = nn.Sequential(nn.Linear(1, 2), nn.ReLU(), nn.Linear(2, 1))
        with torch.no_grad():
            model[0].weight.copy_(torch.tensor([[1.0], [2.0]]))
            model[0].bias.copy_(torch.tensor([9.0, 0.0]))
            model[2].weight.zero_()
        return model

    assert keep_of(prune(build(), ONE), "0.weight") == [1]
    assert keep_of(prune(build(), ONE, include_bias=True), "0.weight") == [0]


# --- rounding ---


@pytest.mark.parametrize(
    ("n", "ratio", "round_to", "kept"),
    [(20, 0.7, 8, 8), (20, 0.5, 4, 8), (20, 0.5, 5, 10), (6, 0.5, 8, 6), (32, 0.1, 8, 24)],
)
@pytest.mark.filterwarnings("ignore")
def test_round_to(n: int, ratio: float, round_to: int, kept: int) -> None:
    model = mlp(n, 64)
    prune(model, pruning_ratio=ratio, round_to=round_to)
    assert sizes(model, "0") == [kept]


def test_round_to_works_per_row_of_a_grid() -> None:
    model = randomise(Net(lambda m, x: m.c2(m.g(x)), g=conv(4, 16, groups=2), c2=conv(16, 3)), 0)
    prune(model, image(4), pruning_ratio=0.4, round_to=4)
    assert sizes(model, "g") == [8]


@pytest.mark.parametrize("round_to", [0, -8, 2.5, "8"])
def test_a_wrong_round_to(round_to: Any) -> None:
    with pytest.raises(OptionError):
        GroupNormPruner(mlp(), X, round_to=round_to)
