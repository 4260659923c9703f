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
        OptionError: If ``fused`` is True, and the language is not installed or there is none for the device.

    Warns:
        UserWarning: Once per device, if ``fused`` is None and what is installed does not compile.
    """
    backend = BACKENDS.get(device.type)
    if fused is False or device.type == "meta" or (backend is not None and not backend.alive()):
        return None
    if fused is None:
        return backend if backend is not None and _compiles(backend, device) else None
    if backend is None:
        raise OptionError(
            f"fused=True has loops for CPUs and for CUDA and ROCm GPUs, and the weights lie on {device}; "
            "leave fused=None"
        )
    try:
        backend.load()
    except ImportError as error:
        raise OptionError(
            f"fused=True needs {backend.language} for weights on {device}, and it cannot be imported "
            f"({error}): {backend.how}, or leave fused=None"
        ) from error
    return backend


@cache
def _compiles(backend: Backend, device: torch.device) -> bool:
    one = torch.ones(1, device=device)
    try:
        with on(device):
            ends = torch.arange(2, device=device)
            backend.kernels.unit_sums(1, one, one.int() - 1, ends, one.clone(), 1, *backend.sizes.units)
    except Exception as error:  # a missing compiler, an unknown card, a broken installation
        if isinstance(error, ModuleNotFoundError) and not backend.comes_along:
            return False
        reason = str(error).strip().partition("\n")[0]
        warnings.warn(
            f"{backend.language} cannot compile for {device} ({type(error).__name__}: {reason}); PyTorch's "
            "operations press the weights instead, which takes more time. fused=False does so without this "
            "message",
            stacklevel=2,
        )
        return False
    return True


def on(device: torch.device) -> AbstractContextManager[Any]:
    """Launch where the tensors are, which need not be the current device."""
    elsewhere = device.type == "cuda" and device.index != torch.cuda.current_device()
    return torch.cuda.device(device) if elsewhere else nullcontext()
