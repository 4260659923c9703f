"""The networks that are measured, with random weights from a seed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn
from zoo.operators import import_torchvision

VISION = ("resnet50", "densenet121", "mobilenet_v2", "convnext_tiny", "vit_b_16", "swin_t")
ALL = (*VISION, "llama")
_HEADS = {
    "densenet121": "classifier",
    "mobilenet_v2": "classifier.1",
    "convnext_tiny": "classifier.2",
    "vit_b_16": "heads.head",
    "swin_t": "head",
    "llama": "lm_head",
}
LLAMA_WIDTH, LLAMA_HEADS, TOKENS = 256, 4, 32


@dataclass(frozen=True)
class Subject:
    """A model with what it is called on.

    Args:
        name: Name as on the command line.
        model: In eval mode.
        inputs: A batch: images or token ids.
        head: Name of the classifier, whose outputs both libraries are told to leave alone.
    """

    name: str
    model: nn.Module
    inputs: Tensor
    head: str

    @property
    def parameter_bytes(self) -> int:
        """Bytes of the parameters."""
        return sum(p.numel() * p.element_size() for p in self.model.parameters())

    def with_gradients(self) -> Subject:
        """Give every parameter a random gradient."""
        for p in self.model.parameters():
            p.grad = torch.randn_like(p)
        return self


def build(name: str, *, seed: int, device: str = "cpu", batch: int = 1, size: int | None = None) -> Subject:
    """Make a subject by name.

    Raises:
        SystemExit: If there is none of that name.
    """
    torch.manual_seed(seed)
    if name == "llama":
        return language(4, device=device, batch=batch)
    if name == "resnet10":
        model, side = _vision().resnet.ResNet(_vision().resnet.BasicBlock, [1, 1, 1, 1], num_classes=10), 32
    elif name in VISION:
        model, side = getattr(_vision(), name)(weights=None), 224
    else:
        raise SystemExit(f"there is no model {name!r} to measure; there are {', '.join((*ALL, 'resnet10'))}")
    side = size or side
    inputs = torch.randn(batch, 3, side, side, device=device)
    return Subject(name, model.eval().to(device), inputs, _HEADS.get(name, "fc"))


def residual(blocks: int, *, device: str) -> Subject:
    """Make a ResNet of bottleneck blocks, most of them in the third stage as in ResNet-152."""
    counts = [3, 4 if blocks < 50 else 8, 0, 3]
    counts[2] = blocks - sum(counts)
    torch.manual_seed(0)
    model = _vision().resnet.ResNet(_vision().resnet.Bottleneck, counts, num_classes=10)
    inputs = torch.randn(1, 3, 64, 64, device=device)
    return Subject(f"resnet of {blocks} blocks", model.eval().to(device), inputs, "fc")


def language(layers: int, *, device: str, batch: int = 1) -> Subject:
    """Make a Llama of some layers; eager attention, because the fused one has no products to count."""
    transformers = import_module("transformers")
    config = transformers.LlamaConfig(
        vocab_size=1000,
        hidden_size=LLAMA_WIDTH,
        intermediate_size=4 * LLAMA_WIDTH,
        num_hidden_layers=layers,
        num_attention_heads=LLAMA_HEADS,
        num_key_value_heads=LLAMA_HEADS,
        use_cache=False,
    )
    model = transformers.LlamaForCausalLM(config).eval().to(device)
    return Subject(
        f"llama of {layers} layers", model, torch.randint(0, 1000, (batch, TOKENS)).to(device), "lm_head"
    )


def _vision() -> Any:
    import_torchvision()
    return import_module("torchvision.models")


FAMILIES: Mapping[str, tuple[Callable[..., Subject], tuple[int, ...]]] = {
    "resnet": (residual, (26, 50, 101, 152)),
    "llama": (language, (2, 4, 8, 16, 32)),
}
