"""A cut on a GPU is the cut on the CPU, by whatever importance, after the same penalty."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from naive_penalty import assert_added, before, channels, naive_gradients, others, parameters
from nets import Case, Net, case_ids, conv, draw, randomise
from on_device import DEVICE, ON_GPU, assert_on_device, at_home, images, moved, on_gpu, residual
from oracle import assert_exact, masked_twin, relative_error, run_double, without_fast_path
from test_exact import CASES, prune
from torch import Tensor, nn

from lightning_prune import GroupNormPruner, apply, prepare
from lightning_prune.scores.importance import IMPORTANCES, NEEDS
from lightning_prune.scores.regularizer import Regularizer

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


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("need_weights", [False, True])
def test_replaced_attention_runs_in_mixed_precision(dtype: torch.dtype, need_weights: bool) -> None:
    """Masked, without and with gradients: as near to the answer in float64 as its digits allow."""

    def run(m: Net, x: Tensor) -> Tensor:
        hidden = torch.arange(7, device=x.device) >= torch.tensor([[7], [4], [5]], device=x.device)
        x = m.up(x)
        options = {"key_padding_mask": hidden, "need_weights": need_weights}
        return m.down(x + m.attention(x, x, x, **options)[0])

    model = randomise(
        Net(
            run,
            up=nn.Linear(6, 32),
            attention=nn.MultiheadAttention(32, 4, batch_first=True, add_bias_kv=True),
            down=nn.Linear(32, 3),
        ),
        0,
    ).to(DEVICE)
    x = draw(3, 7, 6).to(DEVICE)
    assert prune(model, x, pruning_ratio=0.5).patches
    (want,) = run_double(model, x)
    for grad in (False, True):
        with torch.set_grad_enabled(grad), torch.autocast(DEVICE, dtype):
            got = model(x)
        assert got.dtype == dtype
        assert relative_error(got.detach(), want) < 16 * torch.finfo(dtype).eps
    got.float().square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters())


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
    rtol = 1e-6 if name == "random" else 1e-9  # it draws in float32, and its mean is taken on the device
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=rtol, atol=1e-12)


@pytest.mark.parametrize("update_every", [1, 3])
@pytest.mark.parametrize("fused", [None, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_penalty_is_the_naive_one(dtype: torch.dtype, fused: bool | None, update_every: int) -> None:
    """Two steps with weights that stand still: the second one's gammas may be those of the first."""
    groups, tensors = [channels(), *others()], parameters(dtype)
    there = {n: nn.Parameter(t.detach().to(DEVICE)) for n, t in tensors.items()}
    for t in there.values():
        t.grad = torch.zeros_like(t)
    regularizer = Regularizer(groups, there, reg=0.1, update_every=update_every, fused=fused)
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


@pytest.mark.parametrize("fused", [None, False])
def test_the_penalty_joins_gradients_of_float64_to_the_last_digits(fused: bool | None) -> None:
    groups, tensors = [channels(), *others()], parameters()
    added = naive_gradients(groups, tensors, 0.3)
    there = {n: nn.Parameter(t.detach().to(DEVICE)) for n, t in tensors.items()}
    for name, t in there.items():
        t.grad = tensors[name].grad.to(DEVICE)
    start = before(there)
    Regularizer(groups, there, reg=0.3, fused=fused).apply(torch.ones((), device=DEVICE))
    assert_added(there, start, moved(added))
