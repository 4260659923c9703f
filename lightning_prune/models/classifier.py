"""The LightningModule of the demo: any network that maps images to logits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torchmetrics.classification import MulticlassAccuracy

from lightning_prune.errors import OptionError

__all__ = ["Classifier"]

SCHEDULERS = ("cosine", "constant")


class Classifier(LightningModule):
    """Train a network to name the class of an image, with AdamW and cross entropy.

    Args:
        net: Network that maps images [b, *input_shape] to logits [b, num_classes].
        input_shape: Shape of one image.
        num_classes: Number of classes, >= 2.
        lr: Peak learning rate, > 0.
        weight_decay: Decoupled weight decay, >= 0. It shrinks weights in addition to the sparse learning
            of the pruner.
        scheduler: "cosine" (linear rise, then half a cosine down to 0) or "constant".
        warmup: Share of all steps in which the learning rate rises, in [0, 1); for "cosine" only.
        label_smoothing: Share of the target that is spread over all classes, in [0, 1).

    Raises:
        OptionError: If a value is out of its range.

    >>> model = Classifier(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)))
    >>> model(model.example_input_array).shape
    torch.Size([2, 10])
    """

    def __init__(
        self,
        net: nn.Module,
        *,
        input_shape: Sequence[int] = (1, 8, 8),
        num_classes: int = 10,
        lr: float = 3e-3,
        weight_decay: float = 0.05,
        scheduler: str = "cosine",
        warmup: float = 0.1,
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__()
        _check(lr, weight_decay, scheduler=scheduler, warmup=warmup, smoothing=label_smoothing)
        # Plain values only: a checkpoint that holds them loads with weights_only=True.
        self.save_hyperparameters(ignore=["net"])
        self.net = net
        self.lr = lr
        self.weight_decay = weight_decay
        self.scheduler = scheduler
        self.warmup = warmup
        self.loss = nn.CrossEntropyLoss(label_smoothing=label_smoothing)
        self.train_acc = MulticlassAccuracy(num_classes, average="micro")
        self.val_acc = MulticlassAccuracy(num_classes, average="micro")
        self.test_acc = MulticlassAccuracy(num_classes, average="micro")
        self.example_input_array = torch.zeros(2, *input_shape)

    def forward(self, images: Tensor) -> Tensor:
        """Map images [b, *input_shape] to logits [b, num_classes]."""
        logits: Tensor = self.net(images)
        return logits

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Give the mean cross entropy of one batch, a scalar."""
        images, labels = batch
        logits = self(images)
        loss: Tensor = self.loss(logits, labels)
        self.train_acc(logits, labels)
        self.log("train/loss", loss, on_step=False, on_epoch=True)
        self.log("train/acc", self.train_acc, on_step=False, on_epoch=True, metric_attribute="train_acc")
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log loss and accuracy on the validation images."""
        self._evaluate("val", self.val_acc, batch)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log loss and accuracy on the test images."""
        self._evaluate("test", self.test_acc, batch)

    def _evaluate(self, part: str, accuracy: MulticlassAccuracy, batch: tuple[Tensor, Tensor]) -> None:
        images, labels = batch
        logits = self(images)
        accuracy(logits, labels)
        self.log(f"{part}/loss", cross_entropy(logits, labels))
        self.log(f"{part}/acc", accuracy, prog_bar=True, metric_attribute=f"{part}_acc")

    def configure_optimizers(self) -> Any:
        """Give AdamW and, for "cosine", a learning rate that changes after every step."""
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.lr, weight_decay=self.weight_decay)
        if self.scheduler == "constant":
            return optimizer
        shape = partial(_cosine, total=int(self.trainer.estimated_stepping_batches), warmup=self.warmup)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, shape)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def _cosine(step: int, *, total: int, warmup: float) -> float:
    """Give the share of the peak learning rate at a step: up in a line, down in half a cosine."""
    rising = round(warmup * total)
    if step < rising:
        return (step + 1) / rising
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - rising) / max(1, total - rising))))


def _check(lr: float, weight_decay: float, *, scheduler: str, warmup: float, smoothing: float) -> None:
    ranges = {
        "lr": (lr, lr > 0, "> 0"),
        "weight_decay": (weight_decay, weight_decay >= 0, ">= 0"),
        "scheduler": (scheduler, scheduler in SCHEDULERS, " or ".join(SCHEDULERS)),
        "warmup": (warmup, 0 <= warmup < 1, "in [0, 1)"),
        "label_smoothing": (smoothing, 0 <= smoothing < 1, "in [0, 1)"),
    }
    for name, (value, is_good, allowed) in ranges.items():
        if not is_good:
            raise OptionError(f"{name}={value!r} was asked for: it must be {allowed}")
