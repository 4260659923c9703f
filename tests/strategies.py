"""Random nets for Hypothesis: valid by construction, small, printed as the list of steps they are made of."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from nets import randomise
from nets_attention import Fused
from nets_conv import shuffle
from torch import Tensor, nn

SIDE = 4
GRIDDED = frozenset({"grouped", "shuffle", "chunk", "attention", "group_norm", "multiplier"})
WIDTHS = st.sampled_from([4, 6, 8])


@dataclass(frozen=True)
class Step:
    """One operation on earlier feature maps.

    Args:
        op: Name of the operation.
        ins: Which maps it reads; map 0 is the input image.
        width: Channels that it makes.
    """

    op: str
    ins: tuple[int, ...]
    width: int


@dataclass(frozen=True)
class Spec:
    """A net: its steps, and how the last maps become outputs (``pool``, ``flatten`` or ``map``)."""

    steps: tuple[Step, ...]
    tail: str

    @property
    def gridded(self) -> bool:
        """Whether some op binds rows to equal counts, so that counts may differ from the plain ratio."""
        return any(s.op in GRIDDED for s in self.steps)

    def build(self, seed: int) -> RandomNet:
        """Make the net with random values."""
        return randomise(RandomNet(self), seed)


def _part(step: Step, widths: list[int]) -> nn.Module:
    c_in, c_out = widths[step.ins[0]], step.width
    makers = {
        "conv": lambda: nn.Conv2d(c_in, c_out, 3, padding=1),
        "pointwise": lambda: nn.Conv2d(c_in, c_out, 1, bias=False),
        "grouped": lambda: nn.Conv2d(c_in, c_out, 3, padding=1, groups=2),
        "depthwise": lambda: nn.Conv2d(c_in, c_in, 3, padding=1, groups=c_in),
        "multiplier": lambda: nn.Conv2d(c_in, 2 * c_in, 1, groups=c_in),
        "transposed": lambda: nn.ConvTranspose2d(c_in, c_out, 3, padding=1),
        "batch_norm": lambda: nn.BatchNorm2d(c_in),
        "group_norm": lambda: nn.GroupNorm(2, c_in),
        "layer_norm": lambda: nn.LayerNorm(c_in),
        "prelu": lambda: nn.PReLU(c_in),
        "gate": lambda: nn.Sequential(
            nn.Linear(c_in, c_out), nn.SiLU(), nn.Linear(c_out, c_in), nn.Sigmoid()
        ),
        "attention": lambda: Fused(c_in, 2, "unbind"),
    }
    return makers[step.op]() if step.op in makers else nn.Identity()


class RandomNet(nn.Module):
    """Runs a ``Spec``: every step reads earlier maps [n, c, 4, 4] and adds one."""

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        self.spec = spec
        widths = [3]
        self.parts = nn.ModuleList()
        for step in spec.steps:
            self.parts.append(_part(step, widths))
            widths.append(step.width if step.op != "gate" else widths[step.ins[0]])
        features = widths[-1] * (SIDE * SIDE if spec.tail == "flatten" else 1)
        self.fc: nn.Module = nn.Conv2d(widths[-1], 3, 1) if spec.tail == "map" else nn.Linear(features, 3)

    def forward(self, x: Tensor) -> Tensor:
        maps = [x]
        for step, part in zip(self.spec.steps, self.parts, strict=True):
            maps.append(_run(step, part, [maps[i] for i in step.ins]))
        last = maps[-1]
        if self.spec.tail == "pool":
            last = last.mean((2, 3))
        elif self.spec.tail == "flatten":
            last = last.flatten(1)
        out: Tensor = self.fc(last)
        return out


def _run(step: Step, part: nn.Module, ins: list[Tensor]) -> Tensor:
    x = ins[0]
    moves = {
        "tanh": x.tanh,
        "sigmoid": x.sigmoid,
        "add": lambda: x + ins[1],
        "mul": lambda: x * ins[1],
        "cat": lambda: torch.cat(ins, 1),
        "chunk": lambda: x.chunk(2, 1)[0] * x.chunk(2, 1)[1].sigmoid(),
        "shuffle": lambda: shuffle(x, 2),
        "flip": lambda: x.flip(1),
        "roll": lambda: x.roll(1, 1),
        "layer_norm": lambda: part(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2),
        "gate": lambda: x * part(x.mean((2, 3)))[:, :, None, None],
        "attention": lambda: part(x.flatten(2).transpose(1, 2)).transpose(1, 2).view_as(x),
    }
    out: Tensor = moves[step.op]() if step.op in moves else part(x)
    return out


LAYERS = ("conv", "conv", "pointwise", "grouped", "transposed")
SAME = (
    "depthwise",
    "batch_norm",
    "group_norm",
    "layer_norm",
    "prelu",
    "gate",
    "attention",
    "tanh",
    "sigmoid",
    "shuffle",
    "flip",
    "roll",
)


@st.composite
def specs(draw: st.DrawFn, *, max_steps: int = 7) -> Spec:
    """Draw a net of 1 to ``max_steps`` operations after a first convolution."""
    first = draw(WIDTHS)
    steps, widths = [Step("conv", (0,), first)], [3, first]
    for _ in range(draw(st.integers(1, max_steps))):
        step = _step(draw, widths)
        steps.append(step)
        widths.append(step.width if step.op != "gate" else widths[step.ins[0]])
    return Spec(tuple(steps), draw(st.sampled_from(["pool", "flatten", "map"])))


def _step(draw: st.DrawFn, widths: list[int]) -> Step:
    last = len(widths) - 1
    at = draw(st.integers(max(1, last - 2), last))
    width = widths[at]
    partners = [i for i in range(1, last + 1) if widths[i] == width and i != at]
    ops = [*LAYERS, *SAME, *(["add", "mul"] * 2 if partners else []), *(["cat"] if width <= 8 else [])]
    ops += [*(["chunk"] if width % 4 == 0 and width >= 8 else []), *(["multiplier"] if width <= 6 else [])]
    op = draw(st.sampled_from(ops))
    if op in ("add", "mul"):
        return Step(op, (at, draw(st.sampled_from(partners))), width)
    if op == "cat":
        other = draw(st.sampled_from([i for i in range(1, last + 1) if widths[i] <= 8]))
        return Step(op, (at, other), width + widths[other])
    if op in ("chunk", "multiplier"):
        return Step(op, (at,), width // 2 if op == "chunk" else 2 * width)
    return Step(op, (at,), draw(WIDTHS) if op in (*LAYERS, "gate") else width)
