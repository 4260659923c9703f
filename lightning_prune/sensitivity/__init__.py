"""How much a metric suffers when one part of a network is pruned alone."""

from lightning_prune.sensitivity.curves import Sensitivity
from lightning_prune.sensitivity.measuring import measure_sensitivity
from lightning_prune.sensitivity.ratios import ratios_for

__all__ = ["Sensitivity", "measure_sensitivity", "ratios_for"]
