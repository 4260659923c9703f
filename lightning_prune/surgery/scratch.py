"""Memory that large intermediate results pass through, one after the other."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

__all__ = ["Scratch"]

LEAST = 1 << 15  # elements: below it fresh memory costs nothing


class Scratch:
    """The same memory for every intermediate result: on a CPU, fresh pages cost more than what fills them.

    >>> scratch, x = Scratch(), torch.ones(300, 300)
    >>> square = torch.square(x, out=scratch.room(x.shape, x))
    >>> double = torch.add(x, x, out=scratch.room(x.shape, x))
    >>> square.data_ptr() == double.data_ptr()
    True
    """

    def __init__(self) -> None:
        self._memory: dict[tuple[torch.dtype, torch.device], Tensor] = {}

    def room(self, shape: Sequence[int], like: Tensor) -> Tensor | None:
        """Give memory of a shape, of the type and device of ``like``; it is good until the next call.

        None where it would not pay, or a plain tensor would not do: ``out=None`` makes a new one.
        """
        count = prod(shape)
        if count < LEAST or type(like) is not Tensor or like.layout != torch.strided or like.is_meta:
            return None
        key = (like.dtype, like.device)
        if key not in self._memory or self._memory[key].numel() < count:
            self._memory.pop(key, None)  # first free, then take more
            self._memory[key] = torch.empty(count, dtype=like.dtype, device=like.device)
        return self._memory[key][:count].view(tuple(shape))
