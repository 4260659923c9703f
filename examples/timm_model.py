"""Prune a model of timm: a vision transformer loses heads, head dims and channels, and half its MACs.

    pip install 'lightning-prune[demo]' timm
    python examples/timm_model.py             about a minute; EPOCHS=3 for a look

Nothing is said about the model's layers. Any name of ``timm.list_models()`` will do; where you have its
weights, ``pretrained=True`` starts from them, and ``StructuredPruning`` is the same.
"""

import os

import timm
from lightning.pytorch import Trainer

from lightning_prune import StructuredPruning
from lightning_prune.data import Digits
from lightning_prune.models import Classifier

epochs = int(os.environ.get("EPOCHS", "20"))
net = timm.create_model(
    "vit_tiny_patch16_224", img_size=8, patch_size=2, in_chans=1, num_classes=10, depth=3, embed_dim=96
)
pruning = StructuredPruning(
    module="net",
    sparse_start_epoch=1,
    start_epoch=epochs // 3,
    iterative_steps=max(1, epochs // 5),
    options={"budget": {"macs": 0.5}, "prune_num_heads": True, "head_pruning_ratio": 0.33},
)
trainer = Trainer(max_epochs=epochs, callbacks=[pruning], accelerator="cpu", logger=False)
trainer.fit(Classifier(net), datamodule=Digits())

for name, block in net.blocks.named_children():
    heads, width, hidden = block.attn.num_heads, block.attn.head_dim, block.mlp.fc1.out_features
    print(f"block {name}: {heads} heads of {width}, {hidden} hidden")
