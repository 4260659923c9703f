"""What stands between the code of a model and torch in a trace: around functions, inside operations."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_prune.surgery.numbers import computes, name_of
from lightning_prune.tracing.integers import Size
from lightning_prune.tracing.numbers import are_pieces, is_read
from lightning_prune.tracing.operations import operation
from lightning_prune.tracing.tracer import Tracer

_TENSOR = vars(torch._C.TensorBase)
SIZES = (_TENSOR["shape"].__get__, Tensor.size)  # reading a size does nothing
_PLACES = frozenset(
    (
        *(_TENSOR[name].__get__ for name in ("device", "is_cpu", "is_cuda", "is_meta", "is_mps", "is_xpu")),
        Tensor.get_device,
        torch.get_device,
    )
)


class Functions(TorchFunctionMode):
    """Outside: follows python integers and composite functions."""

    def __init__(self, tracer: Tracer, rules: Mapping[Any, Callable[..., Any]]) -> None:
        super().__init__()
        self.tracer = tracer
        self.rules = rules

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        try:
            return self._follow(func, args, kwargs or {})
        except Exception:
            self.tracer.borrowed.note_failure()
            raise

    def _follow(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        tracer = self.tracer
        if tracer.paused:  # a layer with a rule of the user's: its sizes are not followed, its numbers are
            args, kwargs = tracer.numbers.meet(func, args, kwargs, plain_sizes=True)
            return self._run(func, args, kwargs)
        tracer.begin(getattr(func, "__name__", str(func)))
        tracer.borrowed.watch_function(tracer.op.strip("_"), args)
        if func not in SIZES:
            args, kwargs = tracer.numbers.meet(func, args, kwargs)
        rule = self.rules.get(func)
        if rule is not None:
            out = rule(tracer, func, *args, **kwargs)
        else:
            out = self._run(func, args, kwargs)
            self._pin_sizes(func, args, kwargs)
        if func not in SIZES and is_read(out):
            tracer.numbers.read(tracer.op, out)
        elif are_pieces(out):
            tracer.numbers.give(tracer.op, len(out))
        return out

    def _run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Floats without values say that they are where the model is, so that its code goes the same way."""
        if func in _PLACES and self.tracer.stand_in is not None and args[0].is_meta:
            return func(self.tracer.stand_in)
        return func(*args, **kwargs)

    def _pin_sizes(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A function without a rule was given a size, and not as a number to compute with."""
        is_number = computes(name_of(func))
        for value in (*args, *kwargs.values()):
            is_list = isinstance(value, (tuple, list))
            for item in value if is_list else (value,):
                if type(item) is Size and (is_list or not is_number):
                    self.tracer.begin(getattr(func, "__name__", str(func)))
                    self.tracer.pin(item, "an argument that is not a size must not change")


def _run(func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    return func(*args, **kwargs)


class Operations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Inside: carries labels through primitive operations."""

    def __init__(self, tracer: Tracer, follow: Callable[..., None]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.tracer = tracer
        self.follow = follow
        self.run = tracer.shapes or _run

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        self.tracer.borrowed.watch_operation(func, args, kwargs)
        out = self.run(func, args, kwargs)
        if not self.tracer.paused:
            facts = operation(func)
            self.tracer.begin(facts.name)
            self.follow(self.tracer, func, args, kwargs, out)
            if facts.gives_data:
                self._note_lengths(out)
        return out

    def _note_lengths(self, out: Any) -> None:
        """How many elements were found decides how often a loop over them runs."""
        for tensor in (out,) if isinstance(out, Tensor) else out:
            dims = self.tracer.tags(tensor).dims
            lengths = [n for n, label in zip(tensor.shape, dims, strict=True) if label is None]
            self.tracer.numbers.read(self.tracer.op, lengths)
