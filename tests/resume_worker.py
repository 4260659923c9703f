"""A fit that saves every step, run and killed by test_checkpoint_resume.py: ``FOLDER DELAY [CHECKPOINT]``."""

from __future__ import annotations

import sys
import time
import warnings

import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from test_checkpoint_lightning import Cosine, Slow, build, fit, pruning


class Linger(Callback):
    """Gives the killer time to strike between two steps, and says where it is."""

    def __init__(self, seconds):
        self.seconds = seconds

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        sys.stdout.write(f"{trainer.global_step}\n")
        sys.stdout.flush()
        time.sleep(self.seconds)


def train(*callbacks, **options):
    return fit(
        build(Cosine, optimizer="adamw"),
        pruning(update_every=3),
        *callbacks,
        max_epochs=4,
        loader=Slow(),
        **options,
    )


def main(folder, seconds, ckpt_path=None):
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    saver = ModelCheckpoint(folder, "{step}", save_top_k=-1, every_n_train_steps=1)
    train(saver, Linger(float(seconds)), enable_checkpointing=True, ckpt_path=ckpt_path)


if __name__ == "__main__":
    main(*sys.argv[1:])
