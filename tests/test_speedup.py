"""Time against MACs: the judgement on hand-made numbers, the measurement on a network known by heart."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lightning_prune.errors import TraceError
from lightning_prune.measuring.speedup import (
    LayerTime,
    Speedup,
    explain_speedup,
    judge_speedup,
    measure_layers,
)


@pytest.mark.parametrize(
    ("time", "macs", "verdict"),
    [
        (0.50, 0.5, "as promised"),
        (0.75, 0.5, "as promised"),  # half of the gain, exactly
        (0.76, 0.5, "short"),
        (0.99, 0.5, "short"),
        (1.00, 0.5, "slower"),
        (1.30, 0.9, "slower"),
        (1.00, 1.0, "as promised"),  # nothing was cut, nothing was promised
        (0.30, 0.5, "as promised"),
    ],
)
def test_the_verdict(time: float, macs: float, verdict: str) -> None:
    assert Speedup(time, macs).verdict == verdict


# name, kind, ms before and after, MACs before and after, widths, numbers moved
LAYERS = [
    LayerTime("good", "Conv2d", 10.0, 2.5, 4_000_000, 1_000_000, (64, 64), 10_000),
    LayerTime("odd", "Conv2d", 10.0, 8.0, 4_000_000, 1_000_000, (37, 64), 10_000),
    LayerTime("norm", "BatchNorm2d", 6.0, 6.0, 0, 0, (32,), 50_000),
    LayerTime("depthwise", "Conv2d", 4.0, 4.0, 90_000, 45_000, (32, 1), 10_000),
    LayerTime("stem", "Conv2d", 5.0, 5.0, 700_000, 700_000, (64, 3), 10_000),
    LayerTime("tiny", "Linear", 3.0, 3.0, 2_000_000, 1_000_000, (16, 16), 10_000),
    LayerTime("small", "ReLU", 0.5, 0.5, 0, 0, (), 10_000),
    LayerTime("attn", "Attention", 2.0, 2.0, 400_000, 200_000, (64, 64), 10_000, has_layers=True),
    LayerTime("", "Net", 2.0, 2.0, 0, 0, (), 10_000, has_layers=True),
    LayerTime(
        "block", "Block", 1.0, 1.5, 100, 100, (), 10_000, has_layers=True
    ),  # next to nothing of its own
]


def test_the_layers_at_fault_are_those_that_kept_more_time_than_macs() -> None:
    found = judge_speedup(0.95, 0.5, LAYERS)
    lost = {fault.layer.name: round(fault.lost_ms, 6) for fault in found.faults}
    # odd: 8 - 10/4; norm: 6 - 6/2, by the network's share; depthwise: 4 - 4/2; tiny: 3 - 3/2; attn: 2 - 2/2
    assert lost == {"odd": 5.5, "norm": 3.0, "depthwise": 2.0, "tiny": 1.5, "attn": 1.0}
    assert list(lost) == ["odd", "norm", "depthwise", "tiny", "attn"]  # the costliest first
    assert found.between == (3.5, 1.5)  # the network and its block call layers: 2 - 2/2, 1.5 - 1
    reasons = {fault.layer.name: fault.reason for fault in found.faults}
    assert reasons["odd"] == "37 channels are no multiple of 8; set round_to=8"
    assert reasons["norm"] == "it multiplies nothing, so its time is that of memory and of the call"
    assert reasons["depthwise"] == "4.5 multiply-accumulates per number moved: it is bound by memory"
    assert reasons["tiny"] == "it is too small by now to fill the machine"


def test_a_layer_that_was_not_cut_is_at_fault_only_where_it_got_slower() -> None:
    slower = LayerTime("stem", "Conv2d", 5.0, 9.0, 700_000, 700_000, (64, 3), 10_000)
    (fault,) = judge_speedup(1.2, 0.5, [slower]).faults
    assert (fault.lost_ms, fault.reason) == (4.0, "it was not cut")


def test_where_the_gain_is_as_promised_nobody_is_blamed() -> None:
    assert judge_speedup(0.6, 0.5, LAYERS).faults == ()
    assert explain_speedup(judge_speedup(0.6, 0.5, LAYERS)) == []


def test_the_sentences() -> None:
    sentences = explain_speedup(judge_speedup(0.95, 0.5, LAYERS))
    assert sentences[0] == (
        "Less than half of the promised time was gained: it takes 0.95 of the time at 0.50 of the "
        "multiply-accumulates."
    )
    assert sentences[1] == (
        "odd (Conv2d) takes 8 ms, 5.5 ms more than promised: 37 channels are no multiple of 8; "
        "set round_to=8."
    )
    assert sentences[-2].startswith(
        "attn (Attention) outside its layers takes 2 ms, 1 ms more than promised:"
    )
    assert sentences[-1] == (
        "Outside the layers, calls and operations such as additions take 3.5 ms, 1.5 ms more than promised."
    )
    assert not any("Block" in sentence or "Net" in sentence for sentence in sentences)
    assert explain_speedup(judge_speedup(1.2, 0.5))[0].startswith("Pruning made the network slower")


class Net(nn.Module):
    """[2, 3] -> [2, 2], with a product of its own between the layers."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Linear(3, width), nn.ReLU())
        self.out, self.unused = nn.Linear(width, 2), nn.Linear(1, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block(x)
        return self.out(x @ (x.T @ x))


def test_every_module_that_ran_is_measured_without_its_children() -> None:
    dense, pruned = Net(16).train(), Net(12)
    layers = {layer.name: layer for layer in measure_layers(dense, pruned, torch.ones(2, 3), rounds=2)}
    assert list(layers) == ["", "block", "block.0", "block.1", "out"]
    assert [layer.kind for layer in layers.values()] == ["Net", "Sequential", "Linear", "ReLU", "Linear"]
    assert {n: (x.dense_macs, x.pruned_macs) for n, x in layers.items()} == {
        "": (2 * 2 * 16 * 16, 2 * 2 * 12 * 12),
        "block": (0, 0),
        "block.0": (2 * 3 * 16, 2 * 3 * 12),
        "block.1": (0, 0),
        "out": (2 * 16 * 2, 2 * 12 * 2),
    }
    assert {n: x.widths for n, x in layers.items() if x.widths} == {"block.0": (12,), "out": (12,)}
    # inputs, outputs, weight, bias
    assert layers["block.0"].moved == 2 * 3 + 2 * 12 + 12 * 3 + 12
    assert [n for n, x in layers.items() if x.has_layers] == ["", "block"]
    assert all(x.dense_ms >= 0 and x.pruned_ms >= 0 for x in layers.values())
    assert dense.training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in (*dense.modules(), *pruned.modules()))


def test_a_failed_forward_leaves_no_hooks() -> None:
    dense = Net(16)
    with pytest.raises(TraceError):
        measure_layers(dense, Net(12), torch.ones(2, 4))
    assert not any(m._forward_hooks for m in dense.modules())
