"""Rank channels by an importance of your own, and compare it with the built-in ones.

    pip install 'lightning-prune[demo]'
    python examples/custom_importance.py      some seconds

One network is trained; copies of it lose half of their channels by different rankings and are tested at
once, without fine-tuning. docs/adding-an-importance.md explains groups, units and members.
"""

import copy
import os

import torch
from lightning.pytorch import Trainer, seed_everything
from torch import Tensor

from lightning_prune import GroupNormPruner
from lightning_prune.data import Digits
from lightning_prune.models import Classifier, ResNet

seed_everything(0)
data = Digits()
model = Classifier(ResNet())
trainer = Trainer(
    max_epochs=int(os.environ.get("EPOCHS", "8")),
    accelerator="cpu",
    logger=False,
    enable_checkpointing=False,
)
trainer.fit(model, datamodule=data)


def filters_only(group) -> Tensor:  # noqa: ANN001 - a lightning_prune.graph.groups.Group
    """Score a unit by the magnitudes of its own filters alone (Li et al., ICLR 2017), higher = keep."""
    weights = dict(model.net.named_parameters())
    scores = torch.zeros(group.n_units)
    for member in group.members:
        if member.is_buffer or member.dim != 0 or weights[member.tensor].dim() < 2:
            continue  # only filters: what reads these channels and what normalises them is not asked
        magnitude = weights[member.tensor].detach().abs().flatten(1).sum(1)  # [channels]
        unit, index = torch.from_numpy(member.unit), torch.from_numpy(member.index)
        scores.index_add_(0, unit, magnitude[index])
    return scores


found = {}
for importance in ("random", "l1", "group_norm", "fpgm", filters_only):
    small = copy.deepcopy(model)
    GroupNormPruner(small.net, torch.zeros(1, 1, 8, 8), importance=importance, pruning_ratio=0.3).step()
    (score,) = trainer.test(small, datamodule=data, verbose=False)
    found[importance if isinstance(importance, str) else importance.__name__] = score["test/acc"]

print("accuracy right after 30 % of the channels went:")
for name, accuracy in found.items():
    print(f"  {name:<14} {accuracy:7.2%}")
