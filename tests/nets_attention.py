"""Attention, transformer, gated and language-model cases."""

from __future__ import annotations

import torch
from nets import Case, Net, draw, image, param
from torch import Tensor, nn
from torch.nn import functional

DIM, HEADS, TOKENS = 8, 2, 5


class Separate(nn.Module):
    """Multi-head attention with three projections; ``style`` is how the heads meet."""

    def __init__(self, dim: int = DIM, heads: int = HEADS, style: str = "sdpa") -> None:
        super().__init__()
        self.heads, self.head_dim, self.style = heads, dim // heads, style
        self.scale = self.head_dim**-0.5
        self.q, self.k, self.v = (nn.Linear(dim, dim) for _ in range(3))
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        if self.style == "reshape_c":
            q, k, v = (
                f(x).reshape(b, n, self.heads, c // self.heads).transpose(1, 2)
                for f in (self.q, self.k, self.v)
            )
            out = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, c)
        elif self.style == "einsum":
            q, k, v = (f(x).view(b, n, self.heads, self.head_dim) for f in (self.q, self.k, self.v))
            att = torch.einsum("bihd,bjhd->bhij", q, k).mul(self.scale).softmax(-1)
            out = torch.einsum("bhij,bjhd->bihd", att, v).flatten(2)
        else:
            q, k, v = (f(x).view(b, n, self.heads, -1).transpose(1, 2) for f in (self.q, self.k, self.v))
            heads = self._attend(q, k, v)
            out = (
                heads.permute(0, 2, 3, 1) if self.style == "dims_first" else heads.transpose(1, 2)
            ).flatten(2)
        return self.proj(out)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.style in ("sdpa", "dims_first"):
            return functional.scaled_dot_product_attention(q, k, v)
        scale = q.shape[-1] ** -0.5 if self.style == "live_scale" else self.scale
        return (q @ k.transpose(-2, -1) * scale).softmax(-1) @ v


class Fused(nn.Module):
    """Multi-head attention with one projection for q, k and v; ``style`` is how it is taken apart."""

    def __init__(self, dim: int = DIM, heads: int = HEADS, style: str = "index") -> None:
        super().__init__()
        self.heads, self.dim, self.style = heads, dim, style
        self.scale = (dim // heads) ** -0.5
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        if self.style in ("unbind", "matmul"):
            q, k, v = (
                self.qkv(x).reshape(b, n, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
            )
        elif self.style == "index":
            qkv = self.qkv(x).view(b, n, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
            q, k, v = qkv[0], qkv[1], qkv[2]
        else:
            parts = self.qkv(x).chunk(3, -1) if self.style == "chunk" else self.qkv(x).split(self.dim, -1)
            q, k, v = (t.view(b, n, self.heads, -1).transpose(1, 2) for t in parts)
        if self.style == "matmul":
            out = ((q * self.scale) @ k.mT).softmax(-1) @ v
        else:
            out = functional.scaled_dot_product_attention(q, k, v)
        return self.proj(out.transpose(1, 2).reshape(b, n, -1))


class Torch(nn.Module):
    """``nn.MultiheadAttention`` on itself."""

    def __init__(self, need_weights: bool = False) -> None:
        super().__init__()
        self.mha = nn.MultiheadAttention(DIM, HEADS, batch_first=True)
        self.need_weights = need_weights

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.mha(x, x, x, need_weights=self.need_weights)[0]
        return out


class Vit(nn.Module):
    """Embedding, one pre-norm attention block, an MLP, mean over the tokens, a classifier."""

    def __init__(self, attention: nn.Module, *, post: bool = False) -> None:
        super().__init__()
        self.embed = nn.Linear(6, DIM)
        self.n1, self.n2 = nn.LayerNorm(DIM), nn.LayerNorm(DIM)
        self.att = attention
        self.f1, self.f2 = nn.Linear(DIM, 12), nn.Linear(12, DIM)
        self.fc = nn.Linear(DIM, 3)
        self.post = post

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        if self.post:
            x = self.n1(x + self.att(x))
            x = self.n2(x + self.f2(functional.gelu(self.f1(x))))
        else:
            x = x + self.att(self.n1(x))
            x = x + self.f2(functional.gelu(self.f1(self.n2(x))))
        return self.fc(x.mean(1))


class Patches(nn.Module):
    """A vision transformer from pixels: patch convolution, class token, positions, fused attention."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, DIM, 2, stride=2)
        self.cls = param(1, 1, DIM)
        self.pos = param(1, 10, DIM)
        self.norm = nn.LayerNorm(DIM)
        self.att = Fused()
        self.fc = nn.Linear(DIM, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(x.shape[0], -1, -1), x], 1) + self.pos
        x = x + self.att(self.norm(x))
        return self.fc(x[:, 0])


def _encoder(norm_first: bool) -> nn.Module:
    layer = nn.TransformerEncoderLayer(DIM, HEADS, 12, batch_first=True, norm_first=norm_first)
    return nn.Sequential(nn.Linear(6, DIM), layer, nn.Linear(DIM, 3))


def tokens() -> Tensor:
    """Draw a batch of token features, [2, TOKENS, 6]."""
    return draw(2, TOKENS, 6)


STREAM = (
    "embed.weight:0=4 embed.bias:0=4 n1.weight:0=4 n1.bias:0=4 n2.weight:0=4 n2.bias:0=4"
    " f1.weight:1=4 f2.weight:0=4 f2.bias:0=4"
    " fc.weight:1=4 f1.weight:0=6 f1.bias:0=6 f2.weight:1=6"
)
QKV = " ".join(f"att.{x}.weight:1=4 att.{x}.weight:0=4 att.{x}.bias:0=4" for x in "qkv")
PROJ = "att.proj.weight:0=4 att.proj.weight:1=4 att.proj.bias:0=4"
FUSED = "att.qkv.weight:1=4 att.qkv.weight:0=12 att.qkv.bias:0=12"
MHA = (
    "in_proj_weight:1=4 in_proj_weight:0=12 in_proj_bias:0=12 out_proj.weight:0=4"
    " out_proj.weight:1=4 out_proj.bias:0=4"
)
TAIL = "fc.weight:0 fc.bias:0 embed.weight:1"
MLP_GROUP = "f1.weight:0 f1.bias:0 f2.weight:1"
STREAM_GROUP = (
    "embed.weight:0 embed.bias:0 n1.weight:0 n1.bias:0 n2.weight:0 n2.bias:0 f1.weight:1"
    " f2.weight:0 f2.bias:0 fc.weight:1"
)
SEPARATE_GROUPS = (
    f"{STREAM_GROUP} att.q.weight:1 att.k.weight:1 att.v.weight:1 att.proj.weight:0 att.proj.bias:0",
    MLP_GROUP,
    "att.q.weight:0 att.q.bias:0 att.k.weight:0 att.k.bias:0",
    "att.v.weight:0 att.v.bias:0 att.proj.weight:1",
    "att.q.weight:0 att.q.bias:0 att.k.weight:0 att.k.bias:0 att.v.weight:0 att.v.bias:0 att.proj.weight:1",
)


def _of(prefix: str, text: str) -> str:
    return " ".join(f"{prefix}.{item}" for item in text.split())


ATTENTION_CASES: list[Case] = [
    *(
        Case(
            f"separate_{s}",
            lambda s=s: Vit(Separate(style=s)),
            tokens,
            f"{STREAM} {QKV} {PROJ}",
            TAIL,
            SEPARATE_GROUPS if s in ("sdpa", "matmul") else None,
        )
        for s in ("sdpa", "matmul", "einsum", "reshape_c", "dims_first")
    ),
    Case("separate_live_scale", lambda: Vit(Separate(style="live_scale")), tokens, STREAM, TAIL, whole=False),
    *(
        Case(f"fused_{s}", lambda s=s: Vit(Fused(style=s)), tokens, f"{STREAM} {FUSED} {PROJ}", TAIL)
        for s in ("unbind", "matmul", "index", "chunk", "split")
    ),
    Case("post_norm", lambda: Vit(Separate(), post=True), tokens, f"{STREAM} {QKV} {PROJ}", TAIL),
    Case("multihead_attention", lambda: Vit(Torch()), tokens, f"{STREAM} {_of('att.mha', MHA)}", TAIL),
    Case(
        "multihead_attention_weights",
        lambda: Vit(Torch(need_weights=True)),
        tokens,
        f"{STREAM} {_of('att.mha', MHA)}",
        TAIL,
    ),
    *(
        Case(
            f"encoder_layer_{'pre' if first else 'post'}",
            lambda first=first: _encoder(first),
            tokens,
            f"0.weight:0=4 0.bias:0=4 {_of('1.self_attn', MHA)} 1.linear1.weight:1=4"
            f" 1.linear1.weight:0=6 1.linear1.bias:0=6"
            " 1.linear2.weight:1=6 1.linear2.weight:0=4 1.linear2.bias:0=4 1.norm1.weight:0=4"
            " 1.norm1.bias:0=4 1.norm2.weight:0=4"
            " 1.norm2.bias:0=4 2.weight:1=4",
            "2.weight:0 2.bias:0 0.weight:1",
        )
        for first in (False, True)
    ),
    Case(
        "cross_attention",
        lambda: Net(
            lambda m, x, y: m.fc(m.mha(m.pre(x), m.mem(y), m.mem(y))[0]),
            pre=nn.Linear(6, DIM),
            mem=nn.Linear(5, 6),
            fc=nn.Linear(DIM, 3),
            mha=nn.MultiheadAttention(DIM, HEADS, kdim=6, vdim=6, batch_first=True),
        ),
        lambda: (tokens(), draw(2, 4, 5)),
        "",
        "fc.weight:0 fc.bias:0",
        whole=False,
    ),
    Case(
        "vit_from_pixels",
        Patches,
        image,
        "patch.weight:0=4 patch.bias:0=4 cls:2=4 pos:2=4 norm.weight:0=4 norm.bias:0=4 fc.weight:1=4"
        f" {FUSED} {PROJ}",
        "fc.weight:0 fc.bias:0 patch.weight:1 pos:1",
    ),
]
