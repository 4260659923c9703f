"""Hand a pruned network to torchao: first fewer channels, then eight bits for each weight that is left.

    pip install 'lightning-prune[demo,quantize]'
    python examples/quantize.py               some seconds

The result of pruning is a plain module, so quantisation needs to know nothing about it. Quantise last: a
quantised weight cannot be cut any more.
"""

import os
from pathlib import Path

import torch
from lightning.pytorch import Trainer, seed_everything

from lightning_prune import StructuredPruning
from lightning_prune.data import Digits
from lightning_prune.models import Classifier, ViT

try:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_
except ImportError as missing:
    raise SystemExit("This example needs torchao: pip install 'lightning-prune[quantize]'") from missing

seed_everything(0)
epochs = int(os.environ.get("EPOCHS", "12"))
data = Digits()
model = Classifier(ViT(dim=64, depth=2, mlp_dim=128))
dense_kib = sum(p.numel() * p.element_size() for p in model.net.parameters()) / 1024
pruning = StructuredPruning(0.3, module="net", start_epoch=epochs // 3, options={"round_to": 8})
trainer = Trainer(max_epochs=epochs, callbacks=[pruning], accelerator="cpu", logger=False)
trainer.fit(model, datamodule=data)


def kib_on_disk(path: str) -> float:
    """Save the weights and give the size of the file."""
    torch.save(model.net.state_dict(), path)
    return Path(path).stat().st_size / 1024


pruned_kib = kib_on_disk("pruned.pt")
(pruned,) = trainer.test(model, datamodule=data, verbose=False)
quantize_(model.net, Int8WeightOnlyConfig())  # linear layers only; ask torchao for its other configurations
quantized_kib = kib_on_disk("quantized.pt")
(quantized,) = trainer.test(model, datamodule=data, verbose=False)

print(f"dense                {dense_kib:6.0f} KiB of weights")
print(f"pruned               {pruned_kib:6.0f} KiB   accuracy {pruned['test/acc']:.2%}")
print(f"pruned and quantised {quantized_kib:6.0f} KiB   accuracy {quantized['test/acc']:.2%}")
