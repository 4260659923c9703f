"""What the YAML files may ask that OmegaConf does not know by itself."""

from __future__ import annotations

from typing import Any

from omegaconf import OmegaConf

from lightning_prune.commands.table import listed
from lightning_prune.errors import OptionError

__all__ = ["share"]


def share(part: float, total: Any) -> int:
    """Give a share of a number of epochs, rounded, at least 1.

    Args:
        part: Share, in [0, 1].
        total: Epochs, >= 1.

    Raises:
        OptionError: If ``total`` is no such number.

    >>> share(0.3, 30), share(0.1, 3)
    (9, 1)
    """
    if isinstance(total, bool) or not isinstance(total, int) or total < 1:
        raise OptionError(
            f"trainer.max_epochs={total} was asked for, and the schedule of pruning is a share of it; "
            "give a whole number of epochs, at least 1"
        )
    return max(1, round(part * total))


# Shipped schedules follow trainer.max_epochs, and OmegaConf has no arithmetic of its own.
OmegaConf.register_new_resolver("share", share, replace=True)
OmegaConf.register_new_resolver("commands", listed, replace=True)
