"""The end of a fit: one report of the network before the first cut and after the last."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule, Trainer

from lightning_prune.example_inputs import Example
from lightning_prune.pruner import GroupNormPruner

__all__ = ["FitReport"]


class FitReport:
    """What is known of the dense network, and the report that is written from it."""

    def look_at_dense(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep what the network was before its first cut."""

    def write(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        module: str | None,
        pruner: GroupNormPruner,
        example: Example,
    ) -> None:
        """Write the report."""

    def state_dict(self) -> dict[str, Any]:
        """Give plain data."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take plain data."""
