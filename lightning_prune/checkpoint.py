"""The structure of a pruned model travels with its state dict; a model takes it on before it loads.

The plan lies in ``state_dict()._metadata``: no key is added, nothing but numbers and strings is stored, and
it survives ``torch.save``, ``torch.load(weights_only=True)`` and ``save_weights_only``. Hooks are functions
of this module, so that a model with them can be pickled and copied.
"""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Mapping
from types import FrameType
from typing import Any, TypeVar

from torch import Tensor, nn

from lightning_prune.errors import CheckpointMismatchError, PlanError
from lightning_prune.plan import Plan
from lightning_prune.surgery.cutting import set_tensor_data
from lightning_prune.surgery.manifests import KEY
from lightning_prune.surgery.rehearsing import rehearse
from lightning_prune.surgery.structure import (
    ADVICE,
    Shapes,
    is_guess,
    is_noted,
    note,
    plan_of,
    take_on,
)

__all__ = [
    "KEY",
    "PrunableMixin",
    "adopt",
    "adopt_checkpoint",
    "fit_to_checkpoint",
    "is_prepared",
    "load_from_checkpoint",
    "load_pruned_state",
    "manifests",
    "prepare",
    "record",
    "refuse_guesses",
    "written_plans",
]

_READY = "_lightning_prune_ready"
ModuleT = TypeVar("ModuleT", bound=nn.Module)
T = TypeVar("T")


def prepare(model: ModuleT) -> ModuleT:
    """Let ``model.load_state_dict`` take on the structure that a pruned state dict names.

    Needed before ``trainer.fit`` with ``ddp_spawn`` only, where trained weights come back to a model that
    no callback has seen; elsewhere the callback does it. Calling it twice is harmless.

    Returns:
        The same model.

    >>> prepare(nn.Linear(2, 2))
    Linear(in_features=2, out_features=2, bias=True)
    """
    if not is_prepared(model):
        model.register_load_state_dict_pre_hook(_resize_before_load)  # type: ignore[no-untyped-call]
        model.register_state_dict_post_hook(_write_manifest)  # type: ignore[no-untyped-call]
        setattr(model, _READY, True)
    return model


def is_prepared(model: nn.Module) -> bool:
    """Say whether ``prepare`` was called on the model."""
    return _READY in model.__dict__


def record(module: nn.Module, plan: Plan) -> None:
    """Note what has been kept of ``module`` so far; its state dict says so from now on.

    Args:
        module: Module that the plan's names are relative to.
        plan: Everything kept since the module was built.
    """
    note(prepare(module), plan)


def manifests(model: nn.Module) -> dict[str, dict[str, Any]]:
    """List the plans of a model's pruned submodules, by module name, as plain data."""
    return {n: plan_of(m).as_dict() for n, m in model.named_modules() if is_noted(m)}


def load_pruned_state(
    model: nn.Module,
    state: Mapping[str, Any],
    *,
    plan: Plan | None = None,
    prefix: str = "",
    strict: bool = True,
) -> Any:
    """Load a pruned state dict, or a whole Lightning checkpoint, into a freshly built model.

    No example inputs and no Lightning are needed. Everything is checked first; on an error the model is as
    before.

    Args:
        model: A model of the original architecture, pruned or not.
        state: A state dict or a checkpoint with ``"state_dict"`` in it, from
            ``torch.load(weights_only=True)``.
        plan: Structure of a state dict that carries none (safetensors, a plain dict), relative to
            ``model``.
        prefix: Load only the keys below it, without it: ``"net."`` for the network of a LightningModule.
        strict: As in ``load_state_dict``.

    Returns:
        What ``load_state_dict`` returns.

    Raises:
        CheckpointMismatchError: If the structure or a key does not fit the model; names the first
            difference.

    >>> import torch
    >>> from lightning_prune.plan import Cut, Rewrite
    >>> cuts, rewrites = (Cut("weight", 0, 2, (1,)),), (Rewrite("", "out_features", 2, 1),)
    >>> cut = Plan(cuts, rewrites, sizes=(("weight", (2, 3)),))
    >>> model = nn.Linear(3, 2, bias=False)
    >>> _ = load_pruned_state(model, {"weight": torch.ones(1, 3)}, plan=cut)
    >>> model
    Linear(in_features=3, out_features=1, bias=False)
    """
    tensors = state.get("state_dict", state) if isinstance(state, Mapping) else state
    if not isinstance(tensors, Mapping):
        raise CheckpointMismatchError(
            f"a state dict was expected, got {type(tensors).__name__}; pass what torch.load gave"
        )
    written = _read(tensors, "") or _read_entry(state.get(KEY, {}))
    plans = _below(written, prefix[:-1]) or _from_above(written, prefix[:-1])
    wanted = {"": plan} if plan is not None else {**_present(model), **plans}
    own = _below_prefix(tensors, prefix)
    _adopt_to_load(model, wanted, own, strict=strict)
    return model.load_state_dict(own, strict=strict)


class PrunableMixin:
    """Make ``load_from_checkpoint`` of a LightningModule work on pruned checkpoints.

    Put it first: ``class Net(PrunableMixin, LightningModule)``. ``lightning_prune.load_from_checkpoint``
    does the same for classes that cannot be changed. The structure is taken on together with the weights,
    after the class's own ``on_load_checkpoint``.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if isinstance(self, nn.Module):
            prepare(self)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """See that the state dict names the structure, for ``load_state_dict`` to take on."""
        super().on_load_checkpoint(checkpoint)  # type: ignore[misc]
        plans = _read_entry(checkpoint.get(KEY, {}))
        if plans and not _read(checkpoint["state_dict"], ""):
            metadata = {path: {KEY: plan.as_dict()} for path, plan in plans.items()}
            checkpoint["state_dict"] = _told(OrderedDict(checkpoint["state_dict"]), metadata)


def load_from_checkpoint(cls: type[Any], path: Any, **kwargs: Any) -> Any:
    """Do ``cls.load_from_checkpoint(path, **kwargs)`` for a pruned checkpoint; the class need not change.

    Args:
        cls: The LightningModule class.
        path: Checkpoint file, or anything else ``load_from_checkpoint`` takes.
        **kwargs: Handed on.

    Returns:
        An instance of ``cls`` with the structure and the weights of the checkpoint.

    Raises:
        CheckpointMismatchError: If the structure does not fit the model that ``cls`` builds.
    """

    def on_load_checkpoint(self: Any, checkpoint: dict[str, Any]) -> None:
        fit_to_checkpoint(self, checkpoint)
        cls.on_load_checkpoint(self, checkpoint)

    names = {name: getattr(cls, name) for name in ("__module__", "__qualname__", "__doc__")}
    loader = type(cls.__name__, (cls,), {**names, "on_load_checkpoint": on_load_checkpoint})
    model = loader.load_from_checkpoint(path, **kwargs)  # type: ignore[attr-defined]
    model.__class__ = cls
    return model


def fit_to_checkpoint(model: nn.Module, checkpoint: Mapping[str, Any]) -> None:
    """Give ``model`` the structure of a Lightning checkpoint; weights are left for ``load_state_dict``.

    Raises:
        CheckpointMismatchError: If the structure does not fit; the model is as before.
    """
    prepare(model)
    tensors = checkpoint.get("state_dict", {})
    plans = _read(tensors, "") or _read_entry(checkpoint.get(KEY, {}))
    _adopt(model, {**_present(model), **plans}, _shapes_below(tensors, ""))


def adopt(module: nn.Module, plan: Plan) -> None:
    """Bring a module that took on mere shapes to the plan they came from: attributes, patches, the record.

    Values stay where they are.

    Raises:
        CheckpointMismatchError: If the plan does not fit the module.
    """
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    held = {name: tensor.data for name, tensor in tensors.items()}
    _adopt(module, {"": plan}, {})
    for name, data in held.items():
        if tensors[name].shape == data.shape:
            set_tensor_data(tensors[name], data)


def adopt_checkpoint(root: nn.Module, checkpoint: Mapping[str, Any]) -> None:
    """Bring every pruned submodule to the plan that the callback wrote into a Lightning checkpoint.

    Raises:
        CheckpointMismatchError: If a plan does not fit, or if shapes were taken on that no plan explains.
    """
    for path, plan in _read_entry(checkpoint.get(KEY, {})).items():
        adopt(root.get_submodule(path), plan)
    refuse_guesses(root)


def refuse_guesses(root: nn.Module) -> None:
    """See that whatever was loaded by mere shapes has got its plan since.

    Raises:
        CheckpointMismatchError: If shapes were taken on that no plan explains.
    """
    guessed = [name for name, module in root.named_modules() if is_guess(module)]
    if guessed:
        raise CheckpointMismatchError(
            f"the checkpoint holds smaller tensors for {guessed[0] or 'the model'!r} than the model was "
            f"built with, and no plan that explains them; {ADVICE}"
        )


def written_plans(checkpoint: Mapping[str, Any]) -> dict[str, Plan]:
    """Read the plans that a Lightning checkpoint holds, by module name.

    Raises:
        CheckpointMismatchError: If one cannot be read.
    """
    return {**_read(checkpoint.get("state_dict", {}), ""), **_read_entry(checkpoint.get(KEY, {}))}


def _write_manifest(module: nn.Module, state_dict: Any, prefix: str, local_metadata: dict[str, Any]) -> None:
    if is_noted(module):
        local_metadata[KEY] = plan_of(module).as_dict()


def _resize_before_load(
    module: nn.Module, state_dict: Mapping[str, Any], prefix: str, local_metadata: dict[str, Any], *_: Any
) -> None:
    plans = _read(state_dict, prefix[:-1], {prefix[:-1]: local_metadata})
    # Below the root of a load, hooks above may yet excuse a key, and metadata come module by module.
    strict = not prefix and _every_key_is_asked_for()
    state = _below_prefix(state_dict, prefix)
    if not hasattr(state, "_metadata"):
        _told(state, {"": local_metadata})
    _adopt_to_load(module, {**_present(module), **plans}, state, strict=strict)


def _every_key_is_asked_for() -> bool:
    """Say whether the load that runs right now is a strict one: torch tells its hooks that all are."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code is not nn.Module.load_state_dict.__code__:
        frame = frame.f_back
    return frame is not None and bool(frame.f_locals.get("strict"))


def _adopt_to_load(
    root: nn.Module, wanted: Mapping[str, Plan | None], state: Mapping[str, Any], *, strict: bool
) -> None:
    """Take on what is wanted if ``state`` will load then, else refuse and change nothing."""

    def check(shapes: Shapes) -> None:
        verdict = rehearse(root, shapes, state, own_hook=_resize_before_load)
        if verdict is None:
            return  # torch names what it finds
        for names, what in (
            (verdict.missing, "is missing from the state dict"),
            (verdict.unexpected, "is not in the model"),
        ):
            if strict and names:
                raise CheckpointMismatchError(
                    f"{names[0]!r} {what}; {ADVICE}, or load with strict=False. Nothing was loaded"
                )
        if verdict.errors:
            found = verdict.errors[0].rstrip(".")
            raise CheckpointMismatchError(f"{found}; {ADVICE}. Nothing was loaded")

    for module in take_on(root, wanted, _shapes_below(state, ""), check=check):
        prepare(module)


def _adopt(root: nn.Module, wanted: Mapping[str, Plan | None], shapes: Shapes) -> None:
    for module in take_on(root, wanted, shapes):
        prepare(module)


def _below_prefix(state: Mapping[str, Any], prefix: str) -> OrderedDict[str, Any]:
    """The part of a state dict below a prefix, without it; the metadata go with it."""
    part = OrderedDict((key[len(prefix) :], value) for key, value in state.items() if key.startswith(prefix))
    metadata = getattr(state, "_metadata", None)
    return _told(part, _below(metadata, prefix[:-1])) if isinstance(metadata, Mapping) else part


def _told(state: OrderedDict[str, Any], metadata: Mapping[str, Any]) -> OrderedDict[str, Any]:
    state._metadata = metadata  # type: ignore[attr-defined]
    return state


def _present(model: nn.Module) -> dict[str, Plan | None]:
    """List the submodules that may be pruned; None: the state dict does not say how."""
    return {name: None for name, module in model.named_modules() if is_noted(module)}


def _read(
    state_dict: Mapping[str, Any], root: str, local: Mapping[str, Any] | None = None
) -> dict[str, Plan]:
    """Read the manifests at and below ``root``; names become relative to it."""
    metadata = getattr(state_dict, "_metadata", None)
    metadata = metadata if isinstance(metadata, Mapping) else (local or {})
    wrong = [path for path, entry in metadata.items() if not isinstance(entry, Mapping)]
    if wrong:
        raise CheckpointMismatchError(
            f"the state dict's metadata of {wrong[0]!r} are a {type(metadata[wrong[0]]).__name__}, no table: "
            "the file is damaged or was edited. Nothing was loaded"
        )
    found = {path: entry[KEY] for path, entry in metadata.items() if KEY in entry}
    return {path: _plan_from(data, path) for path, data in _below(found, root).items()}


def _read_entry(entry: Any) -> dict[str, Plan]:
    """Read what the callback wrote into the checkpoint itself."""
    if not isinstance(entry, Mapping):
        raise CheckpointMismatchError(
            f"the checkpoint's {KEY!r} entry is a {type(entry).__name__}, no table of plans"
        )
    return {str(path): _plan_from(data, str(path)) for path, data in entry.items()}


def _below(found: Mapping[str, T], root: str) -> dict[str, T]:
    """Choose what is said of ``root`` and the modules in it; names become relative to it."""
    inside = f"{root}." if root else ""
    return {
        str(path)[len(inside) :]: value
        for path, value in found.items()
        if path == root or str(path).startswith(inside)
    }


def _from_above(plans: Mapping[str, Plan], root: str) -> dict[str, Plan]:
    """Choose what the plan of the nearest module around ``root`` says of it."""
    around = [path for path in plans if not path or root.startswith(f"{path}.")]
    if not around:
        return {}
    nearest = max(around, key=len)
    return {"": plans[nearest].below(root[len(nearest) + 1 :] if nearest else root)}


def _plan_from(data: Any, path: str) -> Plan:
    try:
        for _, _, _, keep, rows in data["cuts"]:
            # Refused here, before Plan makes one tuple per row.
            if not 1 <= rows <= len(keep):
                raise PlanError(f"{len(keep)} kept indices in {rows} rows")
        return Plan.from_dict(data)
    except (PlanError, LookupError, TypeError, ValueError) as error:
        raise CheckpointMismatchError(
            f"the checkpoint's manifest for {path or 'the model'!r} cannot be read: {error}; "
            "nothing was loaded"
        ) from error


def _shapes_below(state_dict: Mapping[str, Any], prefix: str) -> Shapes:
    return {
        key[len(prefix) :]: tuple(value.shape)
        for key, value in state_dict.items()
        if key.startswith(prefix) and isinstance(value, Tensor)
    }
