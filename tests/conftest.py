"""What every test starts from, and what none may leave behind."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from importlib import import_module
from importlib.util import find_spec
from typing import Any

# Before the first import of matplotlib or wandb, here and in processes that tests start.
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("WANDB_SILENT", "true")
os.environ.setdefault("HYDRA_FULL_ERROR", "0")

import numpy as np
import pytest
import torch
from torch.overrides import _get_current_function_mode_stack
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

torch.set_num_threads(1)  # pytest-xdist runs one process per core
if not torch.cuda.is_available():  # Triton asks once, when it is first imported
    os.environ.setdefault("TRITON_INTERPRET", "1")

REGULARIZER = "lightning_prune.scores.regularizer"  # imported when it is needed
# Lightning sets these itself (seed_everything, deterministic=True, on a GPU).
SET_BY_LIGHTNING = {"PL_GLOBAL_SEED", "PL_SEED_WORKERS", "CUBLAS_WORKSPACE_CONFIG", "CUDA_DEVICE_ORDER"}


def _import_torchvision() -> None:
    """Let a torchvision built for another torch be imported: its models need no compiled operator."""
    if find_spec("torchvision") is None:
        return
    try:
        import_module("torchvision")
    except RuntimeError:  # "operator torchvision::nms does not exist"
        for name in ("nms", "qnms"):
            torch.library.define(
                f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
            )
        import_module("torchvision")


_import_torchvision()


def _watched() -> dict[str, Any]:
    """Return the global state that a test must give back."""
    state: dict[str, Any] = {
        name: value
        for name, value in os.environ.items()
        if name.startswith(("CUDA", "PL_")) and name not in SET_BY_LIGHTNING
    }
    return state | {
        "default dtype": torch.get_default_dtype(),
        "default device": torch.get_default_device(),
        "grad mode": torch.is_grad_enabled(),
        "inference mode": torch.is_inference_mode_enabled(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "function modes": _get_current_function_mode_stack(),
        "dispatch modes": _get_current_dispatch_mode_stack(),
    }


@pytest.fixture(autouse=True)
def seed() -> None:
    """Start every test from the same random numbers, whatever ran before it."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def no_leaks() -> Iterator[None]:
    """Fail the test that leaves global state changed; put back what Lightning changes on purpose."""
    environment, watched = dict(os.environ), _watched()
    deterministic = torch.are_deterministic_algorithms_enabled()
    yield
    left = _watched()
    os.environ.clear()
    os.environ.update(environment)
    if torch.are_deterministic_algorithms_enabled() != deterministic:  # the setter imports the compiler
        torch.use_deterministic_algorithms(deterministic)
    torch.set_default_dtype(watched["default dtype"])  # so that one leak fails one test
    torch.set_grad_enabled(watched["grad mode"])
    changed = {
        name: (watched.get(name), left.get(name))
        for name in watched | left
        if watched.get(name) != left.get(name)
    }
    assert not changed, f"the test left global state changed (before, after): {changed}"


@pytest.fixture(params=["torch", "fused", "kernels"])
def every_loop(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Let a test of the regulariser run by PyTorch's operations, by the native loops, and by the kernels."""
    if request.param == "kernels":
        request.getfixturevalue("interpreted_kernels")
    monkeypatch.setitem(
        import_module(REGULARIZER).Regularizer.__init__.__kwdefaults__, "fused", request.param != "torch"
    )
    return str(request.param)


@pytest.fixture
def interpreted_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let Triton's interpreter run the kernels of a GPU on the tensors of a CPU."""
    pytest.importorskip("triton", reason="Triton is published for Linux alone")
    if torch.cuda.is_available():
        pytest.skip("where there is a GPU, the kernels are compiled for it")
    backends = import_module("lightning_prune.scores.backends")
    monkeypatch.setitem(backends.BACKENDS, "cpu", backends.TRITON)


@pytest.fixture
def accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    """Treat the CPU as a device that is not to be waited for."""
    for name in ("scores.regularizer", "scores.inspecting", "scores.launching", "training.gradients"):
        module = import_module(f"lightning_prune.{name}")
        monkeypatch.setattr(module, "answers_at_once", lambda device: False)
