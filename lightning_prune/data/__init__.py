"""Data that the demo trains on."""

from lightning_prune.data.digits import Digits

__all__ = ["Digits"]
