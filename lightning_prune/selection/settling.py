"""A choice becomes a plan that can be applied: it is tried on a copy, and made again where that fails."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
from torch import Tensor, nn

from lightning_prune.errors import StaleGraphError
from lightning_prune.graph.analysis import Analysis, solved
from lightning_prune.graph.certificate import Trial, UnkeptError, certify, try_out
from lightning_prune.plan import Plan
from lightning_prune.selection.choosing import Choice, bound_by
from lightning_prune.surgery.tensors import tensors_of
from lightning_prune.tracing.numbers import Numbers
from lightning_prune.tracing.tracer import Tracer

__all__ = ["Settler"]

Bools = npt.NDArray[np.bool_]
Held: TypeAlias = tuple[tuple[Bools, str], ...]
Trace: TypeAlias = Callable[[Callable[[nn.Module], None] | None, Numbers | None], Tracer]


class Settler:
    """A model as it was last analysed, and the plans that were tried on it.

    Args:
        model: The network.
        trace: ``(change, numbers) -> tracer`` of a copy of it, changed first where ``change`` says how.

    Attributes:
        analysis: The graph of the model as it was when last looked at.
        notes: What is to be said of the last plan.
        held: Units that the last choice had to hold, [n_units], each time with the reason.
    """

    analysis: Analysis

    def __init__(self, model: nn.Module, trace: Trace) -> None:
        self._model, self._trace = model, trace
        self.notes: tuple[str, ...] = ()
        self.look()

    def look(self) -> None:
        """Analyse the model as it is."""
        self.adopt(solved(self._model, self._trace(None, None)))

    def adopt(self, analysis: Analysis) -> None:
        """Take an analysis of the model as it is."""
        self.analysis = analysis
        self.held: Held = ()
        self._trial: Trial | None = None
        self._shapes = {name: t.shape for name, t in tensors_of(self._model).items()}

    def stale(self) -> tuple[str, Tensor] | None:
        """Give a tensor that has another shape than when it was looked at."""
        tensors = tensors_of(self._model).items()
        return next(((n, t) for n, t in tensors if self._shapes.get(n) != t.shape), None)

    def refuse_stale(self) -> None:
        """See that nobody has changed the model since.

        Raises:
            StaleGraphError: If somebody has.
        """
        if (found := self.stale()) is not None:
            name, tensor = found
            raise StaleGraphError(
                f"{name} has shape {list(tensor.shape)}, the graph was traced with "
                f"{list(self._shapes.get(name, ()))}. Make a new pruner after changing the model."
            )

    def settle(self, choose: Callable[[Bools], Choice]) -> tuple[Plan, Choice]:
        """Make a plan that can be applied. Sizes that the forward computes with, and cannot do without, stay.

        Args:
            choose: [n_units] units that must stay -> choice; asked again while there are more of them.

        Raises:
            CertificateError: If the cut would not give a restriction of the model.
        """
        locked = np.zeros(self.analysis.graph.n_units, bool)
        unkept: Held = ()
        while True:
            choice = choose(locked)
            plan, of_configs = self.analysis.plan(choice.keep)
            self._tell(choice, of_configs, unkept)
            if not plan:
                return plan, choice
            try:
                trial = self.try_out(plan)
            except UnkeptError as error:
                bound = bound_by(self.analysis, error.axes) & ~choice.keep
                if not bound.any():
                    raise
                locked |= bound_by(self.analysis, error.axes)
                note = f"numbers computed from these sizes could not be kept: {'; '.join(error.reasons)}"
                unkept += ((bound, note),)
                continue
            patched = frozenset(p.module for p in trial.plan.patches)
            if patched - {p.module for p in plan.patches}:
                _, of_configs = self.analysis.plan(choice.keep, patched)
                self._tell(choice, of_configs, unkept)
            self.notes = tuple(dict.fromkeys(self.notes + trial.notes))
            return trial.plan, choice

    def try_out(self, plan: Plan) -> Trial:
        """Cut a copy, and hold it against the model; once for a plan.

        Raises:
            CertificateError: If the cut would not give a restriction of the model.
        """
        if self._trial is None or self._trial.plan != plan:
            trial = try_out(self.analysis, plan, self._trace)
            certify(self.analysis, trial.after, trial.keep, plan)
            self._trial = trial
        return self._trial

    def _tell(
        self, choice: Choice, of_configs: tuple[str, ...], unkept: tuple[tuple[Bools, str], ...]
    ) -> None:
        self.notes = choice.notes + of_configs + tuple(note for _, note in unkept)
        self.held = choice.held + unkept
