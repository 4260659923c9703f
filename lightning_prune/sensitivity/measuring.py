"""Measure a metric for one part of a network after the other, with the cut that a prune makes."""

from __future__ import annotations

import copy
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from lightning_prune.errors import OptionError
from lightning_prune.pruner import GroupNormPruner
from lightning_prune.randomness import randomness_kept
from lightning_prune.reporting.curves import layer_of
from lightning_prune.reporting.waiting import with_bar
from lightning_prune.sensitivity.curves import Sensitivity
from lightning_prune.sensitivity.parts import Part, cut_parts, parts_of
from lightning_prune.surgery.applying import apply

__all__ = ["RATIOS", "measure_sensitivity"]

RATIOS = (0.1, 0.25, 0.5, 0.75, 0.9)


def measure_sensitivity(
    model: nn.Module,
    example_inputs: Any,
    evaluate: Callable[[nn.Module], float],
    *,
    ratios: Sequence[float] = RATIOS,
    mode: Literal["max", "min"] = "max",
    file: str | os.PathLike[str] | None = None,
    **options: Any,
) -> Sensitivity:
    """Measure how a metric falls as each part of a network is pruned alone, without training.

    Every point is a copy of the network, cut by the plan that a prune of that part makes, and evaluated. A
    part is a group, or groups whose counts sizes in the code bind together.

    Args:
        model: The network; left as it is.
        example_inputs: As for ``GroupNormPruner``.
        evaluate: Network -> metric. It gets a copy that it may change; random states are put back after it.
        ratios: Shares of the units to remove, each in (0, 1).
        mode: ``max`` where a larger metric is better, ``min`` for a loss.
        file: JSON file that every new point is written to at once; what it holds already is not measured
            again, so a measurement that was stopped goes on.
        options: Of ``GroupNormPruner``: importance, ignored_layers, prune_num_heads ...

    Raises:
        OptionError: If an option is wrong, or the file is of another network or other options.

    >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)).requires_grad_(False)
    >>> found = measure_sensitivity(net, torch.ones(1, 4), lambda m: float(m[0].out_features), ratios=[0.5])
    >>> found.baseline, found.points
    (8.0, {'0.weight:0': {0.5: 4.0}})
    """
    if not ratios or not all(0 < ratio < 1 for ratio in ratios):
        raise OptionError(f"ratios must be shares in (0, 1), got {list(ratios)}")
    if mode not in ("max", "min"):
        raise OptionError(f"mode must be 'max' or 'min', got {mode!r}")
    pruner = GroupNormPruner(model, example_inputs, **options)
    parts, path = parts_of(pruner), None if file is None else Path(file)
    found = Sensitivity(_digest(model, parts, options), mode)
    if path is not None and path.exists():
        found = _continued(path, found)
    if found.baseline is None:
        found.baseline = _evaluated(evaluate, copy.deepcopy(model))
    todo = [(p, r) for p in parts for r in sorted(set(ratios)) if r not in found.points.get(p.name, {})]
    done = len(parts) * len(set(ratios)) - len(todo)
    for part, ratio in with_bar(todo, _described, done=done):
        smaller = copy.deepcopy(model)
        plan, _ = pruner.settle(partial(cut_parts, pruner, {part: ratio}))
        if plan:
            apply(smaller, plan)
        found.points.setdefault(part.name, {})[ratio] = _evaluated(evaluate, smaller)
        if path is not None:
            found.write(path)
    return found


def _described(point: tuple[Part, float]) -> str:
    part, ratio = point
    return f"{layer_of(part.name)} less {ratio:.0%}"


def _evaluated(evaluate: Callable[[nn.Module], float], model: nn.Module) -> float:
    with randomness_kept():
        return float(evaluate(model))


def _continued(path: Path, new: Sensitivity) -> Sensitivity:
    old = Sensitivity.read(path)
    if (old.of, old.mode) != (new.of, new.mode):
        raise OptionError(
            f"{path} holds the sensitivity of other weights, other options or another mode; name another "
            "file, or remove it"
        )
    return old


def _digest(model: nn.Module, parts: Iterable[Part], options: dict[str, Any]) -> str:
    total = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        if isinstance(tensor, torch.Tensor):
            total.update(
                name.encode()
                + tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
            )
    # Callables and modules have addresses in their names, which say nothing.
    plain = {
        key: value for key, value in options.items() if isinstance(value, (str, int, float, list, type(None)))
    }
    total.update(json.dumps([[p.name for p in parts], sorted(plain.items())], default=str).encode())
    return total.hexdigest()[:32]
