"""A cut on a GPU is the cut on the CPU; it leaves nothing of the old network, and draws no random numbers."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from naive_penalty import assert_added, before, channels, naive_gradients, others, parameters
from nets import Case, Net, case_ids, conv, draw, randomise
from on_device import DEVICE, ON_GPU, assert_on_device, at_home, moved, no_rehearsal, on_gpu
from oracle import assert_exact, masked_twin, relative_error, run_double, without_fast_path
from test_exact import CASES, prune
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from lightning_prune import GroupNormPruner, apply, prepare
from lightning_prune.measuring.cost import measure_cost, peak_memory_bytes
from lightning_prune.measuring.latency import measure_latency
from lightning_prune.measuring.measured import describe_machine
from lightning_prune.measuring.speedup import measure_layers
from lightning_prune.scores.importance import IMPORTANCES, NEEDS
from lightning_prune.scores.regularizer import Regularizer
from lightning_prune.tracing.borrowing import Memory
from lightning_prune.tracing.trace import trace

pytestmark = on_gpu


@pytest.mark.parametrize("case", CASES, ids=case_ids(CASES))
def test_a_cut_is_that_of_the_cpu(case: Case) -> None:
    """The same plan, the same bits; and the output of the original with the removed units silenced."""
    here, inputs = case.make(), case.inputs()
    there, dense = copy.deepcopy(here).to(DEVICE), copy.deepcopy(here)
    plan = prune(here, inputs, pruning_ratio=0.5)
    assert prune(there, moved(inputs), pruning_ratio=0.5) == plan
    assert_on_device(there)
    for name, tensor in here.state_dict().items():
        assert torch.equal(there.state_dict()[name].cpu(), tensor), name
    assert_exact(dense, at_home(there), plan, inputs, survivors=case.survivors)
    with without_fast_path():
        want = run_double(masked_twin(dense, plan, case.survivors).to(DEVICE), moved(inputs))
    for g, w in zip(run_double(there, moved(inputs)), want, strict=True):
        assert relative_error(g, w) <= 1e-9


# What a module carries beside its numbers


def residual(width: int = 16) -> nn.Module:
    """Residuals, a depthwise convolution, batch norms and a group norm."""

    def run(m: Net, x: Tensor) -> Tensor:
        x = m.b0(m.stem(x)).relu()
        y = m.b2(m.c2(m.b1(m.c1(x)).relu()))
        x = (x + y).relu()
        x = x + m.point(m.norm(m.depthwise(x)).relu())
        out: Tensor = m.fc(x.mean((2, 3)))
        return out

    return Net(
        run,
        stem=conv(3, width, bias=False),
        b0=nn.BatchNorm2d(width),
        c1=conv(width, 2 * width, bias=False),
        b1=nn.BatchNorm2d(2 * width),
        c2=conv(2 * width, width, bias=False),
        b2=nn.BatchNorm2d(width),
        depthwise=conv(width, width, groups=width),
        norm=nn.GroupNorm(4, width),
        point=conv(width, width, 1),
        fc=nn.Linear(width, 5),
    )


def images() -> Tensor:
    return draw(4, 3, 8, 8).to(DEVICE)


def test_memory_format_flags_and_identity_survive_two_cuts() -> None:
    model = randomise(residual(), 0).to(DEVICE, memory_format=torch.channels_last)
    model.c1.weight.requires_grad_(False)
    pruner = GroupNormPruner(model, images(), pruning_ratio=0.5, iterative_steps=2)
    objects = dict(model.named_parameters())
    model(images()).sum().backward()
    for _ in range(2):
        pruner.step()
        for name, p in model.named_parameters():
            assert p is objects[name]
            assert p.requires_grad == (name != "c1.weight")
            assert (p.grad is None) == (name == "c1.weight")
            assert p.dim() < 4 or p.is_contiguous(memory_format=torch.channels_last), name
            assert p.grad is None or p.grad.shape == p.shape
        assert_on_device(model)
    assert model.c1.weight.shape[:2] == (16, 8)
    channels_last = images().to(memory_format=torch.channels_last)
    (want,), (got,) = (
        run_double(model.to(memory_format=torch.contiguous_format), images()),
        run_double(model.to(memory_format=torch.channels_last), channels_last),
    )
    assert relative_error(got, want) <= 1e-9


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_weights_of_a_recurrent_layer_lie_in_one_piece(kind: type[nn.RNNBase]) -> None:
    """Else cuDNN copies them in every call, and warns."""

    def assert_one_piece() -> None:
        torch.set_warn_always(True)  # torch says it once in a process
        try:
            model(x)[0].sum().backward()
        finally:
            torch.set_warn_always(False)
        places = {w.untyped_storage().data_ptr() for w in model.recurrent._flat_weights}
        assert len(places) == 1 or not ON_GPU

    model = Net(
        lambda m, x: m.fc(m.recurrent(m.up(x))[0]),
        up=nn.Linear(6, 12),
        recurrent=kind(12, 16, num_layers=2, bidirectional=True, batch_first=True),
        fc=nn.Linear(32, 3),
    )
    model, x = model.to(DEVICE), draw(2, 5, 6).to(DEVICE)
    assert_one_piece()
    dense, plans = copy.deepcopy(model), []
    whole = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    pruner = GroupNormPruner(model, x, pruning_ratio=0.5, iterative_steps=2)
    for _ in range(2):
        plans.append(pruner.step())
        assert_on_device(model)
        assert_one_piece()
    assert model.recurrent.hidden_size == 8
    assert model.recurrent.input_size == 6
    apply(dense, plans[0].then(plans[1]))
    assert all(torch.equal(a, b) for a, b in zip(dense.parameters(), model.parameters(), strict=True))
    prepare(model).load_state_dict(whole)
    assert model.recurrent.hidden_size == 16
    assert_one_piece()


# What is chosen


def scored(name: str, device: str) -> tuple[list[Tensor], Any]:
    """Scores and plan of a network in float64, trained on nothing but three backward passes."""
    model = randomise(scored_net(), 3).double().to(device)
    x = draw(4, 3, 8, 8).double().to(device)
    pruner = GroupNormPruner(model, x, pruning_ratio=0.5, importance=name)
    for number in range(3):
        model.zero_grad()
        with pruner.watch():
            out = model(x + number)
        out.square().sum().backward()
        pruner.collect()
    plan = pruner.step(dry_run=True)
    return [torch.from_numpy(s) for s in pruner.scores], plan


def scored_net() -> nn.Module:
    return Net(
        lambda m, x: m.fc(m.b2(m.c2(m.b1(m.c1(x)).relu())).relu().mean((2, 3))),
        c1=conv(3, 12, bias=False),
        b1=nn.BatchNorm2d(12),
        c2=conv(12, 10, bias=False),
        b2=nn.BatchNorm2d(10),
        fc=nn.Linear(10, 4),
    )


@pytest.mark.parametrize("name", sorted(IMPORTANCES))
def test_importances_choose_as_on_the_cpu(name: str) -> None:
    assert set(NEEDS) <= set(IMPORTANCES)
    want, plan = scored(name, "cpu")
    got, same = scored(name, DEVICE)
    assert plan
    assert same == plan
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("update_every", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_penalty_is_the_naive_one(dtype: torch.dtype, update_every: int) -> None:
    """Two steps with weights that stand still: the second one's gammas may be those of the first."""
    groups, tensors = [channels(), *others()], parameters(dtype)
    there = {n: nn.Parameter(t.detach().to(DEVICE)) for n, t in tensors.items()}
    for t in there.values():
        t.grad = torch.zeros_like(t)
    regularizer = Regularizer(groups, there, reg=0.1, update_every=update_every)
    wide = {n: t.detach().double().requires_grad_() for n, t in tensors.items()}
    added = naive_gradients(groups, wide, 0.1)
    eps = torch.finfo(dtype).eps
    for number in (1, 2):
        regularizer.apply()
        for name, t in there.items():
            torch.testing.assert_close(
                t.grad.double().cpu(), number * added[name], rtol=number * eps + 1e-5, atol=1e-7
            )
    regularizer.check()
    assert int(regularizer.skipped) == 0


def test_the_penalty_joins_gradients_of_float64_to_the_last_digits() -> None:
    groups, tensors = [channels(), *others()], parameters()
    added = naive_gradients(groups, tensors, 0.3)
    there = {n: nn.Parameter(t.detach().to(DEVICE)) for n, t in tensors.items()}
    for name, t in there.items():
        t.grad = tensors[name].grad.to(DEVICE)
    start = before(there)
    Regularizer(groups, there, reg=0.3).apply(torch.ones((), device=DEVICE))
    assert_added(there, start, moved(added))


# What is left behind


def in_use() -> int:
    """Bytes that were asked for and not given back; the allocator may deal out more, in larger blocks."""
    gc.collect()
    torch.cuda.synchronize()
    torch._C._cuda_clearCublasWorkspaces()
    return int(torch.cuda.memory_stats()["requested_bytes.all.current"])


def held_by(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    state = [t for values in optimizer.state.values() for t in values.values() if isinstance(t, Tensor)]
    tensors = [*model.parameters(), *model.buffers(), *state]
    return [*tensors, *(t.grad for t in model.parameters() if t.grad is not None)]


def learn(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor) -> None:
    optimizer.zero_grad()
    model(x).square().mean().backward()
    optimizer.step()


@pytest.mark.parametrize("regularized", [False, True])
def test_nothing_of_the_dense_network_is_held_after_a_cut(regularized: bool) -> None:
    x = images()
    model = residual(64).to(DEVICE)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    learn(model, optimizer, x)
    pruner = GroupNormPruner(model, x, pruning_ratio=0.5, iterative_steps=2)
    if regularized:
        pruner.regularize()
    for _ in range(2):
        learn(model, optimizer, x)
        dense = [StorageWeakRef(t.untyped_storage()) for t in held_by(model, optimizer) if t.numel() > 999]
        assert len(dense) >= 16
        pruner.step(optimizers=optimizer)
        gc.collect()
        assert all(storage.expired() for storage in dense)
        if regularized:
            pruner.regularize()


@no_rehearsal
def test_memory_falls_to_what_the_pruned_network_takes() -> None:
    x = images()
    for width in (8, 256):  # first what libraries keep for themselves
        start, allocated = in_use(), torch.cuda.memory_allocated()
        model = residual(width).to(DEVICE)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
        learn(model, optimizer, x)
        dense = torch.cuda.memory_allocated() - allocated
        pruner = GroupNormPruner(model, x, pruning_ratio=0.5)
        pruner.step(optimizers=optimizer)
        needed = sum(t.numel() * t.element_size() for t in held_by(model, optimizer))
        assert needed <= in_use() - start <= needed + 2**16
        left = torch.cuda.memory_allocated() - allocated
        learn(model, optimizer, x)
        assert in_use() - start <= needed + 2**16
        del model, optimizer, pruner
    assert left < 0.6 * dense


@no_rehearsal
@pytest.mark.parametrize("build", [lambda: residual(256), lambda: nn.LSTM(512, 512, num_layers=2)])
def test_a_trace_takes_no_memory_for_weights(build: Callable[[], nn.Module]) -> None:
    model = build().to(DEVICE)
    x = images() if isinstance(model, Net) else draw(3, 2, 512).to(DEVICE)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    start = in_use()
    torch.cuda.reset_peak_memory_stats()
    pruner = GroupNormPruner(model, x, pruning_ratio=0.5)
    assert torch.cuda.memory_stats()["requested_bytes.all.peak"] - start < weights / 8
    assert in_use() - start < weights / 8
    assert pruner.groups()


@pytest.mark.parametrize("case", CASES, ids=case_ids(CASES))
def test_a_trace_does_without_values_where_it_does_on_the_cpu(case: Case) -> None:
    model, inputs = case.make(), case.inputs()
    memory = trace(model, inputs).borrowed.memory
    assert trace(model.to(DEVICE), moved(inputs)).borrowed.memory is memory


def test_numbers_on_the_device_are_no_reason_to_ask_for_values() -> None:
    """Beside shapes torch takes a single number from a CPU alone."""
    model = Net(
        lambda m, x: m.second((m.first(x) * m.share + torch.tensor(2.0, device=x.device)).relu()),
        first=nn.Linear(4, 6),
        share=torch.tensor(0.5),
        second=nn.Linear(6, 2),
    )
    x = draw(3, 4).to(DEVICE)
    assert trace(model.to(DEVICE), x).borrowed.memory is Memory.SHAPES


@pytest.mark.parametrize("asks", [False, True])
def test_autocast_of_the_caller_stays_outside_a_trace(asks: bool) -> None:
    """Of shapes, and of values, which a forward may ask for."""

    def run(m: Net, x: Tensor) -> Tensor:
        x = m.first(x).relu()
        seen.append(torch.is_autocast_enabled(DEVICE))
        if asks:
            seen.append(float(x.sum()) < 0)
        return m.last(m.attention(x, x, x)[0])

    seen: list[bool] = []
    model = randomise(
        Net(
            run,
            first=nn.Linear(4, 8),
            attention=nn.MultiheadAttention(8, 2, batch_first=True),
            last=nn.Linear(8, 2),
        ),
        0,
    ).to(DEVICE)
    x = draw(3, 5, 4).to(DEVICE)
    want = GroupNormPruner(model, x, pruning_ratio=0.5).step(dry_run=True)
    with torch.autocast(DEVICE, torch.bfloat16):
        assert GroupNormPruner(model, x, pruning_ratio=0.5).step(dry_run=True) == want
        assert torch.is_autocast_enabled(DEVICE)
    assert want
    assert not any(seen)


# Random numbers


@pytest.mark.parametrize("importance", ["group_norm", "random"])
def test_a_cut_draws_no_random_numbers(importance: str) -> None:
    model = residual().to(DEVICE)
    model.drop = nn.Dropout()
    run, model.run = model.run, lambda m, x: m.drop(run(m, x))
    torch.manual_seed(7)
    states = [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if ON_GPU else [])]
    pruner = GroupNormPruner(model, images(), pruning_ratio=0.5, importance=importance)
    pruner.step()
    pruner.regularize()
    measure_cost(model, images())
    after = [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if ON_GPU else [])]
    assert all(torch.equal(a, b) for a, b in zip(states, after, strict=True))


# Measuring


def test_times_and_bytes_are_of_the_device() -> None:
    dense, x = residual(64).to(DEVICE).eval(), images()
    pruned = copy.deepcopy(dense)
    GroupNormPruner(pruned, x, pruning_ratio=0.5).step()
    models = {"dense": dense, "pruned": pruned}
    taken = measure_latency(models, x.cpu(), rounds=3, min_run_time_s=0.05)
    assert all(t.median_ms > 0 and t.iqr_ms >= 0 and t.runs >= 3 for t in taken.values())
    layers = measure_layers(dense, pruned, x, rounds=2)
    assert {"stem", "b1", "depthwise", "norm", "fc", ""} <= {layer.name for layer in layers}
    assert all(layer.dense_ms > 0 and layer.pruned_ms > 0 for layer in layers)
    costs = {name: measure_cost(model, x) for name, model in models.items()}
    assert all(costs[n] == measure_cost(at_home(model), x.cpu()) for n, model in models.items())
    for allocator in (True, False):
        peaks = {n: peak_memory_bytes(m, x, allocator=allocator) for n, m in models.items()}
        held = {n: cost.parameter_bytes + cost.buffer_bytes for n, cost in costs.items()}
        assert all(peaks[n] > held[n] for n in models)
    said = str(describe_machine(x.device)["device"])
    assert said.startswith(DEVICE)
    assert not ON_GPU or torch.cuda.get_device_name() in said
