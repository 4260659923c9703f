"""When evidence for an importance is gathered: in every step of the epoch that ends before a cut."""

from __future__ import annotations

from contextlib import ExitStack

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lightning_prune.errors import OptionError
from lightning_prune.pruner import GroupNormPruner
from lightning_prune.scores.importance import NEEDS
from lightning_prune.training.gradients import overflowed
from lightning_prune.training.strategies import is_compiled

__all__ = ["EvidenceGatherer"]


class EvidenceGatherer:
    """Lets a pruner see gradients and outputs of training steps; costs nothing where neither is needed.

    Hooks hang on the layers during a training step alone: no copy, trace or checkpoint meets them.
    """

    def __init__(self) -> None:
        self._hooks = ExitStack()

    @staticmethod
    def check(importance: object, first_cut: int) -> None:
        """Refuse a first cut that comes before any training step.

        Raises:
            OptionError: If the importance needs such steps.
        """
        if isinstance(importance, str) and importance in NEEDS and first_cut < 1:
            raise OptionError(
                f"importance={importance!r} collects {NEEDS[importance].replace('_', ' ')} while the network "
                "trains, and start_epoch=0 cuts before any; set start_epoch to at least 1, or choose another "
                "importance"
            )

    def begin_epoch(self, pruner: GroupNormPruner | None) -> None:
        """Forget the epoch before: its weights are others by now, and its cut is made."""
        if pruner is not None:
            pruner.collector.restart()

    def begin_batch(self, pruner: GroupNormPruner | None, pl_module: LightningModule) -> None:
        """Begin to watch outputs.

        Raises:
            OptionError: If they are needed and compiled code passes the hooks by.
        """
        if pruner is None or pruner.collector.need != "activations":
            return
        if is_compiled(pl_module):
            raise OptionError(
                "importance='activation' was asked for a compiled module, whose code runs past forward "
                "hooks; train it uncompiled, or choose another importance"
            )
        self._hooks.enter_context(pruner.watch())

    def end_batch(self) -> None:
        """Give the layers back."""
        self._hooks.close()

    def collect(self, trainer: Trainer, pruner: GroupNormPruner, grad_scale: float) -> None:
        """Take in a step's gradients before a penalty joins them, or the outputs of its batches.

        Args:
            trainer: The running Trainer.
            pruner: Whose collector is fed.
            grad_scale: Factor on the gradients right now.
        """
        need = pruner.collector.need
        if need is None or (need != "activations" and overflowed(trainer, pruner.model)):
            return

        def over_ranks(tensor: Tensor) -> Tensor:
            total = trainer.strategy.reduce(tensor, reduce_op="sum")
            assert isinstance(total, Tensor)
            return total

        pruner.collect(grad_scale=grad_scale, reduce=over_ranks if trainer.world_size > 1 else None)
