"""What the options ask of a model, and what every step to come would keep of it; nothing is touched."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import nn

from lightning_prune.budgets.meeting import Budget
from lightning_prune.budgets.subject import Subject
from lightning_prune.graph.groups import Group
from lightning_prune.options import PruningOptions
from lightning_prune.plan import Plan
from lightning_prune.scores.scoring import Scorer
from lightning_prune.selection.census import Census
from lightning_prune.selection.choosing import Choice, Chooser
from lightning_prune.selection.forecast import Forecast, foresee
from lightning_prune.selection.questions import Questions
from lightning_prune.selection.requests import (
    Targets,
    check_counts,
    check_custom,
    check_ratio,
    targets,
    unwrapped,
)
from lightning_prune.selection.schedules import resolve
from lightning_prune.selection.settling import Settler
from lightning_prune.tracing.borrowing import Memory
from lightning_prune.tracing.numbers import Numbers
from lightning_prune.tracing.trace import trace
from lightning_prune.tracing.tracer import Tracer

__all__ = ["Prospect"]

Bools = npt.NDArray[np.bool_]
Floats = npt.NDArray[np.float64]


class Prospect(Questions):
    """A model on its way through the steps of a prune.

    Args:
        model: The network; it is traced, and left as it is.
        example_inputs: What it is traced with.
        options: Every option but the next two.
        pruning_ratio: Share of the initial units of every group to remove, in [0, 1).
        iterative_steps: Number of steps until then, >= 1.

    Attributes:
        plan: What was kept by the steps so far.
        current_step: Number of steps so far.
        budget: What is asked of the whole, if anything is.

    Raises:
        OptionError: If an option has a wrong type or value, or names nothing.
        BudgetError: If the budget cannot be met.
        TraceError: If the model cannot be run on the example inputs.
    """

    def __init__(
        self,
        model: nn.Module,
        example_inputs: Any,
        options: PruningOptions,
        pruning_ratio: float,
        iterative_steps: int,
    ) -> None:
        self.model, self.example_inputs, self.options = model, example_inputs, options
        self.pruning_ratio = check_ratio("pruning_ratio", pruning_ratio)
        self.iterative_steps = iterative_steps
        self._course(self.pruning_ratio)
        self.plan = Plan()
        self.current_step = 0
        self.budget = Budget(options.budget)
        self._census = Census()
        self._scorer = Scorer(model, options)
        check_custom(model, options.customized_pruners)
        self._by_shapes = True
        super().__init__(Settler(model, self._trace))
        check_counts(self.analysis, options)
        self._follow()
        self._scorer.check(self.pressed_groups())
        if self.budget:
            self._choose(iterative_steps, self._scorer.scores(self.groups(), rehearsal=True))

    @property
    def goal(self) -> Targets:
        """Final ratios, scopes and locks, as the options ask."""
        return self._goal

    def chooser(self, scores: Sequence[Floats] | None = None) -> Chooser:
        """Give what chooses units by scores, by default those of the weights as they are."""
        groups = self.groups()
        scores = self._scorer.scores(groups) if scores is None else scores
        return Chooser(self.analysis, scores, self._census.of(groups), self.options)

    def pressed_groups(self) -> tuple[Group, ...]:
        """Groups that the ratios reach: sparse learning presses them. Ignored ones and ratio 0 are out."""
        return tuple(
            group
            for group, ratio in zip(self.groups(), self._goal.ratio, strict=True)
            if ratio > 0 and not self._goal.locked[group.units].all()
        )

    def foresee(self) -> Iterator[Forecast]:
        """Yield what is left now and after every step to come, chosen by the weights as they are.

        Nothing is touched. Later steps will choose by the weights of their day; how many units they remove is
        known already.

        Raises:
            BudgetError: If the budget of a step cannot be met.
        """
        yield foresee(self.analysis, self.current_step, Choice(np.ones(self.analysis.graph.n_units, bool)))
        scores = self._scorer.scores(self.groups(), rehearsal=True)
        for step in range(self.current_step + 1, self.iterative_steps + 1):
            yield foresee(self.analysis, step, self._choose(step, scores))

    def _trace(self, change: Callable[[nn.Module], None] | None, numbers: Numbers | None) -> Tracer:
        tracer = trace(
            self.model,
            self.example_inputs,
            forward_fn=self.options.forward_fn,
            output_transform=self.options.output_transform,
            custom=self.options.customized_pruners,
            prepare=unwrapped(self.model, self.options.unwrapped_parameters),
            change=change,
            numbers=numbers,
            by_shapes=self._by_shapes,
        )
        self._by_shapes = tracer.borrowed.memory is Memory.SHAPES
        return tracer

    def _follow(self) -> None:
        """Bring everything that speaks of groups up to the analysis of now."""
        self._scorer.collector.of(self.groups(), include_bias=self.options.include_bias)
        self._census.count(self.groups())
        self._goal = self._targets(self.pruning_ratio)

    def _targets(self, ratio: float) -> Targets:
        is_new = not self.plan and not self.current_step
        return targets(self.analysis, self.options, ratio, self._census.head_dims, is_new=is_new)

    def _course(self, target: float) -> list[float]:
        return resolve(self.options.iterative_pruning_ratio_scheduler, target, self.iterative_steps)

    def _choose(self, step: int, scores: Sequence[Floats], locked: Bools | None = None) -> Choice:
        """Units that stay after step number ``step``; units that are locked now stay."""
        goal = self._goal if locked is None else replace(self._goal, locked=self._goal.locked | locked)
        chooser = self.chooser(scores)
        course = {r: self._course(r)[step] for r in set(self._goal.ratio)}
        ratios = [course[r] for r in self._goal.ratio]
        if not self.budget:
            return chooser.choose(goal, ratios)
        follows = [a != b for a, b in zip(self._targets(0.25).ratio, self._targets(0.5).ratio, strict=True)]

        def choose(ratio: float) -> Choice:
            now = [ratio if f else r for f, r in zip(follows, ratios, strict=True)]
            return chooser.choose(goal, now)

        subject = Subject(
            self.model,
            self.analysis,
            self.example_inputs,
            self.options.forward_fn,
            lambda r: choose(r).keep,
        )
        return self.budget.meet(subject, choose, 1 - self._course(1 - self.budget.share)[step])

    def _why_nothing(self) -> str:
        if not self.groups():
            return "the trace found no removable units; explain(name, dim) says why a dimension stays."
        if not any(self._goal.ratio):
            return "every ratio is 0 (check pruning_ratio, prune_head_dims and the dictionaries)."
        if self._goal.locked.all():
            return "ignored_layers covers every unit."
        return "; ".join(self.notes) or "the ratio of this step rounds to no unit in any group."
