"""Scores of a model's groups as its options ask, with the random numbers and the evidence that takes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from lightning_prune.graph.groups import Group
from lightning_prune.options import PruningOptions
from lightning_prune.scores.evidence import Collector
from lightning_prune.scores.importance import Evidence
from lightning_prune.scores.ranking import rank

__all__ = ["Scorer"]

Floats = npt.NDArray[np.float64]


class Scorer:
    """Scores units by the weights as they are, and by what was collected.

    Args:
        model: The network.
        options: Importance, normaliser, NaN policy, biases.

    Attributes:
        collector: What no weight holds.
    """

    def __init__(self, model: nn.Module, options: PruningOptions) -> None:
        self._model, self._options = model, options
        self._evidence = Evidence(include_bias=options.include_bias)
        self.collector = Collector(model, options.importance)

    def scores(self, groups: Sequence[Group], *, rehearsal: bool = False) -> list[Floats]:
        """Score units, [n_units] per group, higher = keep; all alike where there are no weights yet.

        Args:
            groups: What is scored.
            rehearsal: Score all alike too where evidence is needed, which a rehearsal does not have, and draw
                no random numbers: the steps themselves will draw those.
        """
        tensors = dict(self._model.named_parameters())
        if any(t.is_meta for t in tensors.values()) or (rehearsal and self.collector.need):
            return [np.zeros(g.n_units) for g in groups]
        drawn = self._evidence.generator.get_state()
        found = rank(
            groups,
            tensors,
            importance=self._options.importance,
            normalizer=self._options.normalizer,
            nan_policy=self._options.nan_policy,
            evidence=self.collector.evidence(self._evidence),
        )
        if rehearsal:
            self._evidence.generator.set_state(drawn)
        return [s.detach().double().cpu().numpy() for s in found]

    def check(self, groups: Sequence[Group]) -> None:
        """Find a wrong name now, not in hour ten.

        Args:
            groups: What will be scored.

        Raises:
            OptionError: If there is no such importance, or it cannot score these groups.
        """
        if isinstance(self._options.importance, str):
            rank([], {}, importance=self._options.importance, nan_policy=self._options.nan_policy)
            self.collector.check(groups)

    @property
    def random_state(self) -> str:
        """State of the random numbers, in hexadecimal."""
        return bytes(self._evidence.generator.get_state().tolist()).hex()

    @random_state.setter
    def random_state(self, state: str) -> None:
        self._evidence.generator.set_state(
            torch.tensor(list(bytes.fromhex(state)), dtype=torch.uint8, device="cpu")
        )
