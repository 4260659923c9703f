"""Where tests of a GPU run. ``LIGHTNING_PRUNE_TEST_DEVICE=cpu pytest -m gpu`` rehearses them without one."""

from __future__ import annotations

import copy
import os
from typing import Any

import pytest
import torch
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
