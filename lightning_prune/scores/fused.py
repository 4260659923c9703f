"""Fused: one native loop over a tensor where PyTorch takes several operations, each with a pass of its own.

Sums over rows and over columns come out of one reading, and the gradient is written in one pass without any
coefficients in memory. Numba compiles the loops when they are first used. They serve contiguous tensors of
two axes on a CPU, float32 or float64, which is nearly all that convolutions and linear layers own.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lightning_prune.errors import OptionError
from lightning_prune.scores.layout import PIECES, Block, unrepeat

__all__ = ["add_scaled", "require", "serves", "sums"]

Array: TypeAlias = npt.NDArray[np.floating[Any]]
Loop: TypeAlias = Callable[..., None]
# Sums may be made in another order and with fused multiplications; NaN and infinity stay what they are.
FAST = {"reassoc", "contract", "nsz"}


def require() -> None:
    """See that the loops can be compiled.

    Raises:
        OptionError: If Numba is not installed.
    """
    if find_spec("numba") is None:
        raise OptionError(
            "fused=True needs numba on a CPU, and it is not installed: pip install 'lightning-prune[fused]', "
            "or leave fused=None"
        )


def serves(block: Block, *tensors: Tensor) -> bool:
    """Whether the loops can work on these tensors, seen through ``block.look``."""
    if _compiled.cache_info().currsize and _compiled()[0] != os.getpid():
        return False  # a fork of the process that ran them: its threads are gone, and OpenMP would end it
    first = tensors[0]
    plain = first.device.type == "cpu" and first.dtype in (torch.float32, torch.float64)
    alike = all(t.is_contiguous() and t.dtype == first.dtype and t.device == first.device for t in tensors)
    return plain and alike and len(block.view) == 2 and all(len(s.reduce) == 1 for s in block.slots)


def sums(block: Block, tensor: Tensor) -> list[Tensor]:
    """Do what ``Block.sums`` does, in one reading."""
    columns = tensor.new_empty(PIECES, block.view[1])
    rows = tensor.new_empty(block.view[0])
    _run(0, tensor.numpy(), rows.numpy(), columns.numpy())
    total = columns.sum(0)
    return [unrepeat(total, s.repeat) if s.reduce == (0,) else rows for s in block.slots]


def add_scaled(block: Block, target: Tensor, tensor: Tensor, factors: Sequence[Tensor]) -> None:
    """Do what ``Block.add_scaled`` does for finite elements, in one pass; ``factors`` are from ``spread``."""
    by_row, by_column = tensor.new_zeros(block.view[0]), tensor.new_zeros(block.view[1])
    for slot, factor in zip(block.slots, factors, strict=True):
        (by_column if slot.reduce == (0,) else by_row).add_(factor.flatten())
    _run(1, target.numpy(), tensor.numpy(), by_row.numpy(), by_column.numpy())


def _run(which: int, *arrays: Array) -> None:
    """Run a loop on as many cores as PyTorch may use, which is what it may use afterwards too."""
    _, numba, *loops = _compiled()
    threads = torch.get_num_threads()
    numba.set_num_threads(max(1, min(threads, numba.config.NUMBA_NUM_THREADS)))
    loops[which](*arrays)
    if torch.get_num_threads() != threads:  # Numba's OpenMP pool sets its size for the whole process
        torch.set_num_threads(threads)


@cache
def _compiled() -> tuple[int, Any, Loop, Loop]:
    """Give the process, Numba and the loops, which are typed at their first call."""
    numba = import_module("numba")
    prange = numba.prange

    def square_sums(values: Array, rows: Array, columns: Array) -> None:
        """Sum the squares of each row, and of each column in pieces of rows.

        Four rows at a time: a column's sum is then read and written once for four of its elements.
        """
        height, width = values.shape
        pieces, zero = columns.shape[0], values.dtype.type(0)
        for piece in prange(pieces):
            column = columns[piece]
            column[:] = 0
            r, stop = piece * height // pieces, (piece + 1) * height // pieces
            while r + 4 <= stop:
                first, second, third, fourth = zero, zero, zero, zero
                for c in range(width):
                    a = values[r, c] * values[r, c]
                    b = values[r + 1, c] * values[r + 1, c]
                    d = values[r + 2, c] * values[r + 2, c]
                    e = values[r + 3, c] * values[r + 3, c]
                    column[c] += (a + b) + (d + e)
                    first += a
                    second += b
                    third += d
                    fourth += e
                rows[r], rows[r + 1], rows[r + 2], rows[r + 3] = first, second, third, fourth
                r += 4
            while r < stop:
                first = zero
                for c in range(width):
                    a = values[r, c] * values[r, c]
                    column[c] += a
                    first += a
                rows[r] = first
                r += 1

    def add_products(target: Array, values: Array, by_row: Array, by_column: Array) -> None:
        """Add each element times the sum of its row's and its column's factor."""
        height, width = values.shape
        for r in prange(height):
            factor = by_row[r]
            for c in range(width):
                target[r, c] += values[r, c] * (factor + by_column[c])

    native = numba.njit(parallel=True, fastmath=FAST, nogil=True)
    return os.getpid(), numba, native(square_sums), native(add_products)
