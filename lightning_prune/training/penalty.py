"""The penalty in a Trainer's step: on the scale of the gradients, and without waiting for a device."""

from __future__ import annotations

from lightning.pytorch import Trainer
from torch import Tensor
from torch.optim import Optimizer

from lightning_prune.pruner import GroupNormPruner
from lightning_prune.training.evidence import EvidenceGatherer
from lightning_prune.training.gradients import GradientWatch, loss_scale

__all__ = ["Penalty"]


class Penalty:
    """Adds the penalty's gradient to whole gradients.

    Args:
        nan_policy: What a gradient that is not finite does; see ``GradientWatch``.
        update_every: Optimizer steps between refreshes of the regulariser's weights, >= 1.
        fused: Whether kernels of our own may look at gradients.

    Attributes:
        watch: Counts the steps whose gradients were not finite.
    """

    def __init__(self, nan_policy: str, update_every: int, *, fused: bool | None) -> None:
        self.watch = GradientWatch(nan_policy, fused=fused)
        self._update_every = update_every
        self._unlooked = 0

    def add(
        self,
        trainer: Trainer,
        pruner: GroupNormPruner,
        gatherer: EvidenceGatherer,
        *,
        presses: bool,
        share: float,
        optimizer: Optimizer | None,
    ) -> None:
        """Add the penalty's gradient, and before it let an importance see those of the task.

        Args:
            trainer: The running Trainer.
            pruner: Its model has just got its gradients.
            gatherer: Of the evidence that the pruner's importance needs, if any.
            presses: Whether this is a step of the sparse phase.
            share: Of an accumulation's backward passes, how many there were, in (0, 1].
            optimizer: That is about to step; None right after the backward pass.
        """
        gathers = pruner.collector.need is not None
        fit = self.watch.share(trainer, pruner.regularizer.parameters)
        if gathers:
            fit = float(fit)  # evidence of a broken step is none at all, so here the device is waited for
        if isinstance(fit, Tensor) or fit:
            scale = share * loss_scale(trainer, optimizer)
            if gathers:
                gatherer.collect(trainer, pruner, float(scale))
            if presses:
                pruner.regularizer.update_every = self._update_every  # a cut makes a new regulariser
                self.watch.warn_of_rounding(pruner)
                pruner.regularize(grad_scale=scale * fit)
        self._unlooked += 1
        if self._unlooked >= trainer.log_every_n_steps:  # type: ignore[attr-defined]
            self.look(trainer, pruner)

    def look(self, trainer: Trainer, pruner: GroupNormPruner) -> None:
        """Hear what the device has found: it is not asked in every step, but when something is logged.

        Raises:
            PruneError: If something was not finite, and ``nan_policy`` is ``raise``.
        """
        self._unlooked = 0
        self.watch.check(trainer)
        pruner.regularizer.check()
