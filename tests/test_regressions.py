"""What a well-known pruning library got wrong: one test for each, named after the defect."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from nets import Net, conv, draw, image, param, randomise
from nets_attention import Fused, Vit, tokens
from nets_language import Llama, ids
from oracle import assert_exact
from torch import Tensor, nn

from lightning_prune import GroupNormPruner, Plan, apply
from lightning_prune.errors import PruneError

X = draw(4, 5)


def mlp(a: int = 8, b: int = 6) -> nn.Sequential:
    """Two hidden layers."""
    return randomise(
        nn.Sequential(nn.Linear(5, a), nn.ReLU(), nn.Linear(a, b), nn.ReLU(), nn.Linear(b, 3)), 0
    )


def gradients(model: nn.Module, inputs: Any, steps: int = 0, **options: Any) -> dict[str, Tensor]:
    """Give what the regulariser adds to zero gradients, after ``steps`` cuts."""
    pruner = GroupNormPruner(model, inputs, iterative_steps=max(steps, 1), **options)
    for _ in range(steps):
        pruner.step()
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    pruner.update_regularizer()
    pruner.regularize()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def test_01_alpha_has_an_effect() -> None:
    weak, strong = (gradients(mlp(), X, alpha=a)["0.weight"] for a in (1.0, 8.0))
    ratio = strong / weak  # 2 ** (7 * t): t = 0 for the strongest unit, 1 for the weakest
    assert float(ratio.min()) == pytest.approx(1, rel=1e-4)
    assert float(ratio.max()) == pytest.approx(128, rel=1e-4)


def test_02_a_one_channel_conv_gets_no_nan() -> None:
    model = randomise(nn.Sequential(conv(3, 1), nn.ReLU(), conv(1, 8), nn.ReLU(), conv(8, 2)), 0)
    assert all(torch.isfinite(g).all() for g in gradients(model, image()).values())


def test_02_equal_units_get_gamma_one() -> None:
    model = mlp()
    with torch.no_grad():
        model[0].weight.fill_(0.5)
        model[2].weight.fill_(0.25)
    got = gradients(model, X, reg=0.1)["0.weight"]
    torch.testing.assert_close(got, torch.full_like(got, 0.05))


@pytest.mark.parametrize("ranked", [False, True])
def test_03_a_nan_channel_neither_stops_pruning_nor_stays(ranked: bool) -> None:
    model = mlp()
    with torch.no_grad():
        model[0].weight[3] = float("nan")
    with pytest.warns(UserWarning, match=r"0\.weight"):
        plan = GroupNormPruner(model, X, global_pruning=ranked).step()
    (cut,) = [c for c in plan.cuts if (c.tensor, c.dim) == ("0.weight", 0)]
    assert 3 not in cut.keep
    assert sum(m.out_features for m in (model[0], model[2])) == 7


def test_04_the_cap_holds() -> None:
    model = mlp(100)
    with pytest.warns(UserWarning, match="max_pruning_ratio"):
        GroupNormPruner(model, X, pruning_ratio=0.9, max_pruning_ratio=0.5).step()
    assert model[0].out_features == 50


@pytest.mark.parametrize("n", [10, 100])
def test_05_no_float_truncation(n: int) -> None:
    model = mlp(n)
    GroupNormPruner(model, X, pruning_ratio=0.9).step()
    assert model[0].out_features == n // 10


def test_06_rounding_does_not_undo_the_cut() -> None:
    model = mlp(20, 20)
    GroupNormPruner(model, X, pruning_ratio=0.7, round_to=8).step()
    assert (model[0].out_features, model[2].out_features) == (8, 8)


def test_07_isomorphic_without_global_still_ranks_by_class() -> None:
    """Layers of one class are one pool even though ``global_pruning`` is off."""
    model = randomise(
        nn.Sequential(
            *[m for i in range(4) for m in (conv(3 if i == 0 else 16, 16), nn.ReLU())], conv(16, 2)
        ),
        0,
    )
    GroupNormPruner(model, image(), isomorphic=True, global_pruning=False).step()
    kept = [m.out_channels for m in model if isinstance(m, nn.Conv2d)][:4]
    assert sum(kept) == 32


def test_08_iterative_head_pruning_lands_on_the_ratio() -> None:
    model = _wide_heads()
    pruner = GroupNormPruner(
        model, tokens(), pruning_ratio=0.0, prune_num_heads=True, head_pruning_ratio=0.5, iterative_steps=6
    )
    heads = []
    for _ in range(6):
        pruner.step()
        heads.append(model.att.heads)
    assert heads == [11, 10, 9, 8, 7, 6]


def _wide_heads() -> nn.Module:
    return randomise(
        Net(
            lambda m, x: m.fc(m.att(m.embed(x))),
            embed=nn.Linear(6, 24),
            att=Fused(24, 12),
            fc=nn.Linear(24, 3),
        ),
        0,
    )


def test_09_heads_alone_are_cut() -> None:
    model = randomise(Vit(Fused()), 0)
    assert GroupNormPruner(
        model, tokens(), pruning_ratio=0.0, prune_num_heads=True, head_pruning_ratio=0.5
    ).step()
    assert model.att.heads == 1


def test_10_a_rejected_prune_changes_no_attribute() -> None:
    model = randomise(Vit(Fused()), 0)
    plan = GroupNormPruner(
        copy.deepcopy(model), tokens(), pruning_ratio=0.0, prune_num_heads=True, head_pruning_ratio=0.5
    ).step()
    model.att.proj = nn.Linear(9, 8)
    with pytest.raises(PruneError):
        apply(model, plan)
    assert model.att.heads == 2
    assert model.att.qkv.weight.shape == (24, 8)


@pytest.mark.parametrize("ratio", [0.5, 0.9])
@pytest.mark.filterwarnings("ignore")
def test_10_a_gqa_model_keeps_a_head(ratio: float) -> None:
    model = randomise(Llama(), 0)
    dense = copy.deepcopy(model)
    plan = GroupNormPruner(
        model, ids(), pruning_ratio=0.0, prune_num_heads=True, head_pruning_ratio=ratio
    ).step()
    assert (model.heads, model.kv_heads) == (2, 1)
    assert_exact(dense, model, plan, ids())


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "batch norm without affine": lambda: nn.Sequential(
        conv(3, 8), nn.BatchNorm2d(8, affine=False), conv(8, 8), nn.ReLU(), conv(8, 2)
    ),
    "grouped": lambda: nn.Sequential(conv(3, 8), conv(8, 8, groups=2), nn.ReLU(), conv(8, 2)),
    "transposed": lambda: nn.Sequential(conv(3, 8), nn.ConvTranspose2d(8, 8, 2), nn.ReLU(), conv(8, 2)),
    "grouped transposed": lambda: nn.Sequential(
        conv(3, 8), nn.ConvTranspose2d(8, 8, 2, groups=2), nn.ReLU(), conv(8, 2)
    ),
}


@pytest.mark.parametrize("steps", [0, 1])
@pytest.mark.parametrize("name", LAYERS)
def test_11_regularize_works_on_every_layer_and_after_a_step(name: str, steps: int) -> None:
    got = gradients(randomise(LAYERS[name](), 0), image(), steps)
    for key, g in got.items():
        assert torch.isfinite(g).all()
        assert g.abs().sum() > 0 or not key.endswith("weight")


def _naive(
    model: nn.Module, members: list[tuple[str, int]], n: int, reg: float, alpha: float
) -> dict[str, Tensor]:
    """The formula for one group whose members give slice k of a dimension to unit k."""
    weights = {t: model.get_parameter(t).detach().double() for t, _ in members}
    strength = [sum(float(weights[t].select(d, k).square().sum()) for t, d in members) for k in range(n)]
    out = {t: torch.zeros_like(w) for t, w in weights.items()}
    for k in range(n):
        gamma = 2 ** (alpha * (max(strength) - strength[k]) / (max(strength) - min(strength)))
        for t, d in members:
            out[t].select(d, k).add_(reg * gamma * weights[t].select(d, k))
    return out


NORMED: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor], list[tuple[str, int]]]] = {
    "layer norm": (
        lambda: nn.Sequential(nn.Linear(5, 8), nn.LayerNorm(8), nn.Linear(8, 3)),
        lambda: X,
        [("0.weight", 0), ("1.weight", 0), ("2.weight", 1)],
    ),
    "rms norm": (
        lambda: nn.Sequential(nn.Linear(5, 8), nn.RMSNorm(8), nn.Linear(8, 3)),
        lambda: X,
        [("0.weight", 0), ("1.weight", 0), ("2.weight", 1)],
    ),
    "batch norm": (
        lambda: nn.Sequential(conv(3, 8), nn.BatchNorm2d(8), conv(8, 2)),
        image,
        [("0.weight", 0), ("1.weight", 0), ("2.weight", 1)],
    ),
    "group norm": (
        lambda: nn.Sequential(conv(3, 8), nn.GroupNorm(2, 8), conv(8, 2)),
        image,
        [("0.weight", 0), ("1.weight", 0), ("2.weight", 1)],
    ),
    "depthwise": (
        lambda: nn.Sequential(conv(3, 8), conv(8, 8, groups=8), conv(8, 2)),
        image,
        [("0.weight", 0), ("1.weight", 0), ("2.weight", 1)],
    ),
    "transposed": (
        lambda: nn.Sequential(conv(3, 8), nn.ConvTranspose2d(8, 3, 2)),
        image,
        [("0.weight", 0), ("1.weight", 0)],
    ),
    "embedding": (
        lambda: nn.Sequential(nn.Embedding(11, 8), nn.Linear(8, 3)),
        ids,
        [("0.weight", 1), ("1.weight", 1)],
    ),
    "bare parameter": (
        lambda: Net(
            lambda m, x: m.b(m.a(x) * m.scale), a=nn.Linear(5, 8), scale=param(1, 8), b=nn.Linear(8, 3)
        ),
        lambda: X,
        [("a.weight", 0), ("scale", 1), ("b.weight", 1)],
    ),
}


@pytest.mark.parametrize("name", NORMED)
def test_12_every_member_gets_its_gradient(name: str) -> None:
    build, inputs, members = NORMED[name]
    model = randomise(build(), 1)
    want = _naive(model, members, 8, 0.1, 4.0)
    got = gradients(model, inputs(), reg=0.1)
    for key, g in got.items():
        torch.testing.assert_close(
            g.double(), want.get(key, torch.zeros_like(g).double()), rtol=1e-4, atol=1e-8
        )


def test_13_the_constructor_leaves_the_training_flag() -> None:
    model = mlp().train()
    model[1].eval()
    pruner = GroupNormPruner(model, X)
    pruner.step()
    assert [m.training for m in model.modules()] == [True, True, False, True, True, True]


def test_14_no_defaults_leak_between_pruners() -> None:
    first = GroupNormPruner(mlp(), X, ignored_layers=["0"], pruning_ratio_dict={"2": 0.0})
    with pytest.warns(UserWarning, match="nothing to prune"):
        first.step()
    ratios: dict[Any, float] = {"0": 0.25}
    ignored = ["2"]
    model = mlp()
    GroupNormPruner(model, X, pruning_ratio_dict=ratios, ignored_layers=ignored).step()
    assert (ratios, ignored) == ({"0": 0.25}, ["2"])
    model = mlp()
    GroupNormPruner(model, X).step()
    assert (model[0].out_features, model[2].out_features) == (4, 3)


def test_15_a_type_may_be_ignored() -> None:
    model = randomise(
        Net(lambda m, x: m.b(m.a(m.c(x).mean((2, 3)))), c=conv(3, 8), a=nn.Linear(8, 6), b=nn.Linear(6, 2)), 0
    )
    GroupNormPruner(model, image(), ignored_layers=[nn.Linear]).step()
    assert (model.c.out_channels, model.a.out_features) == (4, 6)


def test_16_unwrapped_parameters_take_a_dict() -> None:
    model = randomise(
        Net(lambda m, x: m.b(m.a(x) * m.scale), a=nn.Linear(5, 8), scale=param(8), b=nn.Linear(8, 3)), 0
    )
    GroupNormPruner(model, X, unwrapped_parameters={model.scale: 0}).step()
    assert model.scale.shape == (4,)


@pytest.mark.parametrize("options", [{}, {"global_pruning": True}, {"isomorphic": True}], ids=str)
def test_17_ties_do_not_change_the_count(options: dict[str, Any]) -> None:
    model = mlp(8, 8)
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(0.5)
    GroupNormPruner(model, X, pruning_ratio=0.25, **options).step()
    assert model[0].out_features + model[2].out_features == 12


def test_18_a_batch_of_one_is_not_unpacked() -> None:
    seen = []

    def run(m: Net, x: Tensor) -> Tensor:
        seen.append(tuple(x.shape))
        out: Tensor = m.b(m.a(x).relu())
        return out

    model = randomise(Net(run, a=nn.Linear(5, 8), b=nn.Linear(8, 3)), 0)
    GroupNormPruner(model, draw(1, 5)).step()
    assert set(seen) == {(1, 5)}


def test_19_the_optimizer_holds_only_live_parameters() -> None:
    model = randomise(
        nn.Sequential(conv(3, 8), nn.BatchNorm2d(8), nn.ReLU(), conv(8, 6), nn.Flatten(), nn.Linear(216, 3)),
        0,
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    model(image()).square().sum().backward()
    optimizer.step()
    GroupNormPruner(model, image()).step(optimizers=[optimizer])
    held = [p for group in optimizer.param_groups for p in group["params"]]
    assert [id(p) for p in held] == [id(p) for p in model.parameters()]
    assert all(v.shape == p.shape for p in held for v in optimizer.state[p].values() if v.ndim)
    optimizer.zero_grad()
    before = [p.detach().clone() for p in model.parameters()]
    model(image()).square().sum().backward()
    optimizer.step()
    assert all(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_20_a_custom_importance_does_not_touch_the_regulariser() -> None:
    model = mlp()
    custom = gradients(mlp(), X, importance=lambda g: torch.linspace(0, 9, g.n_units))
    default = gradients(model, X)
    assert all(torch.equal(custom[n], default[n]) for n in default)


def test_21_weight_decay_is_documented() -> None:
    assert "weight decay" in (GroupNormPruner.regularize.__doc__ or "").lower()


def test_22_a_pruned_model_loads_with_weights_only() -> None:
    model = mlp()
    pruner = GroupNormPruner(model, X)
    pruner.step()
    file = io.BytesIO()
    torch.save(
        {"model": model.state_dict(), "plan": pruner.plan.as_dict(), "pruner": pruner.state_dict()}, file
    )
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    fresh = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3))
    apply(fresh, Plan.from_dict(saved["plan"]))
    fresh.load_state_dict(saved["model"])
    assert torch.equal(fresh.eval()(X), model(X))
