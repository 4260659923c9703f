"""Numbers that follow a size are refused with the model as it was; numbers that do not are cut."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_prune import CertificateError, GroupNormPruner


class Scaled(nn.Module):
    """Two linear layers and a number that may come from the width between them."""

    def __init__(self, scale: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.scale = nn.Linear(5, 8), nn.Linear(8, 3), scale

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.a(x))
        return self.scale(self.b(h), h)


FOLLOWING: dict[str, Any] = {
    "divided by": lambda y, h: y * (1.0 / h.shape[1]),
    "times": lambda y, h: y * (0.5 * h.shape[1]),
    "tensor": lambda y, h: y / torch.tensor(2.0 ** h.shape[1]),
    "length of range": lambda y, h: y * len(range(h.shape[1])),
}


@pytest.mark.parametrize("name", FOLLOWING)
def test_a_number_that_follows_a_size_is_refused(name: str) -> None:
    model = Scaled(FOLLOWING[name])
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(CertificateError, match="size that was cut"):
        GroupNormPruner(model, torch.randn(2, 5)).step()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_a_number_of_its_own_is_no_obstacle() -> None:
    model = Scaled(lambda y, h: y * 0.5)
    GroupNormPruner(model, torch.randn(2, 5)).step()
    assert model.a.out_features == 4


class Attention(nn.Module):
    """Passes its dropout by hand, as most implementations do, and leaves the scale to the default."""

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.head_dim = 2, 4
        self.qkv, self.out = nn.Linear(3, 24), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = self.qkv(x).view(b, n, 3, self.heads, self.head_dim).permute(2, 0, 3, 1, 4)
        y = nn.functional.scaled_dot_product_attention(q, k, v, dropout_p=0.0)
        return self.out(y.transpose(1, 2).flatten(2))


def test_the_default_scale_of_attention_is_kept_beside_other_numbers() -> None:
    model = Attention().eval()
    plan = GroupNormPruner(model, torch.randn(2, 5, 3)).step()
    assert model.head_dim == 2
    assert dict(plan.patches[0].values) == {"scale": 0.5}
