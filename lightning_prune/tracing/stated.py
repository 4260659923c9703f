"""Attributes that state a width for others to read, which no forward reads: seen where that width passes.

Nothing in the code that runs says what such an attribute speaks of. There are conventions that do, and what
they name is watched while the model runs: ``num_features`` is the width of what ``forward_features`` gives,
``head_hidden_size`` that of what goes into ``get_classifier()``, and an entry of ``feature_info`` names the
submodule whose channels it counts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from inspect import isfunction
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prune.tracing.tracer import Tracer


def watch_stated_widths(t: Tracer, model: nn.Module) -> None:
    """Note on the traced copy which axes stated widths are the length of."""
    for name, module in model.named_modules():
        _watch_features(t, name, module)
        _watch_classifier(t, name, module)
        for path, info in _feature_infos(module):
            _watch_info(t, name, path, module, info)


def _watch_features(t: Tracer, name: str, module: Any) -> None:
    width = vars(module).get("num_features")
    forward = getattr(type(module), "forward_features", None)
    if not isinstance(width, int) or not isfunction(forward) or "forward_features" in vars(module):
        return

    def run(*args: Any, **kwargs: Any) -> Any:
        out = forward(module, *args, **kwargs)
        _note(t, (name, "num_features"), out, width)
        return out

    module.forward_features = run


def _watch_classifier(t: Tracer, name: str, module: Any) -> None:
    width = vars(module).get("head_hidden_size")
    if not isinstance(width, int) or not callable(getattr(module, "get_classifier", None)):
        return
    classifier = None
    with suppress(Exception):  # a method of somebody's own that only has the same name
        classifier = module.get_classifier()
    if isinstance(classifier, nn.Module):
        classifier.register_forward_pre_hook(_before(t, (name, "head_hidden_size"), width))


def _feature_infos(module: Any) -> Iterator[tuple[str, Mapping[str, Any]]]:
    infos = vars(module).get("feature_info")
    for i, info in enumerate(infos if isinstance(infos, (list, tuple)) else ()):
        if isinstance(info, dict) and isinstance(info.get("num_chs"), int) and info.get("module"):
            yield f"feature_info[{i}]['num_chs']", info


def _watch_info(t: Tracer, name: str, path: str, module: nn.Module, info: Mapping[str, Any]) -> None:
    try:
        source = module.get_submodule(info["module"])
    except AttributeError:
        return
    if info.get("hook_type") == "forward_pre":
        source.register_forward_pre_hook(_before(t, (name, path), info["num_chs"]))
    else:
        source.register_forward_hook(_behind(t, (name, path), info["num_chs"]))


def _before(t: Tracer, place: tuple[str, str], width: int) -> Callable[..., None]:
    def hook(module: nn.Module, args: Any) -> None:
        _note(t, place, args[0] if args else None, width)

    return hook


def _behind(t: Tracer, place: tuple[str, str], width: int) -> Callable[..., None]:
    def hook(module: nn.Module, args: Any, output: Any) -> None:
        _note(t, place, output, width)

    return hook


def _note(t: Tracer, place: tuple[str, str], value: Any, width: int) -> None:
    """Remember the one dimension that has this length; with none or several nothing is known."""
    if isinstance(value, (tuple, list)) and value:
        value = value[0]
    if not isinstance(value, Tensor):
        return
    with torch._C.DisableTorchFunction():
        dims = [d for d, n in enumerate(value.shape) if n == int.__int__(width)]
        if len(dims) == 1:
            label = t.tags(value).dims[dims[0]]
            axis = None if label is None or not label.any() else t.ledger.axis(label, dims[0])
            t.stated.setdefault(place, set()).add(axis)
