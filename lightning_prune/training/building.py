"""What a callback's options make of a module: the part to prune, inputs to trace it with, a pruner for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from difflib import get_close_matches
from functools import partial
from typing import Any

from torch import nn

from lightning_prune.errors import OptionError
from lightning_prune.options import PruningOptions
from lightning_prune.pruner import GroupNormPruner
from lightning_prune.training.example_inputs import Call, Example

__all__ = ["build_pruner", "example_of", "has_module", "target_of"]


def has_module(root: nn.Module, module: str | None) -> bool:
    """Say whether there is a submodule of this name; None is the whole."""
    return module is None or any(name == module for name, _ in root.named_modules(remove_duplicate=False))


def target_of(root: nn.Module, module: str | None) -> nn.Module:
    """Give the submodule to prune; None is the whole.

    Raises:
        OptionError: If there is none of this name.
    """
    if not has_module(root, module):
        names = [name for name, _ in root.named_modules() if name]
        near = get_close_matches(str(module), names, n=5, cutoff=0.0)
        raise OptionError(
            f"module={module!r} names no submodule of {type(root).__name__}; the nearest are {near}"
        )
    return root.get_submodule(module or "")


def example_of(calls: list[Call], forward_fn: Callable[..., Any] | None) -> Example:
    """Make one example of the calls that a module received; ``forward_fn`` runs it if there is one."""
    if forward_fn is None:
        return Example.of(calls)
    first = calls[0]
    return Example(first.args[0] if len(first.args) == 1 else first.kwargs or first.args, forward_fn)


def build_pruner(
    target: nn.Module,
    example: Example,
    options: PruningOptions,
    *,
    pruning_ratio: float,
    iterative_steps: int,
    state: Mapping[str, Any] | None = None,
) -> GroupNormPruner:
    """Build the pruner of a callback.

    Args:
        target: What is pruned.
        example: Inputs, and how they are run.
        options: Every option that a pruner has beyond the ratio.
        pruning_ratio: In [0, 1).
        iterative_steps: >= 1.
        state: Where another pruner stopped; None for a new start.
    """
    given = {**options.as_keywords(), "forward_fn": example.forward_fn}
    build = GroupNormPruner if state is None else partial(GroupNormPruner.resume, state=state)
    return build(
        target, example.inputs, pruning_ratio=pruning_ratio, iterative_steps=iterative_steps, **given
    )
