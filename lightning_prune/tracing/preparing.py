"""The copy that will run: its indices get labels, its integers are tracked, its modules say when they run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from lightning_prune.surgery.tensors import tensors_of
from lightning_prune.tracing.integers import Size
from lightning_prune.tracing.labels import Label, Tags
from lightning_prune.tracing.tracer import Attribute, Tracer


def label_tensors(tracer: Tracer, model: nn.Module) -> None:
    """Give every index of every parameter and buffer an atom."""
    for name, tensor in tensors_of(model).items():
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
        for key, value in [(key, value) for key, value in vars(module).items() if key.endswith("config")]:
            is_config = hasattr(value, "__dict__") and id(value) not in seen
            if is_config and not isinstance(value, (nn.Module, type)):
                seen.add(id(value))
                _track(tracer, vars(value), name, f"{key}.")


_MAY_HOLD = frozenset((int, tuple, list))


def _track(tracer: Tracer, table: dict[str, Any], module: str, prefix: str) -> None:
    for key, value in [(key, value) for key, value in table.items() if type(value) in _MAY_HOLD]:
        if key.startswith("_") and not prefix:
            continue
        path = f"{prefix}{key}"
        if type(value) is int:
            table[key] = tracked(tracer, module, path, value)
        elif int in map(type, value):
            items = [
                tracked(tracer, module, f"{path}[{i}]", v) if type(v) is int else v
                for i, v in enumerate(value)
            ]
            table[key] = type(value)(items)


def tracked(tracer: Tracer, module: str, path: str, value: int) -> Size:
    """Note an integer of a module, and give one that remembers what is done with it."""
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
