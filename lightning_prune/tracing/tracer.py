"""Run the model once under two interceptors and write down what it does to channels."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_prune.surgery.numbers import computes, name_of
from lightning_prune.tracing.borrowing import Borrowed
from lightning_prune.tracing.integers import Condition, Equation, Expr, Recorder, Size, mentions
from lightning_prune.tracing.labels import Ints, Label, Ledger, Site, Tags, opaque
from lightning_prune.tracing.meta import Shapes
from lightning_prune.tracing.numbers import Numbers, are_pieces, gives_data, is_read

TAGS = "_lightning_prune_tags"
_TORCH = str(Path(torch.__file__).parent)
_TENSOR = vars(torch._C.TensorBase)
SIZES = (_TENSOR["shape"].__get__, Tensor.size)  # reading a size does nothing
_PLACES = frozenset(
    (
        *(_TENSOR[name].__get__ for name in ("device", "is_cpu", "is_cuda", "is_meta", "is_mps", "is_xpu")),
        Tensor.get_device,
        torch.get_device,
    )
)
_HERE = str(Path(__file__).parent.parent)
_NETWORKS = str(Path(__file__).parent.parent / "models")  # those of the demo are models like any other


@dataclasses.dataclass(frozen=True)
class Attribute:
    """A tracked integer attribute: owner module, path within it, value."""

    module: str
    path: str
    value: int


@dataclasses.dataclass(frozen=True)
class Left:
    """A number was computed from a size; it is kept where it is used, or else the size stays."""

    module: str
    expr: Expr
    why: int


@dataclasses.dataclass(frozen=True)
class Work:
    """Multiply-accumulates of one contraction: ``constant`` times the kept counts of ``axes``."""

    constant: int
    axes: tuple[int, ...]
    module: str


@dataclasses.dataclass
class Unknown:
    """An operation without a rule, met by a labelled tensor."""

    op: str
    site: Site


class Tracer:
    """State of one trace. Rules receive it as their first argument."""

    def __init__(self, borrowed: Borrowed | None = None, numbers: Numbers | None = None) -> None:
        self.ledger = Ledger()
        self.numbers = Numbers() if numbers is None else numbers
        self.numbers.site = self.site
        self.attributes: list[Attribute] = []
        self.equations: list[Equation] = []
        self.conditions: dict[tuple[str, Expr, Expr, bool], Condition] = {}
        self.left: list[Left] = []
        self.work: list[Work] = []
        self.unknown: list[Unknown] = []
        self.leaves: dict[str, tuple[Label | None, ...]] = {}
        self.ragged: dict[str, Ints] = {}
        self.stated: dict[tuple[str, str], set[int | None]] = {}
        self.names: dict[int, str] = {}
        self.buffers: set[str] = set()
        self.touched: set[str] = set()
        self.whole: set[str] = set()
        self.modules: list[str] = [""]
        self.module_types: dict[str, str] = {}
        self.dirty: dict[int, torch.UntypedStorage] = {}
        self.inputs: set[tuple[str, int]] = set()
        self.paused = 0
        self.op = ""
        self.borrowed = borrowed or Borrowed()
        self.has_no_floats = False
        self.stand_in: Tensor | None = None  # asked in the place of floats without values where they are
        self.recorder = Recorder(self._on_value, self._on_equal, self._on_answer)
        self._site: Site | None = None
        self._lines: dict[tuple[CodeType, int], str] = {}

    # -- tensors -----------------------------------------------------------------------------------

    def tags(self, tensor: Tensor) -> Tags:
        """What is known of a tensor; unknown tensors are opaque."""
        found: Tags | None = tensor.__dict__.get(TAGS)
        if found is None or len(found.dims) != tensor.ndim:
            return opaque(tensor.ndim)
        name = self.names.get(id(tensor))
        if name is not None:
            self.touched.add(name)
            self.whole.add(name)
        if self.dirty and any(found.zero) and tensor.untyped_storage()._cdata in self.dirty:
            return dataclasses.replace(found, zero=(False,) * tensor.ndim)
        return found

    def soil(self, tensor: Tensor) -> None:
        """Removed positions of this memory, whoever looks at it, hold zeros no more."""
        storage = tensor.untyped_storage()
        self.dirty[storage._cdata] = storage  # held, for its address must not be given to another

    def put(self, tensor: Tensor, tags: Tags) -> None:
        """Say what is known of a tensor."""
        if tags.is_opaque:
            tensor.__dict__.pop(TAGS, None)
        else:
            tensor.__dict__[TAGS] = tags

    def why(self, text: str) -> int:
        """Reason number for the operation that runs now."""
        return self.ledger.why(self.site(), text)

    def freeze_tensor(self, tensor: Tensor, text: str) -> None:
        """Every labelled dimension of a tensor stays."""
        tags = self.tags(tensor)
        if not tags.is_opaque:
            why = self.why(text)
            for label in (*tags.dims, *tags.statistics):
                self.ledger.freeze(label, why)

    def freeze(self, label: Label | None, text: str) -> None:
        """A label stays."""
        if label is not None:
            self.ledger.freeze(label, self.why(text))

    # -- integers ----------------------------------------------------------------------------------

    def sized(self, tensor: Tensor, dim: int) -> int:
        """Length of a dimension, tracked where it is labelled."""
        label = self.tags(tensor).dims[dim] if tensor.ndim else None
        size = int(tensor.shape[dim])
        if label is None:
            return size
        return Size(size, ("axis", self.ledger.axis(label, dim)), self.recorder)

    def expect(self, size: Any, label: Label | None, dim: int) -> None:
        """A Python integer was used as the length of a dimension with this label."""
        if isinstance(size, Size):
            if label is None or not label.any():
                self.pin(size, "a size that is counted nowhere must not change")
            else:
                axis = self.ledger.axis(label, dim)
                if size.expr != ("axis", axis):
                    why = self.why("used as a size")
                    self.equations.append(Equation(size.expr, axis, int.__int__(size), why))
        elif label is not None:
            self.freeze(label, f"the literal size {size} is written in the code")

    def pin(self, size: Any, text: str) -> None:
        """The value of a tracked integer must not change."""
        if isinstance(size, Size):
            self._pin(size.expr, int.__int__(size), text)

    def _pin(self, expr: Expr, value: int, text: str) -> None:
        why = self.why(text)
        for axis in mentions(expr, "axis"):
            self.ledger.freeze(self.ledger.axes[axis].rows, why)
        if mentions(expr, "attr"):
            self.equations.append(Equation(expr, None, value, why))

    def _why_here(self, what: str, text: str) -> int:
        """Reason number for what Python does between two operations."""
        return self.ledger.why(Site(what, self.modules[-1], self._line()), text)

    def _on_value(self, expr: Expr, value: int) -> None:
        why = self._why_here("arithmetic", "a value is computed from this size")
        self.left.append(Left(self.modules[-1], expr, why))

    def _on_equal(self, left: Expr, right: Expr, value: int) -> None:
        if left != right:
            why = self.why("compared in the code")
            self.equations.append(Equation(("-", left, right), None, 0, why))

    def _on_answer(self, relation: str, left: Expr, right: Expr, answer: bool) -> None:
        key = (relation, left, right, answer)
        if key not in self.conditions:
            why = self._why_here("comparison", "the code decides by this size")
            self.conditions[key] = Condition(relation, left, right, answer, why)

    # -- where -------------------------------------------------------------------------------------

    def site(self) -> Site:
        """Where the running operation was called from."""
        if self._site is None:
            self._site = Site(self.op, self.modules[-1], self._line())
        return self._site

    def begin(self, op: str, site: Site | None = None) -> None:
        """A new operation starts; without a ``site`` it is where the model's code calls it."""
        self.op = op
        self._site = site

    def _line(self) -> str:
        frame: FrameType | None = sys._getframe(2)
        while frame is not None:
            code = frame.f_code
            if _is_of_a_network(code):
                key = (code, frame.f_lasti)
                if key not in self._lines:
                    self._lines[key] = f"{Path(code.co_filename).name}:{frame.f_lineno}"
                return self._lines[key]
            frame = frame.f_back
        return ""

    @contextmanager
    def silently(self) -> Iterator[None]:
        """Run operations without following them; the caller states the result's tags."""
        self.paused += 1
        try:
            yield
        finally:
            self.paused -= 1

    def count_work(self, constant: int, sizes: list[tuple[Label | None, int, int]]) -> None:
        """Note multiply-accumulates: (label, dim, length) per factor."""
        axes = []
        for label, dim, length in sizes:
            if label is None or not label.any():
                constant *= length
            else:
                axes.append(self.ledger.axis(label, dim))
        self.work.append(Work(constant, tuple(axes), self.modules[-1]))


@lru_cache(maxsize=4096)
def _is_of_a_network(code: CodeType) -> bool:
    name = code.co_filename
    return name.startswith(_NETWORKS) or not name.startswith((_TORCH, _HERE, "<"))


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


@lru_cache(maxsize=4096)
def _name(func: Any) -> str:
    return str(func._schema.name.removeprefix("aten::"))


def _run(func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    return func(*args, **kwargs)


class Operations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Inside: carries labels through primitive operations."""

    def __init__(self, tracer: Tracer, follow: Callable[..., None]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.tracer = tracer
        self.follow = follow
        self.run = Shapes() if tracer.has_no_floats else _run

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        self.tracer.borrowed.watch_operation(func, args, kwargs)
        out = self.run(func, args, kwargs)
        if not self.tracer.paused:
            self.tracer.begin(_name(func))
            self.follow(self.tracer, func, args, kwargs, out)
            if gives_data(func):
                self._note_lengths(out)
        return out

    def _note_lengths(self, out: Any) -> None:
        """How many elements were found decides how often a loop over them runs."""
        for tensor in (out,) if isinstance(out, Tensor) else out:
            dims = self.tracer.tags(tensor).dims
            lengths = [n for n, label in zip(tensor.shape, dims, strict=True) if label is None]
            self.tracer.numbers.read(self.tracer.op, lengths)


def label_tensors(tracer: Tracer, model: nn.Module) -> None:
    """Give every index of every parameter and buffer an atom."""
    everything = [*model.named_parameters(), *model.named_buffers()]
    for name, tensor in everything:
        is_parameter = isinstance(tensor, nn.Parameter)
        followed = is_parameter or tensor.is_floating_point() or tensor.dtype == torch.bool
        dims: list[Label | None] = []
        for d, size in enumerate(tensor.shape):
            shape = [1] * tensor.ndim
            shape[d] = size
            dims.append(tracer.ledger.new(shape) if size > 1 and followed else None)
        tracer.leaves[name] = tuple(dims)
        tracer.names[id(tensor)] = name
        tracer.buffers |= set() if is_parameter else {name}
        is_zero = is_parameter or (not tensor.is_meta and not bool(tensor.any()))
        tracer.put(tensor, Tags(tuple(dims), (is_zero,) * tensor.ndim))


def track_attributes(tracer: Tracer, model: nn.Module) -> None:
    """Replace integer attributes, also in tuples, lists and configs, by tracked ones."""
    seen: set[int] = set()
    for name, module in model.named_modules():
        tracer.module_types[name] = type(module).__name__
        _track(tracer, vars(module), name, "")
        for key, value in vars(module).items():
            is_config = key.endswith("config") and hasattr(value, "__dict__") and id(value) not in seen
            if is_config and not isinstance(value, (nn.Module, type)):
                seen.add(id(value))
                _track(tracer, vars(value), name, f"{key}.")


def _track(tracer: Tracer, table: dict[str, Any], module: str, prefix: str) -> None:
    for key, value in list(table.items()):
        if key.startswith("_") and not prefix:
            continue
        path = f"{prefix}{key}"
        if type(value) is int:
            table[key] = _tracked(tracer, module, path, value)
        elif type(value) in (tuple, list) and any(type(v) is int for v in value):
            items = [
                _tracked(tracer, module, f"{path}[{i}]", v) if type(v) is int else v
                for i, v in enumerate(value)
            ]
            table[key] = type(value)(items)


def _tracked(tracer: Tracer, module: str, path: str, value: int) -> Size:
    tracer.attributes.append(Attribute(module, path, value))
    return Size(value, ("attr", len(tracer.attributes) - 1), tracer.recorder)


def follow_modules(tracer: Tracer, model: nn.Module) -> None:
    """Keep the path of the running module at hand. The hooks live on the traced copy."""
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            continue
        module.register_forward_pre_hook(_enter(tracer, name))
        module.register_forward_hook(_leave(tracer), always_call=True)


def _enter(tracer: Tracer, name: str) -> Callable[..., None]:
    def hook(module: nn.Module, args: Any) -> None:
        tracer.modules.append(name)
        tracer.numbers.enter(name)

    return hook


def _leave(tracer: Tracer) -> Callable[..., None]:
    def hook(module: nn.Module, args: Any, output: Any) -> None:
        tracer.modules.pop()
        tracer.numbers.leave()

    return hook


def output_tensors(value: Any, seen: set[int] | None = None) -> list[Tensor]:
    """Every float tensor in an output: in lists, dicts and dataclasses; key/value caches excepted.

    >>> len(output_tensors({"a": torch.ones(2), "b": [torch.ones(1), 3]}))
    2
    """
    seen = set() if seen is None else seen
    if id(value) in seen:
        return []
    seen.add(id(value))
    if isinstance(value, Tensor):
        return [value] if value.is_floating_point() or value.is_complex() else []
    if isinstance(value, Mapping):
        items = [v for k, v in value.items() if k not in ("past_key_values", "mems", "cache_params")]
    elif isinstance(value, (list, tuple)):
        items = list(value)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        items = [getattr(value, f.name) for f in dataclasses.fields(value)]
    else:
        return []
    return [t for item in items for t in output_tensors(item, seen)]


def call(model: nn.Module, example_inputs: Any, forward_fn: Callable[..., Any] | None) -> Any:
    """Call the model the way its user would."""
    if forward_fn is not None:
        return forward_fn(model, example_inputs)
    if isinstance(example_inputs, Mapping):
        return model(**example_inputs)
    if isinstance(example_inputs, (tuple, list)):
        return model(*example_inputs)
    return model(example_inputs)
