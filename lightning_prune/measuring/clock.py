"""The time, read once a device is through with what it was given."""

from __future__ import annotations

from collections.abc import Callable
from timeit import default_timer

import torch
from torch import nn

from lightning_prune.measuring.forwards import devices

__all__ = ["clock_of"]


def clock_of(*models: nn.Module) -> Callable[[], float]:
    """Give a clock that waits for the accelerators of these models before it reads the time, in seconds.

    Where none of them lies on one, it waits for the accelerator that a forward may use by itself. One that
    nobody has used yet is left alone: to ask it for anything would take memory and seconds on it.
    """
    kind = torch.accelerator.current_accelerator()
    if kind is None:
        return default_timer
    own = dict.fromkeys(device for model in models for device in devices(model) if device.type == kind.type)
    module = torch.get_device_module(kind)
    is_in_use = getattr(module, "is_initialized", module.is_available)  # MPS has nothing to initialise

    def clock() -> float:
        if is_in_use():
            for place in own or (None,):
                torch.accelerator.synchronize(place)
        return default_timer()

    return clock
