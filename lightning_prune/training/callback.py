"""StructuredPruning: when to prune, on which rank, with which state. How is the pruner's matter."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import nn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_prune.checkpoint import KEY, adopt_checkpoint, manifests, prepare, record, refuse_guesses
from lightning_prune.options import PruningOptions
from lightning_prune.plan import Plan
from lightning_prune.pruner import GroupNormPruner
from lightning_prune.selection.requests import check_ratio
from lightning_prune.surgery.structure import plan_of, trust_shapes
from lightning_prune.training import example_inputs, finish
from lightning_prune.training.account import reached_targets, settings_of
from lightning_prune.training.arguments import as_record, whole_number
from lightning_prune.training.building import build_pruner, example_of, has_module, target_of
from lightning_prune.training.cutting import cut_every_copy
from lightning_prune.training.describing import Call, describe, rebuild
from lightning_prune.training.distilling import Distillation, Distiller
from lightning_prune.training.evidence import EvidenceGatherer
from lightning_prune.training.example_inputs import Example
from lightning_prune.training.gradients import closes_accumulation, hide_from
from lightning_prune.training.penalty import Penalty
from lightning_prune.training.progress import Progress, log_levels
from lightning_prune.training.recalibrating import recalibrate
from lightning_prune.training.schedule import PHASES, Schedule, place_in_logs
from lightning_prune.training.strategies import (
    averaged_copies,
    check_parameters,
    check_set_up,
    decide_on_rank_zero,
    eager,
    follow_cut,
    point_out_missed_start,
    point_out_neighbours,
    show_what_is_read,
)
from lightning_prune.training.vetting import vet_checkpoint

__all__ = ["PHASES", "StructuredPruning"]


class StructuredPruning(Schedule):
    """Prune a network while it trains.

    Epochs pass through phases: *dense* warm-up; *sparse* learning, where unimportant units are pushed towards
    zero; *prune*, where an epoch begins with a cut; *fine-tune* after the last cut. Every epoch logs
    ``prune/sparsity`` (share of the parameters removed), ``prune/channels`` (share of the units removed),
    ``prune/macs`` (share of the MACs left), ``prune/phase`` (index into ``PHASES``) and
    ``prune/target_reached`` (0 or 1). With several of these callbacks the names hold the module:
    ``prune/net/sparsity``.

    Args:
        pruning_ratio: Share of the units of every group to remove by the last cut, in [0, 1).
        module: Name of the submodule to prune, as in ``named_modules()``; None is the whole LightningModule.
            Names in ``options`` are relative to it.
        sparse_start_epoch: First epoch with regularisation, 0-based.
        start_epoch: Epoch that begins with the first cut, 0-based.
        every_n_epochs: Epochs between cuts, >= 1.
        iterative_steps: Number of cuts, >= 1.
        update_every: Optimizer steps between refreshes of the regulariser's weights, >= 1; a cut refreshes
            them too.
        recalibrate_batches: Training batches over which batch norms get new statistics after a cut, >= 0; 0
            leaves them to the training.
        distillation: How the dense network teaches the pruned one, as ``Distillation`` or as a dict of its
            fields; None: not at all.
        options: Every other option of the pruner, as ``PruningOptions`` or as a dict of its fields.

    Attributes:
        pruner: The live GroupNormPruner; None until the fit has begun.

    Raises:
        OptionError: If a value is out of range or an option has an unknown name.

    >>> StructuredPruning(pruning_ratio=0.5, start_epoch=2, options={"round_to": 8}).should_prune(2)
    True
    """

    def __init__(  # noqa: PLR0913 - one flat list, as a command line has it
        self,
        pruning_ratio: float = 0.5,
        *,
        module: str | None = None,
        sparse_start_epoch: int = 0,
        start_epoch: int = 1,
        every_n_epochs: int = 1,
        iterative_steps: int = 1,
        update_every: int = 1,
        recalibrate_batches: int = 0,
        distillation: Distillation | dict[str, Any] | None = None,
        options: PruningOptions | dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.pruning_ratio = check_ratio("pruning_ratio", pruning_ratio)
        self.module = module
        self.sparse_start_epoch = whole_number("sparse_start_epoch", sparse_start_epoch, 0)
        self.start_epoch = whole_number("start_epoch", start_epoch, 0)
        self.every_n_epochs = whole_number("every_n_epochs", every_n_epochs, 1)
        self.iterative_steps = whole_number("iterative_steps", iterative_steps, 1)
        self.update_every = whole_number("update_every", update_every, 1)
        self.recalibrate_batches = whole_number("recalibrate_batches", recalibrate_batches, 0)
        self.options = as_record("options", PruningOptions, options)
        how = None if distillation is None else as_record("distillation", Distillation, distillation)
        self.distillation = how
        if type(self).should_prune is StructuredPruning.should_prune:
            EvidenceGatherer.check(self.options.importance, self.start_epoch)
        self.pruner: GroupNormPruner | None = None
        self.report = finish.FitReport()
        self._progress = Progress()
        self._example: Example | None = None
        self._recorded: list[Any] | None = None  # description of example inputs that came from a batch
        self._restored: dict[str, Any] | None = None  # state that waits for a pruner
        self._base = Plan()  # what was cut before the live pruner was built
        self._begun: int | None = None  # last epoch whose start was seen
        self._closes, self._backwards = True, 0
        self._penalty = Penalty(self.options.nan_policy, self.update_every, fused=self.options.fused)
        self._gatherer, self._distiller = EvidenceGatherer(), Distiller(how, module)

    @property
    @override
    def steps_done(self) -> int:
        if self.pruner is not None:
            return self.pruner.current_step
        return 0 if self._waiting is None else int(self._waiting["pruner"]["step"])

    @property
    @override
    def state_key(self) -> str:
        return self._generate_state_key(module=self.module)

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        show_what_is_read(trainer, vet_checkpoint)
        if stage == "fit":
            check_set_up(trainer, pl_module)
            point_out_neighbours(trainer)
            self._cut_epoch = self._begun = self._restored = None
            if self.pruner is not None and self.pruner.model not in set(pl_module.modules()):
                self.pruner = None  # of another model: a state that is loaded now waits for its own
        for root in (pl_module, *averaged_copies(trainer)):
            prepare(root)
            if has_module(root, self.module):  # configure_model may yet build it
                target = self._target(root)
                record(target, plan_of(target))
                trust_shapes(target)

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        check_parameters(pl_module)
        target = self._target(pl_module)
        lives_on = self.pruner is not None and self.pruner.model is target
        if lives_on and plan_of(target) == self._base.then(self.pruner.plan):  # type: ignore[union-attr]
            return
        self.pruner, self._progress = None, Progress()
        self._distiller.forget()
        calls = example_inputs.from_array(pl_module, self.module)
        recorded = (self._restored or {}).get("example")
        if not calls and recorded:
            calls = rebuild(recorded, pl_module.device)
        if calls:
            self._build(pl_module, calls)

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        epoch = self._begun = trainer.current_epoch
        self._backwards = 0
        if self._waiting is not None:  # whoever is asked next may look at the pruner
            self._build_from_batch(trainer, pl_module, example_inputs.take_batch(trainer, pl_module))
        if epoch != self._cut_epoch and self.should_prune(epoch):
            if self.pruner is None:
                self._build_from_batch(trainer, pl_module, example_inputs.take_batch(trainer, pl_module))
            self._prune(trainer, pl_module)
            self._cut_epoch = epoch
        self._gatherer.begin_epoch(self.pruner)
        self._distiller.begin_epoch()

    @override
    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._begun != trainer.current_epoch:  # Lightning resumed past the start of this epoch
            self._begun = trainer.current_epoch
            point_out_missed_start(trainer)
            if batch_idx == 0:
                self.on_train_epoch_start(trainer, pl_module)
        if self.pruner is None:
            self._build_from_batch(trainer, pl_module, batch)
        self._closes = closes_accumulation(trainer, batch_idx)
        if not self.target_reached:
            self._gatherer.begin_batch(self.pruner, pl_module)
        if self.pruner is not None:
            self._distiller.begin_batch(trainer, pl_module, self.pruner.plan)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._give_back()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._give_back()

    @override
    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if pl_module.automatic_optimization:
            self._distiller.check_taught(pl_module)
            self._backwards += 1
            if self._closes:
                self._add_penalty(trainer, None)

    @override
    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        if not self._acts(trainer):
            return
        if not pl_module.automatic_optimization:
            # The user decides when which gradients are whole, so only those about to be used are known to be.
            with hide_from(self._target(pl_module), optimizer):
                self._backwards = trainer.accumulate_grad_batches
                self._add_penalty(trainer, optimizer)
        elif self._backwards:
            # The step's last micro-batch had no loss, so no backward pass closed the accumulation.
            self._add_penalty(trainer, optimizer)

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.pruner is None:
            return
        self._penalty.look(trainer, self.pruner)
        if not self._progress.now and self._example is not None:  # restored in the middle of a fit
            with eager(pl_module):
                self._progress.look(self.pruner, self._example)
        values = self._progress.values(pl_module.device)
        phase = self.phase(trainer.current_epoch)
        facts = {name: float(value) for name, value in values.items() if name != "channels"}
        self.report.note_epoch(trainer, {**facts, "phase": phase})
        self.report.note_norms(trainer, self.pruner)
        values |= {"phase": float(PHASES.index(phase)), "target_reached": float(self.target_reached)}
        if (loss := self._distiller.mean_loss(trainer)) is not None:
            values["distillation"] = loss
        if self._penalty.watch.count:
            values["nonfinite_gradients"] = float(self._penalty.watch.count)
        log_levels(pl_module, place_in_logs(trainer, self), values)

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        trial = getattr(trainer, "fast_dev_run", False)
        if self.pruner is not None and self._example is not None and self.steps_done and not trial:
            self.report.write(
                trainer,
                pl_module,
                module=self.module,
                example=self._example,
                pruner=self.pruner,
                targets=reached_targets(self, self._progress),
                config=settings_of(self),
            )

    @override
    def state_dict(self) -> dict[str, Any]:
        if self._waiting is not None:
            return dict(self._waiting)
        return {
            "pruner": None if self.pruner is None else self.pruner.state_dict(),
            "example": self._recorded,
            "initial": self._progress.initial,
            "left": self._progress.now,
            "base": self._base.as_dict(),
            "cut_epoch": self._cut_epoch,
            "overflows": self._penalty.watch.state_dict(),
            "report": self.report.state_dict(),
            "distiller": self._distiller.state_dict(),
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._restored = state_dict
        self._cut_epoch = state_dict["cut_epoch"]
        self._penalty.watch.load_state_dict(state_dict["overflows"])
        self.report.load_state_dict(state_dict["report"])
        # Tuners save and restore in the middle of a fit, where the pruner is alive already.
        self._resume()

    @override
    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        checkpoint[KEY] = manifests(pl_module)

    @override
    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        vet_checkpoint(trainer, checkpoint)
        for root in (pl_module, *averaged_copies(trainer)):
            adopt_checkpoint(root, checkpoint)

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        refuse_guesses(pl_module)  # of a file of mere weights Lightning says nothing to callbacks

    on_test_start = on_predict_start = on_validation_start

    def _target(self, root: nn.Module) -> nn.Module:
        return target_of(root, self.module)

    @property
    def _waiting(self) -> dict[str, Any] | None:
        """State of a pruner that cannot be built before there is a batch."""
        held = None if self.pruner is not None else self._restored
        return held if held is not None and held["pruner"] is not None else None

    def _build_from_batch(self, trainer: Trainer, pl_module: LightningModule, batch: Any) -> None:
        if self.options.forward_fn is not None:
            self._build(pl_module, [Call("", (batch,))])
            return
        with eager(pl_module):
            calls = example_inputs.from_batch(pl_module, self.module, batch, trainer)
        self._recorded = describe(calls)
        self._build(pl_module, calls)

    def _build(self, pl_module: LightningModule, calls: list[Call]) -> None:
        target, example = self._target(pl_module), example_of(calls, self.options.forward_fn)
        with eager(pl_module):
            self.pruner = build_pruner(
                target,
                example,
                self.options,
                pruning_ratio=self.pruning_ratio,
                iterative_steps=self.iterative_steps,
                state=(self._restored or {}).get("pruner"),
            )
            self._example, self._base = example, plan_of(target)
            self._resume()
            self._progress.look(self.pruner, example)

    def _resume(self) -> None:
        if self.pruner is None or self._restored is None:
            return
        state, self._restored = self._restored, None
        if state["pruner"] is not None:
            self.pruner.load_state_dict(state["pruner"])
            self._base = Plan.from_dict(state["base"])
            self._recorded = state["example"]
            self._progress = Progress(state["initial"], state["left"])
            self._distiller.load_state_dict(state.get("distiller"), self.pruner.model, self._base)

    def _prune(self, trainer: Trainer, pl_module: LightningModule) -> None:
        pruner, example = self.pruner, self._example
        assert pruner is not None
        assert example is not None
        if not self._base.then(pruner.plan):
            self.report.look_at_dense(trainer, pl_module)
        self._distiller.keep_teacher(pl_module)
        with eager(pl_module):
            if not self._progress.now:  # restored in the middle of a fit
                self._progress.look(pruner, example)
            plan = Plan.from_dict(decide_on_rank_zero(trainer, lambda: pruner.step(dry_run=True).as_dict()))
            if not plan and self.pruning_ratio:
                rank_zero_warn(
                    f"the cut of epoch {trainer.current_epoch} removes nothing {list(pruner.notes)}; "
                    "callback.pruner.explain(name, dim) says why a dimension stays"
                )
            self.report.note_cut(trainer, pruner, plan)
            cut_every_copy(trainer, pl_module, self.module, pruner, plan, self._base)
            pruner.update_regularizer()
            self._progress.look(pruner, example)
        follow_cut(trainer, pl_module)
        if self.recalibrate_batches and plan:
            with eager(pl_module):
                recalibrate(trainer, pl_module, self.module, self.recalibrate_batches)

    def _give_back(self) -> None:
        self._gatherer.end_batch()
        self._distiller.end_batch()

    def _add_penalty(self, trainer: Trainer, optimizer: Optimizer | None) -> None:
        """Add the gradient of the penalty, on the scale that the task's gradients have now."""
        share = self._backwards / trainer.accumulate_grad_batches
        self._backwards = 0
        if self.pruner is not None and self._acts(trainer):
            presses = trainer.current_epoch >= self.sparse_start_epoch
            self._penalty.add(
                trainer, self.pruner, self._gatherer, presses=presses, share=share, optimizer=optimizer
            )

    def _acts(self, trainer: Trainer) -> bool:
        """Whether the gradients of this step are anyone's business."""
        if self.pruner is None or self.target_reached:
            return False
        return trainer.current_epoch >= self.sparse_start_epoch or self.pruner.collector.need is not None
