"""The walk over all weights that are pressed: their sums of squares, and products of them into gradients."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lightning_prune.scores.layout import Block
from lightning_prune.scores.members import answers_at_once, real

__all__ = ["Walk", "grad_of"]

# Elements per chunk: 1 MB of float32, which the cores' own caches hold beside weight and gradient; an
# accelerator wants fewer, larger kernels.
CHUNK_CPU = 1 << 18
CHUNK_DEVICE = 1 << 23


class Walk:
    """Walks block after block by PyTorch's operations.

    Args:
        blocks: As ``plan_blocks`` places them, vectors first; at least one.
        parameters: By name; those that the blocks name lie on one device.
        dtype: Precision of sums and factors.
    """

    def __init__(self, blocks: Sequence[Block], parameters: Mapping[str, Tensor], dtype: torch.dtype) -> None:
        self._parameters, self._dtype = parameters, dtype
        n = sum(b.is_vector for b in blocks)
        self._vectors, self._blocks = blocks[:n], blocks[n:]
        device = parameters[blocks[0].tensor].device if blocks else torch.device("cpu")
        self._device = device
        limit = CHUNK_CPU if answers_at_once(device) else CHUNK_DEVICE
        self._steps = [b.step(limit) for b in self._blocks]
        sizes = (s * math.prod(b.view[1:]) for s, b in zip(self._steps, self._blocks, strict=True))
        self._scratch = max(sizes, default=0)

    def sums(self, *, clean: bool) -> Tensor:
        """Sum squares per position, [positions].

        Args:
            clean: Whether elements that are not finite count as 0.
        """
        parts = []
        if self._vectors:
            joined = torch.cat([self._look(b, clean=clean).flatten() for b in self._vectors])
            parts.append(joined.to(self._dtype).square())
        scratch = self._make_scratch()
        for block, step in zip(self._blocks, self._steps, strict=True):
            parts += block.sums(self._look(block, clean=clean), scratch, step)
        return torch.cat(parts)

    def add(self, flat: Tensor, *, clean: bool) -> None:
        """Add to every gradient its weight times the factors of its positions.

        Args:
            flat: [positions].
            clean: Whether elements that are not finite count as 0.
        """
        targets, updates = self._small_updates(flat, clean=clean)
        scratch = self._make_scratch()
        # Backwards: what the sums have read last may still lie in the cache.
        for block, step in reversed(list(zip(self._blocks, self._steps, strict=True))):
            parameter = self._parameters[block.tensor]
            grad = grad_of(parameter)
            if grad is None:
                continue
            view, factors = self._look(block), block.spread(flat)
            try:
                into = block.look(real(grad))
            except RuntimeError:  # the gradient lies otherwise in memory than its parameter
                targets.append(grad)
                updates.append(torch.zeros_like(parameter))
                into = block.look(real(updates[-1]))
            block.add_scaled(into, view, factors, scratch, step=step, clean=clean)
        if targets:
            torch._foreach_add_(targets, updates)

    def _look(self, block: Block, *, clean: bool = False) -> Tensor:
        view = block.look(real(self._parameters[block.tensor].detach()))
        return view.nan_to_num(0, 0, 0) if clean else view

    def _make_scratch(self) -> Tensor:
        return torch.empty(self._scratch, dtype=self._dtype, device=self._device)

    def _small_updates(self, flat: Tensor, *, clean: bool) -> tuple[list[Tensor], list[Tensor]]:
        """Give the gradients of all vectors and what to add to them, made in one go."""
        if not self._vectors:
            return [], []
        parameters = [self._parameters[b.tensor] for b in self._vectors]
        joined = torch.cat([self._look(b).flatten() for b in self._vectors]).to(self._dtype)
        if clean:
            joined = joined.nan_to_num_(0, 0, 0)
        updates = torch.split(joined.mul_(flat[: len(joined)]), [p.numel() for p in parameters])
        live = [grad_of(p) for p in parameters]
        pairs = [(g, u.view(g.shape)) for g, u in zip(live, updates, strict=True) if g is not None]
        return [g for g, _ in pairs], [u for _, u in pairs]


def grad_of(parameter: Tensor) -> Tensor | None:
    """Give the gradient that may be written to, if there is one."""
    grad = parameter.grad if parameter.requires_grad else None
    return grad if grad is not None and grad.layout == torch.strided else None
