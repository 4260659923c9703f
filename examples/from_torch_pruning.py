"""Move over from Torch-Pruning: the import changes, and the importance is a name.

    python examples/from_torch_pruning.py     a second, nothing but lightning-prune is needed

With Torch-Pruning this script begins with

    from torch_pruning import importance, pruner

    GroupNormPruner, importance = pruner.GroupNormPruner, importance.GroupMagnitudeImportance()

and every line below is the same. docs/options.md lists, option by option, where the meaning differs.
"""

import torch
from torch import nn

from lightning_prune import GroupNormPruner

importance = "group_norm"

torch.manual_seed(0)
model = nn.Sequential(
    nn.Conv2d(1, 16, 3, padding=1, bias=False),
    nn.BatchNorm2d(16),
    nn.ReLU(),
    nn.Conv2d(16, 32, 3, stride=2, padding=1),
    nn.ReLU(),
    nn.AdaptiveAvgPool2d(1),
    nn.Flatten(),
    nn.Linear(32, 10),
)
example_inputs = torch.randn(8, 1, 8, 8)
optimizer = torch.optim.SGD(model.parameters(), lr=0.05)

pruner = GroupNormPruner(
    model,
    example_inputs,
    importance=importance,
    pruning_ratio=0.5,
    iterative_steps=2,
    ignored_layers=[model[7]],  # ours leaves outputs alone without being told
    round_to=4,
    reg=1e-3,
)

for _ in range(2):
    pruner.update_regularizer()
    for _ in range(3):
        loss = model(example_inputs).logsumexp(dim=1).mean()
        optimizer.zero_grad()
        loss.backward()
        pruner.regularize(model)
        optimizer.step()
    pruner.step()
    optimizer = torch.optim.SGD(
        model.parameters(), lr=0.05
    )  # not needed with ours: parameters stay the same objects

print(model[0].out_channels, model[3].out_channels, tuple(model(example_inputs).shape))
