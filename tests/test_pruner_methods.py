"""Methods, the regulariser's options, traces of odd models, and bad input."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
from nets import Net, conv, draw, image, randomise
from oracle import assert_exact, assert_same_objects
from torch import Tensor, nn

from lightning_prune import GroupNormPruner, Plan, apply
from lightning_prune.errors import OptionError, PlanError, PruneError, StaleGraphError, TraceError

X = draw(4, 5)


def mlp() -> nn.Sequential:
    """Two hidden layers of 8 and 6 units."""
    return randomise(
        nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3)), 0
    )


def snapshot(model: nn.Module) -> list[tuple[str, Tensor, Tensor]]:
    """List names, tensors and copies of their values."""
    return [(n, t, t.detach().clone()) for n, t in (*model.named_parameters(), *model.named_buffers())]


def assert_untouched(before: list[tuple[str, Tensor, Tensor]], model: nn.Module) -> None:
    """The same objects under the same names with the same bits."""
    after = [*model.named_parameters(), *model.named_buffers()]
    assert [n for n, _ in after] == [n for n, _, _ in before]
    for (_, now), (name, then, value) in zip(after, before, strict=True):
        assert now is then, name
        assert torch.equal(now.detach(), value), name


# --- regulariser ---


def expected_gradients(
    model: nn.Sequential, *, reg: float, alpha: float, bias: bool = False
) -> dict[str, Tensor]:
    """Write out ``reg * gamma_k * w`` for the two groups of ``mlp``, unit by unit."""
    weights = {n: p.detach().double() for n, p in model.named_parameters()}
    out = {n: torch.zeros_like(w) for n, w in weights.items()}
    for a, b in ((0, 2), (2, 4)):
        parts = [(f"{a}.weight", 0), (f"{b}.weight", 1), *([(f"{a}.bias", 0)] if bias else [])]
        n = weights[f"{a}.weight"].shape[0]
        strength = [sum(float(weights[t].select(d, k).pow(2).sum()) for t, d in parts) for k in range(n)]
        low, high = min(strength), max(strength)
        for k in range(n):
            gamma = 2 ** (alpha * (high - strength[k]) / (high - low))
            for t, d in parts:
                out[t].select(d, k).add_(reg * gamma * weights[t].select(d, k))
    return out


def regularised(model: nn.Module, *, grad_scale: float = 1.0, **options: Any) -> dict[str, Tensor]:
    """Give the gradients that one call adds to zeros."""
    pruner = GroupNormPruner(model, X, **options)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    pruner.update_regularizer()
    pruner.regularize(grad_scale=grad_scale)
    return {n: p.grad.double() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    "options", [{}, {"reg": 0.5}, {"alpha": 1.0}, {"alpha": 0.0}, {"include_bias": True, "reg": 0.1}], ids=str
)
def test_gradients_are_the_formula(options: dict[str, Any]) -> None:
    model = mlp()
    got = regularised(model, **options)
    want = expected_gradients(
        model,
        reg=options.get("reg", 1e-4),
        alpha=options.get("alpha", 4.0),
        bias=options.get("include_bias", False),
    )
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, rtol=1e-4, atol=1e-9)


def test_grad_scale_multiplies_and_gradients_accumulate() -> None:
    model = mlp()
    want = expected_gradients(model, reg=1e-4, alpha=4.0)
    pruner = GroupNormPruner(model, X)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    pruner.update_regularizer()
    pruner.regularize(model, grad_scale=1024.0)
    for name, p in model.named_parameters():
        assert p.grad is not None
        torch.testing.assert_close(p.grad.double(), 1 + 1024 * want[name], rtol=1e-4, atol=1e-6)


def test_normalizer_does_not_reach_the_regulariser() -> None:
    a, b = regularised(mlp(), normalizer="max"), regularised(mlp(), normalizer=None)
    assert all(torch.equal(a[n], b[n]) for n in a)


def test_another_model_is_an_error() -> None:
    pruner = GroupNormPruner(mlp(), X)
    with pytest.raises(OptionError):
        pruner.regularize(mlp())


def test_frozen_parameters_and_missing_gradients_are_left_alone() -> None:
    model = mlp()
    pruner = GroupNormPruner(model, X)
    model[0].weight.requires_grad_(False)
    model[4].weight.grad = torch.zeros_like(model[4].weight)
    pruner.update_regularizer()
    pruner.regularize()
    assert model[0].weight.grad is None
    assert model[2].weight.grad is None
    assert model[4].weight.grad.abs().sum() > 0


@pytest.mark.parametrize("options", [{"ignored_layers": ["0"]}, {"pruning_ratio_dict": {"0": 0.0}}], ids=str)
def test_groups_that_are_not_cut_are_not_regularised(options: dict[str, Any]) -> None:
    got = regularised(mlp(), **options)
    assert got["0.weight"].abs().sum() == 0
    assert got["2.weight"].abs().sum() > 0


def test_update_regularizer_follows_the_weights() -> None:
    model = mlp()
    pruner = GroupNormPruner(model, X, reg=0.1)
    pruner.update_regularizer()
    with torch.no_grad():
        model[0].weight.mul_(torch.linspace(3, 0.1, 8)[:, None])
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    pruner.update_regularizer()
    pruner.regularize()
    want = expected_gradients(model, reg=0.1, alpha=4.0)
    assert model[0].weight.grad is not None
    torch.testing.assert_close(model[0].weight.grad.double(), want["0.weight"], rtol=1e-4, atol=1e-9)


# --- non-finite values ---


def _poisoned(value: float) -> nn.Sequential:
    model = mlp()
    with torch.no_grad():
        model[0].weight.mul_(torch.arange(1, 9)[:, None])
        model[0].weight[6, 2] = value
    return model


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("options", [{}, {"global_pruning": True}, {"nan_policy": "zero"}], ids=str)
def test_non_finite_units_are_cut_first(value: float, options: dict[str, Any]) -> None:
    model = _poisoned(value)
    with pytest.warns(UserWarning, match=r"0\.weight") as caught:
        plan = GroupNormPruner(model, X, pruning_ratio=0.2, **options).step()
    assert len(caught) == 1
    (cut,) = [c for c in plan.cuts if (c.tensor, c.dim) == ("0.weight", 0)]
    assert 6 not in cut.keep
    assert torch.isfinite(model(X)).all()


def test_nan_policy_raise() -> None:
    model = _poisoned(float("nan"))
    before = [t.detach().clone() for t in model.parameters()]
    with pytest.raises(PruneError, match=r"0\.weight"):
        GroupNormPruner(model, X, nan_policy="raise").step()
    assert all(
        torch.equal(a.nan_to_num(9), b.nan_to_num(9)) for a, b in zip(before, model.parameters(), strict=True)
    )


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("policy", ["skip", "zero"])
def test_nothing_non_finite_is_written_into_a_gradient(policy: str) -> None:
    got = regularised(_poisoned(float("nan")), nan_policy=policy)
    assert all(torch.isfinite(g).all() for g in got.values())
    assert got["4.weight"].abs().sum() > 0
    assert (got["0.bias"] == 0).all()


@pytest.mark.filterwarnings("ignore")
def test_skip_rests_the_group_for_that_step() -> None:
    assert regularised(_poisoned(float("nan")), nan_policy="skip")["0.weight"].abs().sum() == 0


def test_a_wrong_nan_policy() -> None:
    with pytest.raises(OptionError, match="nonsense"):
        GroupNormPruner(mlp(), X, nan_policy="nonsense")


# --- how the model is called ---


def test_forward_fn_replaces_the_call() -> None:
    model = randomise(
        Net(lambda m, x, *, flag: m.b(m.a(x).tanh()) * flag, a=nn.Linear(5, 8), b=nn.Linear(8, 3)), 0
    )
    with pytest.raises(TraceError):
        GroupNormPruner(model, X)
    pruner = GroupNormPruner(model, {"batch": [X]}, forward_fn=lambda m, e: m(e["batch"][0], flag=2.0))
    pruner.step()
    assert model.a.out_features == 4


@pytest.mark.parametrize(
    ("transform", "kept"), [(None, 8), (lambda o: o["logits"], 4), (lambda o: [o["logits"]], 4)]
)
def test_output_transform(transform: Any, kept: int) -> None:
    def run(m: Net, x: Tensor) -> dict[str, Tensor]:
        h = m.a(x).tanh()
        return {"logits": m.c(m.b(h).tanh()), "features": h}

    model = randomise(Net(run, a=nn.Linear(5, 8), b=nn.Linear(8, 6), c=nn.Linear(6, 3)), 0)
    GroupNormPruner(model, X, output_transform=transform).step()
    assert (model.a.out_features, model.b.out_features) == (kept, 3)


# --- plans ---


def test_dry_run_touches_nothing_and_foretells_the_step() -> None:
    model = mlp()
    before = snapshot(model)
    pruner = GroupNormPruner(model, X)
    foretold = pruner.step(dry_run=True)
    assert foretold
    assert_untouched(before, model)
    assert pruner.current_step == 0
    assert not pruner.plan
    assert pruner.step() == foretold == pruner.plan


def test_plan_goes_through_json_onto_a_fresh_model() -> None:
    def build() -> nn.Module:
        return Net(lambda m, x: m.c2(m.bn(m.c1(x))), c1=conv(3, 8), bn=nn.BatchNorm2d(8), c2=conv(8, 4))

    model = randomise(build(), 0)
    dense = copy.deepcopy(model)
    plan = GroupNormPruner(model, image()).step()
    again = Plan.from_dict(json.loads(json.dumps(plan.as_dict())))
    assert again == plan
    fresh = build()
    objects = list(fresh.named_parameters())
    apply(fresh, again)
    assert_same_objects(objects, fresh)
    fresh.load_state_dict(model.state_dict())
    assert_exact(dense, fresh.eval(), plan, image())
    assert fresh.bn.num_features == 4


def test_a_plan_for_another_model_cuts_nothing() -> None:
    plan = GroupNormPruner(mlp(), X).step()
    other = randomise(
        nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 7), nn.ReLU(), nn.Linear(7, 3)), 0
    )
    before = snapshot(other)
    with pytest.raises(PlanError):
        apply(other, plan)
    assert_untouched(before, other)


def test_commit_takes_a_plan_made_elsewhere() -> None:
    a, b = mlp(), mlp()
    leader, follower = GroupNormPruner(a, X, iterative_steps=2), GroupNormPruner(b, X, iterative_steps=2)
    follower.commit(leader.step())
    assert follower.current_step == 1
    assert follower.plan == leader.plan
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    assert follower.step() == leader.step()


def test_state_dict_is_plain_and_resumes_the_schedule() -> None:
    model = mlp()
    pruner = GroupNormPruner(model, X, pruning_ratio=0.5, iterative_steps=2)
    pruner.step()
    state, half = json.loads(json.dumps(pruner.state_dict())), copy.deepcopy(model)
    resumed = GroupNormPruner(half, X, pruning_ratio=0.5, iterative_steps=2)
    resumed.load_state_dict(state)
    assert resumed.current_step == 1
    assert resumed.plan == pruner.plan
    assert resumed.step() == pruner.step()
    assert half[0].out_features == 4


def test_optimizers_are_carried() -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(X).square().sum().backward()
    optimizer.step()
    momentum = {n: optimizer.state[p]["momentum_buffer"].clone() for n, p in model.named_parameters()}
    plan = GroupNormPruner(model, X).step(optimizers=[optimizer])
    for name, p in model.named_parameters():
        want = momentum[name]
        for cut in plan.cuts:
            if cut.tensor == name:
                want = want.index_select(cut.dim, torch.tensor(cut.keep))
        assert torch.equal(optimizer.state[p]["momentum_buffer"], want)


def test_explain_says_why() -> None:
    def run(m: Net, x: Tensor) -> Tensor:
        y = m.a(x)
        out: Tensor = m.out(y + m.b(y.tanh()))
        return out

    pruner = GroupNormPruner(
        randomise(Net(run, a=nn.Linear(5, 8), b=nn.Linear(8, 8), out=nn.Linear(8, 3)), 0), X
    )
    assert "output" in pruner.explain("out", 0).lower()
    tied = pruner.explain("a", dim=0)
    assert "b.weight" in tied
    assert "add" in tied
    assert "test_pruner_methods.py" in tied
    assert pruner.explain("a.weight", 0)
    with pytest.raises(OptionError, match="out"):
        pruner.explain("outt", 0)
    with pytest.raises(OptionError):
        pruner.explain("a.weight", 2)


# --- bad input ---


BAD: list[tuple[str, Any, Any]] = [
    ("wrong shape", mlp, draw(4, 7)),
    ("nothing", mlp, None),
    ("too many", mlp, (X, X, X)),
    ("unknown keyword", mlp, {"nope": X}),
    ("not a model", lambda: lambda x: x, X),
    ("lazy", lambda: nn.Sequential(nn.LazyLinear(8), nn.Linear(8, 3)), X),
]


@pytest.mark.parametrize(("build", "inputs"), [b[1:] for b in BAD], ids=[b[0] for b in BAD])
@pytest.mark.filterwarnings("ignore:Lazy modules")
def test_bad_input_is_an_error_of_ours_and_leaves_the_model(build: Any, inputs: Any) -> None:
    model = build()
    state = dict(vars(model)) if isinstance(model, nn.Module) else {}
    with pytest.raises(PruneError):
        GroupNormPruner(model, inputs)
    assert (dict(vars(model)) if isinstance(model, nn.Module) else {}) == state


def test_a_forward_that_fails_is_a_trace_error_with_its_cause() -> None:
    def run(m: Net, x: Tensor) -> Tensor:
        raise KeyError("my own trouble")

    model = Net(run, a=nn.Linear(5, 8))
    before = snapshot(model.train())
    with pytest.raises(TraceError, match="my own trouble"):
        GroupNormPruner(model, X)
    assert_untouched(before, model)
    assert model.training
    assert torch.is_grad_enabled()


def test_meta_parameters_plan_but_do_not_step() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3))
    pruner = GroupNormPruner(model, X.to("meta"))
    plan = pruner.step(dry_run=True)
    assert {(c.tensor, c.dim, c.kept) for c in plan.cuts} == {
        ("0.weight", 0, 4),
        ("0.bias", 0, 4),
        ("2.weight", 1, 4),
    }
    with pytest.raises(PruneError, match="meta"):
        pruner.step()
    assert model[0].weight.shape == (8, 5)


def test_an_unknown_option_is_a_type_error() -> None:
    with pytest.raises(TypeError):
        GroupNormPruner(mlp(), X, pruning_ration=0.5)


def test_a_model_changed_behind_the_pruners_back_is_stale() -> None:
    model = mlp()
    pruner = GroupNormPruner(model, X)
    model[2] = nn.Linear(8, 9)
    model[4] = nn.Linear(9, 3)
    before = snapshot(model)
    with pytest.raises(StaleGraphError):
        pruner.step()
    assert_untouched(before, model)


def test_a_value_error_is_also_a_value_error() -> None:
    with pytest.raises(ValueError, match=r"1\.2"):
        GroupNormPruner(mlp(), X, pruning_ratio=1.2)


class Bound(nn.Module):
    """The length of an output is written as the length of something else."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(5, 8), nn.Linear(5, 8)
        self.fc, self.fd = nn.Linear(8, 3), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y, z = self.a(x), self.b(x)
        return self.fc(y) + self.fd(z.reshape(-1, y.shape[-1])), z


def test_explain_says_which_count_holds_another():
    pruner = GroupNormPruner(Bound(), torch.randn(2, 5))
    lines = pruner.explain("a", 0).splitlines()
    (held,) = [line for line in lines if line.startswith("Their count follows one of positions that stay: ")]
    assert "used as a size: reshape (test_pruner_methods.py:" in held
    with pytest.warns(UserWarning, match="used as a size: reshape"):
        assert pruner.step().cuts == ()
