"""Train a residual network on handwritten digits and halve its channels on the way."""

from lightning.pytorch import Trainer

from lightning_prune.callback import StructuredPruning
from lightning_prune.data import Digits
from lightning_prune.models import Classifier, ResNet

model = Classifier(ResNet(widths=(16, 32), depth=1))
pruning = StructuredPruning(pruning_ratio=0.5, module="net", start_epoch=3, iterative_steps=2)
trainer = Trainer(max_epochs=8, callbacks=[pruning], accelerator="cpu", logger=False)
trainer.fit(model, datamodule=Digits())
