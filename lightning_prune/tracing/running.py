"""How the model is called, and which tensors of its answer count as outputs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn


def output_tensors(value: Any, seen: set[int] | None = None) -> list[Tensor]:
    """Every float tensor in an output: in lists, dicts and dataclasses; key/value caches excepted.

    >>> import torch
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
