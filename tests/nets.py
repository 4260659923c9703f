"""Small nets that carry their own expected result.

Each ``Case`` states by hand which dimension of which parameter a ratio of 0.5 cuts, and to what length:
equality, not inclusion, wherever ``whole`` holds. The simple ones state their groups as well.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

Module = TypeVar("Module", bound=nn.Module)
Dim = tuple[str, int]


@dataclass(frozen=True)
class Case:
    """One net with its hand-written expectation.

    Args:
        name: Shown by pytest.
        build: Makes the net; ``make`` seeds and randomises it.
        inputs: Makes the example inputs.
        cut: ``"conv.weight:0=4 ..."``: parameter dimensions that ratio 0.5 cuts, with their new length.
        stay: ``"fc.weight:0 ..."``: dimensions that may never be cut.
        groups: One string of ``tensor:dim`` per group, parameters alone; None = not stated.
        whole: Whether ``cut`` lists every parameter dimension that is cut.
        survivors: For the oracle, norms without weights.
        idle: Whether nothing at all may be cut.
    """

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], Any]
    cut: str = ""
    stay: str = ""
    groups: tuple[str, ...] | None = None
    whole: bool = True
    survivors: Mapping[str, Mapping[int, Dim]] | None = None
    idle: bool = False

    def make(self, seed: int = 0) -> nn.Module:
        """Build the net with random, non-degenerate values, in eval mode."""
        return randomise(self.build(), seed)

    def expected_cut(self) -> dict[Dim, int]:
        """Read ``cut``."""
        table = {}
        for item in self.cut.split():
            at, _, size = item.partition("=")
            table[dim_of(at)] = int(size)
        return table

    def expected_groups(self) -> set[frozenset[Dim]] | None:
        """Read ``groups``."""
        return None if self.groups is None else {frozenset(map(dim_of, g.split())) for g in self.groups}


def dim_of(text: str) -> Dim:
    """Read ``"conv.weight:0"``."""
    name, _, dim = text.rpartition(":")
    return name, int(dim)


@torch.no_grad()
def randomise(model: Module, seed: int) -> Module:
    """Give every parameter and running statistic a value of its own; eval mode."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        noise = torch.randn(p.shape, generator=generator)
        if p.ndim > 1:
            p.copy_(noise * 1.3 / math.sqrt(max(p[0].numel(), 2)))
        elif "bias" in name:
            p.copy_(noise * 0.4)
        else:
            p.copy_(1 + 0.3 * noise)
    for name, b in model.named_buffers():
        if name.endswith("running_mean"):
            b.copy_(torch.randn(b.shape, generator=generator) * 0.4)
        elif name.endswith("running_var"):
            b.copy_(torch.rand(b.shape, generator=generator) + 0.5)
    return model.eval()


def draw(*shape: int, seed: int = 0) -> Tensor:
    """Draw a fixed normal tensor of ``shape``."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def image(channels: int = 3, size: int = 6) -> Tensor:
    """Draw two images, [2, channels, size, size]."""
    return draw(2, channels, size, size)


class Net(nn.Module):
    """Parts and a function of them: ``Net(lambda m, x: m.fc(x), fc=nn.Linear(2, 2))``."""

    def __init__(self, run: Callable[..., Any], **parts: Any) -> None:
        super().__init__()
        self.run = run
        for name, part in parts.items():
            if isinstance(part, Tensor) and not isinstance(part, nn.Parameter):
                self.register_buffer(name, part)
            else:
                setattr(self, name, part)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.run(self, *args, **kwargs)


def param(*shape: int) -> nn.Parameter:
    """Make a bare parameter; ``randomise`` fills it."""
    return nn.Parameter(torch.zeros(shape))


def conv(c_in: int, c_out: int, kernel: int = 3, **options: Any) -> nn.Conv2d:
    """Make a 3x3 convolution that keeps the image size."""
    return nn.Conv2d(c_in, c_out, kernel, **{"padding": kernel // 2, **options})


def case_ids(cases: list[Case]) -> list[str]:
    """List the names, for ``pytest.mark.parametrize(ids=...)``."""
    return [c.name for c in cases]
