"""Networks too big to hold: floats are mere shapes, on the meta device; integers and booleans have values.

Python asks for the values of integers and booleans (is anything masked? how long is this?), and never for
those of weights. So a network whose weights lie on the meta device is traced with the rest real.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import NoneType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_prune.errors import TraceError
from lightning_prune.tracing.operations import LIKE, operation

__all__ = ["ADVICE", "floats_on_meta", "run_without_floats", "without_floats"]

ADVICE = (
    "The weights are on the meta device, so numbers computed from them have no value. Give integer and "
    "boolean inputs with values, and build the model under lightning_prune.floats_on_meta(), which makes its "
    "integer buffers real; what Python decides by the value of a float needs a model with weights."
)
_META, _REAL = torch.device("meta"), torch.device("cpu")
# These read whole numbers as places, which may be real beside floats that are not.
_LOOKUPS = frozenset(
    ("index", "_unsafe_index", "index_put", "index_put_", "_index_put_impl_", "embedding", "index_select")
)
# What weights are made by. Ranges and numbers written in the code are small, and are looked at.
_PLAIN = frozenset((int, float, bool, str, NoneType, torch.dtype, torch.layout, torch.memory_format))
_TENSORS = frozenset((Tensor, nn.Parameter))
_BULK = frozenset(("empty", "empty_strided", "zeros", "ones", "full", "rand", "randn", "normal"))


class floats_on_meta(TorchDispatchMode):  # type: ignore[no-untyped-call]  # noqa: N801 - reads as a verb
    """Build a network without the memory of its weights: ``with floats_on_meta(): net = Net()``.

    Like ``with torch.device("meta")``, but integers, booleans, ranges and numbers written in the code have
    values, so that what a forward asks of them is known. For ``GroupNormPruner.step(dry_run=True)`` and
    ``foresee()``.

    >>> with floats_on_meta():
    ...     layer, places = torch.nn.Linear(4, 8), torch.arange(3)
    >>> layer.weight.device.type, places.tolist()
    ('meta', [0, 1, 2])
    """

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run one operation."""
        kwargs = kwargs or {}
        tensors = _tensors((*args, *kwargs.values()))
        if any(t.is_meta for t in tensors):
            return run_without_floats(func, args, kwargs)
        if not tensors and operation(func).name in _BULK:
            out = func(*args, **{**kwargs, "device": _META})
            if out.is_floating_point() or out.is_complex():
                return out
        return func(*args, **kwargs)


def run_without_floats(func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Run an operation so that its floats are shapes and its integers, where they can be, real.

    Raises:
        TraceError: If it writes numbers without values into a tensor that has some.
    """
    lie_on_meta = [t.is_meta for t in _tensors((*args, *kwargs.values()))]
    if any(lie_on_meta):
        name = operation(func).name
        is_lookup = name in _LOOKUPS
        if not all(lie_on_meta):
            _refuse_writing(func, args, kwargs)
        shaped = [_shaped(value, is_lookup) for value in args]
        out = func(*shaped, **{key: _shaped(value, is_lookup) for key, value in kwargs.items()})
        return func(*args, **{**kwargs, "device": _REAL}) if name in LIKE and _is_whole(out) else out
    device = kwargs.get("device")
    out = func(*args, **kwargs)
    if device is not None and torch.device(device) == _META and _is_whole(out):
        out = func(*args, **{**kwargs, "device": _REAL})
    return without_floats(out)


class Shapes:
    """Run operations by ``run_without_floats``, and find each result only once.

    What comes out of shapes depends on nothing but shapes, and the layers of a deep network are alike. Torch
    finds many results in Python, which takes longer than the arithmetic of a small layer.
    """

    def __init__(self) -> None:
        self._known: dict[Any, tuple[Any, ...]] = {}

    def __call__(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Run one operation."""
        facts = operation(func)
        if facts.changes_numbers and facts.is_alone and args[0].is_meta:
            return args[0]
        inputs = (*args, *kwargs.values())
        key = _key(inputs) if facts.makes_tensors or facts.changes_numbers else None
        if key is None:
            return run_without_floats(func, args, kwargs)
        key = (func, *kwargs, *key)
        known = self._known.get(key)
        if known is not None:
            return _made(known) if known else args[0]
        if not any(t.is_meta for t in _tensors(inputs)):  # it has values, and is not to be known
            return run_without_floats(func, args, kwargs)
        form = FORMS.get(facts.name)
        out = run_without_floats(func, args, kwargs) if form is None else form(args, kwargs)
        if facts.changes_numbers:
            self._known[key] = ()  # no form of its own
        else:
            made = (out,) if isinstance(out, Tensor) else out
            if all(isinstance(value, Tensor) for value in made):  # a gradient that nobody asked for is None
                self._known[key] = tuple(map(_form, made))
        return out

    def whole(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Run a function as Python calls it, which gives one tensor and writes into none.

        A result with a history is not to be known, for no form tells of that.
        """
        inputs = (*args, *kwargs.values())
        has_history = torch.is_grad_enabled() and any(t.requires_grad for t in _tensors(inputs))
        key = None if has_history else _key(inputs)
        if key is None:
            return func(*args, **kwargs)
        key = (func, *kwargs, *key)
        known = self._known.get(key)
        if known is not None:
            with torch._C._DisableTorchDispatch():
                return _made(known)
        out = func(*args, **kwargs)
        if out.is_meta and _memory(out) not in map(_memory, _tensors(inputs)):
            self._known[key] = (_form(out),)
        return out


def _memory(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _made(forms: tuple[Any, ...]) -> Any:
    made = [torch.empty_strided(*sizes, dtype=dtype, device=_META) for *sizes, dtype in forms]
    return tuple(made) if len(made) > 1 else made[0]


def _form(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.shape, tensor.stride(), tensor.dtype


def _batch_norm(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """The output is like the input; beside it stand the statistics of a batch that was learnt from."""
    learnt = args[0].shape[1:2] if args[5] else (0,)
    statistics = torch.empty(learnt, device=_META), torch.empty(learnt, device=_META)
    return torch.empty_like(args[0], device=_META), *statistics


# Torch has no meta function for these, and does all of their arithmetic on shapes.
FORMS = {"native_batch_norm": _batch_norm}


def _key(values: Sequence[Any]) -> tuple[Any, ...] | None:
    """All that a result can depend on; None if it could be something else."""
    key: list[Any] = []
    for value in values:
        kind = type(value)
        if kind in _TENSORS:
            is_meta = value.is_meta
            if not is_meta and value.ndim == 0:
                return None
            key.append((is_meta, value.shape, value.stride(), value.dtype))
        elif kind in _PLAIN:
            key.append((kind, value))
        elif kind in (list, tuple):
            inner = _key(value)
            if inner is None:
                return None
            key.append(inner)
        elif isinstance(value, int):  # that remembers where it came from
            key.append((int, int.__int__(value)))
        else:
            return None
    return tuple(key)


def shape_of(tensor: Tensor) -> Tensor:
    """Give a tensor of the same form without values."""
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=_META)


def without_floats(value: Any) -> Any:
    """Give nested values with floats as shapes on the meta device; single numbers stay."""
    if isinstance(value, Tensor):
        if value.is_meta or _is_whole(value) or value.ndim == 0:
            return value
        return shape_of(value)
    if isinstance(value, Mapping):
        return {k: without_floats(v) for k, v in value.items()}
    if type(value) in (list, tuple):
        return type(value)(without_floats(v) for v in value)
    return value


def _shaped(value: Any, is_lookup: bool) -> Any:
    if type(value) in _PLAIN:
        return value
    if isinstance(value, Tensor):
        if value.is_meta or (is_lookup and _is_whole(value)):
            return value
        return shape_of(value) if value.ndim else value.cpu()  # beside shapes a number may lie there alone
    if type(value) in (list, tuple):
        return type(value)(_shaped(v, is_lookup) for v in value)
    return _META if isinstance(value, torch.device) else value


def _refuse_writing(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    for i, name in operation(func).written:
        target = args[i] if i < len(args) else kwargs.get(name)
        if isinstance(target, Tensor) and not target.is_meta:
            raise TraceError(
                f"{operation(func).name} was to write numbers without values into a tensor of shape "
                f"{list(target.shape)} and type {target.dtype} that has values. {ADVICE}"
            )


def _is_whole(value: Any) -> bool:
    return isinstance(value, Tensor) and not (value.is_floating_point() or value.is_complex())


def _tensors(values: Any) -> list[Tensor]:
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found += _tensors(value)
    return found
