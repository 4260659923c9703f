"""Train a residual network on handwritten digits and remove half of its channels on the way."""

from lightning.pytorch import Trainer

from lightning_prune import StructuredPruning
from lightning_prune.data import Digits
from lightning_prune.models import Classifier, ResNet

model = Classifier(ResNet())
pruning = StructuredPruning(pruning_ratio=0.5, module="net", start_epoch=4)
trainer = Trainer(max_epochs=6, callbacks=[pruning], accelerator="cpu", logger=False)
trainer.fit(model, datamodule=Digits())
