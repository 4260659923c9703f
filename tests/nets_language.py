"""Language-model, gated and channels-last cases, and norms written by hand."""

from __future__ import annotations

import torch
from nets import Case, Net, conv, draw, image, param
from nets_attention import DIM, MLP_GROUP
from oracle import Masks, SurvivorLayerNorm, register_survivor
from torch import Tensor, nn
from torch.nn import functional


class RMSNorm(nn.Module):
    """Root mean square norm as language models write it."""

    def __init__(self, dim: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps))


def _survivor_rms(norm: nn.Module, masks: Masks) -> nn.Module:
    assert isinstance(norm, RMSNorm)
    return SurvivorLayerNorm(norm, masks[0], eps=norm.eps, centred=False)


register_survivor(RMSNorm, _survivor_rms)


class StandardConv(nn.Conv2d):
    """Convolution with weight standardisation, statistics over a filter's inputs."""

    keep: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        w = self.weight
        if self.keep is None:
            mean, var = w.mean((1, 2, 3), keepdim=True), w.var((1, 2, 3), keepdim=True, unbiased=False)
            w = (w - mean) / torch.sqrt(var + 1e-5)
        else:
            keep = self.keep.to(w.device).double().view(1, -1, 1, 1).expand_as(w)
            n = keep.sum((1, 2, 3), keepdim=True)
            mean = (w * keep).sum((1, 2, 3), keepdim=True) / n
            var = ((w - mean).square() * keep).sum((1, 2, 3), keepdim=True) / n
            w = (w - mean) / torch.sqrt(var + 1e-5) * keep
        return functional.conv2d(x, w, self.bias, self.stride, self.padding)


def _survivor_standard(layer: nn.Module, masks: Masks) -> nn.Module:
    assert isinstance(layer, StandardConv)
    layer.keep = masks.get(1)
    return layer


register_survivor(StandardConv, _survivor_standard)


class Llama(nn.Module):
    """Tied embedding, one block of grouped-query attention with rotary positions, SwiGLU, RMS norms."""

    def __init__(
        self, vocabulary: int = 11, dim: int = DIM, heads: int = 4, kv_heads: int = 2, head_dim: int = 4
    ) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, head_dim
        self.embed = nn.Embedding(vocabulary, dim)
        self.n1, self.n2, self.n3 = RMSNorm(dim), RMSNorm(dim), RMSNorm(dim)
        self.q = nn.Linear(dim, heads * head_dim, bias=False)
        self.k = nn.Linear(dim, kv_heads * head_dim, bias=False)
        self.v = nn.Linear(dim, kv_heads * head_dim, bias=False)
        self.o = nn.Linear(heads * head_dim, dim, bias=False)
        self.gate, self.up, self.down = (nn.Linear(*s, bias=False) for s in ((dim, 12), (dim, 12), (12, dim)))
        self.head = nn.Linear(dim, vocabulary, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("inv_freq", 1.0 / (100.0 ** (torch.arange(0, head_dim, 2).float() / head_dim)))

    def _rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        a, b = x.chunk(2, dim=-1)
        return x * cos + torch.cat((-b, a), dim=-1) * sin

    def _repeat(self, x: Tensor) -> Tensor:
        b, h, n, d = x.shape
        times = self.heads // self.kv_heads
        return x[:, :, None].expand(b, h, times, n, d).reshape(b, h * times, n, d)

    def _attend(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q = self.q(x).view(b, n, self.heads, self.head_dim).transpose(1, 2)
        k = self.k(x).view(b, n, self.kv_heads, self.head_dim).transpose(1, 2)
        v = self.v(x).view(b, n, self.kv_heads, self.head_dim).transpose(1, 2)
        angle = (
            torch.arange(n, device=x.device).to(self.inv_freq)[:, None] * self.inv_freq[None]
        )  # [n, d / 2]
        angle = torch.cat((angle, angle), dim=-1)
        cos, sin = angle.cos(), angle.sin()
        q, k = self._rotate(q, cos, sin), self._rotate(k, cos, sin)
        y = functional.scaled_dot_product_attention(q, self._repeat(k), self._repeat(v), is_causal=True)
        out: Tensor = self.o(y.transpose(1, 2).reshape(b, n, -1))
        return out

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        x = x + self._attend(self.n1(x))
        y = self.n2(x)
        x = x + self.down(functional.silu(self.gate(y)) * self.up(y))
        out: Tensor = self.head(self.n3(x))
        return out


class ConvNext(nn.Module):
    """Channels-last block: depthwise convolution, LayerNorm, MLP, layer scale, residual."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, DIM)
        self.dw = conv(DIM, DIM, groups=DIM)
        self.norm = nn.LayerNorm(DIM)
        self.f1, self.f2 = nn.Linear(DIM, 12), nn.Linear(12, DIM)
        self.gamma = param(DIM)
        self.fc = nn.Linear(DIM, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.norm(self.dw(x).permute(0, 2, 3, 1))
        y = self.gamma * self.f2(functional.gelu(self.f1(y)))
        return self.fc((x + y.permute(0, 3, 1, 2)).mean((-2, -1)))


def _tied() -> nn.Module:
    net = Net(
        lambda m, ids: m.head(m.f2(m.f1(m.embed(ids)).tanh())),
        embed=nn.Embedding(11, DIM),
        f1=nn.Linear(DIM, 12),
        f2=nn.Linear(12, DIM),
        head=nn.Linear(DIM, 11, bias=False),
    )
    net.head.weight = net.embed.weight
    return net


def _glu(kind: str) -> nn.Module:
    def run(m: Net, x: Tensor) -> Tensor:
        x = m.f1(x)
        if kind == "chunk":
            a, b = x.chunk(2, dim=-1)
            x = a * b.sigmoid()
        else:
            x = functional.glu(x)
        out: Tensor = m.f2(x)
        return out

    return Net(run, f1=nn.Linear(6, 16), f2=nn.Linear(8, 4))


def ids() -> Tensor:
    """Draw token ids, [2, TOKENS]."""
    return torch.tensor([[1, 4, 2, 9, 7], [3, 3, 0, 10, 5]])


LANGUAGE_CASES: list[Case] = [
    Case(
        "llama_block",
        Llama,
        ids,
        "embed.weight:1=4 n1.weight:0=4 n2.weight:0=4 n3.weight:0=4 q.weight:1=4 k.weight:1=4"
        " v.weight:1=4 o.weight:0=4 gate.weight:1=4"
        " up.weight:1=4 down.weight:0=4 gate.weight:0=6 up.weight:0=6 down.weight:1=6"
        " q.weight:0=8 k.weight:0=4 v.weight:0=4"
        " o.weight:1=8",
        "embed.weight:0",
    ),
    Case(
        "convnext_block",
        ConvNext,
        image,
        "stem.weight:0=4 stem.bias:0=4 dw.weight:0=4 dw.bias:0=4 norm.weight:0=4 norm.bias:0=4"
        " f1.weight:1=4 f1.weight:0=6 f1.bias:0=6"
        " f2.weight:1=6 f2.weight:0=4 f2.bias:0=4 gamma:0=4 fc.weight:1=4",
        "fc.weight:0 fc.bias:0",
        (
            "stem.weight:0 stem.bias:0 dw.weight:0 dw.bias:0 norm.weight:0 norm.bias:0"
            " f1.weight:1 f2.weight:0 f2.bias:0 gamma:0 fc.weight:1",
            MLP_GROUP,
        ),
    ),
    Case(
        "weight_standardised",
        lambda: nn.Sequential(StandardConv(3, 8, 3), nn.ReLU(), StandardConv(8, 4, 3)),
        image,
        "0.weight:0=4 0.bias:0=4 2.weight:1=4",
        "2.weight:0 0.weight:1",
    ),
    *(
        Case(
            f"glu_{kind}",
            lambda kind=kind: _glu(kind),
            lambda: draw(4, 6),
            "f1.weight:0=8 f1.bias:0=8 f2.weight:1=4",
            "f2.weight:0",
            (MLP_GROUP,),
        )
        for kind in ("chunk", "functional")
    ),
    Case(
        "swiglu",
        lambda: Net(
            lambda m, x: m.down(functional.silu(m.gate(x)) * m.up(x)),
            gate=nn.Linear(6, 8),
            up=nn.Linear(6, 8),
            down=nn.Linear(8, 4),
        ),
        lambda: draw(4, 6),
        "gate.weight:0=4 gate.bias:0=4 up.weight:0=4 up.bias:0=4 down.weight:1=4",
        "down.weight:0",
        ("gate.weight:0 gate.bias:0 up.weight:0 up.bias:0 down.weight:1",),
    ),
    Case(
        "tied_embedding",
        _tied,
        ids,
        "embed.weight:1=4 f1.weight:1=4 f2.weight:0=4 f2.bias:0=4 f1.weight:0=6 f1.bias:0=6 f2.weight:1=6",
        "embed.weight:0",
        ("embed.weight:1 f1.weight:1 f2.weight:0 f2.bias:0", MLP_GROUP),
    ),
]
