"""What a checkpoint holds for a callback is vetted before anything is loaded: it decides what is cut next."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn

from lightning_prune.checkpoint import written_plans
from lightning_prune.errors import PlanError
from lightning_prune.plan import Plan
from lightning_prune.selection.requests import reaches_all
from lightning_prune.surgery.structure import dense_shapes
from lightning_prune.training.building import has_module, target_of
from lightning_prune.training.describing import vet_calls
from lightning_prune.training.schedule import Schedule
from lightning_prune.training.strategies import callbacks_of
from lightning_prune.vetting import LARGEST, Part, vet_pruner

__all__ = ["vet_checkpoint"]

COUNTS = ("parameters", "units", "macs")


def vet_checkpoint(trainer: Trainer, checkpoint: Mapping[str, Any]) -> None:
    """See that every callback that prunes can go on with what a checkpoint holds for it.

    Args:
        trainer: It, its callbacks and its LightningModule are not touched.
        checkpoint: As it was read.

    Raises:
        CheckpointMismatchError: If one cannot; names the first thing wrong.
    """
    for callback in callbacks_of(trainer):
        if isinstance(callback, Schedule):
            _vet_callback(callback, trainer, checkpoint)


def _vet_callback(callback: Schedule, trainer: Trainer, checkpoint: Mapping[str, Any]) -> None:
    root, states = trainer.lightning_module, checkpoint.get("callbacks", {})
    if not isinstance(states, Mapping):
        Part("the checkpoint's callbacks", states).table()
    if callback.state_key not in states or not has_module(root, callback.module):
        return
    # Whoever only tests a network need not know how it was trained.
    is_fit = trainer.state.fn is TrainerFn.FITTING
    state = Part(f"the state of {callback.state_key}", states[callback.state_key])
    try:
        _vet(state, checkpoint, root, callback.module, callback.iterative_steps if is_fit else LARGEST)
        if is_fit and state["pruner"].value is not None:
            _vet_pressed(state, callback)
    except RecursionError:
        state.refuse("nested less deeply; it")


def _vet(
    state: Part, checkpoint: Mapping[str, Any], root: LightningModule, module: str | None, steps: int
) -> None:
    state.table(
        "pruner", "example", "initial", "left", "base", "distiller", "cut_epoch", "overflows", "report"
    )
    target = target_of(root, module)
    base = state["base"].plan()
    _vet_sizes(state["base"], base, target)
    plan = Plan()
    if state["pruner"].value is not None:
        shapes = _shapes(checkpoint, module)
        plan = vet_pruner(state["pruner"], steps, shapes)
        _vet_sizes(state["pruner"]["plan"], plan, target)
        _vet_agreement(state, base, plan, checkpoint, module or "")
        _vet_teacher(state["distiller"], target, {**shapes, **dict(plan.sizes)})
    else:
        _vet_beginning(state)
    if state["example"].value is not None:
        vet_calls(state["example"])
    if state["cut_epoch"].value is not None:
        state["cut_epoch"].whole(0, Part("the checkpoint's epoch", checkpoint.get("epoch")).whole())
    _vet_overflows(state["overflows"])
    _vet_report(state["report"])
    for name in ("initial", "left"):
        counts = state[name].table(*(COUNTS if state[name].value else ()))
        for count in counts.parts():
            count.number(0, LARGEST)


def _vet_pressed(state: Part, callback: Schedule) -> None:
    """See that there is a gamma for each unit that is pressed: for all, where the options leave none out."""
    gammas, counts = state["pruner"]["regularizer"]["gamma"], state["left"].value
    if not counts:
        return
    if reaches_all(callback.options, callback.pruning_ratio, state["pruner"]["initial"].value):
        gammas.items(counts["units"])
    elif len(gammas.items()) > counts["units"]:
        gammas.refuse(f"a list of {counts['units']} at most")


def _shapes(checkpoint: Mapping[str, Any], module: str | None) -> dict[str, tuple[int, ...]]:
    inside = f"{module}." if module else ""
    held = Part("the state dict", checkpoint.get("state_dict", {})).table().value
    return {
        name[len(inside) :]: tuple(tensor.shape)
        for name, tensor in held.items()
        if name.startswith(inside) and isinstance(tensor, Tensor)
    }


def _vet_sizes(part: Part, plan: Plan, target: nn.Module) -> None:
    """See that no cut is of more than there was; what composes plans goes by their sizes."""
    built = dense_shapes(target)
    for cut in plan.cuts:
        shape = built.get(cut.tensor)
        if shape is None or not 0 <= cut.dim < len(shape) or cut.size > shape[cut.dim]:
            part.refuse(
                f"a plan of this model, which has no {cut.tensor!r} with {cut.size} in dim {cut.dim}; it"
            )


def _vet_agreement(state: Part, base: Plan, plan: Plan, checkpoint: Mapping[str, Any], module: str) -> None:
    """See that what the callback has cut is what the model's manifest says."""
    try:
        kept = base.then(plan)
    except PlanError as error:
        state["pruner"]["plan"].refuse(f"a plan that follows its base ({error}); it")
    written = written_plans(checkpoint).get(module, Plan())
    if kept == written:
        return
    found = {(cut.tensor, cut.dim): cut for cut in kept.cuts}
    asked = {(cut.tensor, cut.dim): cut for cut in written.cuts}
    differing = [key for key in {**asked, **found} if found.get(key) != asked.get(key)]
    where = f" for {differing[0][0]!r} dim {differing[0][1]}" if differing else ""
    state["pruner"]["plan"].refuse(f"what the manifest of {module or 'the model'!r} says{where}; it")


def _vet_beginning(state: Part) -> None:
    """See that nothing was done where there is no pruner."""
    for name, nothing in (("initial", {}), ("left", {}), ("cut_epoch", None), ("distiller", None)):
        if state[name].value != nothing:
            state["pruner"].refuse(f"a table where there is a {name!r}")


def _vet_teacher(state: Part, target: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> None:
    if state.value is None:
        return
    state.table("teacher", "loss")
    for number in state["loss"].items(2):
        number.number()
    weights = state["teacher"].table(*target.state_dict())
    for name, value in weights.value.items():
        if isinstance(value, Tensor):
            weights[name].tensor(*((shapes[name],) if name in shapes else ()))


def _vet_overflows(state: Part) -> None:
    state.table("count", "pending")["count"].whole()
    steps, name = state["pending"].items(2)
    steps.whole()
    name.text()


def _vet_report(state: Part) -> None:
    state.table("metrics", "timeline", "cuts", "spreads")
    tables = [state["metrics"], *state["timeline"].items()]
    for value in (value for table in tables for value in table.parts()):
        value.plain()
    for spread in state["spreads"].items():
        spread.table("epoch", "quantiles")["epoch"].whole()
        _vet_numbers(spread["quantiles"])
    for cut in state["cuts"].items():
        cut.table("epoch", "edges", "classes", "unscored", "notes")["epoch"].whole()
        cut["unscored"].whole()
        _vet_numbers(cut["edges"])
        for note in cut["notes"].items():
            note.text()
        for units in cut["classes"].items():
            units.table("name", "kept", "removed", "line")["name"].text()
            units["line"].plain()
            for count in (*units["kept"].items(), *units["removed"].items()):
                count.whole()


def _vet_numbers(numbers: Part) -> None:
    for number in numbers.items():
        number.number()
