"""One rank of DDP fits in turn, started by test_ddp.py: ``python ddp_worker.py FOLDER VARIANT...``."""

from __future__ import annotations

import hashlib
import json
import sys
import time
import warnings
import weakref
from pathlib import Path

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy
from processes import note_end
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset

from lightning_prune import checkpoint
from lightning_prune.scores.importance import IMPORTANCES
from lightning_prune.training import callback as callbacks
from lightning_prune.training.callback import StructuredPruning

follow_cut = callbacks.follow_cut
warnings.simplefilter("ignore")
warnings.filterwarnings("error", message=".*sync_dist")  # advice on how we log
VARIANTS = {
    "default": {},
    "unused": {"find_unused_parameters": True},
    "static": {"static_graph": True},
    "static_manual": {"static_graph": True},
    "views": {"gradient_as_bucket_view": True},
    "spawn": {"start_method": "spawn"},
    "unprepared": {"start_method": "spawn"},
    "broken": {"find_unused_parameters": True},
    "accumulated": {},
    "raises": {},
    "taylor": {},
    "hessian": {},
    "activation": {},
    "distilled": {},
}


class Net(LightningModule):
    """Batch statistics differ between ranks, gradients do not."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, 2)

    def forward(self, x):
        return self.fc(self.bn(self.conv(x)).relu().mean(dim=(2, 3)))

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


class ByHand(Net):
    """The same steps, made by the module itself."""

    automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        optimizer.step()


class Watch(StructuredPruning):
    """Notes, at the start of every epoch, whether the ranks agree, and whether old DDP wrappers are gone."""

    def __init__(self, out, **options):
        super().__init__(0.5, start_epoch=1, every_n_epochs=1, iterative_steps=3, **options)
        self.out, self.rows, self.old = out, [], None

    def on_train_epoch_start(self, trainer, pl_module):
        self.old = weakref.ref(trainer.strategy.model)
        try:
            super().on_train_epoch_start(trainer, pl_module)
        except Exception as error:
            self._last_words(trainer.global_rank, error)
            raise
        self._note(trainer, pl_module)

    def on_train_epoch_end(self, trainer, pl_module):
        super().on_train_epoch_end(trainer, pl_module)
        self._note(trainer, pl_module)

    def on_fit_end(self, trainer, pl_module):
        if trainer.global_rank == 0:
            Path(self.out).write_text(json.dumps(self.rows))

    def _last_words(self, rank, error):
        """Write down what a rank fails with; the first to end takes the others along, so it waits a while."""
        files = [Path(f"{self.out}.{which}") for which in range(dist.get_world_size())]
        files[rank].write_text(f"{type(error).__name__}: {error}")
        patience = time.monotonic() + 30
        while time.monotonic() < patience and not all(file.exists() for file in files):
            time.sleep(0.1)

    def _note(self, trainer, pl_module):
        evidence = self.pruner.collector.state_dict() if self.pruner is not None else {}
        collected = [table[name] for table in evidence.values() for name in sorted(table)]
        tensors = [*pl_module.parameters(), *collected]
        mine = hashlib.sha256(b"".join(t.detach().numpy().tobytes() for t in tensors)).hexdigest()
        both = [None] * dist.get_world_size()
        dist.all_gather_object(both, mine)
        wrapped = isinstance(trainer.strategy.model, DistributedDataParallel)
        gone = self.old() is None or self.old() is trainer.strategy.model
        self.rows.append(
            [trainer.current_epoch, len(set(both)) == 1, pl_module.conv.out_channels, wrapped, gone]
        )


def data():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(32, 3, 5, 5, generator=generator)
    return DataLoader(TensorDataset(x, (x.mean(dim=(1, 2, 3)) > 0).long()), batch_size=4)


def fit(variant, out):
    torch.manual_seed(0)
    model = ByHand() if variant == "static_manual" else Net()
    if variant == "spawn":
        checkpoint.prepare(model)
    callbacks.follow_cut = (lambda *args: None) if variant == "broken" else follow_cut
    options = {"options": {"reg": 0.01, "importance": "random" if variant == "default" else "group_norm"}}
    if variant in IMPORTANCES:
        options["options"]["importance"] = variant
    if variant == "distilled":
        options |= {"distillation": {}, "recalibrate_batches": 2}
    if variant == "raises":
        options["options"]["importance"] = lambda group: 1 / 0
    trainer = Trainer(
        max_epochs=4,
        accelerator="cpu",
        devices=2,
        strategy=DDPStrategy(**VARIANTS[variant]),
        accumulate_grad_batches=2 if variant in ("accumulated", "taylor") else 1,
        callbacks=[Watch(out, **options)],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, data())
    return trainer


def main(folder, *variants):
    torch.set_num_threads(1)
    for variant in variants:
        trainer = fit(variant, Path(folder, f"{variant}.json"))
        if variant == "spawn":
            shape = list(trainer.lightning_module.conv.weight.shape)
            Path(folder, f"{variant}.json.main").write_text(json.dumps(shape))
        if dist.is_initialized():  # by now every rank is through, or there is none but this
            dist.barrier()
        if trainer.is_global_zero:
            note_end(Path(folder), variant)


if __name__ == "__main__":
    main(*sys.argv[1:])
