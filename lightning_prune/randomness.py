"""Random numbers that are drawn on the side, and that nobody misses."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

__all__ = ["randomness_kept", "used_gpus"]


def used_gpus() -> list[int]:
    """Give the numbers of all GPUs, none where nobody has used one yet.

    Then a seed may wait there, which whatever touches the random numbers would replace for good.
    """
    is_used = bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call]
    return list(range(torch.cuda.device_count())) if is_used else []


@contextmanager
def randomness_kept() -> Iterator[None]:
    """Give the random states of Python, NumPy and PyTorch back as they were; wakes no GPU.

    >>> with randomness_kept():
    ...     inside = torch.rand(3)
    >>> torch.equal(torch.rand(3), inside)
    True
    """
    drawn, drawn_by_numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=used_gpus()):
            yield
    finally:
        random.setstate(drawn)
        np.random.set_state(drawn_by_numpy)
