"""Calls as plain data: what the modules were called with, less the values, and back again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import Tensor

from lightning_prune.vetting import Part

__all__ = ["Call", "describe", "rebuild", "vet_calls"]

# Integers up to this count are kept as they are, for they may be token ids or edge lists; above, their
# range is.
_MAX_VALUES = 4096
# Elements of all tensors of one description together, a size of 0 counting as 1. Calls that have more are not
# described, so a file that asks for more was not written here: its few bytes could ask for any memory.
MAX_ELEMENTS = 2**28


@dataclass(frozen=True)
class Call:
    """One recorded call.

    Args:
        path: Submodule that was called, as in ``named_modules()``; "" is the pruned module itself.
        args: Positional arguments.
        kwargs: Keyword arguments.
    """

    path: str
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)


def describe(calls: list[Call]) -> list[Any] | None:
    """Write calls as plain lists, strings and numbers; None if one is of another kind, or too large."""
    try:
        spec = [[c.path, _describe(c.args), _describe(c.kwargs)] for c in calls]
    except (TypeError, RuntimeError):  # numbers of few bits, for which PyTorch has no operations
        return None
    return spec if sum(_elements(item) for item in spec) <= MAX_ELEMENTS else None


def rebuild(spec: list[Any], device: torch.device) -> list[Call]:
    """Make calls of the same structure, shapes and dtypes as ``describe`` saw.

    Floating-point values are drawn from a generator of their own, so that no random state moves.
    """
    generator = torch.Generator().manual_seed(0)
    return [
        Call(path, _rebuild(args, device, generator), _rebuild(kwargs, device, generator))
        for path, args, kwargs in spec
    ]


def vet_calls(spec: Part) -> None:
    """See that ``rebuild`` can make something of a description, and that ``describe`` could have written it.

    Raises:
        CheckpointMismatchError: If not; names the first thing wrong.
    """
    elements = 0
    for call in spec.items():
        path, args, kwargs = call.items(3)
        path.text()
        elements += _vet(args, "tuple") + _vet(kwargs, "dict")
        if elements > MAX_ELEMENTS:
            call.refuse(f"inputs of {MAX_ELEMENTS} elements at most")


_KINDS = ("tensor", "dict", "list", "tuple", "value")


def _describe(value: Any) -> Any:
    if isinstance(value, Tensor):
        return _describe_tensor(value)
    if isinstance(value, Mapping):
        return {"dict": [[str(key), _describe(item)] for key, item in value.items()]}
    if type(value) in (list, tuple):
        return {type(value).__name__: [_describe(item) for item in value]}
    if value is None or type(value) in (bool, int, float, str):
        return {"value": value}
    raise TypeError(f"{type(value).__name__} has no plain description")


def _describe_tensor(tensor: Tensor) -> dict[str, Any]:
    spec: dict[str, Any] = {"tensor": list(tensor.shape), "dtype": str(tensor.dtype).removeprefix("torch.")}
    if not (tensor.is_floating_point() or tensor.is_complex()):
        small = tensor.numel() <= _MAX_VALUES
        spec |= (
            {"values": tensor.flatten().tolist()}
            if small
            else {"range": [int(tensor.min()), int(tensor.max())]}
        )
    return spec


def _rebuild(spec: Any, device: torch.device, generator: torch.Generator) -> Any:
    if "tensor" in spec:
        return _rebuild_tensor(spec, generator).to(device)
    if "dict" in spec:
        return {key: _rebuild(item, device, generator) for key, item in spec["dict"]}
    for kind in (list, tuple):
        if kind.__name__ in spec:
            return kind(_rebuild(item, device, generator) for item in spec[kind.__name__])
    return spec["value"]


def _rebuild_tensor(spec: Mapping[str, Any], generator: torch.Generator) -> Tensor:
    dtype, shape = getattr(torch, spec["dtype"]), tuple(spec["tensor"])
    at = generator.device  # whatever the caller's default is
    if "values" in spec:
        return torch.tensor(spec["values"], dtype=dtype, device=at).reshape(shape)
    if "range" in spec:
        low, high = spec["range"]
        return torch.randint(low, high + 1, shape, generator=generator, device=at).to(dtype)
    kind = torch.complex64 if dtype.is_complex else None
    return torch.randn(shape, generator=generator, dtype=kind, device=at).to(dtype)


def _elements(spec: Any) -> int:
    """Count the elements of all tensors in a description."""
    if isinstance(spec, dict):
        return _size(spec["tensor"]) if "tensor" in spec else sum(_elements(v) for v in spec.values())
    return sum(_elements(item) for item in spec) if isinstance(spec, list) else 0


def _size(shape: list[int]) -> int:
    return prod(max(size, 1) for size in shape)


def _vet(spec: Part, *kinds: str) -> int:
    """See to one value, of any kind where none is named; count its elements."""
    table = spec.table()
    kind = next((k for k in kinds or _KINDS if k in table.value), None)
    if kind is None:
        spec.refuse(f"a table with one of {', '.join(kinds or _KINDS)}")
    if kind == "tensor":
        return _vet_tensor(spec)
    (content,) = spec.table(kind).parts()
    if kind == "value":
        content.plain()
        return 0
    if kind == "dict":
        pairs = [pair.items(2) for pair in content.items()]
        for key, _ in pairs:
            key.text()
        return sum(_vet(value) for _, value in pairs)
    return sum(_vet(item) for item in content.items())


def _vet_tensor(spec: Part) -> int:
    """See to the tensor of a description; count its elements."""
    spec.table("tensor", "dtype", optional=("values", "range"))
    shape = [size.whole(0, MAX_ELEMENTS) for size in spec["tensor"].items()]
    count = _size(shape)
    dtype = getattr(torch, spec["dtype"].text(), None)
    if not isinstance(dtype, torch.dtype):
        spec["dtype"].refuse("the name of a torch.dtype")
    if count > MAX_ELEMENTS:
        spec["tensor"].refuse(f"a shape of {MAX_ELEMENTS} elements at most")
    held = "range" if "range" in spec.value else "values"
    if dtype.is_floating_point or dtype.is_complex:
        spec.table("tensor", "dtype")
    else:
        spec.table("tensor", "dtype", held)
        are_truths = dtype == torch.bool and held == "values"
        items = spec[held].items()
        numbers = [each.truth() if are_truths else each.whole(-(2**63), 2**63 - 1) for each in items]
        if len(numbers) != (2 if held == "range" else prod(shape)):
            spec[held].refuse("two bounds" if held == "range" else f"the values of a shape {shape}")
        if held == "range" and not numbers[0] <= numbers[1] < 2**63 - 1:
            spec[held].refuse("a lower bound and an upper one")
        _try(spec, dtype, numbers)
    return count


def _try(spec: Part, dtype: torch.dtype, numbers: list[int]) -> None:
    try:
        torch.tensor(numbers, dtype=dtype)
    except (RuntimeError, TypeError, ValueError, OverflowError):
        spec.refuse(f"numbers that {dtype} holds")
