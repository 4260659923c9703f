"""Tests of a copy, once the fit is over."""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.model_helpers import is_overridden

__all__ = ["can_test", "test_copy"]


def can_test(trainer: Trainer, pl_module: LightningModule) -> bool:
    """Say whether there is a test step, and data for it."""
    return is_overridden("test_step", pl_module) and _test_data(trainer, pl_module) is not None


def _test_data(trainer: Trainer, pl_module: LightningModule) -> Any:
    """Find who has test data: the DataModule, else the module itself."""
    datamodule = getattr(trainer, "datamodule", None)
    for owner in (datamodule, pl_module):
        if owner is not None and is_overridden("test_dataloader", owner):
            return owner
    return None


def test_copy(trainer: Trainer, model: LightningModule) -> dict[str, float]:
    """Test a copy with a Trainer of its own; this one's fit is over, but its state is still the user's."""
    owner = _test_data(trainer, model)
    datamodule = owner if owner is getattr(trainer, "datamodule", None) else None
    with _silence():
        tester = Trainer(
            accelerator=trainer.strategy.root_device.type,
            devices=1
            if trainer.strategy.root_device.type == "cpu"
            else [trainer.strategy.root_device.index or 0],
            precision=trainer.precision,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        try:
            results = tester.test(copy.deepcopy(model), datamodule=datamodule, verbose=False)
        finally:
            if datamodule is not None:
                datamodule.trainer = trainer
    return {name: float(value) for result in reversed(results) for name, value in result.items()}


@contextmanager
def _silence() -> Iterator[None]:
    """Keep what a Trainer says about itself off the console; it was said at the start of the fit."""
    loggers = [
        logging.getLogger(name) for name in ("lightning.pytorch", "lightning.pytorch.utilities.rank_zero")
    ]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.WARNING)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
