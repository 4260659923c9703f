"""Prune on two processes: Lightning starts them, rank 0 decides on a cut, every rank makes the same.

    pip install 'lightning-prune[demo]'
    python examples/ddp.py                    some seconds, two CPU processes that talk by gloo

On GPUs it is accelerator="gpu", devices=8, and nothing else changes.
"""

import hashlib
import os

import torch
from lightning.pytorch import Trainer, seed_everything

from lightning_prune import StructuredPruning
from lightning_prune.data import Digits
from lightning_prune.models import Classifier, ResNet

seed_everything(0, verbose=False)
epochs = int(os.environ.get("EPOCHS", "6"))
model = Classifier(ResNet(widths=(16, 32, 64), depth=1))
pruning = StructuredPruning(0.5, module="net", start_epoch=epochs // 3, iterative_steps=max(1, epochs // 3))
trainer = Trainer(
    max_epochs=epochs,
    accelerator="cpu",
    devices=2,
    strategy="ddp",
    callbacks=[pruning],
    logger=False,
    enable_progress_bar=False,
)
trainer.fit(model, datamodule=Digits())

weights = torch.cat([p.detach().flatten() for p in model.parameters()])
print(
    f"rank {trainer.global_rank}: {len(weights):,} parameters,",
    f"stem of {model.net.stem.out_channels} channels,",
    f"sha256 {hashlib.sha256(weights.numpy().tobytes()).hexdigest()[:12]}",
)
