"""Convolutional and fully connected cases."""

from __future__ import annotations

import torch
from nets import Case, Net, conv, draw, image
from torch import Tensor, nn
from torch.nn import functional

TAIL = "fc.weight:0 fc.bias:0"


def pool(x: Tensor) -> Tensor:
    """Average over the image."""
    return x.mean((2, 3))


def _plain() -> nn.Module:
    return Net(
        lambda m, x: m.fc(pool(m.c2(m.bn(m.c1(x)).relu()).relu())),
        c1=conv(3, 8),
        bn=nn.BatchNorm2d(8),
        c2=conv(8, 6),
        fc=nn.Linear(6, 4),
    )


def _residual() -> nn.Module:
    def run(m: Net, x: Tensor) -> Tensor:
        x = m.stem(x).relu()
        y = m.b2(m.c2(m.b1(m.c1(x)).relu()))
        x = (y + m.db(m.down(x))).relu()
        x = (m.c4(m.c3(x).relu()) + x).relu()
        out: Tensor = m.fc(pool(x))
        return out

    return Net(
        run,
        stem=conv(3, 8),
        c1=conv(8, 10, stride=2, bias=False),
        b1=nn.BatchNorm2d(10),
        c2=conv(10, 12, bias=False),
        b2=nn.BatchNorm2d(12),
        down=conv(8, 12, 1, stride=2, bias=False),
        db=nn.BatchNorm2d(12),
        c3=conv(12, 14),
        c4=conv(14, 12),
        fc=nn.Linear(12, 4),
    )


def _dense_concat() -> nn.Module:
    def run(m: Net, x: Tensor) -> Tensor:
        a = m.c1(x).relu()
        b = m.c2(a).relu()
        c = m.c3(torch.cat([a, b], 1)).relu()
        out: Tensor = m.fc(pool(torch.cat((a, b, c), dim=1)))
        return out

    return Net(run, c1=conv(3, 6), c2=conv(6, 4), c3=conv(10, 8), fc=nn.Linear(18, 4))


def _se() -> nn.Module:
    def run(m: Net, x: Tensor) -> Tensor:
        x = m.bn(m.c1(x)).relu()
        gate = m.s2(m.s1(functional.adaptive_avg_pool2d(x, 1)).relu()).sigmoid()
        out: Tensor = m.fc(pool(m.c2(x * gate)))
        return out

    return Net(
        run,
        c1=conv(3, 8),
        bn=nn.BatchNorm2d(8),
        s1=conv(8, 4, 1),
        s2=conv(4, 8, 1),
        c2=conv(8, 6),
        fc=nn.Linear(6, 4),
    )


def shuffle(x: Tensor, groups: int) -> Tensor:
    """Shuffle channels as ShuffleNet does."""
    n, c, h, w = x.shape
    return x.view(n, groups, c // groups, h, w).transpose(1, 2).reshape(n, c, h, w)


def _shuffle() -> nn.Module:
    return Net(
        lambda m, x: m.fc(pool(m.g2(m.dw(shuffle(m.g1(m.c0(x).relu()).relu(), 2))).relu())),
        c0=conv(3, 8),
        g1=conv(8, 8, 1, groups=2),
        dw=conv(8, 8, groups=8),
        g2=conv(8, 8, 1, groups=2),
        fc=nn.Linear(8, 4),
    )


def _twice() -> nn.Module:
    return Net(
        lambda m, x: m.fc(pool(m.c2(m.c2(m.c1(x)).relu()).relu())),
        c1=conv(3, 8),
        c2=conv(8, 8),
        fc=nn.Linear(8, 4),
    )


def _normed(norm: nn.Module) -> nn.Module:
    return Net(
        lambda m, x: m.fc(pool(m.c2(m.norm(m.c1(x))).relu())),
        c1=conv(3, 8),
        norm=norm,
        c2=conv(8, 6),
        fc=nn.Linear(6, 4),
    )


C1 = "c1.weight:0=4 c1.bias:0=4"
C2 = "c2.weight:1=4 c2.weight:0=3 c2.bias:0=3 fc.weight:1=3"
G1 = "c1.weight:0 c1.bias:0"
G2 = "c2.weight:0 c2.bias:0 fc.weight:1"
NORM = "norm.weight:0=4 norm.bias:0=4"

CONV_CASES: list[Case] = [
    Case(
        "plain",
        _plain,
        image,
        f"{C1} bn.weight:0=4 bn.bias:0=4 {C2}",
        TAIL,
        (f"{G1} bn.weight:0 bn.bias:0 c2.weight:1", G2),
    ),
    Case(
        "mlp",
        lambda: nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3)),
        lambda: draw(4, 5),
        "0.weight:0=4 0.bias:0=4 2.weight:1=4 2.weight:0=3 2.bias:0=3 4.weight:1=3",
        "4.weight:0 0.weight:1",
        ("0.weight:0 0.bias:0 2.weight:1", "2.weight:0 2.bias:0 4.weight:1"),
    ),
    Case(
        "residual",
        _residual,
        image,
        "stem.weight:0=4 stem.bias:0=4 c1.weight:1=4 down.weight:1=4 c1.weight:0=5"
        " b1.weight:0=5 b1.bias:0=5 c2.weight:1=5"
        " c2.weight:0=6 b2.weight:0=6 b2.bias:0=6 down.weight:0=6 db.weight:0=6 db.bias:0=6"
        " c3.weight:1=6 c4.weight:0=6"
        " c4.bias:0=6 fc.weight:1=6 c3.weight:0=7 c3.bias:0=7 c4.weight:1=7",
        TAIL,
        (
            "stem.weight:0 stem.bias:0 c1.weight:1 down.weight:1",
            "c1.weight:0 b1.weight:0 b1.bias:0 c2.weight:1",
            "c2.weight:0 b2.weight:0 b2.bias:0 down.weight:0 db.weight:0 db.bias:0 c3.weight:1"
            " c4.weight:0 c4.bias:0 fc.weight:1",
            "c3.weight:0 c3.bias:0 c4.weight:1",
        ),
    ),
    Case(
        "dense_concat",
        _dense_concat,
        image,
        "c1.weight:0=3 c1.bias:0=3 c2.weight:1=3 c2.weight:0=2 c2.bias:0=2 c3.weight:1=5"
        " c3.weight:0=4 c3.bias:0=4 fc.weight:1=9",
        TAIL,
        (
            "c1.weight:0 c1.bias:0 c2.weight:1 c3.weight:1 fc.weight:1",
            "c2.weight:0 c2.bias:0 c3.weight:1 fc.weight:1",
            "c3.weight:0 c3.bias:0 fc.weight:1",
        ),
    ),
    Case(
        "depthwise",
        lambda: Net(
            lambda m, x: m.fc(pool(m.c2(m.dw(m.c1(x).relu())))),
            c1=conv(3, 8),
            dw=conv(8, 8, groups=8),
            c2=conv(8, 6),
            fc=nn.Linear(6, 4),
        ),
        image,
        f"{C1} dw.weight:0=4 dw.bias:0=4 {C2}",
        TAIL,
        (f"{G1} dw.weight:0 dw.bias:0 c2.weight:1", G2),
    ),
    Case(
        "depthwise_multiplier",
        lambda: Net(
            lambda m, x: m.fc(pool(m.c2(m.dw(m.c1(x).relu())))),
            c1=conv(3, 8),
            dw=conv(8, 16, groups=8),
            c2=conv(16, 6),
            fc=nn.Linear(6, 4),
        ),
        image,
        C1,
        TAIL,
        whole=False,
    ),
    Case(
        "grouped",
        lambda: Net(
            lambda m, x: m.fc(pool(m.c2(m.g(m.c1(x).relu()).relu()))),
            c1=conv(3, 8),
            g=conv(8, 8, groups=2),
            c2=conv(8, 6),
            fc=nn.Linear(6, 4),
        ),
        image,
        f"{C1} g.weight:1=2 g.weight:0=4 g.bias:0=4 {C2}",
        TAIL,
        (f"{G1} g.weight:1", "g.weight:0 g.bias:0 c2.weight:1", G2),
    ),
    Case(
        "se",
        _se,
        image,
        f"{C1} bn.weight:0=4 bn.bias:0=4 s1.weight:1=4 s1.weight:0=2 s1.bias:0=2 s2.weight:1=2"
        f" s2.weight:0=4 s2.bias:0=4 {C2}",
        TAIL,
        (
            f"{G1} bn.weight:0 bn.bias:0 s1.weight:1 s2.weight:0 s2.bias:0 c2.weight:1",
            "s1.weight:0 s1.bias:0 s2.weight:1",
            G2,
        ),
    ),
    Case(
        "channel_shuffle",
        _shuffle,
        image,
        "c0.weight:0=4 c0.bias:0=4 g1.weight:1=2 g1.weight:0=4 g1.bias:0=4 dw.weight:0=4"
        " dw.bias:0=4 g2.weight:1=2 g2.weight:0=4"
        " g2.bias:0=4 fc.weight:1=4",
        TAIL,
    ),
    Case(
        "flatten",
        lambda: Net(
            lambda m, x: m.fc(m.l1(m.c1(x).relu().flatten(1)).relu()),
            c1=conv(3, 6),
            l1=nn.Linear(6 * 16, 8),
            fc=nn.Linear(8, 3),
        ),
        lambda: image(3, 4),
        "c1.weight:0=3 c1.bias:0=3 l1.weight:1=48 l1.weight:0=4 l1.bias:0=4 fc.weight:1=4",
        TAIL,
        (f"{G1} l1.weight:1", "l1.weight:0 l1.bias:0 fc.weight:1"),
    ),
    Case(
        "pixel_shuffle",
        lambda: Net(
            lambda m, x: m.fc(pool(m.c2(functional.pixel_shuffle(m.c1(x), 2)).relu())),
            c1=conv(3, 16),
            c2=conv(4, 6),
            fc=nn.Linear(6, 4),
        ),
        image,
        "c1.weight:0=8 c1.bias:0=8 c2.weight:1=2 c2.weight:0=3 c2.bias:0=3 fc.weight:1=3",
        TAIL,
        (f"{G1} c2.weight:1", G2),
    ),
    Case(
        "transposed",
        lambda: Net(
            lambda m, x: m.fc(pool(m.t(m.c1(x).relu()).relu())),
            c1=conv(3, 8),
            t=nn.ConvTranspose2d(8, 6, 2, stride=2),
            fc=nn.Linear(6, 4),
        ),
        image,
        f"{C1} t.weight:0=4 t.weight:1=3 t.bias:0=3 fc.weight:1=3",
        TAIL,
        (f"{G1} t.weight:0", "t.weight:1 t.bias:0 fc.weight:1"),
    ),
    Case(
        "transposed_grouped",
        lambda: Net(
            lambda m, x: m.fc(pool(m.t(m.c1(x).relu()).relu())),
            c1=conv(3, 8),
            t=nn.ConvTranspose2d(8, 8, 2, stride=2, groups=2),
            fc=nn.Linear(8, 4),
        ),
        image,
        f"{C1} t.weight:0=4 t.weight:1=2 t.bias:0=4 fc.weight:1=4",
        TAIL,
    ),
    Case(
        "prelu",
        lambda: _normed(nn.PReLU(8)),
        image,
        f"{C1} norm.weight:0=4 {C2}",
        TAIL,
        (f"{G1} norm.weight:0 c2.weight:1", G2),
    ),
    Case(
        "group_norm",
        lambda: _normed(nn.GroupNorm(2, 8)),
        image,
        f"{C1} {NORM} {C2}",
        TAIL,
        (f"{G1} norm.weight:0 norm.bias:0 c2.weight:1", G2),
    ),
    Case(
        "instance_norm", lambda: _normed(nn.InstanceNorm2d(8, affine=True)), image, f"{C1} {NORM} {C2}", TAIL
    ),
    Case(
        "instance_norm_tracked",
        lambda: _normed(nn.InstanceNorm2d(8, track_running_stats=True)),
        image,
        f"{C1} {C2}",
        TAIL,
    ),
    Case("batch_norm_plain", lambda: _normed(nn.BatchNorm2d(8, affine=False)), image, f"{C1} {C2}", TAIL),
    Case(
        "layer_norm_chw",
        lambda: _normed(nn.LayerNorm((8, 6, 6))),
        image,
        f"{C1} {NORM} {C2}",
        TAIL,
    ),
    Case(
        "batch_norm_1d",
        lambda: nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3)),
        lambda: draw(4, 5),
        "0.weight:0=4 0.bias:0=4 1.weight:0=4 1.bias:0=4 3.weight:1=4",
        "3.weight:0",
        ("0.weight:0 0.bias:0 1.weight:0 1.bias:0 3.weight:1",),
    ),
    Case(
        "conv1d",
        lambda: nn.Sequential(nn.Conv1d(3, 8, 3), nn.BatchNorm1d(8), nn.ReLU(), nn.Conv1d(8, 4, 3)),
        lambda: draw(2, 3, 9),
        "0.weight:0=4 0.bias:0=4 1.weight:0=4 1.bias:0=4 3.weight:1=4",
        "3.weight:0",
    ),
    Case(
        "conv3d",
        lambda: nn.Sequential(
            nn.Conv3d(2, 8, 3), nn.BatchNorm3d(8), nn.ReLU(), nn.MaxPool3d(2), nn.Conv3d(8, 4, 1)
        ),
        lambda: draw(2, 2, 5, 5, 5),
        "0.weight:0=4 0.bias:0=4 1.weight:0=4 1.bias:0=4 4.weight:1=4",
        "4.weight:0",
    ),
    Case(
        "used_twice",
        _twice,
        image,
        f"{C1} c2.weight:0=4 c2.weight:1=4 c2.bias:0=4 fc.weight:1=4",
        TAIL,
        ("c1.weight:0 c1.bias:0 c2.weight:0 c2.weight:1 c2.bias:0 fc.weight:1",),
    ),
]
