"""Corners that real models have: caches, shared and idle parameters, dtypes, hooks, pickles."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import pytest
import torch
from nets import Net, conv, draw, image, param, randomise
from nets_attention import Fused, Separate, Torch, Vit, tokens
from nets_conv import shuffle
from nets_language import StandardConv
from oracle import assert_exact, run_double
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from lightning_prune import GroupNormPruner
from lightning_prune.tracing.trace import trace
from lightning_prune.training.describing import Call, describe, rebuild
from lightning_prune.training.recalibrating import _draw_one
from lightning_prune.vetting import Part, vet_pruner

X = draw(4, 5)


class Cached(nn.Module):
    """Keeps a table from its first evaluation, as LeViT does with attention biases."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(5, 8), nn.Linear(8, 3)
        self.table = param(8, 2)
        self.cache: dict[str, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        if "scale" not in self.cache:
            self.cache["scale"] = self.table[:, 0] * 2
        out: Tensor = self.b(self.a(x) * self.cache["scale"])
        return out


def test_a_cache_of_the_forward_is_not_left_behind() -> None:
    model = randomise(Cached(), 0)
    dense = copy.deepcopy(model)
    plan = GroupNormPruner(model, X).step()
    assert model.cache == {}
    assert model.table.shape == (4, 2)
    assert_exact(dense, model, plan, X)


def test_idle_parameters_stay_and_do_no_harm() -> None:
    model = randomise(
        Net(
            lambda m, x: m.b(m.a(x).tanh()),
            a=nn.Linear(5, 8),
            idle=nn.Linear(8, 8),
            spare=param(7),
            b=nn.Linear(8, 3),
        ),
        0,
    )
    dense = copy.deepcopy(model)
    plan = GroupNormPruner(model, X).step()
    assert {c.tensor for c in plan.cuts} == {"a.weight", "a.bias", "b.weight"}
    assert_exact(dense, model, plan, X)


def test_a_parameter_in_two_modules_is_cut_once_and_stays_shared() -> None:
    model = Net(
        lambda m, x: m.c(m.b(m.a(x).tanh()).tanh() + m.twin(m.a(x))),
        a=nn.Linear(5, 8),
        b=nn.Linear(8, 8),
        twin=nn.Linear(8, 8),
        c=nn.Linear(8, 3),
    )
    model.twin.weight = model.b.weight
    randomise(model, 0)
    dense = copy.deepcopy(model)
    plan = GroupNormPruner(model, X).step()
    assert model.twin.weight is model.b.weight
    assert model.b.weight.shape == (4, 4)
    assert model.twin.in_features == model.b.in_features == 4
    assert_exact(dense, model, plan, X)


def test_channels_last_is_kept() -> None:
    model = randomise(
        nn.Sequential(conv(3, 8), nn.BatchNorm2d(8), nn.ReLU(), conv(8, 6), nn.ReLU(), conv(6, 2)), 0
    )
    model = model.to(memory_format=torch.channels_last)
    dense = copy.deepcopy(model)
    plan = GroupNormPruner(model, image().to(memory_format=torch.channels_last)).step()
    assert model[3].weight.shape == (3, 4, 3, 3)
    assert model[3].weight.is_contiguous(memory_format=torch.channels_last)
    assert_exact(dense, model, plan, image())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes(dtype: torch.dtype) -> None:
    model = randomise(nn.Sequential(nn.Linear(5, 8), nn.LayerNorm(8), nn.GELU(), nn.Linear(8, 3)), 0).to(
        dtype
    )
    dense = copy.deepcopy(model)
    plan = GroupNormPruner(model, X.to(dtype)).step()
    assert model[0].weight.shape == (4, 5)
    assert model[0].weight.dtype == dtype
    assert_exact(dense, model, plan, X)


def test_frozen_parameters_stay_frozen() -> None:
    model = randomise(nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3)), 0)
    model[0].requires_grad_(False)
    GroupNormPruner(model, X).step()
    assert [p.requires_grad for p in model.parameters()] == [False, False, True, True]


def test_gradients_follow_the_cut_or_are_dropped() -> None:
    model = randomise(nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3)), 0)
    model(X).sum().backward()
    GroupNormPruner(model, X).step()
    assert all(p.grad is None or p.grad.shape == p.shape for p in model.parameters())
    model.zero_grad()
    model(X).sum().backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in model.parameters())


def test_hooks_of_the_user_are_kept_and_not_called_by_the_trace() -> None:
    model = randomise(nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3)), 0)
    seen: list[int] = []
    model[0].register_forward_hook(lambda m, a, out: seen.append(out.shape[-1]))
    pruner = GroupNormPruner(model, X)
    pruner.step()
    seen.clear()
    model(X)
    assert seen == [4]


@pytest.mark.parametrize(
    "attention",
    [lambda: Separate(style="sdpa"), lambda: Fused(style="chunk"), Torch],
    ids=["sdpa", "fused", "mha"],
)
def test_patched_models_pickle_and_copy(attention: Any) -> None:
    model = randomise(Vit(attention()), 0)
    GroupNormPruner(model, tokens()).step()
    want = run_double(model, tokens())[0]
    again = pickle.loads(pickle.dumps(model))
    assert torch.equal(run_double(again, tokens())[0], want)
    assert torch.equal(run_double(copy.deepcopy(model), tokens())[0], want)


def test_a_patched_model_trains() -> None:
    """A cut attention layer still follows its own parameters: nothing is held from before the cut."""
    model = randomise(Vit(Torch()), 0).train()
    GroupNormPruner(model, tokens()).step()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = model(tokens()).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses == sorted(losses, reverse=True)
    assert all(
        p.grad is not None and p.grad.abs().sum() > 0
        for n, p in model.named_parameters()
        if "in_proj_bias" not in n
    )


class Alibi(nn.Module):
    """Heads get slopes that are computed from their number: heads may not go, head dimensions may."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = 4
        self.q, self.k, self.v = (nn.Linear(16, 16) for _ in range(3))
        self.proj = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = (f(x).view(b, n, self.heads, -1).transpose(1, 2) for f in (self.q, self.k, self.v))
        slopes = torch.tensor([2.0 ** -(i + 1) for i in range(self.heads)], dtype=x.dtype)
        place = torch.arange(n)
        bias = (place[None] - place[:, None]).abs() * slopes.view(-1, 1, 1)
        y = functional.scaled_dot_product_attention(q, k, v, attn_mask=-bias)
        out: Tensor = self.proj(y.transpose(1, 2).flatten(2))
        return out


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("heads", [False, True])
def test_slopes_by_head_number_keep_the_heads(heads: bool) -> None:
    model = randomise(nn.Sequential(nn.Linear(6, 16), Alibi(), nn.Linear(16, 3)), 0)
    dense = copy.deepcopy(model)
    plan = GroupNormPruner(
        model, tokens(), prune_num_heads=heads, head_pruning_ratio=0.5 if heads else 0.0
    ).step()
    assert model[1].heads == 4
    assert model[0].out_features == 8
    assert_exact(dense, model, plan, tokens())


class Biased(nn.Module):
    """Relative position biases, gathered from a table [positions, heads] by an integer buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = 4
        self.qkv, self.proj = nn.Linear(16, 48), nn.Linear(16, 16)
        self.table = param(9, 4)
        self.register_buffer("index", torch.arange(5)[None] - torch.arange(5)[:, None] + 4)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = self.qkv(x).view(b, n, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        bias = self.table[self.index.flatten()].view(n, n, -1).permute(2, 0, 1)
        att = q @ k.transpose(-2, -1) / math.sqrt(4) + bias
        out: Tensor = self.proj((att.softmax(-1) @ v).transpose(1, 2).flatten(2))
        return out


def test_relative_position_tables_follow_the_heads() -> None:
    model = randomise(nn.Sequential(nn.Linear(6, 16), Biased(), nn.Linear(16, 3)), 0)
    dense = copy.deepcopy(model)
    options: dict[str, Any] = {"prune_num_heads": True, "head_pruning_ratio": 0.5}
    plan = GroupNormPruner(model, tokens(), pruning_ratio=0.0, **options).step()
    assert (model[1].heads, tuple(model[1].table.shape)) == (2, (9, 2))
    assert_exact(dense, model, plan, tokens())


def test_standardised_weights_of_a_grouped_convolution() -> None:
    class Grouped(StandardConv):
        """One more way to derive a weight: the convolution sees it in groups."""

        def forward(self, x: Tensor) -> Tensor:
            w = self.weight
            w = w - w.mean((1, 2, 3), keepdim=True)
            return functional.conv2d(x, w, self.bias, self.stride, self.padding, groups=self.groups)

    model = randomise(
        nn.Sequential(conv(3, 8), nn.ReLU(), Grouped(8, 8, 3, groups=2), nn.ReLU(), conv(8, 2)), 0
    )
    dense = copy.deepcopy(model)
    pruner = GroupNormPruner(model, image(), ignored_layers=["0"])
    plan = pruner.step()
    assert model[2].weight.shape == (4, 4, 3, 3)
    assert_exact(dense, model, plan, image())


@pytest.mark.parametrize("ratio", [0.25, 0.4, 0.5, 0.7])
@pytest.mark.parametrize("ranked", [False, True])
def test_a_shuffle_net_of_several_stages_is_exact_and_cut(ratio: float, ranked: bool) -> None:
    def run(m: Net, x: Tensor) -> Tensor:
        x = m.stem(x).relu()
        for i in range(2):
            a, b = x.chunk(2, dim=1)
            b = m.get_submodule(f"p{i}")(m.get_submodule(f"d{i}")(b).relu()).relu()
            x = shuffle(torch.cat((a, b), dim=1), 2)
        out: Tensor = m.fc(x.mean((2, 3)))
        return out

    blocks = {f"p{i}": conv(8, 8, 1) for i in range(2)} | {f"d{i}": conv(8, 8, groups=8) for i in range(2)}
    model = randomise(Net(run, stem=conv(3, 16), **blocks, fc=nn.Linear(16, 4)), 0)
    dense = copy.deepcopy(model)
    plan = GroupNormPruner(model, image(), pruning_ratio=ratio, global_pruning=ranked).step()
    assert model.stem.out_channels < 16
    assert_exact(dense, model, plan, image())


@pytest.mark.filterwarnings("ignore:max_pruning_ratio")
def test_caps_and_rounding_count_from_the_initial_width() -> None:
    def build() -> nn.Sequential:
        return randomise(nn.Sequential(nn.Linear(5, 100), nn.ReLU(), nn.Linear(100, 3)), 0)

    capped, rounded = build(), build()
    first = GroupNormPruner(capped, X, pruning_ratio=0.9, max_pruning_ratio=0.5, iterative_steps=2)
    second = GroupNormPruner(rounded, X, pruning_ratio=0.5, round_to=8, iterative_steps=2)
    for pruner in (first, second):
        pruner.step()
    with pytest.warns(UserWarning, match="max_pruning_ratio"):
        first.step()
    second.step()
    assert (capped[0].out_features, rounded[0].out_features) == (50, 48)


def test_a_submodule_that_runs_twice_with_other_sizes_of_time() -> None:
    """The same encoder sees sequences of two lengths: time is no channel."""
    model = randomise(
        Net(lambda m, a, b: m.fc(m.e(a).mean(1) * m.e(b).mean(1)), e=nn.Linear(6, 8), fc=nn.Linear(8, 3)), 0
    )
    dense = copy.deepcopy(model)
    inputs = (draw(2, 4, 6), draw(2, 7, 6, seed=1))
    plan = GroupNormPruner(model, inputs).step()
    assert model.e.out_features == 4
    assert_exact(dense, model, plan, inputs)


def test_a_forward_that_writes_into_its_inputs_writes_into_copies() -> None:
    """Tensors and what holds them: a cache, for instance, grows with every run."""

    class Cache:
        def __init__(self) -> None:
            self.seen: list[Tensor] = []

    class Writes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.e, self.fc = nn.Linear(6, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor, cache: Cache) -> Tensor:
            cache.seen.append(x)
            out: Tensor = self.fc(self.e(x.mul_(0.5)))
            return out

    x, cache = draw(2, 6), Cache()
    model = Writes()
    GroupNormPruner(model, (x, cache)).step()
    assert model.e.out_features == 4
    assert torch.equal(x, draw(2, 6))
    assert cache.seen == []


def test_a_seed_that_waits_for_a_device_goes_on_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU that nobody has used gets the last seed that was asked for, so a trace may ask for none."""
    seeds: list[int] = []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeds.append)
    monkeypatch.setattr(torch.mps, "manual_seed", seeds.append)
    torch.manual_seed(7)
    assert seeds == [7, 7]
    GroupNormPruner(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), torch.ones(1, 3)).step()
    assert seeds == [7, 7]


@pytest.mark.parametrize("by_shapes", [True, False])
def test_two_traces_draw_alike_and_leave_the_random_numbers_alone(by_shapes: bool) -> None:
    class Draws(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            drawn.append(float(torch.rand(())))
            return self.second(self.first(x).relu())

    drawn: list[float] = []
    model = Draws()
    for _ in range(2):
        torch.rand(1)
        before = torch.get_rng_state()
        trace(model, torch.ones(1, 3), by_shapes=by_shapes)
        assert torch.equal(torch.get_rng_state(), before)
    assert len(drawn) == 2
    assert drawn[0] == drawn[1]


def test_autocast_of_the_caller_stays_outside_a_trace() -> None:
    class Looks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            seen.append(torch.is_autocast_enabled("cpu"))
            return self.second(self.first(x).relu())

    seen: list[bool] = []
    with torch.autocast("cpu", torch.bfloat16):
        GroupNormPruner(Looks(), torch.ones(1, 3)).step()
        assert torch.is_autocast_enabled("cpu")
    assert seen
    assert not any(seen)


def test_a_default_device_of_the_callers_is_not_the_models() -> None:
    """Nothing is made where nobody said where; random numbers least of all, whose generator is on the CPU."""
    model = Net(lambda m, x: m.b(m.a(x).relu()), a=nn.Linear(5, 8), b=nn.Linear(8, 3))
    want = GroupNormPruner(copy.deepcopy(model), X).step()
    calls = [Call("", (X, torch.arange(5000), X > 0), {"phase": X.cfloat()})]
    with torch.device("meta"):
        pruner = GroupNormPruner(model, X)
        pruner.regularize()
        assert pruner.step() == want
        vet_pruner(
            Part("the state", pruner.state_dict()), 1, {n: p.shape for n, p in model.named_parameters()}
        )
        (call,) = rebuild(describe(calls) or [], torch.device("cpu"))
        batches = list(_draw_one(DataLoader(TensorDataset(X), batch_size=2), 2, seed=0))
    assert [t.device.type for t in (*call.args, *call.kwargs.values())] == ["cpu"] * 4
    assert [len(batch[0]) for batch in batches] == [2, 2]
