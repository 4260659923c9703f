"""Plain numbers in the calls of torch functions: where they stand, and how found ones give way to kept ones.

``head_dim ** -0.5`` is another number once head dims are gone. The pruned model has to compute with the one
that the dense model had. Python cannot be told so, for it computes the new number before anybody is asked;
but every number that matters ends as an argument of a torch function, and there it is replaced.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from types import BuiltinFunctionType, FunctionType, MethodDescriptorType, NoneType, WrapperDescriptorType
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from lightning_prune.errors import PlanError
from lightning_prune.plan import Scalar

__all__ = ["KeptNumbers", "Length", "Table", "computes", "entry", "leaves", "name_of", "replaced", "same"]

Number: TypeAlias = int | float
Arguments: TypeAlias = tuple[Any, ...]
Keywords: TypeAlias = dict[str, Any]
Table: TypeAlias = Mapping[str, Mapping[int, tuple[tuple[Number, Number], ...]]]
"""Operation -> number of the leaf -> pairs (found, kept)."""

TENSOR = "<tensor>"
_PLAIN = frozenset((bool, int, float, str, NoneType))
RELATIVE = 1e-9  # numbers nearer than this are one number, computed by two libraries
_ALIASES = {
    "multiply": "mul", "imul": "mul", "truediv": "div", "itruediv": "div", "idiv": "div", "divide": "div",
    "true_divide": "div", "iadd": "add", "isub": "sub", "subtract": "sub", "ipow": "pow", "mod": "remainder",
    "imod": "remainder", "floordiv": "floor_divide", "ifloordiv": "floor_divide", "rtruediv": "rdiv",
    "rfloordiv": "rfloor_divide", "rmod": "rremainder", "greater": "gt", "less": "lt", "greater_equal": "ge",
    "less_equal": "le", "not_equal": "ne",
}  # fmt: skip
_REVERSED = {f"r{name}": name for name in ("add", "sub", "mul", "div", "pow", "floor_divide", "remainder")}
# What computes with a whole number, so that a size given to it is a value and no longer a size.
ARITHMETIC = frozenset(_REVERSED.values()) | {
    "gt", "lt", "ge", "le", "eq", "ne", "fmod", "rsub", "clamp", "clamp_min", "clamp_max", "clip", "fill",
    "full", "full_like", "new_full", "tensor", "as_tensor", "scalar_tensor", "new_tensor", "addcmul",
    "addcdiv", "masked_fill", "where", "maximum", "minimum", "lerp",
}  # fmt: skip


class Length(int):
    """A tracked size in the place of a size: it follows, and equations see to it."""


def _names() -> dict[Any, str]:
    found: dict[Any, str] = {}
    kinds = (FunctionType, BuiltinFunctionType, MethodDescriptorType, NoneType, WrapperDescriptorType)
    classes = (torch._C.TensorBase, Tensor, torch._C._VariableFunctions)
    modules = (torch.functional, functional, torch.special, torch.linalg, operator)
    for owner in (*classes, *modules):
        for key in dir(owner):
            function = getattr(owner, key)
            if isinstance(function, kinds) and not hasattr(object, key):
                name = key.strip("_")
                found.setdefault(function, _ALIASES.get(name, name))
    return found


NAMES = _names()
FUNCTIONS: dict[str, tuple[Any, ...]] = {}  # torch.compile can look a function up by name, but no name by it
for _function, _name in NAMES.items():
    FUNCTIONS[_name] = (*FUNCTIONS.get(_name, ()), _function)


def name_of(function: Any) -> str:
    """Name of a torch function; methods, operators and in-place forms go by one.

    >>> name_of(Tensor.mul_), name_of(Tensor.__rmul__), name_of(torch.true_divide)
    ('mul', 'rmul', 'div')
    """
    known = NAMES.get(function)
    return known if known is not None else str(getattr(function, "__name__", function)).strip("_")


def call_of(
    function: Any, name: str, args: Arguments, kwargs: Keywords
) -> tuple[str, tuple[Any, ...], Keywords]:
    """Name, leaves and keywords of a call as if everything had been written out.

    ``2 - x`` is ``sub`` of 2 and x, also where torch is called the other way round. The default scale of
    attention is a number like any other.
    """
    if function is functional.scaled_dot_product_attention and kwargs.get("scale") is None:
        query = args[0] if args else kwargs["query"]
        kwargs = {**kwargs, "scale": 1.0 / math.sqrt(query.shape[-1])}
    if function is torch._assert:  # the message may speak of sizes; what is asserted holds or raises
        return name, leaves(name, args[:1], {}), kwargs
    found = leaves(name, args, kwargs)
    if name in _REVERSED and len(args) == 2 and not kwargs:
        return _REVERSED[name], found[::-1], kwargs
    return name, found, kwargs


def computes(name: str) -> bool:
    """Whether whole numbers given to a function are numbers to compute with."""
    return name in ARITHMETIC or name in _REVERSED


def leaves(name: str, args: Arguments, kwargs: Keywords) -> tuple[Any, ...]:
    """Everything in the arguments of a call but the contents of tensors, one by one.

    >>> leaves("sum", (torch.ones(2), (0, 1)), {"keepdim": True})
    ('<tensor>', (2,), 0, 1, 'keepdim', True)
    """
    found: list[Any] = []
    whole = computes(name)
    for value in args:
        _collect(value, whole, found)
    for key, value in kwargs.items():
        found.append(key)
        _collect(value, whole, found)
    return tuple(found)


def _collect(value: Any, whole: bool, found: list[Any]) -> None:
    if type(value) in _PLAIN:  # most are
        found.append(value)
    elif isinstance(value, Tensor):
        found.append(TENSOR)
    elif isinstance(value, (tuple, list)):
        found.append((len(value),))
        if all(isinstance(item, Tensor) for item in value):
            return
        for item in value:
            _collect(item, False, found)
    elif isinstance(value, slice):
        for item in (value.start, value.stop, value.step):
            _collect(item, False, found)
    elif isinstance(value, dict):
        found.append(tuple(str(key) for key in value))
        for item in value.values():
            _collect(item, False, found)
    else:
        found.append(_leaf(value, whole))


def _leaf(value: Any, whole: bool) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, int):
        return int.__int__(value) if whole else Length(int.__int__(value))
    return _described(value)


def _described(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return value.shape, hash(value.tobytes())
    is_plain = isinstance(value, (complex, torch.dtype, torch.device, torch.layout, torch.memory_format))
    return str(value) if is_plain else type(value).__name__


def replaced(
    name: str, args: Arguments, kwargs: Keywords, changes: Mapping[int, Any]
) -> tuple[Arguments, Keywords]:
    """Arguments with other numbers at some leaves; ``name`` is that of the function as it is called.

    >>> replaced("rmul", (3, 4.0), {}, {0: 5.0})
    ((3, 5.0), {})
    """
    if name in _REVERSED and len(args) == 2 and not kwargs:
        changes = {1 - index: number for index, number in changes.items()}
    at = [0]
    new_args = tuple([_rebuilt(value, at, changes) for value in args])
    new_kwargs = {}
    for key, value in kwargs.items():
        at[0] += 1
        new_kwargs[key] = _rebuilt(value, at, changes)
    return new_args, new_kwargs


def _rebuilt(value: Any, at: list[int], changes: Mapping[int, Any]) -> Any:
    if isinstance(value, (tuple, list)):
        at[0] += 1
        if all(isinstance(item, Tensor) for item in value):
            return value
        items = [_rebuilt(item, at, changes) for item in value]
        if hasattr(value, "_fields"):
            return type(value)(*items)
        return items if isinstance(value, list) else tuple(items)
    if isinstance(value, slice):
        start, stop, step = [_rebuilt(item, at, changes) for item in (value.start, value.stop, value.step)]
        return slice(start, stop, step)
    if isinstance(value, dict):
        at[0] += 1
        return {key: _rebuilt(item, at, changes) for key, item in value.items()}
    here = at[0]
    at[0] += 1
    return changes.get(here, value)


def is_number(value: Any) -> bool:
    """Plain numbers and truth values; no size."""
    return isinstance(value, (int, float)) and not isinstance(value, Length)


def same(a: Any, b: Any) -> bool:
    """One number, up to the last digits of a float; anything else must be equal.

    >>> same(0.5, 0.5 + 1e-12), same(2, 2.0), same(1, True), same("mean", "sum")
    (True, True, False, False)
    """
    if not is_number(a) or not is_number(b):
        return bool(a == b)
    if isinstance(a, bool) or isinstance(b, bool):
        return isinstance(a, bool) and isinstance(b, bool) and a == b
    if isinstance(a, int) and isinstance(b, int):
        return a == b
    return math.isclose(a, b, rel_tol=RELATIVE) or (math.isnan(a) and math.isnan(b))


def entry(name: str, index: int, found: Number, kept: Number) -> tuple[str, Scalar]:
    """One number as a patch holds it.

    >>> entry("mul", 1, 0.5, 0.25)
    ('mul 1 0.5', 0.25)
    """
    return f"{name} {index} {found!r}", kept


def table_of(values: Mapping[str, Scalar]) -> dict[str, dict[int, tuple[tuple[Number, Number], ...]]]:
    """Read what ``entry`` wrote.

    Raises:
        ValueError: If it is of another form.

    >>> table_of({"mul 1 0.5": 0.25, "mul 1 2": 2})
    {'mul': {1: ((0.5, 0.25), (2, 2))}}
    """
    table: dict[str, dict[int, tuple[tuple[Number, Number], ...]]] = {}
    for key, kept in values.items():
        name, index, text = key.split(" ")
        if not isinstance(kept, (int, float)):
            raise ValueError(f"{kept!r} is no number")
        places = table.setdefault(name, {})
        found = text == "True" if text in ("True", "False") else _read(text)
        places[int(index)] = (*places.get(int(index), ()), (found, kept))
    return table


def _read(text: str) -> Number:
    return int(text) if text.lstrip("-").isdigit() else float(text)


def substituted(table: Table, name: str, found: tuple[Any, ...]) -> dict[int, Any]:
    """Leaf -> kept number, for every number of a call that the table knows and replaces."""
    changes = {}
    for index, pairs in table.get(name, {}).items():
        if index < len(found):
            for number, kept in pairs:
                if same(_plain(found[index]), number) and not same(number, kept):
                    changes[index] = kept
    return changes


def _plain(value: Any) -> Any:
    return int.__int__(value) if isinstance(value, Length) else value


class KeptNumbers(TorchFunctionMode):
    """Give kept numbers to the calls that found others. A nested one is nearer to the call: it comes first.

    Pairs that are equal say what else was seen in that place. A number that is in no pair can be one that
    follows the inputs too; if a wanted one is missing then, ``close`` refuses.
    """

    def __init__(self, table: Table) -> None:
        super().__init__()
        self.table = table
        self.met: list[tuple[str, int, Number]] = []
        self.strange: list[tuple[str, int, Number]] = []

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        called = self._name_of(func)
        if _REVERSED.get(called, called) in self.table:
            name, found, kwargs = call_of(func, called, args, kwargs)
            changes = substituted(self.table, name, found)
            self._look(name, found, changes)
            args, kwargs = replaced(called, args, kwargs, changes)
        return func(*args, **kwargs)

    def _name_of(self, func: Any) -> str:
        if not torch.compiler.is_compiling():
            return NAMES.get(func, "")
        for name in (*self.table, *[f"r{name}" for name in self.table]):
            if func in FUNCTIONS.get(name, ()):
                return name
        return ""

    def _look(self, name: str, found: tuple[Any, ...], changes: Mapping[int, Any]) -> None:
        for index, pairs in self.table[name].items():
            if index < len(found) and is_number(found[index]):
                if index in changes:
                    self.met.append((name, index, found[index]))
                elif not any(same(found[index], number) for number, _ in pairs):
                    self.strange.append((name, index, found[index]))

    def close(self, where: str) -> None:
        """At the end of the forward.

        Raises:
            PlanError: If a number is missing and another one was met in its place.
        """
        for name, index, number in self.strange:
            for found, kept in self.table[name][index]:
                is_met = any((n, i) == (name, index) and same(m, found) for n, i, m in self.met)
                if not same(found, kept) and not is_met:
                    raise PlanError(
                        f"{where}: {name} was to compute with {kept} where the pruned model finds {found}, "
                        f"but it found {number}. The number follows the inputs as well as a size that was "
                        "cut. Compute it in __init__, or prune with these layers in ignored_layers"
                    )
