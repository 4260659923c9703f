"""What presses all weights in a few launches: Triton's kernels on a GPU, Numba's loops on a CPU, one face."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple, TypeAlias

import torch

from lightning_prune.errors import OptionError
from lightning_prune.scores import kernels, loops

__all__ = ["Backend", "Kernels", "Sizes", "backend_for", "on"]

Launch: TypeAlias = Callable[..., None]  # the number of programs, then what ``kernels`` says of each


class Kernels(NamedTuple):
    """What is launched; each is compiled at its first launch."""

    square_sums: Launch
    collect: Launch
    unit_sums: Launch
    press: Launch
    spread: Launch
    add_products: Launch
    find_non_finite: Launch


@dataclass(frozen=True)
class Sizes:
    """How much one program does.

    Args:
        tile: Rows and columns of a tensor that are read together.
        collect: Positions that are added up, and tiles at a time.
        units: Units whose sums are made, and positions at a time.
        group: Units of a group at a time.
        spread: Positions that gammas are spread to.
        inspect: Elements that are looked at.
    """

    tile: tuple[int, int]
    collect: tuple[int, int]
    units: tuple[int, int]
    group: int
    spread: int
    inspect: int


@dataclass(frozen=True)
class Backend:
    """A language, and what to know of it.

    Args:
        language: Its name.
        load: Gives the kernels, in the order of ``Kernels``; raises ImportError if it is not installed.
        dtypes: What tensors may be of.
        sizes: How much one program does.
        alive: Whether it can run in this process.
        how: To get it.
        comes_along: Whether it comes with PyTorch, so that its absence is worth a word.
    """

    language: str
    load: Callable[[], tuple[Launch, ...]]
    dtypes: tuple[torch.dtype, ...]
    sizes: Sizes
    alive: Callable[[], bool]
    how: str
    comes_along: bool

    @property
    def kernels(self) -> Kernels:
        """What is launched."""
        return Kernels(*self.load())


TRITON = Backend(
    language="Triton",
    load=kernels.compiled,
    dtypes=(torch.float32, torch.float64, torch.float16, torch.bfloat16),
    sizes=Sizes(tile=(32, 128), collect=(64, 16), units=(16, 16), group=1024, spread=128, inspect=4096),
    alive=lambda: True,
    how="it comes with PyTorch's builds for GPUs on Linux; install it",
    comes_along=True,
)
NUMBA = Backend(
    language="Numba",
    load=loops.compiled,
    dtypes=(torch.float32, torch.float64),
    # A tile of 1 MB whose rows are long: the cores fetch ahead along them.
    sizes=Sizes(tile=(64, 4096), collect=(4096, 1), units=(4096, 1), group=1, spread=4096, inspect=1 << 16),
    alive=loops.alive,
    how="pip install 'lightning-prune[fused]'",
    comes_along=False,
)
BACKENDS = {"cuda": TRITON, "cpu": NUMBA}  # PyTorch's ROCm builds say cuda too


def backend_for(device: torch.device, *, fused: bool | None) -> Backend | None:
    """Say what presses the weights on a device; None is PyTorch.

    Args:
        device: Where the tensors are.
        fused: False is PyTorch; None is what is installed and compiles there.

    Raises:
        OptionError: If ``fused`` is True, and the language does not run there or there is none for it.

    Warns:
        UserWarning: Once per device, if ``fused`` is None and what is installed does not run.
    """
    backend = BACKENDS.get(device.type)
    if fused is False or device.type == "meta" or (backend is not None and not backend.alive()):
        return None
    if backend is None:
        if fused is None:
            return None
        raise OptionError(
            f"fused=True has loops for CPUs and for CUDA and ROCm GPUs, and the weights lie on {device}; "
            "leave fused=None"
        )
    error = _failure(backend, device)
    if error is None:
        return backend
    if fused:
        raise OptionError(
            f"fused=True needs {backend.language} for weights on {device}, and it does not run there "
            f"({_in_short(error)}): {backend.how}, or leave fused=None"
        ) from error
    if backend.comes_along or not isinstance(error, ModuleNotFoundError):
        _warn(backend, device, _in_short(error))
    return None


@cache
def _failure(backend: Backend, device: torch.device) -> Exception | None:
    """Compile and run the smallest kernel that looks at memory by its address; give what went wrong."""
    try:
        find = backend.kernels.find_non_finite
        one, count = torch.ones(1, device=device), torch.ones(1, dtype=torch.int64, device=device)
        where = torch.tensor([one.data_ptr()], dtype=torch.int64, device=device)
        tiles = torch.zeros(1, 2, dtype=torch.int32, device=device)
        flags = torch.zeros(2, dtype=torch.uint8, device=device)
        with on(device):
            find(1, where, count, count - 1, tiles, flags, 1, one[:0], backend.sizes.inspect)
    except Exception as error:  # not installed, a missing compiler, an unknown card, a broken installation
        return error
    return None


def _in_short(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


@cache
def _warn(backend: Backend, device: torch.device, reason: str) -> None:
    warnings.warn(
        f"{backend.language} does not run on {device} ({reason}); PyTorch's operations press the weights "
        "instead, which takes more time. fused=False does so without this message",
        stacklevel=3,
    )


def on(device: torch.device) -> AbstractContextManager[Any]:
    """Launch where the tensors are, which need not be the current device."""
    elsewhere = device.type == "cuda" and device.index != torch.cuda.current_device()
    return torch.cuda.device(device) if elsewhere else nullcontext()
