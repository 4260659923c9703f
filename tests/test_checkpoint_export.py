"""A pruned network leaves Python: safetensors, torch.export, ONNX. It computes what it computed before."""

from __future__ import annotations

import json

import pytest
import torch
from test_callback import Net
from torch import nn

from lightning_prune import CheckpointMismatchError, GroupNormPruner, Plan, load_pruned_state
from lightning_prune.models.vit import ViT

# onnxscript and torch 2.13 speak of each other's old names.
pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec")


class Attention(nn.Module):
    """PyTorch's own attention works with narrower heads through a replaced computation alone."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 4, batch_first=True)
        self.fc = nn.Linear(16, 3)

    def forward(self, x):
        return self.fc(self.attention(x, x, x, need_weights=False)[0])


class Scaled(nn.Module):
    """Divides by the root of a head's width, a number that a cut may not change."""

    def __init__(self):
        super().__init__()
        self.qkv, self.fc = nn.Linear(12, 3 * 2 * 8), nn.Linear(2 * 8, 3)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        return self.fc(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Grouped(nn.Module):
    """Blocks of channels, and one block per channel; the number of blocks is an attribute of the layer."""

    def __init__(self):
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.grouped = nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.fc = nn.Linear(8, 2)

    def forward(self, x):
        x = self.bn(self.stem(x)).relu()
        return self.fc(self.depthwise(self.grouped(x).relu()).mean(dim=(2, 3)))


CASES = {
    "convolutions": (Net, (2, 3, 5, 5)),
    "grouped convolutions": (Grouped, (2, 3, 5, 5)),
    "replaced attention": (Attention, (2, 5, 16)),
    "kept scale": (Scaled, (2, 5, 12)),
    "transformer": (lambda: ViT(dim=16, depth=1, num_heads=2, mlp_dim=16), (2, 1, 8, 8)),
}
every_network = pytest.mark.parametrize(("build", "shape"), CASES.values(), ids=CASES)


def pruned(build, shape):
    """A pruned network, its plan, its inputs and what it makes of them."""
    x = torch.randn(shape)
    net = build().eval()
    dense = sum(p.numel() for p in net.parameters())
    plan = GroupNormPruner(net, x, pruning_ratio=0.5).step()
    assert sum(p.numel() for p in net.parameters()) < 0.8 * dense
    with torch.no_grad():
        return net, plan, x, net(x)


def difference(ours, expected):
    return (torch.as_tensor(ours) - expected).abs().max()


@every_network
def test_safetensors_bring_it_back_with_the_plan_in_their_metadata(build, shape, tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    net, plan, x, expected = pruned(build, shape)
    path = tmp_path / "net.safetensors"
    safetensors.save_file(net.state_dict(), path, metadata={"plan": json.dumps(plan.as_dict())})
    with safetensors.safe_open(path, "pt") as file:
        written = Plan.from_dict(json.loads(file.metadata()["plan"]))
    other = build().eval()
    load_pruned_state(other, safetensors.load_file(path), plan=written)
    assert torch.equal(other(x), expected)
    without = build()
    with pytest.raises(CheckpointMismatchError, match="size mismatch for"):
        load_pruned_state(without, safetensors.load_file(path))


@every_network
def test_torch_export_agrees(build, shape, tmp_path):
    net, _, x, expected = pruned(build, shape)
    torch.export.save(torch.export.export(net, (x,)), tmp_path / "net.pt2")
    again = torch.export.load(tmp_path / "net.pt2").module()
    assert difference(again(x), expected) <= 1e-5
    assert sum(p.numel() for p in again.parameters()) == sum(p.numel() for p in net.parameters())


@every_network
def test_onnx_agrees(build, shape, tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    net, _, x, expected = pruned(build, shape)
    torch.onnx.export(net, (x,), tmp_path / "net.onnx", dynamo=True, verbose=False)
    session = runtime.InferenceSession(tmp_path / "net.onnx", providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    assert difference(found, expected) <= 1e-5
