"""When an epoch begins with a cut, and which phase an epoch belongs to."""

from __future__ import annotations

from lightning.pytorch import Callback, Trainer

from lightning_prune.options import PruningOptions
from lightning_prune.training.strategies import callbacks_of

__all__ = ["PHASES", "Schedule", "place_in_logs"]

PHASES = ("dense", "sparse", "prune", "fine-tune")


class Schedule(Callback):
    """A callback that cuts at the start of epochs."""

    module: str | None
    options: PruningOptions
    pruning_ratio: float
    sparse_start_epoch: int
    start_epoch: int
    every_n_epochs: int
    iterative_steps: int
    _cut_epoch: int | None = None  # last epoch that began with a cut

    def should_prune(self, epoch: int) -> bool:
        """Say whether ``epoch`` begins with a cut; override it for a schedule of your own.

        Args:
            epoch: 0-based.
        """
        since = epoch - self.start_epoch
        return since >= 0 and since % self.every_n_epochs == 0 and not self.target_reached

    @property
    def target_reached(self) -> bool:
        """Whether the last cut has been made."""
        return self.steps_done >= self.iterative_steps

    @property
    def steps_done(self) -> int:
        """Number of cuts made so far."""
        raise NotImplementedError

    def phase(self, epoch: int) -> str:
        """Name the phase of an epoch that has begun, one of ``PHASES``."""
        if epoch == self._cut_epoch:
            return "prune"
        if self.target_reached:
            return "fine-tune"
        return "sparse" if epoch >= self.sparse_start_epoch else "dense"


def place_in_logs(trainer: Trainer, schedule: Schedule) -> str:
    """Give the prefix of what a callback logs; it holds the module where another one prunes another."""
    several = sum(isinstance(c, Schedule) for c in callbacks_of(trainer)) > 1
    return f"prune/{schedule.module}/" if several and schedule.module else "prune/"
