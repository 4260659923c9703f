"""What the parameters of the traced copy are: shapes alone, the model's own memory, or a copy of it."""

from __future__ import annotations

import copy
import copyreg
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from enum import Enum
from functools import lru_cache
from types import BuiltinFunctionType, FunctionType, NoneType
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prune.errors import TraceError
from lightning_prune.tracing.meta import shape_of
from lightning_prune.tracing.operations import operation

__all__ = ["Borrowed", "Memory", "SharedWriteError", "copy_for_tracing", "ways_to_trace"]

# What gives the memory of a tensor to code that cannot be watched.
_LEAVES_TORCH = frozenset(("numpy", "array", "data_ptr", "dlpack"))


class Memory(Enum):
    """What the parameters of a traced copy are."""

    SHAPES = "no memory, on the meta device"
    SHARED = "the memory of the user's model"
    OWN = "a copy"


class SharedWriteError(Exception):
    """The forward would have read values that are not there, or written into the user's parameters."""


class Borrowed:
    """Watches over the memory that a traced copy does not have to itself.

    Args:
        model: The user's.
        memory: Of its parameters in the copy.

    Attributes:
        is_void: Whether the trace says nothing, whoever caught the error: a write was tried and refused, or
            there are only shapes and something failed.
    """

    def __init__(self, model: nn.Module | None = None, memory: Memory = Memory.OWN) -> None:
        is_shared = model is not None and memory is Memory.SHARED
        lent = [p for p in model.parameters() if _can_be_lent(p)] if model is not None and is_shared else []
        self._storages = {p.untyped_storage()._cdata for p in lent}
        self.memory = memory
        self.is_void = False

    def note_failure(self) -> None:
        """Something failed. It is the model's own affair, unless values are what was missing."""
        self.is_void |= self.memory is Memory.SHAPES

    def watch_function(self, name: str, args: Iterable[Any]) -> None:
        """Refuse to hand shared memory to code outside torch.

        Raises:
            SharedWriteError: If the function would.
        """
        if name in _LEAVES_TORCH:
            self._refuse(args)

    def watch_operation(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Refuse an operation that writes into shared memory; call this before it runs.

        Raises:
            SharedWriteError: If it does.
        """
        if self._storages:
            written = operation(func).written
            self._refuse(args[i] if i < len(args) else kwargs.get(name) for i, name in written)

    def _refuse(self, values: Iterable[Any]) -> None:
        for value in values:
            if isinstance(value, (list, tuple)):
                self._refuse(value)
            elif isinstance(value, Tensor) and self._holds(value):
                self.is_void = True
                raise SharedWriteError

    def _holds(self, tensor: Tensor) -> bool:
        if self.memory is Memory.SHAPES:
            return tensor.is_meta
        return tensor.layout == torch.strided and tensor.untyped_storage()._cdata in self._storages


def _can_be_lent(parameter: Any) -> bool:
    return type(parameter) is nn.Parameter and parameter.layout == torch.strided


def ways_to_trace(model: nn.Module, *, by_shapes: bool) -> tuple[Memory, ...]:
    """What to try, the cheapest first. Shapes do where all parameters are floats of one device."""
    parameters = list(model.parameters())
    do = by_shapes and len({p.device for p in parameters}) == 1 and not parameters[0].is_meta
    do = do and all(_can_be_lent(p) and p.is_floating_point() for p in parameters)
    return (*((Memory.SHAPES,) if do else ()), Memory.SHARED, Memory.OWN)


def copy_for_tracing(model: nn.Module, memory: Memory) -> nn.Module:
    """Deep copy in eval mode.

    Args:
        model: What is copied.
        memory: Of the parameters in the copy; they are tensors of their own.

    Raises:
        TraceError: If the model cannot be copied.
    """
    memo: dict[Any, Any] = {}
    if memory is not Memory.OWN:
        _lend(model, memory, memo)
    try:
        twin = _copied(model, memo)
    except Exception as error:
        raise TraceError(
            f"The model {type(model).__name__} was to be traced on a copy, but copy.deepcopy failed with "
            f"{type(error).__name__}: {error}. Detach stored tensors and drop handles that cannot be copied."
        ) from error
    return twin.eval()


def _lend(model: nn.Module, memory: Memory, memo: dict[Any, Any]) -> None:
    """Put parameters where deepcopy looks for what is copied already."""
    for module in model.modules():
        held = (*vars(module).values(), *module._parameters.values())
        for value in [value for value in held if type(value) is nn.Parameter]:
            if _can_be_lent(value):
                data = value.data if memory is Memory.SHARED else shape_of(value)
                memo[id(value)] = nn.Parameter(data, value.requires_grad)


_ATOMS = frozenset((NoneType, bool, int, float, complex, str, bytes, type, FunctionType, BuiltinFunctionType))


def _copied(module: nn.Module, memo: dict[Any, Any]) -> nn.Module:
    """Do as deepcopy does, which spends most of its time on attributes of which it makes no copy."""
    kind: Any = type(module)
    if id(module) in memo or not _is_plain(kind):
        return copy.deepcopy(module, memo)
    twin: nn.Module = kind.__new__(kind)
    memo[id(module)] = twin
    state = kind.__getstate__(module)
    kind.__setstate__(twin, {key: v if type(v) in _ATOMS else _value(v, memo) for key, v in state.items()})
    return twin


def _value(value: Any, memo: dict[Any, Any]) -> Any:
    kind = type(value)
    if kind in _ATOMS or (kind is tuple and _ATOMS.issuperset(map(type, value))):
        return value
    if isinstance(value, nn.Module):
        return _copied(value, memo)
    if kind is Tensor:
        return _cloned(value, memo)
    if kind in (dict, OrderedDict) and id(value) not in memo:
        table = memo[id(value)] = kind()
        for key, item in value.items():
            table[_value(key, memo)] = _value(item, memo)
        return table
    if kind in (list, set) and id(value) not in memo and _ATOMS.issuperset(map(type, value)):
        memo[id(value)] = kind(value)
        return memo[id(value)]
    return copy.deepcopy(value, memo)


def _cloned(tensor: Tensor, memo: dict[Any, Any]) -> Tensor:
    """Copy a tensor that fills its memory; what looks at the same memory will look at that of the copy."""
    is_simple = tensor.is_leaf and not tensor.requires_grad and not tensor.is_meta and not vars(tensor)
    if id(tensor) not in memo and is_simple and tensor.layout == torch.strided and tensor.is_contiguous():
        storage, seen = tensor.untyped_storage(), memo.setdefault("torch", {})
        if storage.nbytes() == tensor.nbytes and storage._cdata not in seen and not tensor.is_inference():
            twin = memo[id(tensor)] = tensor.clone()
            seen[storage._cdata] = twin.untyped_storage()
            return twin
    return copy.deepcopy(tensor, memo)


@lru_cache(maxsize=4096)
def _is_plain(cls: type) -> bool:
    """Whether a class leaves it to Python and ``nn.Module`` how it is copied."""
    hooks = ("__new__", "__reduce__", "__reduce_ex__", "__getnewargs__", "__getnewargs_ex__")
    return (
        all(getattr(cls, hook, None) is getattr(object, hook, None) for hook in hooks)
        and getattr(cls, "__getstate__", None) is getattr(nn.Module, "__getstate__", None)
        and not hasattr(cls, "__deepcopy__")
        and cls not in copyreg.dispatch_table
        and not any(vars(base).get("__slots__") for base in cls.__mro__)
    )
