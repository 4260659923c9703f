"""Results that passed through shared memory are those of memory of their own."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lightning_prune import GroupNormPruner
from lightning_prune.plan import Cut, Plan
from lightning_prune.surgery.applying import apply

KEEP = tuple(range(0, 300, 2))
SHAPES = [(300, 300), (300, 300, 3, 3), (900, 300)]


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_large_tensors_cut_one_after_the_other_keep_their_own_values(
    memory_format: torch.memory_format,
) -> None:
    torch.manual_seed(0)
    model = nn.ParameterList(torch.randn(shape) for shape in SHAPES)
    model[1].data = model[1].data.contiguous(memory_format=memory_format)
    for p in model:
        p.grad = torch.randn_like(p)
    expected = [(naive(p.data), naive(p.grad)) for p in model]  # type: ignore[arg-type]
    apply(model, Plan(tuple(cut for i, shape in enumerate(SHAPES) for cut in cuts(str(i), shape[0]))))
    for p, (data, grad) in zip(model, expected, strict=True):
        assert torch.equal(p.data, data)
        assert p.grad is not None
        assert torch.equal(p.grad, grad)
    assert model[1].is_contiguous(memory_format=memory_format)
    places = [t.untyped_storage().data_ptr() for p in model for t in (p.data, p.grad)]  # type: ignore[union-attr]
    assert len(set(places)) == len(places)


def cuts(name: str, size: int) -> list[Cut]:
    return [Cut(name, 0, size, KEEP), Cut(name, 1, 300, KEEP)]


def naive(tensor: Tensor) -> Tensor:
    return tensor[list(KEEP)][:, list(KEEP)]


def test_scores_of_large_layers_are_sums_of_their_own_squares() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(300, 400), nn.ReLU(), nn.Linear(400, 500), nn.ReLU(), nn.Linear(500, 300))
    first, second, third = (model[i].weight.detach().double() for i in (0, 2, 4))
    hidden = first.square().sum(1) + second.square().sum(0)
    deeper = second.square().sum(1) + third.square().sum(0)
    pruner = GroupNormPruner(model, torch.randn(1, 300), pruning_ratio=0.5, normalizer=None)
    pruner.step(dry_run=True)
    for scores, wanted in zip(pruner.scores, (hidden, deeper), strict=True):
        torch.testing.assert_close(torch.from_numpy(scores), wanted, rtol=1e-5, atol=0)
