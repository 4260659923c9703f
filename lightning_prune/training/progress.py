"""How far a prune has come: counts before the first cut and now, as logged numbers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torchmetrics import Metric

from lightning_prune.measuring.cost import measure_cost
from lightning_prune.metrics import ChannelSparsity, KeptMacs, ParameterSparsity
from lightning_prune.pruner import GroupNormPruner
from lightning_prune.training.example_inputs import Example

__all__ = ["Progress", "log_levels"]

# Of sharded gradients one rank alone may see what is not finite, and would wait for the others to log it.
LONE = frozenset({"nonfinite_gradients"})


class Progress:
    """Count parameters, units and MACs of a pruner's model, and remember what there was at first.

    Args:
        initial: Counts before the first cut, from an earlier run's ``initial``; empty: the first look gives
            them.
        left: Counts that the earlier run ended with, its ``now``.
    """

    def __init__(
        self, initial: Mapping[str, int] | None = None, left: Mapping[str, int] | None = None
    ) -> None:
        self.initial = dict(initial or {})
        self.now: dict[str, int] = {}
        self._left = dict(left or {})
        self._metrics: dict[str, tuple[str, Metric]] = {
            "sparsity": ("parameters", ParameterSparsity()),
            "channels": ("units", ChannelSparsity()),
            "macs": ("macs", KeptMacs()),
        }

    def look(self, pruner: GroupNormPruner, example: Example) -> None:
        """Count what is there now."""
        cost = measure_cost(pruner.model, example.inputs, forward_fn=example.forward_fn)
        units = sum(group.n_units for group in pruner.groups())
        now = self.now = {"parameters": cost.parameters, "units": units, "macs": cost.macs}
        self.initial = self.initial or dict(now)
        if self._left:  # nothing was cut since: other MACs are those of an example of another size
            left, self._left = self._left["macs"], {}
            self.initial["macs"] = round(self.initial["macs"] * now["macs"] / left) if left else 0
        for count, metric in self._metrics.values():
            if self.initial[count]:
                metric.update(now[count], self.initial[count])

    def kept(self, count: str) -> float:
        """Give the share that is left of ``parameters``, ``units`` or ``macs``, in [0, 1]."""
        return self.now[count] / self.initial[count] if self.initial.get(count) else 1.0

    def values(self, device: torch.device) -> dict[str, Any]:
        """Give the shares to log. Every rank must ask, for the metrics meet."""
        return {
            name: metric.to(device).compute()
            for name, (count, metric) in self._metrics.items()
            if self.initial.get(count)
        }


def log_levels(module: LightningModule, place: str, values: Mapping[str, Any]) -> None:
    """Log the numbers of an epoch under a prefix; every rank calls this, for the ranks take their mean."""
    for name, value in values.items():
        shown, meet = name == "sparsity", name not in LONE
        module.log(place + name, value, prog_bar=shown, on_step=False, on_epoch=True, sync_dist=meet)
