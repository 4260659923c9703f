"""A residual network for small images (He et al., CVPR 2016), batch norm and all.

Shapes: b batch, c channels, h and w height and width.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn.functional import relu

from lightning_prune.errors import OptionError

__all__ = ["ResNet"]


class Block(nn.Module):
    """Add two 3x3 convolutions to what comes in; a 1x1 convolution fits the shortcut where shapes differ.

    Args:
        c_in: Channels that come in, >= 1.
        c_out: Channels that go out, >= 1.
        stride: 1, or 2 to halve height and width.
    """

    def __init__(self, c_in: int, c_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(c_out)
        self.downsample: nn.Module = nn.Identity()
        if stride != 1 or c_in != c_out:
            shortcut = nn.Conv2d(c_in, c_out, 1, stride, bias=False)
            self.downsample = nn.Sequential(shortcut, nn.BatchNorm2d(c_out))

    def forward(self, x: Tensor) -> Tensor:
        """Map [b, c_in, h, w] to [b, c_out, h / stride, w / stride]."""
        y = relu(self.bn1(self.conv1(x)))
        return relu(self.bn2(self.conv2(y)) + self.downsample(x))


class ResNet(nn.Module):
    """Stack stages of residual blocks; every stage after the first halves height and width.

    Args:
        in_channels: Channels of the image, >= 1.
        num_classes: Outputs, >= 1.
        widths: Channels of each stage, each >= 1.
        depth: Blocks per stage, >= 1.

    >>> import torch
    >>> ResNet(widths=(4, 8), depth=1)(torch.zeros(3, 1, 8, 8)).shape
    torch.Size([3, 10])
    """

    def __init__(
        self,
        *,
        in_channels: int = 1,
        num_classes: int = 10,
        widths: Sequence[int] = (32, 64, 128),
        depth: int = 2,
    ) -> None:
        super().__init__()
        if not widths or min(*widths, depth) < 1:
            raise OptionError(
                f"widths={list(widths)} and depth={depth} were asked for: "
                "give one width per stage, all at least 1"
            )
        self.stem = nn.Conv2d(in_channels, widths[0], 3, 1, 1, bias=False)
        self.bn = nn.BatchNorm2d(widths[0])
        stages = [_stage(widths[0], widths[0], depth, stride=1)]
        stages += [_stage(c_in, c_out, depth, stride=2) for c_in, c_out in itertools.pairwise(widths)]
        self.stages = nn.Sequential(*stages)
        self.head = nn.Linear(widths[-1], num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map images [b, in_channels, h, w] to logits [b, num_classes]."""
        y = self.stages(relu(self.bn(self.stem(x))))  # [b, c, h, w]
        logits: Tensor = self.head(y.mean(dim=(2, 3)))
        return logits


def _stage(c_in: int, c_out: int, depth: int, *, stride: int) -> nn.Sequential:
    blocks = [Block(c_in, c_out, stride)]
    blocks += [Block(c_out, c_out, 1) for _ in range(depth - 1)]
    return nn.Sequential(*blocks)
