"""Replacements of how a module computes, for values that followed a size.

Two kinds: ``numbers`` keeps the numbers that a forward computes from sizes, the scale of attention above all;
``attention`` replaces the forward of ``nn.MultiheadAttention``, whose checks tie heads, head dims and width.
"""

from __future__ import annotations

import copyreg
import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, TypeAlias, cast

from torch import nn

from lightning_prune.errors import PlanError
from lightning_prune.plan import Patch, Scalar
from lightning_prune.surgery.attention import attention_forward
from lightning_prune.surgery.numbers import KeptNumbers, table_of

__all__ = [
    "check_patch",
    "install_patch",
    "installed_patches",
    "patch_values",
    "remember_patch",
    "remove_patches",
]

Values: TypeAlias = Mapping[str, Scalar]
Forward: TypeAlias = Callable[..., Any]
_VALUES = "_lightning_prune_patch"
_TABLE = "_lightning_prune_table"
_NESTED = "_lightning_prune_use_nested"
_NEW: Any = vars(copyreg)["__newobj__"]  # how object.__reduce_ex__ makes an instance
_CLASSES: dict[tuple[type[nn.Module], str], type[nn.Module]] = {}

# Why a subclass made on the fly, and not a callable set as the instance's `forward` or a pair of hooks: the
# method belongs to the class, so deepcopy, pickle (spawned workers), DataParallel replicas, torch.compile and
# torch.export meet an ordinary module whose `self` is always the right one, and no reference cycle keeps its
# memory alive. Hooks would leave the mode behind on Ctrl-C and are skipped by a direct call of `forward`. The
# values live on the instance as plain numbers; the state dict does not change.


def check_patch(model: nn.Module, patch: Patch) -> None:
    """See whether a patch fits, without changing anything.

    Raises:
        PlanError: If the kind or the module is unknown, a value is missing or of a wrong type, or the module
            already computes in a way of its own.
    """
    if patch.kind not in _KINDS:
        raise PlanError(
            f"{patch.module!r}: unknown kind of patch {patch.kind!r}; known are {', '.join(_KINDS)}"
        )
    module = _registered(model, patch.module)
    if module is None:
        raise PlanError(
            f"patch {patch.kind!r}: the model has no module {patch.module!r}; plan and model differ"
        )
    where = f"patch {patch.kind!r} of {patch.module!r} ({type(module).__name__})"
    if "forward" in vars(module):
        raise PlanError(
            f"{where}: its forward was replaced on the instance; undo that, or wrap it after pruning"
        )
    wrong = _KINDS[patch.kind].check(_base(type(module)), dict(patch.values))
    if wrong:
        raise PlanError(f"{where}: {wrong}")


def _registered(model: nn.Module, path: str) -> nn.Module | None:
    """Give a module by its name, found part by part: a plan has many patches."""
    module: nn.Module | None = model
    for part in path.split(".") if path else ():
        module = None if module is None else module._modules.get(part)
    return module


def install_patch(model: nn.Module, patch: Patch) -> None:
    """Install a patch, or put new values in the place of those that a patch of the module has.

    Args:
        model: Model that holds the module.
        patch: ``numbers`` with entries as ``numbers.entry`` writes them, or ``attention`` with ``num_heads``,
            ``head_dim``, ``v_head_dim`` (sizes after the cut) and ``scale``.

    Raises:
        PlanError: As ``check_patch``.
    """
    check_patch(model, patch)
    module = model.get_submodule(patch.module)
    setattr(module, _VALUES, dict(patch.values))
    setattr(module, _TABLE, table_of(dict(patch.values)) if patch.kind == "numbers" else None)
    if getattr(type(module), "_lightning_prune_kind", None) != patch.kind:
        module.__class__ = _patched_class(_base(type(module)), patch.kind)
    if patch.kind == "attention":
        # TransformerEncoderLayer's fused kernels read the weights past this forward; this switches them off.
        cast("nn.MultiheadAttention", module)._qkv_same_embed_dim = False
        for encoder in _encoders(model, patch.module):
            if not hasattr(encoder, _NESTED):
                setattr(encoder, _NESTED, encoder.use_nested_tensor)
            encoder.use_nested_tensor = False


def patch_values(module: nn.Module) -> dict[str, Scalar] | None:
    """Give the values of the patch that a module has, or None."""
    values = vars(module).get(_VALUES)
    return None if values is None else dict(values)


def installed_patches(model: nn.Module) -> tuple[Patch, ...]:
    """Give the patches that a model has, in the order of its modules."""
    return tuple(
        Patch(name, vars(type(module))["_lightning_prune_kind"], tuple(vars(module)[_VALUES].items()))
        for name, module in model.named_modules()
        if "_lightning_prune_kind" in vars(type(module))
    )


def remember_patch(model: nn.Module, patch: Patch) -> Callable[[], None]:
    """Give a function that puts back how the patch's module computes now."""
    touched = (model.get_submodule(patch.module), *_encoders(model, patch.module))
    kept = [(module, type(module), dict(vars(module))) for module in touched]

    def undo() -> None:
        for module, cls, before in kept:
            module.__class__ = cls
            for name in (_VALUES, _TABLE, _NESTED, "_qkv_same_embed_dim", "use_nested_tensor"):
                if name in before:
                    vars(module)[name] = before[name]
                else:
                    vars(module).pop(name, None)

    return undo


def remove_patches(model: nn.Module, kind: str | None = None) -> None:
    """Give patched modules, of one kind or all, back their own forward.

    Attention with heads cut does not run after that.
    """
    for module in model.modules():
        found = vars(type(module)).get("_lightning_prune_kind")
        if kind is not None and found != kind:
            continue
        if found is not None:
            module.__class__ = _base(type(module))
            delattr(module, _VALUES)
            delattr(module, _TABLE)
            if isinstance(module, nn.MultiheadAttention):
                module._qkv_same_embed_dim = module.in_proj_weight is not None
        if hasattr(module, _NESTED):
            module.use_nested_tensor = getattr(module, _NESTED)
            delattr(module, _NESTED)


def _is(value: Scalar, kind: type) -> bool:
    allowed = (int, float) if kind is float else (int,)
    return isinstance(value, allowed) and not isinstance(value, bool) and value > 0


def _base(cls: type[nn.Module]) -> type[nn.Module]:
    return cast("type[nn.Module]", vars(cls).get("_lightning_prune_base", cls))


def _encoders(model: nn.Module, name: str) -> Iterator[Any]:
    """Ancestors that may hand nested tensors, which only the fused kernels understand, to their layers."""
    parts = name.split(".")
    for depth in range(len(parts)):
        ancestor = model.get_submodule(".".join(parts[:depth]))
        if isinstance(ancestor, nn.TransformerEncoder):
            yield ancestor


def _patched_class(base: type[nn.Module], kind: str) -> type[nn.Module]:
    """Subclass of ``base`` that goes by its name, pickles as a reference to it, and has a new forward."""
    if (base, kind) in _CLASSES:
        return _CLASSES[base, kind]

    def reduce(self: nn.Module, protocol: Any) -> Any:
        recipe: Any = base.__reduce_ex__(self, max(protocol, 2))
        if recipe[0] is _NEW and recipe[1][0] is patched:
            return (_rebuild, (base, kind, *recipe[1][1:]), *recipe[2:])
        return recipe

    body = {
        "forward": _KINDS[kind].forward(base),
        "__reduce_ex__": reduce,
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
        "_lightning_prune_base": base,
        "_lightning_prune_kind": kind,
    }
    patched = _CLASSES[base, kind] = type(base.__name__, (base,), body)
    return patched


def _rebuild(base: type[nn.Module], kind: str, *arguments: Any) -> Any:
    cls = _patched_class(base, kind)
    return cls.__new__(cls, *arguments)


def _kept_forward(base: type[nn.Module]) -> Forward:
    @functools.wraps(base.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        mode = KeptNumbers(getattr(self, _TABLE))
        with mode:
            out = base.forward(self, *args, **kwargs)
        mode.close(base.__name__)
        return out

    return forward


def _attention_forward(base: type[nn.Module]) -> Forward:
    @functools.wraps(base.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        compute: Forward = attention_forward
        return compute(self, *args, **kwargs, **getattr(self, _VALUES))

    return forward


def _check_sizes(base: type[nn.Module], values: Values) -> str:
    if base.forward is not nn.MultiheadAttention.forward:
        return "only the forward of nn.MultiheadAttention can be replaced; keep its heads whole"
    kinds = {"num_heads": int, "head_dim": int, "v_head_dim": int, "scale": float}
    if set(values) != set(kinds) or not all(_is(values[k], kind) for k, kind in kinds.items()):
        wanted = ", ".join(f"{k}: {kind.__name__}" for k, kind in kinds.items())
        return f"needs the positive numbers {wanted}; got {dict(values)}"
    return ""


def _check_numbers(base: type[nn.Module], values: Values) -> str:
    if base.forward is nn.MultiheadAttention.forward:
        return "nn.MultiheadAttention hides its numbers; use a patch of kind 'attention'"
    try:
        table_of(values)
    except ValueError:
        return f"needs entries 'operation leaf number': number; got {dict(values)}"
    return ""


@dataclass(frozen=True)
class _Kind:
    """What is wrong with the values of a patch, "" for nothing, and the forward that it gives to a class."""

    check: Callable[[type[nn.Module], Values], str]
    forward: Callable[[type[nn.Module]], Forward]


_KINDS: Mapping[str, _Kind] = MappingProxyType(
    {
        "numbers": _Kind(_check_numbers, _kept_forward),
        "attention": _Kind(_check_sizes, _attention_forward),
    }
)
