"""A vision transformer for small images (Dosovitskiy et al., ICLR 2021), pre-norm, mean pooled.

One convolution before the patches lets it learn from a thousand images (Xiao et al., NeurIPS 2021).

Shapes: b batch, n tokens, d width of the token stream, h heads, e width of one head.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, relu, scaled_dot_product_attention

from lightning_prune.errors import OptionError

__all__ = ["ViT"]


class Attention(nn.Module):
    """Let every token look at every other, with q, k and v from one linear layer.

    Args:
        dim: Width d of the tokens, >= 1.
        num_heads: Heads h, >= 1.
        head_dim: Width e of one head, >= 1.
    """

    def __init__(self, dim: int, num_heads: int, head_dim: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.head_dim = head_dim
        self.scale = head_dim**-0.5
        self.qkv = nn.Linear(dim, 3 * num_heads * head_dim)
        self.proj = nn.Linear(num_heads * head_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens [b, n, d] to [b, n, d]."""
        b, n, _ = x.shape
        qkv = self.qkv(x).reshape(b, n, 3, self.num_heads, self.head_dim)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # [b, h, n, e] each
        y = scaled_dot_product_attention(q, k, v, scale=self.scale)  # [b, h, n, e]
        out: Tensor = self.proj(y.transpose(1, 2).flatten(2))
        return out


class Block(nn.Module):
    """Attention, then a two-layer perceptron, each after a layer norm and added to the stream.

    Args:
        dim: Width d of the tokens, >= 1.
        num_heads: Heads, >= 1.
        head_dim: Width of one head, >= 1.
        mlp_dim: Width inside the perceptron, >= 1.
    """

    def __init__(self, dim: int, num_heads: int, head_dim: int, mlp_dim: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = Attention(dim, num_heads, head_dim)
        self.norm2 = nn.LayerNorm(dim)
        self.fc1 = nn.Linear(dim, mlp_dim)
        self.fc2 = nn.Linear(mlp_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens [b, n, d] to [b, n, d]."""
        x = x + self.attn(self.norm1(x))
        update: Tensor = self.fc2(gelu(self.fc1(self.norm2(x))))
        return x + update


class ViT(nn.Module):
    """Cut an image into patches and let a transformer read them as tokens.

    Args:
        image_size: Height and width of the image in pixels, a multiple of patch_size.
        patch_size: Height and width of one patch in pixels, >= 1.
        in_channels: Channels of the image, >= 1.
        num_classes: Outputs, >= 1.
        dim: Width of the token stream, a multiple of num_heads.
        depth: Blocks, >= 1.
        num_heads: Heads per block, >= 1; each is dim / num_heads wide.
        mlp_dim: Width inside each perceptron, >= 1.

    >>> ViT(dim=8, depth=1, num_heads=2, mlp_dim=16)(torch.zeros(3, 1, 8, 8)).shape
    torch.Size([3, 10])
    """

    def __init__(
        self,
        *,
        image_size: int = 8,
        patch_size: int = 2,
        in_channels: int = 1,
        num_classes: int = 10,
        dim: int = 128,
        depth: int = 3,
        num_heads: int = 4,
        mlp_dim: int = 256,
    ) -> None:
        super().__init__()
        if patch_size < 1 or image_size % patch_size:
            raise OptionError(
                f"patch_size={patch_size} was asked for: it must divide image_size={image_size} without rest"
            )
        if min(dim // 2, depth, num_heads, mlp_dim) < 1 or dim % num_heads:
            raise OptionError(
                f"dim={dim}, depth={depth}, num_heads={num_heads} and mlp_dim={mlp_dim} were asked for: "
                "all must be at least 1, dim at least 2, and num_heads must divide dim"
            )
        self.stem = nn.Conv2d(in_channels, dim // 2, 3, 1, 1)
        self.patches = nn.Conv2d(dim // 2, dim, patch_size, patch_size)
        self.position = nn.Parameter(torch.empty(1, (image_size // patch_size) ** 2, dim))  # [1, n, d]
        nn.init.trunc_normal_(self.position, std=0.02)
        self.blocks = nn.Sequential(*[Block(dim, num_heads, dim // num_heads, mlp_dim) for _ in range(depth)])
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map images [b, in_channels, image_size, image_size] to logits [b, num_classes]."""
        tokens = self.patches(relu(self.stem(x))).flatten(2).transpose(1, 2) + self.position  # [b, n, d]
        logits: Tensor = self.head(self.norm(self.blocks(tokens)).mean(dim=1))
        return logits
