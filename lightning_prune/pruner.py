"""GroupNormPruner: trace -> groups -> scores -> plan -> surgery, one ``step()`` at a time."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import fields, replace
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor, nn

from lightning_prune.budgets.meeting import Budget
from lightning_prune.errors import OptionError, PruneError
from lightning_prune.options import PruningOptions
from lightning_prune.plan import Plan
from lightning_prune.prospect import Prospect
from lightning_prune.scores.evidence import Collector, Reduce
from lightning_prune.scores.regularizer import Regularizer
from lightning_prune.selection.choosing import Choice
from lightning_prune.surgery.applying import apply
from lightning_prune.surgery.optimizers import Carrier
from lightning_prune.surgery.structure import note, plan_of
from lightning_prune.surgery.tensors import tensors_of
from lightning_prune.vetting import Part, vet_pruner

Bools = npt.NDArray[np.bool_]
Floats = npt.NDArray[np.float64]

OF_THE_DENSE = ("budget", "in_channel_groups", "out_channel_groups", "num_heads")


class GroupNormPruner(Prospect):
    """Prunes groups of coupled channels and heads by their norm (it has nothing to do with ``nn.GroupNorm``).

    Structured pruning with sparsity regularisation as in DepGraph (Fang et al., CVPR 2023, section 3.3) and,
    with ``isomorphic=True``, Isomorphic Pruning (Fang et al., ECCV 2024). Couplings are found by a trace.

    Args:
        model: The network. Constructing a pruner leaves it as it is.
        example_inputs: A tensor, a tuple of positional or a dict of keyword arguments.
        pruning_ratio: Share of the initial units of every group to remove, in [0, 1).
        iterative_steps: Number of ``step()`` calls until the ratio is reached, >= 1.
        options: Every other option, see ``PruningOptions``; as keywords, the fields of it.

    Raises:
        OptionError: If an option has a wrong type or value, or names nothing.
        BudgetError: If a budget cannot be met.
        TraceError: If the model cannot be run on the example inputs.

    >>> import torch
    >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> pruner = GroupNormPruner(net, torch.ones(1, 4), pruning_ratio=0.5)
    >>> pruner.step().cuts[0].kept
    4
    >>> net
    Sequential(
      (0): Linear(in_features=4, out_features=4, bias=True)
      (1): ReLU()
      (2): Linear(in_features=4, out_features=2, bias=True)
    )
    """

    def __init__(  # noqa: PLR0913 - the field's keyword list, so that moving over is one changed import
        self,
        model: nn.Module,
        example_inputs: Any,
        *,
        importance: str | Callable[..., Any] = "group_norm",
        pruning_ratio: float = 0.5,
        pruning_ratio_dict: Mapping[Any, float] | None = None,
        max_pruning_ratio: float = 1.0,
        iterative_steps: int = 1,
        iterative_pruning_ratio_scheduler: str | Callable[[float, int], Sequence[float]] = "linear",
        global_pruning: bool = False,
        isomorphic: bool = False,
        ignored_layers: Sequence[Any] = (),
        round_to: int | None = None,
        in_channel_groups: Mapping[Any, int] | None = None,
        out_channel_groups: Mapping[Any, int] | None = None,
        num_heads: Mapping[Any, int] | None = None,
        prune_num_heads: bool = False,
        prune_head_dims: bool = True,
        head_pruning_ratio: float = 0.0,
        head_pruning_ratio_dict: Mapping[Any, float] | None = None,
        customized_pruners: Mapping[Any, Any] | None = None,
        unwrapped_parameters: Any = None,
        budget: Mapping[str, float] | None = None,
        normalizer: str | Callable[..., Any] | None = "mean",
        include_bias: bool = False,
        reg: float = 1e-4,
        alpha: float = 4.0,
        nan_policy: str = "skip",
        fused: bool | None = None,
        forward_fn: Callable[..., Any] | None = None,
        output_transform: Callable[..., Any] | None = None,
    ) -> None:
        asked = locals()
        options = PruningOptions(**{field.name: asked[field.name] for field in fields(PruningOptions)})
        if not isinstance(model, nn.Module):
            raise OptionError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        super().__init__(model, example_inputs, options, pruning_ratio, iterative_steps)
        self.scores: tuple[Floats, ...] = ()  # [n_units] per group: what the last choice was made by
        self._regularizer: Regularizer | None = None

    # -- pruning -----------------------------------------------------------------------------------

    def step(self, *, dry_run: bool = False, optimizers: Any = ()) -> Plan:
        """Prune to the next ratio of the schedule.

        Args:
            dry_run: Give the plan and touch nothing, the step counter included. Works on meta tensors.
            optimizers: One optimizer or several; their state is sliced along.

        Returns:
            What is kept by this step; empty if there is nothing to prune.

        Raises:
            PruneError: If the model is on the meta device and ``dry_run`` is False.
            StaleGraphError: If shapes were changed behind the pruner's back.
            CertificateError: If the cut would not give a restriction of the model. Nothing was changed.
        """
        self._settler.refuse_stale()
        if self.current_step >= self.iterative_steps:
            warnings.warn(
                f"step() was called after all {self.iterative_steps} iterative_steps; nothing was pruned.",
                stacklevel=2,
            )
            return Plan()
        self.scores = tuple(self._scorer.scores(self.groups()))
        plan, choice = self.settle(lambda locked: self._choose(self.current_step + 1, self.scores, locked))
        if dry_run:
            return plan
        capped = [note for note in choice.notes if "max_pruning_ratio" in note]
        if capped and self.options.max_pruning_ratio < 1:
            warnings.warn("; ".join(capped), stacklevel=2)
        if not plan:
            warnings.warn(
                f"There was nothing to prune in step {self.current_step + 1}: {self._why_nothing()}",
                stacklevel=2,
            )
        return self.commit(plan, optimizers=optimizers)

    def commit(self, plan: Plan, *, optimizers: Any = ()) -> Plan:
        """Apply a plan made by ``step(dry_run=True)``, here or on another rank; it counts as the step.

        Raises:
            PlanError: If the plan does not fit. Nothing was changed.
            CertificateError: If the result would not be a restriction of the model. Nothing was changed.
        """
        self._settler.refuse_stale()
        if any(p.is_meta for p in self.model.parameters()):
            raise PruneError(
                "The model is on the meta device and has no weights to cut. Use step(dry_run=True), "
                "or load weights first."
            )
        if plan:
            before, trial = self.analysis, self._settler.try_out(plan)
            plan = trial.plan
            kept = (plan_of(self.model) or self.plan).then(plan)
            carrier = Carrier.of(optimizers, self.model, plan)
            snapshot = apply(self.model, plan)
            try:
                carrier.commit()
            except BaseException:  # Ctrl-C too must give the old model back
                snapshot.restore()
                raise
            self.collector.follow(plan)
            self._census.forget_heads(before, trial.keep)
            self.plan = self.plan.then(plan)
            note(self.model, kept)
            self._settler.adopt(trial.after)
            self._follow()
        self.current_step += 1
        self._regularizer = None
        return plan

    def settle(self, choose: Callable[[Bools], Choice]) -> tuple[Plan, Choice]:
        """Make a plan that can be applied. Sizes that the forward computes with, and cannot do without, stay.

        Args:
            choose: [n_units] units that must stay -> choice; asked again while there are more of them.

        Raises:
            CertificateError: If the cut would not give a restriction of the model.
        """
        return self._settler.settle(choose)

    @property
    def collector(self) -> Collector:
        """What was collected for an importance that no weight tells of."""
        return self._scorer.collector

    # -- sparse learning ---------------------------------------------------------------------------

    def update_regularizer(self) -> None:
        """Refresh groups and scores of the regulariser, as after a cut."""
        if self._regularizer is not None:
            self._regularizer.refresh()

    def regularize(self, model: nn.Module | None = None, *, grad_scale: float | Tensor = 1.0) -> None:
        """Add the gradient ``reg * gamma_k * w`` of the group penalty to every gradient.

        ``gamma_k = 2 ** (alpha (I_max - I_k) / (I_max - I_min))`` is held constant (DepGraph, eq. 4); the
        factor 2 of the derivative is in ``reg``. With weight decay on, shrinkage applies twice.

        Args:
            model: The pruner's own model, or None.
            grad_scale: Scale that the gradients have now, such as the loss scale of mixed precision.
        """
        if model is not None and model is not self.model:
            raise OptionError(
                f"regularize(model) must be given the pruner's own model, got another {type(model).__name__}"
            )
        self.regularizer.apply(grad_scale)

    @property
    def regularizer(self) -> Regularizer:
        """The regulariser of the groups that are pruned; ignored groups and ratio 0 are left alone."""
        if self._regularizer is None:
            self._regularizer = Regularizer(
                self.pressed_groups(),
                dict(self.model.named_parameters()),
                reg=self.options.reg,
                alpha=self.options.alpha,
                include_bias=self.options.include_bias,
                nan_policy=self.options.nan_policy,
                fused=self.options.fused,
            )
        return self._regularizer

    # -- evidence ----------------------------------------------------------------------------------

    def watch(self) -> AbstractContextManager[None]:
        """Measure outputs of layers in this context, for ``importance="activation"``; else do nothing."""
        return self.collector.watch()

    def collect(self, *, grad_scale: float | Tensor = 1.0, reduce: Reduce | None = None) -> None:
        """Take in what a batch has left for the importance; call it after the backward pass.

        ``taylor`` and ``hessian`` average the gradients that lie on the parameters, ``activation`` the
        outputs seen within ``watch``. Every other importance needs nothing, and this costs nothing.

        Args:
            grad_scale: Factor that the gradients carry, such as the loss scale of mixed precision.
            reduce: For several processes, a function that sums a tensor over them. Gradients are not passed
                through it: they must be the same in all of them already.
        """
        self.collector.collect(grad_scale, reduce)

    # -- resuming ----------------------------------------------------------------------------------

    @classmethod
    def resume(
        cls, model: nn.Module, example_inputs: Any, state: Mapping[str, Any], **options: Any
    ) -> GroupNormPruner:
        """Build a pruner on a model that has its shapes already, and go on where ``state`` stopped.

        Constructing one and calling ``load_state_dict`` does the same, but for options that speak of the
        dense model: a budget, or a number of heads. Those were checked when there still was one.
        """
        later = {name: options[name] for name in OF_THE_DENSE if name in options}
        pruner = cls(model, example_inputs, **{k: v for k, v in options.items() if k not in later})
        pruner.options, pruner.budget = replace(pruner.options, **later), Budget(later.get("budget"))
        pruner.load_state_dict(state)
        return pruner

    def state_dict(self) -> dict[str, Any]:
        """Everything that decides the next step, as plain data; collected evidence as tensors."""
        return {
            "step": self.current_step,
            "plan": self.plan.as_dict(),
            "budget": self.budget.state_dict(),
            "rng": self._scorer.random_state,
            **self._census.state_dict(),
            "regularizer": Regularizer.first_state(self.pressed_groups())
            if self._regularizer is None
            else self._regularizer.state_dict(),
            **({"evidence": self.collector.state_dict()} if self.collector.need else {}),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where another pruner stopped, on a model that has its shapes already.

        Raises:
            CheckpointMismatchError: If the state is damaged, or of another model. The pruner is as before.
        """
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors_of(self.model).items()}
        vet_pruner(Part("the pruner's state", state), self.iterative_steps, shapes)
        before = self.state_dict()
        try:
            self._take(state)
        except BaseException:
            self._take(before)
            raise

    def _take(self, state: Mapping[str, Any]) -> None:
        self.current_step = int(state["step"])
        self.plan = Plan.from_dict(state["plan"])
        self.budget.load_state_dict(state["budget"])
        self._census.load_state_dict(state)
        self._scorer.random_state = state["rng"]
        if self._settler.stale() is not None:
            self._settler.look()
        self._follow()
        self._regularizer = None
        if state["regularizer"] != Regularizer.first_state(self.pressed_groups()):
            self.regularizer.load_state_dict(state["regularizer"])
        self.collector.load_state_dict(state.get("evidence", {}))
