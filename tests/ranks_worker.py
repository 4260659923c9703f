"""One rank of fits in turn, started by test_ranks.py: ``python ranks_worker.py FOLDER VARIANT...``.

``popen-KIND`` and ``spawn-KIND`` name how the other rank starts, and the kind of DDP.
"""

from __future__ import annotations

import hashlib
import os
import signal
import sys
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from processes import note_end
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader

from lightning_prune import GroupNormPruner, StructuredPruning, checkpoint
from lightning_prune.training import callback as callbacks_of_ours

follow_cut = callbacks_of_ours.follow_cut
EPOCHS = 4
KINDS = {
    "default": {},
    "unused": {"find_unused_parameters": True},
    "static": {"static_graph": True},
    "views": {"gradient_as_bucket_view": True},
}
RANKS = 2  # and batches that one process accumulates: dividing by 2 rounds nothing
QUIET = {
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "accelerator": "cpu",
    "max_epochs": EPOCHS,
    "use_distributed_sampler": False,
}


class Net(LightningModule):
    """Has no batch statistics, so that a rank's half of a batch is worth as much as in the whole one."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.fc = nn.Conv2d(3, 8, 3), nn.LayerNorm(8), nn.Linear(8, 2)

    def forward(self, x):
        return self.fc(self.norm(self.conv(x).mean(dim=(2, 3))).relu())

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def train_dataloader(self):
        own = batches()[self.trainer.global_rank :: self.trainer.world_size]
        return DataLoader(own, batch_size=None)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.01)


class Sharded(Net):
    """Pruned before its parameters are sharded."""

    def configure_model(self):
        if self.conv.out_channels == 8:  # it is called more than once
            GroupNormPruner(self, torch.ones(2, 3, 5, 5)).step()
            fully_shard(self, mesh=self.device_mesh["data_parallel"])


class Pruning(StructuredPruning):
    def __init__(self):
        super().__init__(0.5, start_epoch=1, iterative_steps=2, options={"reg": 0.01})

    def on_fit_end(self, trainer, pl_module):
        pass


class Killer(Callback):
    """Ends the second rank in the middle of the third epoch."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if (trainer.global_rank, trainer.current_epoch, batch_idx) == (1, 2, 2):
            os.kill(os.getpid(), signal.SIGKILL)


def batches():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(8, 4, 3, 5, 5, generator=generator)
    return list(zip(x, (x.mean(dim=(2, 3, 4)) > 0).long(), strict=True))


def digest(model):
    whole = (t.full_tensor() if isinstance(t, DTensor) else t for t in model.state_dict().values())
    # A sum waits for what other ranks still send.
    return hashlib.sha256(b"".join((t + 0).numpy().tobytes() for t in whole)).hexdigest()


class Writer(Callback):
    """Writes down what a rank holds while the ranks can still talk."""

    def __init__(self, file):
        self.file = file

    def on_train_end(self, trainer, pl_module):
        weight = pl_module.conv.weight
        words = [digest(pl_module), pl_module.conv.out_channels, len(weight), type(weight).__name__]
        Path(f"{self.file}{trainer.global_rank}.txt").write_text(" ".join(map(str, words)))


def single(*, pruned_before=False):
    torch.manual_seed(0)
    model = Net()
    if pruned_before:
        GroupNormPruner(model, torch.ones(2, 3, 5, 5)).step()
    callbacks = [] if pruned_before else [Pruning()]
    trainer = Trainer(callbacks=callbacks, accumulate_grad_batches=RANKS, enable_checkpointing=False, **QUIET)
    trainer.fit(model)
    return model


def strategy_of(variant):
    if variant in ("sharded", "refused"):
        return ModelParallelStrategy(data_parallel_size=RANKS, tensor_parallel_size=1)
    start_method, _, kind = variant.partition("-")
    options = KINDS[kind] | {"start_method": start_method} if kind else {}
    if variant == "broken":
        options = {"find_unused_parameters": True}
    return DDPStrategy(process_group_backend="gloo", **options)


def fit(variant, folder):
    callbacks_of_ours.follow_cut = (lambda *args: None) if variant == "broken" else follow_cut
    torch.manual_seed(0)
    sharded, saves = variant in ("sharded", "refused"), variant in ("whole", "killed", "restarted", "broken")
    model = Sharded() if sharded else Net()
    if "-" in variant:
        checkpoint.prepare(model)
    saved = folder / ("killed" if variant == "restarted" else variant)
    callbacks = [
        Writer(folder / f"{variant}-"),
        *([] if variant == "sharded" else [Pruning()]),
        *([ModelCheckpoint(saved, "{epoch}", save_top_k=-1)] if saves else []),
        *([Killer()] if variant == "killed" else []),
    ]
    trainer = Trainer(
        strategy=strategy_of(variant), devices=RANKS, callbacks=callbacks, enable_checkpointing=saves, **QUIET
    )
    trainer.fit(model, ckpt_path=last_of(saved) if variant == "restarted" else None)
    return trainer


def last_of(saved):
    """Choose where to go on, and write down what there was to choose from."""
    checkpoints = sorted(saved.glob("*.ckpt"))
    (saved / "found.txt").write_text(" ".join(path.name for path in checkpoints))
    return checkpoints[-1]


def main(folder, *variants):
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    for variant in variants:
        trainer = fit(variant, Path(folder))
        if dist.is_initialized():  # by now every rank is through, or there is none but this
            dist.barrier()
        if trainer.is_global_zero:
            if "-" in variant:  # trained weights come back to a process that spawned all ranks
                Path(folder, f"{variant}-main.txt").write_text(digest(trainer.lightning_module))
            note_end(Path(folder), variant)


if __name__ == "__main__":
    main(*sys.argv[1:])
