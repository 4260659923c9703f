"""Describe a layer that cannot be looked into: here a kernel of one's own.

    pip install 'lightning-prune[demo]'
    python examples/custom_layer.py           some seconds

An operation without a rule is never guessed at: what goes into it stays whole, and the pruner says so. One
function says how its channels hang together. docs/adding-a-layer.md has the whole story.
"""

import os

import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn

from lightning_prune import GroupNormPruner, StructuredPruning
from lightning_prune.data import Digits
from lightning_prune.models import Classifier


@torch.library.custom_op("examples::wave", mutates_args=())
def wave(x: Tensor, frequency: Tensor) -> Tensor:
    """Give sin(frequency * x) for x [b, channels]; imagine a kernel written in C++."""
    return torch.sin(x * frequency)


def backward(ctx, gradient):  # noqa: ANN001, ANN201, D103
    x, frequency = ctx.saved_tensors
    slope = gradient * torch.cos(x * frequency)
    return slope * frequency, (slope * x).sum(0)


wave.register_autograd(backward, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs))


class Wave(nn.Module):
    """A layer with one frequency per channel."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.frequency = nn.Parameter(torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        """Map [b, channels] to [b, channels]."""
        return wave(x, self.frequency)


def wave_rule(layer) -> None:  # noqa: ANN001 - a lightning_prune.graph.analysis.Layer
    """Channel k in, channel k out, frequency k with it."""
    (x,), (y,) = layer.inputs, layer.outputs
    layer.tie((x, 1), ("frequency", 0))
    layer.carry((x, 1), (y, 1))


net = nn.Sequential(nn.Flatten(), nn.Linear(64, 256), Wave(256), nn.Linear(256, 10))
images = torch.zeros(1, 1, 8, 8)
print("without a rule:", GroupNormPruner(net, images).explain("1", 0).splitlines()[1])
rule = GroupNormPruner(net, images, customized_pruners={Wave: wave_rule})
print("with the rule: ", rule.explain("1", 0).splitlines()[0])

epochs = int(os.environ.get("EPOCHS", "8"))
pruning = StructuredPruning(
    0.75, module="net", start_epoch=epochs // 2, options={"customized_pruners": {Wave: wave_rule}}
)
trainer = Trainer(max_epochs=epochs, callbacks=[pruning], accelerator="cpu", logger=False)
trainer.fit(Classifier(net), datamodule=Digits())
print(net)
print("frequencies:", tuple(net[2].frequency.shape))
