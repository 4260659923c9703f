"""What a case of the zoo is, and how its weights are made non-degenerate."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class ZooCase:
    """One architecture, built from nothing with random weights.

    Args:
        name: ``library/architecture``.
        build: Makes the module; nothing is downloaded.
        inputs: Makes the example inputs: a tensor, a tuple or a dict of keyword arguments.
        train_inputs: Makes the inputs of the gradient check, where training needs others (targets).
        options: Options of the pruner beyond the ratio; the cases of the zoo proper have none.
        counts: Whether dimension 0 of the outputs counts what was found, which the weights decide.
        generates: Whether ``generate()`` has to run after the cut.
        shapes: Shapes after the cut, by hand: which sizes really go, and that nothing else does.
    """

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], Any]
    train_inputs: Callable[[], Any] | None = None
    options: dict[str, Any] = field(default_factory=dict)
    counts: bool = False
    generates: bool = False
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)


@torch.no_grad()
def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give every parameter and running statistic a value of its own, of order one; eval mode.

    Libraries initialise norms to one, biases and layer scales to zero: a wrong cut may not show on those.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        if p.ndim == 0:
            continue  # temperatures and logit scales have a meaning of their own
        noise = torch.randn(p.shape, generator=generator)
        if p.ndim > 1:
            p.copy_(noise / math.sqrt(max(p[0].numel(), 2)))
        elif "bias" in name or "beta" in name:
            p.copy_(noise * 0.2)
        else:
            p.copy_(1 + 0.2 * noise)
    for name, b in model.named_buffers():
        if name.endswith("running_mean"):
            b.copy_(torch.randn(b.shape, generator=generator) * 0.2)
        elif name.endswith("running_var"):
            b.copy_(torch.rand(b.shape, generator=generator) + 0.5)
    return model.eval()


def draw(*shape: int, seed: int = 0) -> Tensor:
    """Draw a fixed normal tensor of ``shape``."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def tokens(vocabulary: int, length: int = 7, batch: int = 2) -> Tensor:
    """Draw fixed token ids, [batch, length], none of them one of the first few (padding, start, end)."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(5, vocabulary, (batch, length), generator=generator)
