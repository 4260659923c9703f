"""One small module for every construct that has broken a pruner; those of the unit tests are used again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from nets import Net, conv, draw, image, param
from nets_attention import ATTENTION_CASES
from nets_conv import CONV_CASES, pool, shuffle
from nets_language import LANGUAGE_CASES
from nets_other import OTHER_CASES
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint
from zoo.cases import ZooCase

_REUSED = [
    "lstm",
    "gru",
    "separate_einsum",
    "separate_reshape_c",
    "separate_dims_first",
    "fused_unbind",
    "cross_attention",
    "multihead_attention",
    "multihead_attention_weights",
    "encoder_layer_pre",
    "encoder_layer_post",
    "weight_norm",
    "spectral_norm",
    "weight_standardised",
    "instance_norm",
    "instance_norm_tracked",
    "prelu",
    "repeat_interleave",
    "roll",
    "roll_add",
    "uneven_chunk",
    "mixed_by_conv",
    "computed_weight",
    "buffers",
    "used_twice",
    "two_outputs",
    "keyword_inputs",
    "outer_residual",
    "channel_shuffle",
    "grouped",
    "transposed_grouped",
    "tied_embedding",
]


def _image_net(run: Callable[..., Tensor], width: int = 16, **parts: Any) -> nn.Module:
    """A stem to 16 channels, ``run`` between, and a classifier of ``width`` channels."""
    return Net(
        lambda m, x: m.fc(pool(run(m, m.stem(x).relu()))), stem=conv(3, 16), fc=nn.Linear(width, 4), **parts
    )


def _encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
    return nn.Sequential(
        nn.Linear(6, 16), nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(16, 3)
    )


def _decoder() -> nn.Module:
    layer = nn.TransformerDecoderLayer(16, 4, 32, batch_first=True)
    return Net(
        lambda m, x, y: m.fc(m.decoder(m.target(x), m.memory(y))),
        target=nn.Linear(6, 16),
        memory=nn.Linear(5, 16),
        decoder=nn.TransformerDecoder(layer, 2),
        fc=nn.Linear(16, 3),
    )


class Bounded(nn.Module):
    """A parametrisation that is computed entry by entry."""

    def forward(self, w: Tensor) -> Tensor:
        return w.tanh()


def _parametrised() -> nn.Module:
    net = nn.Sequential(nn.Linear(5, 16), nn.Tanh(), nn.Linear(16, 3))
    parametrize.register_parametrization(net[0], "weight", Bounded())
    return net


def _old_weight_norm() -> nn.Module:
    norm = torch.nn.utils.parametrizations.weight_norm
    return _image_net(lambda m, x: m.c(x).relu(), c=norm(conv(16, 16), dim=0))


class GroupedStdConv2d(nn.Conv2d):
    """Weight standardisation as BiT and NFNet write it, on a grouped convolution."""

    eps = 1e-6

    def forward(self, x: Tensor) -> Tensor:
        w = functional.batch_norm(
            self.weight.reshape(1, self.out_channels, -1),
            None,
            None,
            training=True,
            momentum=0.0,
            eps=self.eps,
        ).reshape_as(self.weight)
        return functional.conv2d(x, w, self.bias, self.stride, self.padding, self.dilation, self.groups)


def _standardised() -> nn.Module:
    return _image_net(
        lambda m, x: m.after(m.c(x).relu()).relu(),
        c=GroupedStdConv2d(16, 16, 3, padding=1, groups=4),
        after=conv(16, 16),
    )


class Experts(nn.Module):
    """Experts stacked in one parameter, mixed by a router."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(16, 4)
        self.up, self.down = param(4, 16, 32), param(4, 32, 16)

    def forward(self, x: Tensor) -> Tensor:
        share = self.router(x).softmax(-1)  # [b, n, experts]
        hidden = torch.einsum("bnd,edh->bneh", x, self.up).relu()
        return torch.einsum("bneh,ehd,bne->bnd", hidden, self.down, share)


def _experts() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 16), Experts(), nn.Linear(16, 3))


def _ragged_groups() -> nn.Module:
    """Groups of one convolution straddle the parts of a concatenation."""
    return Net(
        lambda m, x: m.fc(pool(m.g(torch.cat([m.a(x), m.b(x)], 1).relu()).relu())),
        a=conv(3, 10),
        b=conv(3, 6),
        g=conv(16, 16, groups=4),
        fc=nn.Linear(16, 4),
    )


def _norm_after_concat() -> nn.Module:
    return Net(
        lambda m, x: m.fc(pool(m.c(m.norm(torch.cat([m.a(x), m.b(x)], 1)).relu()).relu())),
        a=conv(3, 12),
        b=conv(3, 4),
        norm=nn.GroupNorm(4, 16),
        c=conv(16, 16),
        fc=nn.Linear(16, 4),
    )


def _unfolded(m: Any, x: Tensor) -> Tensor:
    columns = functional.unfold(x, 3, padding=1)  # [b, c * 9, positions]
    return functional.fold(columns * 0.5, x.shape[-2:], 3, padding=1)


def _involution(m: Any, x: Tensor) -> Tensor:
    """Every position weighs its own neighbourhood."""
    b, c, h, w = x.shape
    near = functional.unfold(x, 3, padding=1).view(b, c, 9, h * w)
    weights = m.kernel(x).view(b, 1, 9, h * w)
    return (near * weights).sum(2).view(b, c, h, w)


def _space_to_depth(m: Any, x: Tensor) -> Tensor:
    parts = [x[..., i::2, j::2] for j in range(2) for i in range(2)]
    return m.c(torch.cat(parts, 1)).relu()


def _masked() -> nn.Module:
    """A boolean mask and a table of indices as long as the channels."""
    return _image_net(
        lambda m, x: m.c(torch.where(m.mask.view(1, -1, 1, 1), x, x * m.low)).relu(),
        c=conv(16, 16),
        mask=torch.arange(16) % 2 == 0,
        low=draw(1, 16, 1, 1),
    )


def _without_gradient(m: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        frozen = m.a(x).relu()
    return m.b(frozen + x).relu()


@dataclass
class Answer:
    """Outputs by name."""

    logits: Tensor
    features: Tensor


def _dataclass_output() -> nn.Module:
    def run(m: Any, x: Tensor) -> Answer:
        h = m.b(m.a(x).relu()).relu()
        return Answer(m.fc(pool(h)), m.out(h))

    return Net(run, a=conv(3, 16), b=conv(16, 16), fc=nn.Linear(16, 4), out=conv(16, 2))


def _two_axes() -> nn.Module:
    """One Python size names the width of the stream and of what the heads are merged into."""

    def run(m: Any, x: Tensor) -> Tensor:
        x = m.embed(x)
        b, n, c = x.shape
        q, k, v = m.qkv(x).reshape(b, n, 3, 4, c // 4).permute(2, 0, 3, 1, 4)
        att = (q @ k.transpose(-2, -1) * 0.5).softmax(-1)
        y = (att @ v).transpose(1, 2).reshape(b, n, c)
        return m.fc((x + m.proj(y)).mean(1))

    return Net(
        run, embed=nn.Linear(6, 16), qkv=nn.Linear(16, 48), proj=nn.Linear(16, 16), fc=nn.Linear(16, 3)
    )


def _square() -> nn.Module:
    """Two axes happen to have one length: channels and positions."""
    return Net(
        lambda m, x: m.fc(m.mix(m.embed(x).transpose(1, 2).relu()).mean(2)),
        embed=nn.Linear(6, 12),
        mix=nn.Linear(12, 12),
        fc=nn.Linear(12, 3),
    )


def _broadcast_residual() -> nn.Module:
    """A residual of one channel is added to many."""
    return Net(
        lambda m, x: m.fc(pool(m.b((m.a(x) + m.gate(x)).relu()).relu())),
        a=conv(3, 16),
        gate=conv(3, 1),
        b=conv(16, 16),
        fc=nn.Linear(16, 4),
    )


def _tokens() -> Tensor:
    return draw(2, 5, 6)


_OWN: dict[str, tuple[Callable[[], nn.Module], Callable[[], Any]]] = {
    "transformer_encoder": (_encoder, _tokens),
    "transformer_decoder": (_decoder, lambda: (draw(2, 5, 6), draw(2, 4, 5))),
    "parametrize": (_parametrised, lambda: draw(4, 5)),
    "weight_norm_conv": (_old_weight_norm, image),
    "standardised_grouped": (_standardised, image),
    "stacked_experts": (_experts, _tokens),
    "ragged_groups": (_ragged_groups, image),
    "group_norm_after_concat": (_norm_after_concat, image),
    "unfold_fold": (lambda: _image_net(lambda m, x: m.c(_unfolded(m, x)).relu(), c=conv(16, 16)), image),
    "involution": (lambda: _image_net(_involution, kernel=conv(16, 9)), image),
    "space_to_depth": (lambda: _image_net(_space_to_depth, c=conv(64, 16)), image),
    "channel_masks": (_masked, image),
    "checkpointing": (
        lambda: _image_net(
            lambda m, x: checkpoint(lambda y: m.b(m.a(y).relu()).relu(), x, use_reentrant=False) + x,
            a=conv(16, 16),
            b=conv(16, 16),
        ),
        image,
    ),
    "no_grad": (lambda: _image_net(_without_gradient, a=conv(16, 16), b=conv(16, 16)), image),
    "dataclass_output": (_dataclass_output, image),
    "two_axes": (_two_axes, _tokens),
    "square": (_square, lambda: draw(2, 12, 6)),
    "shuffle_of_four": (
        lambda: _image_net(
            lambda m, x: m.b(shuffle(m.a(x).relu(), 4)).relu(),
            a=conv(16, 16, groups=4),
            b=conv(16, 16, groups=4),
        ),
        image,
    ),
    "broadcast_residual": (_broadcast_residual, image),
}

_TINY = {c.name: c for c in (*CONV_CASES, *OTHER_CASES, *ATTENTION_CASES, *LANGUAGE_CASES)}

HARD_OPS = [
    *(ZooCase(f"hard_ops/{name}", _TINY[name].build, _TINY[name].inputs) for name in _REUSED),
    *(ZooCase(f"hard_ops/{name}", build, inputs) for name, (build, inputs) in _OWN.items()),
]
