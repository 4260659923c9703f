"""The end of a fit: one report of the network before the first cut and after the last."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor, nn

from lightning_prune.measuring.measured import describe_machine, describe_versions, measure_pair
from lightning_prune.measuring.speedup import account_for_speed
from lightning_prune.plan import Plan
from lightning_prune.pruner import GroupNormPruner
from lightning_prune.randomness import randomness_kept
from lightning_prune.reporting.console import print_report
from lightning_prune.reporting.history import Cut, Spread, record_cut, record_spread
from lightning_prune.reporting.report import Metric, Report, Target
from lightning_prune.reporting.writing import write_report
from lightning_prune.surgery.structure import take_on
from lightning_prune.training.example_inputs import Example
from lightning_prune.training.samples import sample_of
from lightning_prune.training.scoring import Score
from lightning_prune.training.showing import show
from lightning_prune.training.testing import can_test, test_copy

__all__ = ["FitReport"]

BEFORE_THE_CUT = "The model just before its first cut."
_WIDTHS = ("out_channels", "out_features", "embedding_dim")


class FitReport:
    """What is known of the dense network, and the report that is made of it when the fit ends.

    Until the end of the fit a copy of the dense weights lies in main memory. A resumed fit has none: then the
    validation metrics of before and after stand in for the test split.

    Attributes:
        config: The resolved configuration, for the record; a command line may set it.
        seconds: Least time to measure each network's latency for, in seconds.
        result: The report, once the fit has ended.
    """

    def __init__(self) -> None:
        self.config: Mapping[str, Any] = {}
        self.seconds = 0.5
        self.result: Report | None = None
        self._weights: Mapping[str, Any] | None = None
        self._metrics: dict[str, float] = {}
        self._timeline: list[dict[str, Any]] = []
        self._cuts: list[Cut] = []
        self._spreads: list[Spread] = []
        self._twin: LightningModule | None = None
        self._dense_is = BEFORE_THE_CUT

    def compare_with(self, twin: LightningModule, *, dense_is: str) -> None:
        """Compare with a network that was trained without pruning, instead of the one before the first cut.

        Args:
            twin: Of the same class, trained.
            dense_is: One sentence that says what it is.
        """
        self._twin, self._dense_is = twin, dense_is

    def look_at_dense(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep what the network is just before its first cut."""
        self._metrics = _numbers(trainer.callback_metrics)
        if self._twin is None and trainer.is_global_zero:
            weights = pl_module.state_dict()
            for name, value in weights.items():
                weights[name] = value.to("cpu", copy=True) if isinstance(value, Tensor) else value
            self._weights = weights

    def note_epoch(self, trainer: Trainer, facts: Mapping[str, Any]) -> None:
        """Add an epoch to the timeline, with the task's metric."""
        metrics = _numbers(trainer.callback_metrics)
        name = Score(trainer).choose({n: v for n, v in metrics.items() if not n.startswith("prune/")})
        accuracy = {} if name is None else {"accuracy": metrics[name]}
        self._timeline.append({"epoch": trainer.current_epoch, **facts, **accuracy})

    def note_norms(self, trainer: Trainer, pruner: GroupNormPruner) -> None:
        """Keep how far the unit norms lie apart at the end of an epoch."""
        bias = pruner.options.include_bias

        def note() -> None:
            groups, tensors = pruner.pressed_groups(), dict(pruner.model.named_parameters())
            found = record_spread(trainer.current_epoch, groups, tensors, include_bias=bias)
            self._spreads += [] if found is None else [found]

        self._note(trainer, note)

    def note_cut(self, trainer: Trainer, pruner: GroupNormPruner, plan: Plan) -> None:
        """Keep what a cut that is about to be made chose by."""

        def note() -> None:
            kept = pruner.kept_units(plan)
            found = record_cut(trainer.current_epoch, pruner.groups(), pruner.scores, kept, pruner.notes)
            self._cuts += [] if found is None else [found]

        self._note(trainer, note)

    def _note(self, trainer: Trainer, note: Callable[[], None]) -> None:
        """Do what a picture needs, on the rank that reports; a picture less is no reason to stop."""
        if not trainer.is_global_zero:
            return
        try:
            note()
        except Exception as error:
            rank_zero_warn(f"the report will lack a picture: {type(error).__name__}: {error}")

    def write(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        *,
        module: str | None,
        example: Example,
        pruner: GroupNormPruner,
        targets: tuple[Target, ...],
        config: Mapping[str, Any],
    ) -> None:
        """Measure, print and write the report. What fails is warned of: the training is not lost for it.

        Args:
            trainer: The Trainer whose fit has ended.
            pl_module: The pruned module.
            module: Name of the pruned submodule, None for the whole.
            example: Inputs to measure with.
            pruner: Says what stayed and why.
            targets: Asked against reached.
            config: Configuration to fall back on where ``config`` was not set.
        """
        folder = Path(trainer.log_dir or trainer.default_root_dir)  # every rank must ask
        if not trainer.is_global_zero:
            return
        try:
            with randomness_kept():
                dense = self._dense(pl_module, module)
                found = self._measured(trainer, pl_module, dense, module, example)
            whole = self._with_history(found, trainer, config)
            self.result = replace(whole, targets=targets, frozen=pruner.frozen())
            write_report(self.result, folder)
            print_report(self.result)
            show(trainer, self.result)
        except Exception as error:
            rank_zero_warn(f"the report of the prune could not be made: {type(error).__name__}: {error}")
        finally:
            self._weights = None

    def state_dict(self) -> dict[str, Any]:
        """Give plain data."""
        return {
            "metrics": dict(self._metrics),
            "timeline": [dict(epoch) for epoch in self._timeline],
            "cuts": [asdict(cut) for cut in self._cuts],
            "spreads": [asdict(spread) for spread in self._spreads],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take plain data."""
        self._metrics = dict(state["metrics"])
        self._timeline = [dict(epoch) for epoch in state["timeline"]]
        self._cuts = [Cut.of(cut) for cut in state.get("cuts", ())]  # older checkpoints have none
        self._spreads = [Spread.of(spread) for spread in state.get("spreads", ())]

    def _dense(self, pl_module: LightningModule, module: str | None) -> LightningModule:
        """Give the dense network; without its weights, one of its structure."""
        if self._twin is not None:
            return self._twin
        dense = copy.deepcopy(pl_module)
        if self._weights is not None:
            dense.load_state_dict(self._weights)
        else:
            take_on(dense, {module or "": Plan()}, {})
        return dense

    def _measured(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        dense: LightningModule,
        module: str | None,
        example: Example,
    ) -> Report:
        """Score both networks, then measure them in turns where the fit ran."""
        split, metric, others = self._scores(trainer, pl_module, dense)
        old, new = (
            copy.deepcopy(each.get_submodule(module or "")).to(trainer.strategy.root_device)
            for each in (dense, pl_module)
        )
        sample = sample_of(old, example)
        inputs, forward_fn = sample.example.inputs, sample.example.forward_fn
        before, after = measure_pair(
            old,
            new,
            inputs,
            accuracies=(metric.dense, metric.pruned) if metric else (None, None),
            forward_fn=forward_fn,
            min_run_time_s=self.seconds,
        )
        time, macs = _left(before.latency_ms, after.latency_ms), _left(before.macs, after.macs)
        return Report(
            dense=before,
            pruned=after,
            dense_is=self._dense_is,
            metric=metric.name if metric else "accuracy",
            direction=(metric.direction if metric else None) or "max",
            split=split,
            others=others,
            inputs=sample.words,
            channels=_channels(old, new),
            speed=account_for_speed(old, new, inputs, time=time, macs=macs, forward_fn=forward_fn),
        )

    def _with_history(self, found: Report, trainer: Trainer, config: Mapping[str, Any]) -> Report:
        """Add to what was measured the run that led there."""
        seed = os.environ.get("PL_GLOBAL_SEED")
        return replace(
            found,
            seed=None if seed is None else int(seed),
            versions=describe_versions(),
            machine=describe_machine(trainer.strategy.root_device),
            config=self.config or config,
            timeline=self._timeline,
            cuts=self._cuts,
            spreads=self._spreads,
        )

    def _scores(
        self, trainer: Trainer, pl_module: LightningModule, dense: LightningModule
    ) -> tuple[str | None, Metric | None, tuple[Metric, ...]]:
        """Score both on the test split if that can be done, else compare validation metrics."""
        known = self._twin is not None or self._weights is not None
        if known and trainer.world_size == 1 and can_test(trainer, pl_module):
            split, seen = "test", (test_copy(trainer, dense), test_copy(trainer, pl_module))
        elif self._twin is not None:
            return None, None, ()
        else:
            split, seen = "val", (_validated(self._metrics), _validated(_numbers(trainer.callback_metrics)))
        main, others = Score(trainer).compare(*seen)
        return (split if main or others else None), main, others


def _validated(metrics: Mapping[str, float]) -> dict[str, float]:
    return {name: value for name, value in metrics.items() if name.startswith("val")}


def _numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    return {name: float(value) for name, value in metrics.items()}


def _channels(dense: nn.Module, pruned: nn.Module) -> dict[str, tuple[int, int]]:
    """List the width of every layer that has one, before and after."""
    before, widths = dict(dense.named_modules()), {}
    for name, layer in pruned.named_modules():
        for attribute in _WIDTHS:
            if name in before and isinstance(getattr(layer, attribute, None), int):
                widths[name or type(layer).__name__] = (
                    getattr(before[name], attribute),
                    getattr(layer, attribute),
                )
    return widths


def _left(before: float | None, after: float | None) -> float:
    """Share that is left; all of it where nothing was measured."""
    return after / before if before and after is not None else 1.0
