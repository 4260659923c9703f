"""What a cut on a GPU leaves behind: no memory, no random numbers drawn, nothing of the caller changed."""

from __future__ import annotations

import copy
import gc

import pytest
import torch
from nets import Case, Net, case_ids, draw, randomise
from on_device import DEVICE, ON_GPU, at_home, images, moved, no_rehearsal, on_gpu, residual
from test_exact import CASES
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from lightning_prune import GroupNormPruner
from lightning_prune.measuring.cost import measure_cost
from lightning_prune.measuring.latency import measure_latency
from lightning_prune.measuring.measured import describe_machine
from lightning_prune.measuring.memory import peak_memory_bytes
from lightning_prune.measuring.speedup import measure_layers
from lightning_prune.tracing.borrowing import Memory
from lightning_prune.tracing.trace import trace

pytestmark = on_gpu


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
def test_a_trace_takes_no_memory_for_weights() -> None:
    """Not so with a recurrent layer: it runs on its own weights, and cuDNN takes room beside them."""
    model, x = residual(256).to(DEVICE), images()
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
