"""Checkpointing and early stopping that compare only epochs of equal structure.

The metric of an unpruned epoch is no yardstick for a pruned one: the usual callbacks keep the epoch before
the cut, or stop right after it. These wait for the last cut; a plain ``ModelCheckpoint()`` without
``monitor`` beside them still saves what a resume needs.
"""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn
from typing_extensions import override

from lightning_prune.training.callback import StructuredPruning
from lightning_prune.training.strategies import callbacks_of

__all__ = ["PrunedEarlyStopping", "PrunedModelCheckpoint", "prunings"]


def prunings(trainer: Trainer) -> list[StructuredPruning]:
    """List the callbacks of a Trainer that prune."""
    return [callback for callback in callbacks_of(trainer) if isinstance(callback, StructuredPruning)]


def _is_waiting(trainer: Trainer) -> bool:
    return not all(schedule.target_reached for schedule in prunings(trainer))


def _level(trainer: Trainer) -> int:
    """Count the cuts made so far."""
    return sum(schedule.steps_done for schedule in prunings(trainer))


class PrunedModelCheckpoint(ModelCheckpoint):
    """Save the best *pruned* epochs: nothing before the last cut, or the best of every level.

    Without a ``StructuredPruning`` in the Trainer it is a plain ``ModelCheckpoint``.

    Saves by step or by the clock begin when an epoch or a validation has ended since the cut, for until then
    the monitored value is an older network's. A fit that ends before the last cut leaves ``best_model_path``
    empty. Two files are there to go on from and hold the network as it is, pruned or not: that of
    ``save_on_exception``, and ``last.ckpt``, which ``save_last`` writes with every save, and at the end of a
    fit that saved nothing.

    Args:
        per_level: Save at every level of sparsity, and begin anew with every cut: ``best_model_path`` is then
            the best since the last one, and files of earlier levels stay. Put ``{prune/sparsity:.2f}`` into
            ``filename``, with ``auto_insert_metric_name=False``, to tell them apart.
        **kwargs: Arguments of ``ModelCheckpoint``.

    >>> PrunedModelCheckpoint(monitor="val_acc", mode="max").waits_for_pruning
    True
    """

    waits_for_pruning = True

    def __init__(self, *, per_level: bool = False, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.per_level = per_level
        self._seen_level: int | None = None  # level that `best_model_path` is of
        self._judged_level: int | None = None  # of the last validation, or the last epoch

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            self._seen_level = self._judged_level = None

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._seen_level is None:  # not resumed
            self._seen_level = self._judged_level = _level(trainer)
        super().on_train_start(trainer, pl_module)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx == 0:  # a resumed run may have no start of its epoch, nor the end of the last one
            self._judged_level = self._seen_level
        self._follow(trainer)
        # Right after a cut the monitored value is still that of the epoch before it.
        if self._counts(trainer) and self._judged_level == self._seen_level:
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._follow(trainer)
        self._judged_level = self._seen_level
        if self._counts(trainer):
            super().on_train_epoch_end(trainer, pl_module)

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking or trainer.state.fn != TrainerFn.FITTING:
            return
        self._follow(trainer)
        self._judged_level = self._seen_level
        if self._counts(trainer):
            super().on_validation_end(trainer, pl_module)

    @override
    def state_dict(self) -> dict[str, Any]:
        levels = {"seen_level": self._seen_level, "judged_level": self._judged_level}
        return {**super().state_dict(), **levels}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._seen_level = state_dict.get("seen_level")
        self._judged_level = state_dict.get("judged_level")

    def _counts(self, trainer: Trainer) -> bool:
        return self.per_level or not _is_waiting(trainer)

    def _follow(self, trainer: Trainer) -> None:
        level = _level(trainer)
        if self.per_level and level != self._seen_level:
            self._begin_anew()
        self._seen_level = level

    def _begin_anew(self) -> None:
        self.best_k_models = {}
        self.best_model_path = self.kth_best_model_path = ""
        self.best_model_score = self.current_score = None
        self.kth_value = torch.tensor(float("inf") if self.mode == "min" else float("-inf"))


class PrunedEarlyStopping(EarlyStopping):
    """Stop when the *pruned* network stops improving: patience begins with the epoch of the last cut.

    Without a ``StructuredPruning`` in the Trainer it is a plain ``EarlyStopping``. Takes its arguments.

    >>> PrunedEarlyStopping(monitor="val_loss").waits_for_pruning
    True
    """

    waits_for_pruning = True

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not _is_waiting(trainer):
            super().on_train_epoch_end(trainer, pl_module)

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not _is_waiting(trainer):
            super().on_validation_end(trainer, pl_module)
