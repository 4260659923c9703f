"""The structure a module has and the one a file asks for: compare them, then go from one to the other.

A module notes the plan that made it what it is. From that plan follow the shapes it was built with, so that
any other plan for the same architecture, the empty one included, can be checked before a byte is allocated.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from math import prod
from typing import TypeAlias

import torch
from torch import Tensor, nn

from lightning_prune.errors import CheckpointMismatchError, PlanError
from lightning_prune.plan import Cut, Plan, Rewrite, Scalar
from lightning_prune.surgery.applying import Snapshot, apply
from lightning_prune.surgery.attributes import get_path, set_path
from lightning_prune.surgery.cutting import cut_tensor, set_tensor_data
from lightning_prune.surgery.manifests import tell_configs
from lightning_prune.surgery.patches import remove_patches
from lightning_prune.surgery.recurrent import lay_side_by_side
from lightning_prune.surgery.tensors import tensors_of

__all__ = [
    "ADVICE",
    "Shapes",
    "confirm",
    "dense_shapes",
    "is_guess",
    "is_noted",
    "note",
    "plan_of",
    "shape_stored",
    "shape_the_rest",
    "take_on",
    "trust_shapes",
]

ADVICE = "build the model with the configuration that the checkpoint was trained with"
Shapes: TypeAlias = dict[str, tuple[int, ...]]
_Choice: TypeAlias = tuple[str, nn.Module, Plan, bool]  # prefix, module, structure, guessed
_PLAN = "_lightning_prune_plan"
_SHAPES = "_lightning_prune_trusts_shapes"
_GUESS = "_lightning_prune_guess"


def plan_of(module: nn.Module) -> Plan:
    """Give everything that has been kept of ``module``, an empty plan if it was never cut."""
    plan = module.__dict__.get(_PLAN)
    return plan if isinstance(plan, Plan) else Plan()


def is_noted(module: nn.Module) -> bool:
    """Say whether a plan, be it an empty one, was noted on the module itself."""
    return _PLAN in module.__dict__


def note(module: nn.Module, plan: Plan) -> None:
    """Note what has been kept of ``module`` so far; names in the plan are relative to it.

    The note is written into the configs that are saved with the model, too.
    """
    setattr(module, _PLAN, plan)
    tell_configs(module, plan)


def trust_shapes(module: nn.Module) -> None:
    """Let a state dict without a plan shrink ``module`` to its mere shapes."""
    note(module, plan_of(module))
    setattr(module, _SHAPES, True)


def is_guess(module: nn.Module) -> bool:
    """Say whether the plan noted on the module was made from mere shapes."""
    return _GUESS in module.__dict__


def confirm(module: nn.Module) -> None:
    """Note that the plan of the module is a true one."""
    module.__dict__.pop(_GUESS, None)


def take_on(
    root: nn.Module,
    wanted: Mapping[str, Plan | None],
    shapes: Shapes,
    *,
    check: Callable[[Shapes], None] = lambda shapes: None,
) -> list[nn.Module]:
    """Check every wanted structure, then take all of them on; what two structures share keeps its value.

    Args:
        root: Module that paths and shapes are relative to.
        wanted: Plan per path of a submodule; None: choose by the shapes.
        shapes: Shapes of the tensors that will be loaded next, as far as known.
        check: Gets the shapes that tensors of the wanted modules will have, and may yet refuse them.

    Returns:
        The modules that follow a plan named in ``wanted``, or that were changed.

    Raises:
        CheckpointMismatchError: If one does not fit; names the first difference, and nothing was changed.
    """
    chosen = _choose(root, wanted, shapes)
    check(_shapes_then(chosen))
    _reshape(chosen)
    for _, module, target, guessed in chosen:
        note(module, target)
        if guessed:
            setattr(module, _GUESS, True)
        else:
            confirm(module)
    return [module for _, module, _, _ in chosen]


def _choose(root: nn.Module, wanted: Mapping[str, Plan | None], shapes: Shapes) -> list[_Choice]:
    """Find out which structure each module should have, and whether it can; change nothing."""
    chosen: list[_Choice] = []
    for path, plan in wanted.items():
        module = _find(root, path)
        below = f"{path}." if path else ""
        local = {key[len(below) :]: shape for key, shape in shapes.items() if key.startswith(below)}
        if plan is not None:
            _check_fits(module, below, plan, local)
        target = _guess(module, local) if plan is None else plan
        if target is not None:
            chosen.append((below, module, target, plan is None and bool(target)))
    return chosen


def _reshape(chosen: list[_Choice]) -> None:
    """Go from the present structures over the dense ones to the chosen; what both keep, keeps its value.

    On an error, Ctrl-C included, all of them are as before.
    """
    before = [Snapshot.across(module, plan_of(module), target) for _, module, target, _ in chosen]
    try:
        for _, module, target, _ in chosen:
            if target != plan_of(module):
                _grow(module, plan_of(module))
                apply(module, target)
    except BaseException as error:
        for snapshot in before:
            snapshot.restore()
        if not isinstance(error, PlanError):
            raise
        raise CheckpointMismatchError(
            f"the checkpoint's manifest cannot be applied: {error}; nothing was loaded"
        ) from error


def shape_stored(module: nn.Module, plan: Plan) -> None:
    """Give the tensors that a state dict holds the shapes that ``plan`` leaves; no value is there yet.

    Between this and ``shape_the_rest`` a loader fills them, and makes anew what no file holds.

    Raises:
        CheckpointMismatchError: If the plan does not fit; names the first difference.
    """
    _check_fits(module, "", plan, {})
    _shapes_after(plan, "")
    stored, cuts = module.state_dict(keep_vars=True), plan.by_tensor()
    for name, tensor in tensors_of(module).items():
        if name in cuts and name in stored:
            set_tensor_data(tensor, cut_tensor(tensor, cuts[name]))


def shape_the_rest(module: nn.Module, plan: Plan) -> None:
    """Cut what no state dict holds, set the attributes, install the patches, and note the plan.

    Raises:
        CheckpointMismatchError: If it cannot be done.
    """
    stored = module.state_dict(keep_vars=True)
    cuts = tuple(c for c in plan.cuts if c.tensor not in stored)
    sizes = tuple((name, shape) for name, shape in plan.sizes if name not in stored)
    try:
        apply(module, Plan(cuts, plan.rewrites, plan.patches, sizes))
    except PlanError as error:
        raise CheckpointMismatchError(
            f"the checkpoint's manifest cannot be applied: {error}; nothing was loaded"
        ) from error
    cut = plan.by_tensor()
    lay_side_by_side(module, [t for name, t in tensors_of(module).items() if name in cut])
    note(module, plan)


def _shapes_then(chosen: list[_Choice]) -> Shapes:
    """Give the shapes of all tensors in the chosen modules once these have taken on what was chosen."""
    then: Shapes = {}
    for below, module, target, _ in chosen:
        inner = {**dense_shapes(module), **_shapes_after(target, below)}
        then |= {below + name: shape for name, shape in inner.items()}
    return then


def _find(root: nn.Module, path: str) -> nn.Module:
    try:
        return root.get_submodule(path)
    except AttributeError as error:
        raise CheckpointMismatchError(
            f"the checkpoint was pruned in module {path!r}, which this model has not; {ADVICE}. "
            "Nothing was loaded"
        ) from error


def _guess(module: nn.Module, shapes: Shapes) -> Plan | None:
    """Choose a structure for a state dict that names none: the present, the dense, or its mere shapes."""
    present = {name: tuple(tensor.shape) for name, tensor in tensors_of(module).items() if name in shapes}
    dense = {name: shape for name, shape in dense_shapes(module).items() if name in shapes}
    asked = {name: shapes[name] for name in present}
    if asked == present:
        return None
    if asked == dense:
        return Plan()
    if not module.__dict__.get(_SHAPES):
        return None  # torch names the tensors that do not fit
    smaller = all(
        len(asked[name]) == len(dense[name])
        and all(0 < a <= d for a, d in zip(asked[name], dense[name], strict=True))
        for name in asked
    )
    return _plan_of_shapes(dense, asked) if smaller else None


def _plan_of_shapes(dense: Shapes, asked: Shapes) -> Plan:
    changed = [name for name in asked if asked[name] != dense[name]]
    cuts = tuple(
        Cut(name, dim, old, tuple(range(new)))
        for name in changed
        for dim, (old, new) in enumerate(zip(dense[name], asked[name], strict=True))
        if old != new
    )
    return Plan(cuts, sizes=tuple(sorted((name, dense[name]) for name in changed)))


def dense_shapes(module: nn.Module) -> Shapes:
    """Give the shapes that the module was built with, of every parameter and buffer."""
    now = {name: tuple(tensor.shape) for name, tensor in tensors_of(module).items()}
    return {**now, **{name: shape for name, shape in plan_of(module).sizes if name in now}}


def _check_fits(module: nn.Module, where: str, plan: Plan, shapes: Shapes) -> None:
    """Compare a plan with the module it would cut and the tensors to be loaded; allocate nothing."""
    dense, sizes = dense_shapes(module), dict(plan.sizes)
    for name, shape in sizes.items():
        if dense.get(name) != shape:
            raise CheckpointMismatchError(
                f"the checkpoint was pruned from {where}{name} of shape {list(shape)}, this model has "
                f"{list(dense[name]) if name in dense else 'no such tensor'}; {ADVICE}. Nothing was loaded"
            )
    for name, shape in _shapes_after(plan, where).items():
        if name in shapes and shapes[name] != shape:
            raise CheckpointMismatchError(
                f"the manifest leaves {where}{name} with shape {list(shape)}, the state dict holds "
                f"{list(shapes[name])}: the file is damaged or was edited. Nothing was loaded"
            )
    built = {(r.module, r.path): r.before for r in plan_of(module).rewrites}
    for rewrite in plan.rewrites:
        _check_rewrite(module, where, rewrite, built.get((rewrite.module, rewrite.path)))


def _shapes_after(plan: Plan, where: str) -> Shapes:
    after = {name: list(shape) for name, shape in plan.sizes}
    seen: set[tuple[str, int]] = set()
    for cut in plan.cuts:
        shape = after.get(cut.tensor)
        fits = (
            shape is not None
            and 0 <= cut.dim < len(shape)
            and dict(plan.sizes)[cut.tensor][cut.dim] == cut.size
        )
        if not fits or (cut.tensor, cut.dim) in seen or (cut.rows > 1 and cut.dim == 0):
            raise CheckpointMismatchError(
                f"the manifest cuts {where}{cut.tensor} dim {cut.dim} of size {cut.size}, which does not "
                "agree with the sizes it states: the file is damaged or was edited. Nothing was loaded"
            )
        seen.add((cut.tensor, cut.dim))
        after[cut.tensor][cut.dim] = cut.kept
    return {name: tuple(shape) for name, shape in after.items()}


def _check_rewrite(module: nn.Module, where: str, rewrite: Rewrite, built: Scalar) -> None:
    try:
        now = get_path(module.get_submodule(rewrite.module), rewrite.path) if built is None else built
    except (AttributeError, PlanError) as error:
        raise CheckpointMismatchError(
            f"the checkpoint changed {where}{rewrite.module} {rewrite.path}, which this model has not; "
            f"{ADVICE}. Nothing was loaded"
        ) from error
    if now != rewrite.before:
        raise CheckpointMismatchError(
            f"the checkpoint was pruned from {where}{rewrite.module} with {rewrite.path}={rewrite.before!r}, "
            f"this model has {now!r}; {ADVICE}. Nothing was loaded"
        )


def _grow(module: nn.Module, plan: Plan) -> None:
    """Undo ``plan``: shapes and attributes as built, kept values in their places, zeros elsewhere."""
    tensors, cuts = tensors_of(module), plan.by_tensor()
    for name, shape in plan.sizes:
        set_tensor_data(tensors[name], _grown(tensors[name].detach(), shape, cuts.get(name, ())))
    if plan.patches:
        remove_patches(module)
    for rewrite in plan.rewrites:
        set_path(module.get_submodule(rewrite.module), rewrite.path, rewrite.before)
    lay_side_by_side(module, [tensors[name] for name, _ in plan.sizes])


def _grown(tensor: Tensor, shape: tuple[int, ...], cuts: Iterable[Cut]) -> Tensor:
    places = cut_tensor(torch.arange(prod(shape), device=tensor.device).reshape(shape), cuts).flatten()
    dense = tensor.new_zeros(prod(shape))
    dense[places] = tensor.flatten()
    dense = dense.reshape(shape)
    if (
        tensor.dim() == 4
        and tensor.is_contiguous(memory_format=torch.channels_last)
        and not tensor.is_contiguous()
    ):
        return dense.contiguous(memory_format=torch.channels_last)
    return dense
