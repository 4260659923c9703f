"""A model built again from its config, with integers that remember: where every size came from.

Built on the meta device from a copy of the config whose integers are tracked. What the modules then hold, and
what their tensors were made of, are expressions of the config's integers.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lightning_prune.surgery.attributes import config_objects
from lightning_prune.surgery.tensors import tensors_of
from lightning_prune.tracing.integers import Expr, Recorder, Size, mentions


@dataclass(frozen=True)
class Origins:
    """Where the numbers of a model came from.

    Args:
        attributes: (module, path) -> (expression, value now) of what was copied or computed from the config.
        sizes: (tensor, dim) -> expression of the lengths that were.
        blurred: Integers of which something was computed that no expression tells, as in ``int(a / b)``.
    """

    attributes: Mapping[tuple[str, str], tuple[Expr, int]]
    sizes: Mapping[tuple[str, int], Expr]
    blurred: frozenset[int]


def integers_of(config: Any) -> dict[str, int]:
    """List the integers of a config by path, those in lists and in configs inside it included.

    >>> from types import SimpleNamespace
    >>> integers_of(SimpleNamespace(width=8, depths=[1, 2], text_config=SimpleNamespace(heads=4), on=True))
    {'width': 8, 'depths[0]': 1, 'depths[1]': 2, 'text_config.heads': 4}
    """
    found: dict[str, int] = {}
    for where, one in config_objects(config):
        for key, value in vars(one).items():
            if key.startswith("_"):
                continue
            items = enumerate(value) if isinstance(value, (tuple, list)) else [(None, value)]
            for index, item in items:
                if type(item) is int:
                    found[f"{where}{key}" if index is None else f"{where}{key}[{index}]"] = item
    return found


def with_integers(config: Any, values: Mapping[str, int]) -> Any:
    """Give a copy of a config with other integers, by path; nothing that watches its attributes is asked."""
    twin = copy.deepcopy(config)
    for where, one in config_objects(twin):
        for key, value in list(vars(one).items()):
            path = f"{where}{key}"
            if path in values:
                vars(one)[key] = values[path]
            elif type(value) in (tuple, list):
                vars(one)[key] = type(value)(values.get(f"{path}[{i}]", v) for i, v in enumerate(value))
    return twin


def built(module: nn.Module, config: Any, watching: Any = None) -> nn.Module | None:
    """The module built from a config, on the meta device; None where there is none, or no way to do so."""
    if config is None:
        return None
    with suppress(Exception), torch.device("meta"), torch.random.fork_rng(devices=[]):
        with watching or nullcontext():
            twin = type(module)(config)
        return twin if isinstance(twin, nn.Module) else None
    return None


def origins_of(module: nn.Module, config: Any, paths: list[str]) -> Origins | None:
    """Say where the numbers of a module came from; None where its class cannot be built from its config.

    Args:
        module: What was built from ``config``.
        config: Its config.
        paths: Integers to follow; number i is ``("attr", i)`` in the expressions.
    """
    now = integers_of(config)
    blurred: set[int] = set()
    recorder = Recorder(
        lambda expr, value: blurred.update(mentions(expr, "attr")),
        lambda left, right, value: None,
        lambda *asked: None,
    )
    tracked = {path: Size(now[path], ("attr", i), recorder) for i, path in enumerate(paths)}
    watching = _Making()
    twin = built(module, with_integers(config, tracked), watching)
    if twin is None:
        return None
    return Origins(dict(_attributes(module, twin)), dict(_sizes(twin, watching)), frozenset(blurred))


class _Making(TorchFunctionMode):
    """Notes which sizes tensors are made with."""

    def __init__(self) -> None:
        super().__init__()
        self._found: dict[
            int, tuple[Tensor, tuple[Any, ...]]
        ] = {}  # holds the tensors, so that ids stay theirs

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor):
            inputs = [self.sizes(x) for x in args if isinstance(x, Tensor) and x.shape == out.shape]
            sizes = next((known for known in inputs if known), None) or _sizes_in(args, kwargs or {})
            if len(sizes) == out.ndim and tuple(sizes) == tuple(out.shape):
                self._found.setdefault(out.untyped_storage()._cdata, (out, tuple(sizes)))
        return out

    def sizes(self, tensor: Tensor) -> tuple[Any, ...]:
        """What a tensor, or the one that it was made of, was made with."""
        made, sizes = self._found.get(tensor.untyped_storage()._cdata, (tensor, ()))
        return sizes if made.shape == tensor.shape else ()


def _sizes_in(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, ...]:
    """Shape among the arguments of a factory, ``(2, 3)`` or ``2, 3``; empty where no size is tracked."""
    first = next((v for v in (*args, kwargs.get("size")) if isinstance(v, (tuple, list))), None)
    sizes = tuple(first) if first is not None else tuple(a for a in args if isinstance(a, int))
    return sizes if any(isinstance(s, Size) for s in sizes) else ()


def _attributes(module: nn.Module, twin: nn.Module) -> Iterator[tuple[tuple[str, str], tuple[Expr, int]]]:
    mine = dict(module.named_modules())
    for name, other in twin.named_modules():
        if name not in mine:
            continue
        for key, value in vars(other).items():
            items = enumerate(value) if isinstance(value, (tuple, list)) else [(None, value)]
            for index, item in items:
                if isinstance(item, Size):
                    path = key if index is None else f"{key}[{index}]"
                    yield (name, path), (item.expr, int.__int__(item))


def _sizes(twin: nn.Module, making: _Making) -> Iterator[tuple[tuple[str, int], Expr]]:
    for name, tensor in tensors_of(twin).items():
        for dim, size in enumerate(making.sizes(tensor)):
            if isinstance(size, Size):
                yield (name, dim), size.expr
