"""Configs that a model was built from: which of their integers follow a cut, proved by building it again.

The model is built a second time on the meta device from a copy of its config whose integers are tracked.
What its modules then hold says which expression of the config every size came from. After a cut the
integers are solved from the new sizes; if the model built from the new config has exactly the shapes of the
pruned one, the config is rewritten, else it is left alone.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lightning_prune.plan import Cut, Rewrite
from lightning_prune.tracing.integers import Expr, Recorder, Size, evaluate, invert, mentions

Relation = tuple[Expr, int]


def owners(model: nn.Module) -> Iterator[tuple[str, nn.Module, Any]]:
    """Outermost modules that keep the config they were built from."""
    seen: set[int] = set()
    for name, module in model.named_modules():
        config = vars(module).get("config")
        if config is None or id(config) in seen or not hasattr(config, "__dict__"):
            continue
        seen.add(id(config))
        if not isinstance(config, (nn.Module, type, Mapping)):
            yield name, module, config


def config_rewrites(
    model: nn.Module, cuts: tuple[Cut, ...], rewrites: tuple[Rewrite, ...], used: frozenset[tuple[str, str]]
) -> tuple[tuple[Rewrite, ...], tuple[str, ...]]:
    """Rewrites that keep configs, and attributes that were copied from them, true.

    Args:
        model: The model before the cut.
        cuts: What is cut.
        rewrites: New values of the modules' own attributes, as far as sizes decide them.
        used: (module, path) of attributes that the forward uses; these are decided by ``rewrites`` alone.

    Returns:
        The rewrites, and a note for each config that has to be left.
    """
    found: list[Rewrite] = []
    notes: list[str] = []
    after = {(r.module, r.path): int(r.after) for r in rewrites if isinstance(r.after, int)}
    for name, module, config in owners(model):
        prefix = f"{name}." if name else ""
        here = tuple(c for c in cuts if c.tensor.startswith(prefix))
        if not here or any(module == name and path.startswith("config.") for module, path in after):
            continue
        solved = _Solved.of(module, config, prefix, here, after)
        if solved is None:
            notes.append(
                f"{prefix}config is left as it was: no values of its integers give the sizes that are kept"
            )
        else:
            if not solved.is_whole:
                notes.append(
                    f"{prefix}config gives the sizes that are kept, but not the scales or frequencies: "
                    "load the model through load_pruned_state or apply, not from the config alone"
                )
            found += [Rewrite(name, f"config.{k}", getattr(config, k), v) for k, v in solved.changed.items()]
            found += [
                r for r in solved.copies if (r.module, r.path) not in used and (r.module, r.path) not in after
            ]
    return tuple(found), tuple(notes)


@dataclass(frozen=True)
class _Solved:
    """New integers of a config, attributes that were copied from them, and whether they tell all.

    Args:
        changed: New values by name.
        copies: Rewrites of attributes.
        is_whole: False where building from the new config gives the sizes, but other numbers than are kept.
    """

    changed: dict[str, int]
    copies: tuple[Rewrite, ...]
    is_whole: bool

    @staticmethod
    def of(
        module: nn.Module,
        config: Any,
        prefix: str,
        cuts: tuple[Cut, ...],
        after: Mapping[tuple[str, str], int],
    ) -> _Solved | None:
        """Solve; None if the model built from the new config has other shapes than the pruned one."""
        keys = [k for k, v in vars(config).items() if type(v) is int and not k.startswith("_")]
        values = {i: int(getattr(config, k)) for i, k in enumerate(keys)}
        tracked = {k: Size(values[i], ("attr", i), SILENT) for i, k in enumerate(keys)}
        twin = _built(module, _with(config, tracked))
        if twin is None:
            return None
        relations = list(_relations(module, twin, prefix))
        _solve([(expr, after[place]) for place, expr, _ in relations if place in after], values)
        changed = {k: values[i] for i, k in enumerate(keys) if values[i] != getattr(config, k)}
        rebuilt = _built(module, _with(config, changed))
        if rebuilt is None or _shapes(rebuilt) != _shapes_after(module, prefix, cuts):
            return None
        copies = tuple(
            Rewrite(where, path, before, evaluate(expr, _no_axis, values))
            for (where, path), expr, before in relations
            if evaluate(expr, _no_axis, values) != before
        )
        return _Solved(changed, copies, not _computes_otherwise(module, rebuilt, prefix, cuts))


def _computes_otherwise(module: nn.Module, rebuilt: nn.Module, prefix: str, cuts: tuple[Cut, ...]) -> bool:
    """True if building from the new config would give other numbers than the pruned model keeps.

    A scale that followed the head dimension, or frequencies that are made anew, would load without an error
    and compute something else.
    """
    stored = set(module.state_dict(keep_vars=True))
    if any(c.tensor.removeprefix(prefix) not in stored for c in cuts):
        return True
    mine = dict(module.named_modules())
    for name, other in rebuilt.named_modules():
        kept = vars(mine[name]) if name in mine else {}
        if any(isinstance(v, float) and kept.get(k) != v for k, v in vars(other).items()):
            return True
    return False


def _solve(equations: list[Relation], values: dict[int, int]) -> None:
    """Solve for one integer after the other, the plain ones first."""
    known: set[int] = set()
    for expr, value in sorted(equations, key=lambda e: e[0][0] != "attr"):
        free = sorted(mentions(expr, "attr") - known)
        if not free:
            continue
        if evaluate(expr, _no_axis, values) != value:
            solved = invert(expr, value, _no_axis, values, free[0])
            if solved is None:
                continue
            values[free[0]] = solved
        known.add(free[0])


def _no_axis(axis: int) -> int:
    raise AssertionError(axis)


SILENT = Recorder(lambda expr, value: None, lambda left, right, value: None)


def _with(config: Any, values: Mapping[str, int]) -> Any:
    twin = copy.deepcopy(config)
    vars(twin).update(values)
    return twin


def _built(module: nn.Module, config: Any) -> nn.Module | None:
    """The module built from a config, on the meta device; None where its class cannot be built like that."""
    with suppress(Exception), torch.device("meta"), torch.random.fork_rng(devices=[]):
        twin = type(module)(config)
        return twin if isinstance(twin, nn.Module) else None
    return None


def _relations(
    module: nn.Module, twin: nn.Module, prefix: str
) -> Iterator[tuple[tuple[str, str], Expr, int]]:
    """((module, path), expression of the config, value now) of every attribute that came from the config."""
    mine = dict(module.named_modules())
    for name, other in twin.named_modules():
        if name not in mine:
            continue
        where = (prefix + name).rstrip(".")
        for key, value in vars(other).items():
            items = list(enumerate(value)) if isinstance(value, (tuple, list)) else [(None, value)]
            for index, item in items:
                if isinstance(item, Size):
                    path = key if index is None else f"{key}[{index}]"
                    yield (where, path), item.expr, int.__int__(item)


def _shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(int(n) for n in p.shape) for name, p in module.named_parameters()}


def _shapes_after(module: nn.Module, prefix: str, cuts: tuple[Cut, ...]) -> dict[str, tuple[int, ...]]:
    shapes = {name: list(shape) for name, shape in _shapes(module).items()}
    for cut in cuts:
        name = cut.tensor.removeprefix(prefix)
        if name in shapes:
            shapes[name][cut.dim] = cut.kept
    return {name: tuple(shape) for name, shape in shapes.items()}
