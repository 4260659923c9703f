"""A fit that saves every step, killed by test_checkpoint_resume.py: ``FOLDER KIND STEP [CHECKPOINT]``."""

from __future__ import annotations

import sys
import time
import warnings

import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import (
    EMAWeightAveraging,
    ModelCheckpoint,
    StochasticWeightAveraging,
    WeightAveraging,
)
from test_checkpoint_lightning import Cosine, Slow, build, every_epoch, fit, pruning

EPOCHS = 4
AVERAGES = {
    "none": list,
    "mean": lambda: [WeightAveraging()],
    "ema": lambda: [EMAWeightAveraging(decay=0.5)],
    "epochs": lambda: [EMAWeightAveraging(decay=0.5, update_starting_at_epoch=1)],
    "swa": lambda: [StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=3)],  # from epoch 2 on
}


class Linger(Callback):
    """Says which step is done, and after one of them gives the killer time to strike."""

    def __init__(self, step):
        self.step = step

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        sys.stdout.write(f"{trainer.global_step}\n")
        sys.stdout.flush()
        if trainer.global_step == self.step:
            time.sleep(60)


def train(kind, *callbacks, ours_first=True, prune=True, dtype=torch.float32, **options):
    ours = [pruning(update_every=3)] if prune else []
    both = [*ours, *AVERAGES[kind]()] if ours_first else [*AVERAGES[kind](), *ours]
    model = build(Cosine, optimizer="adamw").to(dtype)
    return fit(model, *both, *callbacks, max_epochs=EPOCHS, loader=Slow(), **options)


def save(folder):
    """Save every step and every epoch."""
    return ModelCheckpoint(folder, "{step}", save_top_k=-1, every_n_train_steps=1), every_epoch(folder)


def main(folder, kind, step, ckpt_path=None):
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    train(kind, *save(folder), Linger(int(step)), enable_checkpointing=True, ckpt_path=ckpt_path)


if __name__ == "__main__":
    main(*sys.argv[1:])
