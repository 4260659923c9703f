"""Numbers computed from sizes keep the value that they had in the dense model, or the size stays."""

from __future__ import annotations

import copy
import json
import math
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from oracle import assert_exact
from torch import Tensor, nn

from lightning_prune import CertificateError, GroupNormPruner, Plan
from lightning_prune.errors import PlanError
from lightning_prune.surgery.applying import apply
from lightning_prune.surgery.patches import installed_patches

Use = Callable[["Net", Tensor, Tensor], Tensor]


class Net(nn.Module):
    """Two linear layers, and a use of the width between them in a module of its own."""

    def __init__(self, use: Use, width: int = 8) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(5, width), nn.Linear(width, 3)
        self.width, self.use = width, use

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.a(x))
        return self.use(self, self.b(h), h)


def size(m: Net, h: Tensor) -> int:
    return h.shape[-1]


FORMS: dict[str, Use] = {
    "power": lambda m, y, h: y * h.shape[-1] ** -0.5,
    "quotient of sizes": lambda m, y, h: (y * (h.shape[-1] // 2) ** -0.5).sin(),
    "hidden quotient": lambda m, y, h: y * (1.0 / h.shape[1]),
    "hidden product": lambda m, y, h: (y + 0.5 * h.shape[1]).sin(),
    "hidden power": lambda m, y, h: y / 2.0 ** h.shape[1],
    "difference": lambda m, y, h: (1.5 - h.shape[1]) - y,
    "square root": lambda m, y, h: y / math.sqrt(h.shape[1]),
    "logarithm": lambda m, y, h: y * math.log(h.size(1)),
    "numpy": lambda m, y, h: y * np.sqrt(h.shape[1]),
    "numpy of single precision": lambda m, y, h: y * np.float32(1.0 / h.shape[1]),
    "whole number": lambda m, y, h: y / h.shape[-1],
    "whole number on the left": lambda m, y, h: h.shape[-1] / (y.square() + 1),
    "reversed": lambda m, y, h: h.shape[-1] - y,
    "in place": lambda m, y, h: y.mul_(h.shape[-1]),
    "power of a number": lambda m, y, h: h.shape[-1] ** y.sigmoid(),
    "int": lambda m, y, h: y * int(h.shape[-1] / 3),
    "round": lambda m, y, h: y * round(0.3 * h.shape[-1]),
    "length of range": lambda m, y, h: y * len(range(h.shape[1])),
    "tensor": lambda m, y, h: y / torch.tensor(2.0 ** h.shape[1]),
    "list of numbers": lambda m, y, h: y * torch.tensor([1.0, 0.5 * h.shape[1], 2.0]),
    "full": lambda m, y, h: y * torch.full((3,), 1.0 / h.shape[1]),
    "keyword": lambda m, y, h: torch.add(y, y.sin(), alpha=0.1 * h.shape[1]),
    "clamp": lambda m, y, h: y.clamp(min=-0.1 * h.shape[1], max=0.1 / h.shape[1]),
    "comparison": lambda m, y, h: torch.where(y * 16 > h.shape[1], y, -y),
    "attribute": lambda m, y, h: y * m.a.out_features**-0.5,
    "keep the largest": lambda m, y, h: y * h.shape[0] + y.topk(1 + int(0.125 * h.shape[1])).values.sum(),
    "truth": lambda m, y, h: y.sum(1, keepdim=bool(int(h.shape[1] * 0.2))),
    "twice": lambda m, y, h: y * h.shape[-1] ** -0.5 + y * h.shape[-1] ** -1.5 + y * 3.0,
    "statistic by hand": lambda m, y, h: y + h.sum(-1, keepdim=True) / h.shape[-1],
}


@pytest.mark.parametrize("form", FORMS)
def test_a_number_keeps_the_value_that_it_had(form: str) -> None:
    torch.manual_seed(0)
    model, x = Net(FORMS[form]).double(), torch.randn(4, 5).double()
    dense = copy.deepcopy(model)
    pruner = GroupNormPruner(model, x, pruning_ratio=0.75, iterative_steps=2)
    dry = pruner.step(dry_run=True)
    first = pruner.step()
    assert dry == first
    assert_exact(dense, model, first, x)
    pruner.step()
    assert model.a.out_features == 2
    assert_exact(dense, model, pruner.plan, x)
    fresh = copy.deepcopy(dense)
    apply(fresh, Plan.from_dict(json.loads(json.dumps(pruner.plan.as_dict()))))
    for twin in (fresh, pickle_of(model), copy.deepcopy(model), model.train()):
        torch.testing.assert_close(twin(x), model(x), rtol=0, atol=0)
    assert [p.kind for p in pruner.plan.patches] == ["numbers"]
    program = torch.export.export(model.eval(), (x,), strict=False)
    torch.testing.assert_close(program.module()(x), model(x))


def pickle_of(model: Net) -> nn.Module:
    use, model.use = model.use, None  # type: ignore[assignment]
    twin = pickle.loads(pickle.dumps(model))
    model.use = twin.use = use
    return twin  # type: ignore[no-any-return]


@pytest.mark.parametrize("form", [f for f in FORMS if f not in ("numpy", "numpy of single precision")])
def test_compiled_models_compute_with_kept_numbers_too(form: str) -> None:
    model, x = Net(FORMS[form]), torch.randn(4, 5)
    GroupNormPruner(model, x).step()
    want = model(x)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(model, backend="eager")(x), want)
    torch._dynamo.reset()


def test_gradients_pass_through_a_kept_number() -> None:
    model, x = Net(FORMS["power"]), torch.randn(4, 5)
    GroupNormPruner(model, x).step()
    model(x).sum().backward()
    h = torch.relu(model.a(x))
    torch.testing.assert_close(model.b.weight.grad, (h * 8**-0.5).sum(0).expand(3, -1))


class Scaled(nn.Module):
    """Attention with a scale that is computed where it is used."""

    def __init__(self, dim: int = 16, heads: int = 2) -> None:
        super().__init__()
        self.heads, self.head_dim = heads, dim // heads
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = self.qkv(x).view(b, n, 3, self.heads, self.head_dim).permute(2, 0, 3, 1, 4)
        weights = (q * self.head_dim**-0.5) @ k.transpose(-2, -1)
        return self.proj((weights.softmax(-1) @ v).transpose(1, 2).flatten(2))


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.out = nn.Linear(4, 16), nn.Linear(16, 3)
        self.blocks = nn.ModuleList(Scaled() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = x + block(x)
        return self.out(x)


def test_head_dims_go_and_every_scale_stays() -> None:
    model, x = Encoder().double(), torch.randn(2, 5, 4).double()
    dense = copy.deepcopy(model)
    pruner = GroupNormPruner(model, x, pruning_ratio=0.5)
    plan = pruner.step()
    assert [b.head_dim for b in model.blocks] == [4, 4]  # type: ignore[misc]
    assert [(p.module, p.values) for p in plan.patches] == [
        (f"blocks.{i}", ((f"mul 1 {4**-0.5!r}", 8**-0.5),)) for i in range(2)
    ]
    assert_exact(dense, model, plan, x)


def test_the_default_scale_of_attention_is_kept_beside_other_numbers() -> None:
    class Default(Scaled):
        def forward(self, x: Tensor) -> Tensor:
            b, n, _ = x.shape
            q, k, v = self.qkv(x).view(b, n, 3, self.heads, self.head_dim).permute(2, 0, 3, 1, 4)
            y = F.scaled_dot_product_attention(q, k, v, dropout_p=0.0)
            return self.proj(y.transpose(1, 2).flatten(2))

    model, x = (
        nn.Sequential(nn.Linear(3, 16), Default(), nn.Linear(16, 2)).double(),
        torch.randn(2, 5, 3).double(),
    )
    dense = copy.deepcopy(model)
    plan = GroupNormPruner(model, x).step()
    assert model[1].head_dim == 4
    assert [list(dict(p.values).values()) for p in plan.patches] == [[1 / math.sqrt(8)]]
    assert_exact(dense, model, plan, x)


class Wave(nn.Module):
    """A layer that a rule of the user's speaks for."""

    def forward(self, x: Tensor) -> Tensor:
        n, c = x.shape
        return (x.reshape(n, 1, c) * (1.0 / c)).reshape(n, c).sin() / x.shape[1]


def test_a_layer_with_a_rule_of_ones_own_keeps_its_numbers_too() -> None:
    model, x = nn.Sequential(nn.Linear(5, 8), Wave(), nn.Linear(8, 3)).double(), torch.randn(4, 5).double()
    dense = copy.deepcopy(model)

    def rule(layer: Any) -> None:
        layer.carry((layer.inputs[0], 1), (layer.outputs[0], 1))

    plan = GroupNormPruner(model, x, customized_pruners={Wave: rule}).step()
    assert [(p.module, dict(p.values)) for p in plan.patches] == [("1", {"mul 1 0.25": 0.125, "div 1 4": 8})]
    assert_exact(dense, model, plan, x)


# -- what decides the way ----------------------------------------------------------------------------------


def loop(m: Net, y: Tensor, h: Tensor) -> Tensor:
    for _ in range(h.shape[1]):
        y = y.sin()
    return y


def hidden_branch(m: Net, y: Tensor, h: Tensor) -> Tensor:
    return y.sin() if 0.5 * h.shape[1] > 3 else y.cos()


def mode(m: Net, y: Tensor, h: Tensor) -> Tensor:
    return F.gelu(y, approximate="tanh" if 1.0 / h.shape[1] < 0.2 else "none")


def attribute(m: Net, y: Tensor, h: Tensor) -> Tensor:
    return y.sin() if m.a.out_features > 4 else y.cos()  # which no line of the forward ties to a size


@pytest.mark.parametrize("use", [loop, hidden_branch, mode, attribute])
def test_another_way_through_the_forward_is_refused(use: Use) -> None:
    model, x = Net(use), torch.randn(2, 5)
    before = copy.deepcopy(model.state_dict())
    pruner = GroupNormPruner(model, x)
    with pytest.raises(CertificateError, match=r"test_numbers\.py:\d+") as caught:
        pruner.step()
    assert "size that was cut" in str(caught.value)
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not installed_patches(model)


BRANCHES: dict[str, tuple[Use, int]] = {
    "if n > 4": (lambda m, y, h: y.sin() if h.shape[1] > 4 else y.cos(), 8),
    "if n >= 4": (lambda m, y, h: y.sin() if h.shape[1] >= 4 else y.cos(), 4),
    "if n < 4.5": (lambda m, y, h: y.sin() if h.shape[1] < 4.5 else y.cos(), 8),
    "if n == 8": (lambda m, y, h: y.sin() if h.shape[1] == 8 else y.cos(), 8),
    "if n % 8": (lambda m, y, h: y.cos() if h.shape[1] % 8 else y.sin(), 8),
    "if n % 4": (lambda m, y, h: y.cos() if h.shape[1] % 4 else y.sin(), 4),
    "among": (lambda m, y, h: y.sin() if h.shape[1] in (2, 3, 4) else y.cos(), 8),
}


@pytest.mark.parametrize("branch", BRANCHES)
def test_a_size_that_the_code_decides_by_stays_where_the_answer_would_change(branch: str) -> None:
    use, width = BRANCHES[branch]
    model, x = Net(use).double(), torch.randn(2, 5).double()
    dense = copy.deepcopy(model)
    pruner = GroupNormPruner(model, x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # there was nothing to prune
        plan = pruner.step()
    assert model.a.out_features == width
    assert_exact(dense, model, plan, x)
    said = "the code decides by this size: comparison (test_numbers.py:" in (text := pruner.explain("a", 0))
    assert said or width == 4, text


# -- what cannot be kept -----------------------------------------------------------------------------------


def test_a_number_that_looks_like_another_keeps_its_size() -> None:
    """16 ** -0.5 becomes 4 ** -0.5, which is the 0.5 of the next line: the width stays."""
    model, x = Net(lambda m, y, h: y * h.shape[1] ** -0.5 + y * 0.5, 16), torch.randn(2, 5)
    pruner = GroupNormPruner(model, x, pruning_ratio=0.75)
    with pytest.warns(UserWarning, match="nothing to prune"):
        plan = pruner.step()
    assert not plan
    assert model.a.out_features == 16
    reason = "became 0.5, which is also met as another number there: mul (test_numbers.py"
    assert reason in pruner.notes[-1]
    assert reason in pruner.explain("a", 0)
    assert reason in pruner.explain("b", 1)
    assert reason not in pruner.explain("b", 0)


def test_a_number_that_looks_like_another_and_whose_size_nobody_saw_is_refused() -> None:
    model, x = Net(lambda m, y, h: y * (2.0 / h.shape[1]) + y * 0.5, 8), torch.randn(2, 5)
    with pytest.raises(CertificateError, match=r"0\.25 became 0\.5, which is also met"):
        GroupNormPruner(model, x).step()


def test_a_number_outside_of_every_module_keeps_its_size() -> None:
    model, x = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3)), torch.randn(2, 5)

    def forward(m: nn.Module, inputs: Tensor) -> Any:
        h = m[1](m[0](inputs))  # type: ignore[index]
        return m[2](h) * h.shape[1] ** -0.5  # type: ignore[index]

    pruner = GroupNormPruner(model, x, forward_fn=forward)
    with pytest.warns(UserWarning, match="nothing to prune"):
        pruner.step()
    assert "outside of every module" in pruner.notes[-1]


def test_a_number_that_follows_the_inputs_too_is_refused_on_other_inputs() -> None:
    model = Net(lambda m, y, h: y / h.numel())
    GroupNormPruner(model, torch.randn(2, 5)).step()
    model(torch.randn(2, 5))
    with pytest.raises(PlanError, match="follows the inputs"):
        model(torch.randn(3, 5))


# -- what is no news ---------------------------------------------------------------------------------------


def test_a_number_of_its_own_needs_no_patch() -> None:
    model = Net(lambda m, y, h: y * 0.5)
    plan = GroupNormPruner(model, torch.randn(2, 5)).step()
    assert model.a.out_features == 4
    assert not plan.patches


def test_numbers_read_off_the_data_are_left_alone() -> None:
    """The largest activation changes with the cut, in the masked model as in the pruned one."""
    model = Net(lambda m, y, h: y / (1.0 + float(y.detach().max())) * h.shape[1] ** -0.5).double()
    x = torch.randn(4, 5).double()
    dense = copy.deepcopy(model)
    plan = GroupNormPruner(model, x).step()
    assert [dict(p.values)["mul 1 0.5"] for p in plan.patches] == [8**-0.5]
    for inputs in (x, 3 * torch.randn(4, 5).double()):
        assert_exact(dense, model, plan, inputs)


def test_a_number_that_changed_since_the_analysis_is_taken_as_it_is() -> None:
    class Annealed(Net):
        tau = 1.0

    model = Annealed(lambda m, y, h: y / m.tau * h.shape[1] ** -0.5).double()  # type: ignore[attr-defined]
    x = torch.randn(4, 5).double()
    pruner = GroupNormPruner(model, x)
    model.tau = 0.25
    dense = copy.deepcopy(model)
    plan = pruner.step()
    assert [dict(p.values) for p in plan.patches] == [{"mul 1 0.5": 8**-0.5}]
    assert_exact(dense, model, plan, x)


def test_a_cache_that_was_filled_since_the_analysis_is_no_other_way() -> None:
    class Cached(Net):
        table: Tensor | None = None

    def use(m: Any, y: Tensor, h: Tensor) -> Tensor:
        if m.table is None:
            m.table = torch.arange(3.0, dtype=y.dtype).exp()
        return y * m.table

    model, x = Cached(use).double(), torch.randn(4, 5).double()
    pruner = GroupNormPruner(model, x)
    model(x)
    dense = copy.deepcopy(model)
    assert_exact(dense, model, pruner.step(), x)


def test_a_way_chosen_by_data_is_reported_and_no_alarm() -> None:
    def use(m: Net, y: Tensor, h: Tensor) -> Tensor:
        for _ in (y > y.mean()).nonzero():
            y = y * 1.01
        return y.sum() if float(y.sum()) > 0 else y

    model, x = Net(use), torch.randn(4, 5)
    pruner = GroupNormPruner(model, x)
    pruner.step()
    assert model.a.out_features == 4


def test_a_patch_that_is_no_longer_needed_is_withdrawn() -> None:
    """7 % 4 and 3 % 4 are the same number; 5 % 4 is not."""
    model, x = Net(lambda m, y, h: y * float(h.shape[1] % 4), 7).double(), torch.randn(2, 5).double()
    dense = copy.deepcopy(model)
    pruner = GroupNormPruner(
        model,
        x,
        pruning_ratio=4 / 7,
        iterative_steps=2,
        iterative_pruning_ratio_scheduler=lambda *_: [0, 2 / 7, 4 / 7],
    )
    first = pruner.step()
    assert [dict(p.values) for p in first.patches] == [{"mul 1 1.0": 3.0}]
    second = pruner.step()
    assert [dict(p.values) for p in second.patches] == [{}]
    assert_exact(dense, model, pruner.plan, x)


def test_a_plan_from_a_meta_model_says_which_numbers_stay() -> None:
    with torch.device("meta"):
        model = Net(FORMS["power"])
    plan = GroupNormPruner(model, torch.empty(2, 5, device="meta")).step(dry_run=True)
    assert [dict(p.values) for p in plan.patches] == [{"mul 1 0.5": 8**-0.5}]
    assert model.a.out_features == 8


def test_what_an_assertion_says_is_no_computation() -> None:
    """Its message may speak of the size that was cut."""

    class Asserting(Net):
        def forward(self, x: Tensor) -> Tensor:
            h = torch.relu(self.a(x))
            torch._assert(h.dim() == 2, f"expected two dimensions, got {h.shape}")
            return self.b(h)

    model = Asserting(lambda m, y, h: y).double()
    dense = copy.deepcopy(model)
    plan = GroupNormPruner(model, torch.ones(2, 5, dtype=torch.float64)).step()
    assert {(cut.tensor, len(cut.keep)) for cut in plan.cuts} >= {("a.weight", 4), ("b.weight", 4)}
    assert not plan.patches
    assert_exact(dense, model, plan, (torch.randn(3, 5, dtype=torch.float64),))
