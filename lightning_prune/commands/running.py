"""One run: train the dense twin, then the network that is pruned; report and save."""

from __future__ import annotations

import copy
import logging
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from omegaconf import DictConfig, OmegaConf

from lightning_prune.commands.answering import Stopped
from lightning_prune.commands.configuring import build
from lightning_prune.training.checkpointing import prunings

__all__ = ["fit", "known_warnings", "run", "stoppable"]

TWIN = "The same network, trained without pruning with the same seed for the same number of epochs."
TWINS_FOLDER = "dense"
log = logging.getLogger(__name__)


def run(cfg: DictConfig) -> float:
    """Train the dense twin, then the network that is pruned; save that one and say how good it is."""
    with known_warnings():
        twin = _dense_twin(cfg) if cfg.dense_twin and cfg.pruning else None
        model, data, trainer = build(cfg)
        for callback in prunings(trainer):
            callback.report.config = cast(dict[str, Any], OmegaConf.to_container(cfg, resolve=True))
            if twin is not None:
                callback.report.compare_with(twin, dense_is=TWIN)
        fit(trainer, model, data, cfg.ckpt_path, "go on from the last checkpoint with ckpt_path={}")
        tuned = _tuned(trainer, cfg.tuned_metric)
        if not cfg.pruning:
            with stoppable(trainer, lambda: "Stopped while testing; training was done."):
                trainer.test(model, datamodule=data)
    name = "pruned.ckpt" if cfg.pruning else "trained.ckpt"
    trainer.save_checkpoint(Path(cfg.run_dir) / name, weights_only=True)
    log.info("Everything is in %s", cfg.run_dir)
    return tuned


def _dense_twin(cfg: DictConfig) -> LightningModule:
    """Train the same network with the same seed for the same epochs, and prune nothing.

    A run that goes on takes along the twin that it had trained.
    """
    before = _twins_checkpoint(cfg.ckpt_path)
    if before is None:
        log.info("First the dense twin is trained, then the network that is pruned")
    else:
        log.info("The dense twin goes on from %s, then the network that is pruned", before)
    twin = copy.deepcopy(cfg)
    twin.run_dir, twin.pruning = f"{cfg.run_dir}/{TWINS_FOLDER}", {}
    model, data, trainer = build(twin)
    fit(trainer, model, data, before, "the last checkpoint of the dense twin is {}")
    return model


def _twins_checkpoint(ckpt_path: str | None) -> str | None:
    """``run/checkpoints/last.ckpt`` -> ``run/dense/checkpoints/last.ckpt``, if that is a file."""
    if ckpt_path is None:
        return None
    path = Path(ckpt_path)
    twins = path.parent.parent / TWINS_FOLDER / path.parent.name / path.name
    return str(twins) if twins.is_file() else None


@contextmanager
def known_warnings() -> Iterator[None]:
    """Keep warnings off the console that nobody needs to act on."""
    with warnings.catch_warnings():
        for text in (
            ".*does not have many workers",  # the demo's images lie in memory
            ".*LeafSpec",  # Lightning 2.6 on torch 2.13
            "Experiment logs directory .* exists",  # made by Hydra a moment ago
            "The dirpath has changed",  # a run that goes on has a folder of its own
        ):
            warnings.filterwarnings("ignore", message=text)
        yield


def fit(
    trainer: Trainer, model: LightningModule, data: LightningDataModule, ckpt_path: str | None, advice: str
) -> None:
    """Train; after Ctrl-C say which checkpoint is left."""

    def what_is_left() -> str:
        keeper = trainer.checkpoint_callback
        last = getattr(keeper, "last_model_path", "") or getattr(keeper, "best_model_path", "")
        rest = advice.format(last) if last else "no checkpoint was written yet."
        return f"Stopped in epoch {trainer.current_epoch}; {rest}"

    with stoppable(trainer, what_is_left):
        trainer.fit(model, datamodule=data, ckpt_path=ckpt_path)


@contextmanager
def stoppable(trainer: Trainer, say: Callable[[], str]) -> Iterator[None]:
    """Answer Ctrl-C with a sentence; Lightning makes an exit with code 1 of it, which is turned back here.

    Args:
        trainer: The Trainer that is at work.
        say: Gives the sentence.
    """
    try:
        yield
    except KeyboardInterrupt:
        raise Stopped(say()) from None
    except SystemExit:
        if not trainer.interrupted:
            raise
        raise Stopped(say()) from None


def _tuned(trainer: Trainer, name: str) -> float:
    """Give the last value of the metric that a sweeper tunes; NaN, with a warning, if nothing logged it."""
    if name not in trainer.callback_metrics:
        known = ", ".join(sorted(trainer.callback_metrics))
        log.warning("tuned_metric=%s was asked for, but only these were logged: %s", name, known)
        return math.nan
    return float(trainer.callback_metrics[name])
