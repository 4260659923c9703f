"""Operation -> rule: the table, the way a rule is written, and what happens without one.

A rule is one function ``rule(t, a, out)``: ``t`` the tracer, ``a`` the arguments by the names of the
operation's schema, ``out`` the result. It states what the operation does to labels with four verbs:

* ``t.put(out, Tags(dims, zero))`` labels the result,
* ``t.ledger.tie(a, b, why)`` says that two labels live or die together,
* ``t.freeze(label, text)`` says that a label stays, and why,
* ``t.expect(size, label, dim)`` says that a Python integer is the length of a labelled dimension.

An operation without a rule freezes every labelled input and is reported; it is never taken for pointwise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor

from lightning_prune.tracing.operations import operation
from lightning_prune.tracing.tracer import Tracer, Unknown

Arguments: TypeAlias = Mapping[str, Any]
Rule: TypeAlias = Callable[[Tracer, Arguments, Any], None]
FunctionRule: TypeAlias = Callable[..., Any]
F = TypeVar("F", bound=FunctionRule)

RULES: dict[str, Rule] = {}
FUNCTIONS: dict[Any, FunctionRule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register a rule for primitive operations, by their names in ``torch.ops.aten``."""

    def register(function: Rule) -> Rule:
        for name in names:
            if name in RULES:
                raise RuntimeError(f"duplicate rule for {name}")
            RULES[name] = function
        rule_for.cache_clear()
        return function

    return register


def function_rule(*functions: Any) -> Callable[[F], F]:
    """Register a rule for Python-visible functions: ``rule(t, func, *args, **kwargs) -> result``."""

    def register(function: F) -> F:
        for target in functions:
            if target in FUNCTIONS:
                raise RuntimeError(f"duplicate rule for {target}")
            FUNCTIONS[target] = function
        return function

    return register


def tensors_in(values: Iterable[Any]) -> list[Tensor]:
    """Tensors among arguments, also in lists."""
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found.extend(tensors_in(value))
    return found


@lru_cache(maxsize=4096)
def rule_for(func: Any) -> Rule | None:
    """Rule of an operation: by name, then by torch's own "pointwise" tag."""
    name = operation(func).name
    base = name if name.startswith("__") else name.removesuffix("_")
    for candidate in (name, base, base.removesuffix("_copy")):
        if candidate in RULES:
            return RULES[candidate]
    tags = list(func.tags)
    functional = getattr(torch.ops.aten, base, None)
    if functional is not None:
        tags += [tag for overload in functional.overloads() for tag in getattr(functional, overload).tags]
    return RULES["pointwise"] if torch.Tag.pointwise in tags else None


def follow(t: Tracer, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    """Apply the rule of an operation that has just run."""
    inputs = tensors_in((*args, *kwargs.values()))
    if all(t.tags(x).is_opaque for x in inputs):
        return
    found = rule_for(func)
    if found is None:
        unknown(t, inputs)
        return
    defaults = operation(func).defaults
    bound = dict(defaults)
    for (name, _), value in zip(defaults, args, strict=False):
        bound[name] = value
    bound.update(kwargs)
    bound["func"] = func
    found(t, bound, out)


def unknown(t: Tracer, inputs: Iterable[Tensor]) -> None:
    """No rule: everything that goes in stays, and the operation is reported."""
    t.unknown.append(Unknown(t.op, t.site()))
    for tensor in inputs:
        t.freeze_tensor(tensor, "no rule for this operation")
