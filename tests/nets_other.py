"""Cases about index movement, bare parameters, buffers, and the shape of inputs and outputs."""

from __future__ import annotations

import torch
from nets import Case, Net, conv, draw, image, param
from nets_conv import C1, C2, G1, G2, TAIL, pool
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrizations


def _computed_weight() -> nn.Module:
    return Net(
        lambda m, x: m.fc(pool(functional.conv2d(x, m.kernel * m.scale, m.shift).relu())),
        kernel=param(8, 3, 3, 3),
        scale=param(8, 1, 1, 1),
        shift=param(8),
        fc=nn.Linear(8, 4),
    )


def _stacked_vectors() -> nn.Module:
    def run(m: Net, x: Tensor) -> Tensor:
        scale, shift = torch.stack([m.scale, m.shift])
        out: Tensor = m.fc((m.l1(x) * scale + shift).tanh())
        return out

    return Net(run, l1=nn.Linear(5, 8), scale=param(8), shift=param(8), fc=nn.Linear(8, 3))


def _stacked_channels_first() -> nn.Module:
    def run(m: Net, x: Tensor) -> Tensor:
        channels = [layer(x).tanh().t() for layer in (m.l1, m.l2)]  # [channels, batch]
        out: Tensor = m.fc(torch.stack(channels, -1).sum(-1).t())
        return out

    return Net(run, l1=nn.Linear(5, 8), l2=nn.Linear(5, 8), fc=nn.Linear(8, 3))


def _two_inputs() -> nn.Module:
    return Net(
        lambda m, a, b: m.fc((m.l1(a) + m.l2(b)).tanh()),
        l1=nn.Linear(5, 8),
        l2=nn.Linear(7, 8),
        fc=nn.Linear(8, 3),
    )


def _two_outputs() -> nn.Module:
    def run(m: Net, x: Tensor) -> dict[str, Tensor | None]:
        h = m.l1(x).tanh()
        return {"a": m.fa(h), "nothing": None, "b": m.fb(m.l2(h).tanh())}

    return Net(run, l1=nn.Linear(5, 8), l2=nn.Linear(8, 6), fa=nn.Linear(8, 3), fb=nn.Linear(6, 2))


def _mixed_by_conv() -> nn.Module:
    """A convolution of one position mixes tokens; the channels lie along its length."""
    return Net(
        lambda m, x: m.fc(m.mix(torch.stack([m.a(x), m.b(x)], 1)).squeeze(1)),
        a=nn.Linear(5, 8),
        b=nn.Linear(5, 8),
        mix=nn.Conv1d(2, 1, 1),
        fc=nn.Linear(8, 3),
    )


def _moved(move: str, width: int = 8) -> nn.Module:
    moves = {
        "roll": lambda x: x.roll(1, dims=1),
        "flip": lambda x: x.flip(1),
        "repeat_interleave": lambda x: x.repeat_interleave(2, dim=1),
        "repeat": lambda x: x.repeat(1, 2, 1, 1),
        "pixel_unshuffle": lambda x: functional.pixel_unshuffle(x, 2),
        "roll_add": lambda x: x + x.roll(1, dims=1),
        "flip_add": lambda x: x + x.flip(1),
        "unbind_stack": lambda x: torch.stack(x.unbind(1)[::-1], 1),
        "split_swap": lambda x: torch.cat(x.split(x.shape[1] // 2, 1)[::-1], 1),
        "pad": lambda x: functional.pad(x, (0, 0, 0, 0, 0, 2)),
        "sort": lambda x: x.sort(dim=1).values,
        "cumsum": lambda x: x.cumsum(1),
        "softmax": lambda x: x.softmax(1),
        "uneven_chunk": lambda x: torch.cat(x.chunk(3, 1)[::-1], 1),
    }
    run = moves[move]
    return Net(
        lambda m, x: m.fc(pool(m.c2(run(m.c1(x).tanh())))),
        c1=conv(3, 8),
        c2=conv(width, 6),
        fc=nn.Linear(6, 4),
    )


def _buffers() -> nn.Module:
    def run(m: Net, x: Tensor) -> Tensor:
        x = (m.c1(x) - m.mean) / m.std * m.gain
        out: Tensor = m.fc(pool(m.c2(x.sigmoid())) @ m.mix)
        return out

    return Net(
        run,
        c1=conv(3, 8),
        c2=conv(8, 6),
        fc=nn.Linear(5, 4),
        mean=draw(8, 1, 1),
        std=draw(1, 8, 1, 1).exp(),
        gain=draw(8, 1, 1, seed=1),
        mix=draw(6, 5),
    )


def _recurrent(kind: type[nn.RNNBase]) -> nn.Module:
    return Net(
        lambda m, x: m.fc(m.rnn(m.pre(x))[0][:, -1]),
        pre=nn.Linear(5, 6),
        rnn=kind(6, 8, batch_first=True),
        fc=nn.Linear(8, 3),
    )


OTHER_CASES: list[Case] = [
    # The channel that a roll carries over the edge stays: half of the other seven go, a half rounded down.
    Case("roll", lambda: _moved("roll"), image, f"{C1} {C2}".replace("=4", "=5"), TAIL),
    # Pieces of 3, 3 and 2: with 2, 2 and 1 `chunk` parts at the same places.
    Case("uneven_chunk", lambda: _moved("uneven_chunk"), image, f"{C1} {C2}".replace("=4", "=5"), TAIL),
    Case(
        "mixed_by_conv",
        _mixed_by_conv,
        lambda: draw(2, 5),
        "a.weight:0=4 a.bias:0=4 b.weight:0=4 b.bias:0=4 fc.weight:1=4",
        f"mix.weight:1 mix.weight:0 {TAIL}",
    ),
    Case("flip", lambda: _moved("flip"), image, f"{C1} {C2}", TAIL, (f"{G1} c2.weight:1", G2)),
    Case(
        "repeat_interleave",
        lambda: _moved("repeat_interleave", 16),
        image,
        f"{C1} {C2}".replace("c2.weight:1=4", "c2.weight:1=8"),
        TAIL,
    ),
    Case(
        "repeat",
        lambda: _moved("repeat", 16),
        image,
        f"{C1} {C2}".replace("c2.weight:1=4", "c2.weight:1=8"),
        TAIL,
    ),
    Case(
        "pixel_unshuffle",
        lambda: _moved("pixel_unshuffle", 32),
        image,
        f"{C1} {C2}".replace("c2.weight:1=4", "c2.weight:1=16"),
        TAIL,
    ),
    Case("roll_add", lambda: _moved("roll_add"), image, C2.split(" ", 1)[1], f"{G1} c2.weight:1", (G2,)),
    Case("flip_add", lambda: _moved("flip_add"), image, f"{C1} {C2}", TAIL),
    Case("unbind_stack", lambda: _moved("unbind_stack"), image, "", TAIL, whole=False),
    Case("split_swap", lambda: _moved("split_swap"), image, "", TAIL, whole=False),
    Case(
        "pad", lambda: _moved("pad", 10), image, f"{C1} {C2}".replace("c2.weight:1=4", "c2.weight:1=6"), TAIL
    ),
    Case("sort", lambda: _moved("sort"), image, C2.split(" ", 1)[1], f"{G1} c2.weight:1"),
    Case("cumsum", lambda: _moved("cumsum"), image, C2.split(" ", 1)[1], f"{G1} c2.weight:1"),
    Case("softmax", lambda: _moved("softmax"), image, C2.split(" ", 1)[1], f"{G1} c2.weight:1"),
    Case(
        "outer_residual",
        lambda: Net(lambda m, x: x + m.c2(m.c1(x).relu()), c1=conv(3, 8), c2=conv(8, 3)),
        image,
        f"{C1} c2.weight:1=4",
        "c2.weight:0 c2.bias:0 c1.weight:1",
        (f"{G1} c2.weight:1",),
    ),
    Case(
        "single_layer",
        lambda: nn.Linear(5, 3),
        lambda: draw(2, 5),
        "",
        "weight:0 weight:1 bias:0",
        (),
        idle=True,
    ),
    Case(
        "computed_weight",
        _computed_weight,
        image,
        "kernel:0=4 scale:0=4 shift:0=4 fc.weight:1=4",
        TAIL,
        ("kernel:0 scale:0 shift:0 fc.weight:1",),
    ),
    Case(
        "weight_norm",
        lambda: nn.Sequential(
            parametrizations.weight_norm(nn.Linear(5, 8)),
            nn.Tanh(),
            parametrizations.weight_norm(nn.Linear(8, 3)),
        ),
        lambda: draw(4, 5),
        "0.bias:0=4 0.parametrizations.weight.original0:0=4 0.parametrizations.weight.original1:0=4"
        " 2.parametrizations.weight.original1:1=4",
        "2.bias:0",
    ),
    Case(
        "spectral_norm",
        lambda: nn.Sequential(parametrizations.spectral_norm(nn.Linear(5, 8)), nn.Tanh(), nn.Linear(8, 3)),
        lambda: draw(4, 5),
        "0.bias:0=4 0.parametrizations.weight.original:0=4 2.weight:1=4",
        "2.bias:0",
    ),
    Case("buffers", _buffers, image, f"{C1} {C2}", TAIL),
    Case(
        "stacked_vectors",
        _stacked_vectors,
        lambda: draw(4, 5),
        "l1.weight:0=4 l1.bias:0=4 scale:0=4 shift:0=4 fc.weight:1=4",
        TAIL,
        ("l1.weight:0 l1.bias:0 scale:0 shift:0 fc.weight:1",),
    ),
    Case(
        "stacked_channels_first",
        _stacked_channels_first,
        lambda: draw(4, 5),
        "l1.weight:0=4 l1.bias:0=4 l2.weight:0=4 l2.bias:0=4 fc.weight:1=4",
        TAIL,
        ("l1.weight:0 l1.bias:0 l2.weight:0 l2.bias:0 fc.weight:1",),
    ),
    Case(
        "two_inputs",
        _two_inputs,
        lambda: (draw(4, 5), draw(4, 7)),
        "l1.weight:0=4 l1.bias:0=4 l2.weight:0=4 l2.bias:0=4 fc.weight:1=4",
        TAIL,
    ),
    Case(
        "keyword_inputs",
        _two_inputs,
        lambda: {"b": draw(4, 7), "a": draw(4, 5)},
        "l1.weight:0=4 l1.bias:0=4 l2.weight:0=4 l2.bias:0=4 fc.weight:1=4",
        TAIL,
    ),
    Case(
        "two_outputs",
        _two_outputs,
        lambda: draw(4, 5),
        "l1.weight:0=4 l1.bias:0=4 l2.weight:1=4 fa.weight:1=4 l2.weight:0=3 l2.bias:0=3 fb.weight:1=3",
        "fa.weight:0 fb.weight:0",
        ("l1.weight:0 l1.bias:0 l2.weight:1 fa.weight:1", "l2.weight:0 l2.bias:0 fb.weight:1"),
    ),
    Case("lstm", lambda: _recurrent(nn.LSTM), lambda: draw(2, 4, 5), "", TAIL, whole=False),
    Case("gru", lambda: _recurrent(nn.GRU), lambda: draw(2, 4, 5), "", TAIL, whole=False),
]
