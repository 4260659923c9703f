"""Where tests of a GPU run. ``LIGHTNING_PRUNE_TEST_DEVICE=cpu pytest -m gpu`` rehearses them without one."""

from __future__ import annotations

import copy
import os
from typing import Any

import pytest
import torch
from nets import Net, conv, draw
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

DEVICE = os.environ.get("LIGHTNING_PRUNE_TEST_DEVICE", "cuda")
ON_GPU = DEVICE == "cuda"
TRAINER = {"accelerator": "gpu" if ON_GPU else "cpu", "devices": 1}

no_rehearsal = pytest.mark.skipif(not ON_GPU, reason="a CPU cannot show this")
on_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(ON_GPU and not torch.cuda.is_available(), reason="needs a CUDA device"),
    *(
        pytest.mark.filterwarnings(f"ignore:{text}")
        for text in (
            ".*LeafSpec",
            ".*does not have many workers",
            ".*number of training batches",
            "Be aware that when using .ckpt_path",
            "GPU available but not used",
        )
    ),
]


def moved(value: Any) -> Any:
    """Bring nested inputs to the device."""
    return tree_map_only(Tensor, lambda t: t.to(DEVICE), value)


def at_home(model: nn.Module) -> nn.Module:
    """Copy a model to the CPU."""
    return copy.deepcopy(model).cpu()


def assert_on_device(model: nn.Module) -> None:
    """Parameters, buffers and gradients lie where the tests run."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        assert tensor.device.type == DEVICE, name
        assert tensor.grad is None or tensor.grad.device.type == DEVICE, name


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
