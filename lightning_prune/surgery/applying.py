"""The only stage that changes a model: check the whole plan, compute every tensor, then swap pointers."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightning_prune.errors import PlanError
from lightning_prune.plan import Cut, Plan, Rewrite
from lightning_prune.surgery.attributes import config_objects, get_path, remember, set_path
from lightning_prune.surgery.cutting import cut_tensor, mask_tensor, set_tensor_data
from lightning_prune.surgery.patches import check_patch, install_patch, remember_patch
from lightning_prune.surgery.recurrent import holders_of, lay_side_by_side
from lightning_prune.surgery.scratch import Scratch

__all__ = ["Snapshot", "apply", "cut_tensor", "mask", "set_tensor_data", "validate"]


def apply(model: nn.Module, plan: Plan, *, on_meta: bool = False) -> Snapshot:
    """Cut a model in place, as the plan says. Needs no example inputs.

    Every parameter and buffer stays the same Python object, tied ones are cut once, gradients are cut along.
    Whatever goes wrong, Ctrl-C included, the model is afterwards the old one, bit for bit, or the new one.
    Optimizer state is not touched: see ``optimizers.Carrier``.

    Args:
        model: The model that the plan was made for, or a freshly built one of the same structure.
        plan: What is kept; an empty plan changes nothing.
        on_meta: Whether a model without values, on the meta device, may be cut to see its shapes.

    Returns:
        What gives the old model back, and holds its memory until then.

    Raises:
        PlanError: If any part of the plan does not fit. Nothing was cut.

    >>> from lightning_prune.plan import Cut
    >>> net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    >>> places = ("0.weight", 0), ("0.bias", 0), ("1.weight", 1)
    >>> before = apply(net, Plan(cuts=tuple(Cut(tensor, dim, 4, (0, 2)) for tensor, dim in places)))
    >>> tuple(net(torch.ones(5, 3)).shape), tuple(net[1].weight.shape)
    ((5, 2), (2, 2))
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    targets = _checked(model, modules, plan, on_meta=on_meta)
    scratch = Scratch()
    pieces = [_Piece.of(target, scratch) for target in targets]
    del scratch
    snapshot = Snapshot(list(_undos(model, modules, plan)))
    try:
        for piece in pieces:
            piece.commit()
        own_configs(model, plan)
        for rewrite in plan.rewrites:
            set_path(model.get_submodule(rewrite.module), rewrite.path, rewrite.after)
        for patch in plan.patches:
            install_patch(model, patch)
    except BaseException:  # Ctrl-C too must not leave half a model
        snapshot.restore()
        raise
    lay_side_by_side(model, [target.tensor for target in targets])
    return snapshot


def mask(model: nn.Module, plan: Plan) -> None:
    """Put zeros in place, in every parameter, where a plan would cut; nothing changes its shape.

    Raises:
        PlanError: If the plan does not fit.
    """
    buffers = {id(b) for b in model.buffers()}
    modules = dict(model.named_modules(remove_duplicate=False))
    for target in _checked(model, modules, plan, on_meta=True):
        if not target.tensor.is_meta and id(target.tensor) not in buffers:
            set_tensor_data(target.tensor, mask_tensor(target.tensor, target.cuts))


def validate(model: nn.Module, plan: Plan) -> None:
    """See whether a plan fits a model, without changing anything.

    Raises:
        PlanError: As ``apply``, whose checks these are.
    """
    _checked(model, dict(model.named_modules(remove_duplicate=False)), plan)


class Snapshot:
    """What a plan will change: tensors, gradients, attributes, computations. Copies nothing.

    >>> from lightning_prune.plan import Cut
    >>> layer, plan = nn.Linear(3, 4), Plan(cuts=(Cut("weight", 0, 4, (0, 2)), Cut("bias", 0, 4, (0, 2))))
    >>> snapshot = Snapshot.of(layer, plan)
    >>> _ = apply(layer, plan)
    >>> snapshot.restore()
    >>> tuple(layer.weight.shape)
    (4, 3)
    """

    def __init__(self, undos: list[Callable[[], None]]) -> None:
        self._undos = undos

    @staticmethod
    def of(model: nn.Module, plan: Plan, *, on_meta: bool = False) -> Snapshot:
        """Take a snapshot of what ``apply(model, plan)`` would change. It holds the old tensors' memory.

        Raises:
            PlanError: If the plan does not fit the model.
        """
        _checked(model, dict(model.named_modules(remove_duplicate=False)), plan, on_meta=on_meta)
        return Snapshot.across(model, plan)

    @staticmethod
    def across(model: nn.Module, *plans: Plan) -> Snapshot:
        """Take a snapshot of all that the plans name and the model has, whether or not they fit."""
        modules = dict(model.named_modules(remove_duplicate=False))
        return Snapshot([undo for plan in plans for undo in _undos(model, modules, plan)])

    def restore(self) -> None:
        """Put everything back: the same tensor objects over the same memory. May be called again."""
        while True:
            try:
                for undo in reversed(self._undos):
                    undo()
            except KeyboardInterrupt:
                continue  # a second Ctrl-C, on the way back: start again, every part may run twice
            return


def _undos(model: nn.Module, modules: Mapping[str, nn.Module], plan: Plan) -> Iterator[Callable[[], None]]:
    """One per thing that a plan names and the model has."""
    tensors = _named_tensors(modules)
    rewrites = [r for r in plan.rewrites if _leads_somewhere(modules, r)]
    held = {id(t): t for name in plan.by_tensor() if (t := tensors.get(name)) is not None}
    for layer in holders_of(modules.values(), set(held)):  # all of its weights move when one is cut
        held |= {id(p): p for p in layer.parameters(recurse=False)}
    yield from map(_remember_tensor, held.values())
    yield from (_remember_holder(holder, key) for holder, key, _ in _config_holders(model, rewrites))
    yield from (remember(modules[r.module], r.path) for r in rewrites)
    yield from (remember_patch(model, p) for p in plan.patches if p.module in modules)


def own_configs(model: nn.Module, plan: Plan) -> None:
    """Give a model a config of its own before it is rewritten: other models may hold the same object."""
    copies: dict[int, Any] = {}  # one memo: what held a part of another config holds a part of its copy
    for holder, key, config in list(_config_holders(model, plan.rewrites)):
        vars(holder)[key] = copy.deepcopy(config, copies)


def _leads_somewhere(modules: Mapping[str, nn.Module], rewrite: Rewrite) -> bool:
    try:
        get_path(modules[rewrite.module], rewrite.path)
    except (KeyError, PlanError):
        return False
    return True


def _config_holders(model: nn.Module, rewrites: Iterable[Rewrite]) -> Iterator[tuple[nn.Module, str, Any]]:
    """Every attribute of a module that holds an object into which a rewrite reaches."""
    roots = {(r.module, r.path.partition(".")[0]) for r in rewrites if "." in r.path}
    found = [c for m, k in roots if (c := vars(model.get_submodule(m)).get(k)) is not None]
    shared = {id(one) for c in found for one in (c, *(inner for _, inner in config_objects(c)))}
    for module in model.modules() if shared else ():
        for key, value in list(vars(module).items()):
            if id(value) in shared:
                yield module, key, value


def _remember_holder(holder: nn.Module, key: str) -> Callable[[], None]:
    old = vars(holder)[key]

    def undo() -> None:
        vars(holder)[key] = old

    return undo


@dataclass(frozen=True, eq=False)
class _Target:
    name: str
    tensor: Tensor
    cuts: tuple[Cut, ...]


@dataclass(frozen=True, eq=False)
class _Piece:
    """A tensor with what it will hold."""

    tensor: Tensor
    data: Tensor
    grad: Tensor | None

    @staticmethod
    def of(target: _Target, scratch: Scratch) -> _Piece:
        grad = target.tensor.grad if target.tensor.is_leaf else None
        fits = grad is not None and grad.shape == target.tensor.shape
        return _Piece(
            target.tensor,
            cut_tensor(target.tensor, target.cuts, scratch),
            cut_tensor(grad, target.cuts, scratch) if grad is not None and fits else None,
        )

    def commit(self) -> None:
        set_tensor_data(self.tensor, self.data)
        if self.grad is not None:
            self.tensor.grad = self.grad


def _remember_tensor(tensor: Tensor) -> Callable[[], None]:
    data, grad = tensor.data, tensor.grad if tensor.is_leaf else None

    def undo() -> None:
        set_tensor_data(tensor, data)
        if grad is not None:
            tensor.grad = grad

    return undo


def _checked(
    model: nn.Module, modules: Mapping[str, nn.Module], plan: Plan, *, on_meta: bool = False
) -> list[_Target]:
    """Check everything, and give each tensor object once with its cuts."""
    if torch.is_inference_mode_enabled():
        raise PlanError(
            "a plan was applied under torch.inference_mode(), which leaves tensors that cannot be trained. "
            "Apply it outside; torch.no_grad() is fine"
        )
    tensors = _named_tensors(modules)
    if plan:
        for name, tensor in tensors.items():
            _check_kind(name, tensor, modules, on_meta=on_meta)
    _check_sizes(tensors, plan)
    targets = list(_targets(tensors, plan.by_tensor()))
    for rewrite in plan.rewrites:
        _check_rewrite(modules, rewrite)
    for patch in plan.patches:
        check_patch(model, patch)
    return targets


def _named_tensors(modules: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """Every parameter, then every buffer, under each of its names."""
    tables = [(f"{name}." if name else "", module) for name, module in modules.items()]
    found: dict[str, Tensor] = {}
    for kind in ("_parameters", "_buffers"):
        for prefix, module in tables:
            for key, tensor in getattr(module, kind).items():
                if tensor is not None:
                    found[prefix + key] = tensor
    return found


def _check_kind(name: str, tensor: Tensor, modules: Mapping[str, nn.Module], *, on_meta: bool) -> None:
    owner = modules.get(name.rpartition(".")[0])
    where = f"{name} ({type(owner).__name__})"
    if is_lazy(tensor):
        raise PlanError(f"{where}: not initialised yet; run the model once, then make and apply the plan")
    distributed: Any = sys.modules.get("torch.distributed.tensor")  # not imported: no tensor can be one
    if distributed is not None and isinstance(tensor, distributed.DTensor):
        raise PlanError(
            f"{where}: a DTensor, sharded over processes; apply the plan before sharding, or use DDP"
        )
    if tensor.is_meta and not on_meta:
        raise PlanError(
            f"{where}: on the meta device, without values; move the model with to_empty() and load it"
        )
    if tensor.is_inference():
        raise PlanError(f"{where}: made under torch.inference_mode(); build the model outside of it")


def _check_sizes(tensors: Mapping[str, Tensor], plan: Plan) -> None:
    for name, shape in plan.sizes:
        if name in tensors and tuple(tensors[name].shape) != tuple(shape):
            raise PlanError(
                f"{name}: the plan is for shape {tuple(shape)}, the model has {tuple(tensors[name].shape)}; "
                "make the plan for this model, or compose it with Plan.then"
            )


def _targets(tensors: Mapping[str, Tensor], table: Mapping[str, tuple[Cut, ...]]) -> Iterator[_Target]:
    seen: dict[int, _Target] = {}
    for name, cuts in table.items():
        if name not in tensors:
            raise PlanError(
                f"{name}: the model has no parameter or buffer of this name; plan and model differ"
            )
        for cut in cuts:
            _check_cut(tensors[name], cut)
        if len({cut.dim for cut in cuts}) != len(cuts):
            raise PlanError(f"{name}: one dimension is cut twice in one plan; compose plans with Plan.then")
        target = _Target(name, tensors[name], cuts)
        twin = seen.setdefault(id(target.tensor), target)
        if twin is target:
            yield target
        elif [_what(c) for c in twin.cuts] != [_what(c) for c in cuts]:
            raise PlanError(
                f"{name}: the same tensor as {twin.name}, but cut in another way; cut both alike or one"
            )


def _what(cut: Cut) -> tuple[int, int, tuple[int, ...], int]:
    return cut.dim, cut.rows, cut.keep, cut.size


def _check_cut(tensor: Tensor, cut: Cut) -> None:
    where = f"{cut.tensor} dim {cut.dim}"
    if not 0 <= cut.dim < tensor.dim():
        raise PlanError(f"{where}: the tensor has {tensor.dim()} dimensions; plan and model differ")
    if tensor.shape[cut.dim] != cut.size:
        raise PlanError(
            f"{where}: the plan cuts a dimension of size {cut.size}, the model has {tensor.shape[cut.dim]}; "
            "make the plan for this model, or compose it with Plan.then"
        )
    if cut.rows > 1 and (cut.dim == 0 or tensor.shape[0] % cut.rows):
        raise PlanError(
            f"{where}: {cut.rows} rows are blocks of dimension 0 with indices along another one; "
            f"the shape is {tuple(tensor.shape)}"
        )
    if cut.kept == 0:
        raise PlanError(f"{where}: nothing would be left of {cut.size}; keep at least one index")


def _check_rewrite(modules: Mapping[str, nn.Module], rewrite: Rewrite) -> None:
    where = f"rewrite of {rewrite.path} in {rewrite.module!r}"
    if rewrite.module not in modules:
        raise PlanError(f"{where}: the model has no such module; plan and model differ")
    now = get_path(modules[rewrite.module], rewrite.path)
    if isinstance(now, bool) or isinstance(rewrite.after, bool):
        raise PlanError(f"{where}: {now!r} -> {rewrite.after!r}, but no flag follows a size; leave it out")
    if now != rewrite.before:
        raise PlanError(
            f"{where}: the plan expects {rewrite.before!r}, the model has {now!r}; plan and model differ"
        )
