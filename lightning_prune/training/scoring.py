"""Which of the logged metrics a report shows, and which of them speaks for the task."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Literal

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

from lightning_prune.reporting.report import Metric
from lightning_prune.training.strategies import callbacks_of

__all__ = ["Score"]

MOST = 7  # metrics that a report shows beside the one that speaks for the task
_SPLIT = re.compile(r"^(test|val|valid|validation)[_/]")
_OF_A_STEP = re.compile(r"_step$")
_OF_AN_EPOCH = re.compile(r"_epoch$")
# As words of their own: `accepted` is no accuracy, and `inferred` no error.
_ACCURACY = re.compile(r"(?i:accuracy)|(?<![a-zA-Z])acc(?![a-z])|A(?:cc|CC)(?![a-z])")
_ERROR = re.compile(r"(?i:loss|error)|(?<![a-zA-Z])err(?![a-z])|E(?:rr|RR)(?![a-z])")


class Score:
    """Which of the logged metrics speaks for the task.

    Args:
        trainer: Its checkpoint and early stopping callbacks name the monitored metric and its direction.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._monitored: dict[str, str] = {}
        for callback in callbacks_of(trainer):
            if isinstance(callback, (ModelCheckpoint, EarlyStopping)) and callback.monitor:
                self._monitored[_without_split(callback.monitor)] = callback.mode

    def choose(self, metrics: Mapping[str, float]) -> str | None:
        """Choose a metric: an accuracy, else the monitored one, else a loss of held-out data."""
        held_out = [name for name in metrics if _SPLIT.match(name)] or list(metrics)
        accuracies = [name for name in held_out if _ACCURACY.search(_without_split(name))]
        monitored = [name for name in held_out if _without_split(name) in self._monitored]
        losses = [name for name in held_out if "loss" in _without_split(name).lower()]
        return next(iter([*accuracies, *monitored, *losses]), None)

    def direction(self, name: str) -> Literal["max", "min"] | None:
        """Say whether more or less of the metric is better; None where nothing tells."""
        plain = _without_split(name)
        if plain in self._monitored:
            return "min" if self._monitored[plain] == "min" else "max"
        if _ERROR.search(plain):
            return "min"
        return "max" if _ACCURACY.search(plain) else None

    def compare(
        self, dense: Mapping[str, float], pruned: Mapping[str, float]
    ) -> tuple[Metric | None, tuple[Metric, ...]]:
        """Give the metric that speaks for the task, if one does, and the others that both networks have.

        Args:
            dense: Logged name -> value.
            pruned: The same.
        """
        shared = [name for name in pruned if name in dense]
        shared = [name for name in shared if not name.startswith("prune/") and not _OF_A_STEP.search(name)]
        first = self.choose(dict.fromkeys(shared, 0.0))
        both = {
            name: Metric(_display(name), self.direction(name), dense[name], pruned[name]) for name in shared
        }
        main = both.pop(first) if first is not None else None
        return main, tuple(both.values())[:MOST]


def _without_split(name: str) -> str:
    return _SPLIT.sub("", name)


def _display(name: str) -> str:
    plain = _OF_AN_EPOCH.sub("", _without_split(name))
    return "accuracy" if plain.lower() in ("acc", "accuracy") else plain
