"""Attributes of modules that follow a size: read, set and undo paths; the declarative ones, per type."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, TypeAlias

from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from lightning_prune.errors import PlanError
from lightning_prune.plan import Plan, Rewrite, Scalar

__all__ = ["config_objects", "cosmetic_rewrites", "get_path", "remember", "set_path", "split_path"]

Token: TypeAlias = tuple[str, Any]  # ("attr", name) or ("item", key)
# No name with two leading underscores: a path may come from a file, and those lead to globals.
_PART = re.compile(
    r"\.?(?P<name>(?!__)[^\W\d]\w*)|\[(?P<index>-?\d+)\]|\[(?P<quote>['\"])(?P<key>.*?)(?P=quote)\]"
)


def get_path(root: object, path: str) -> Any:
    """Read a value by path.

    Args:
        root: Module that the path starts from.
        path: Attribute, with ``[i]`` or ``['key']`` for an item and ``.`` for a nested attribute.

    Raises:
        PlanError: If the path is malformed or leads nowhere.

    >>> get_path(nn.LayerNorm(8), "normalized_shape[0]")
    8
    """
    return _follow(root, _parse(path), path)


def set_path(root: object, path: str, value: Scalar) -> None:
    """Set a value by path.

    Tuples, lists and dicts are rebuilt as the same type (``torch.Size`` and named tuples included) and
    assigned to the attribute that holds them, so that other holders of the old container do not change.

    Args:
        root: Module that the path starts from.
        path: As in ``get_path``.
        value: New value; bools are refused, no flag follows a size.

    Raises:
        PlanError: If the path leads nowhere, meets a bool, or cannot be assigned.

    >>> norm = nn.LayerNorm((4, 8))
    >>> set_path(norm, "normalized_shape[1]", 6)
    >>> norm.normalized_shape
    (4, 6)
    """
    old = get_path(root, path)
    if isinstance(old, bool) or isinstance(value, bool):
        raise PlanError(f"{_where(root, path)}: cannot rewrite {old!r} to {value!r}; no flag follows a size")
    holder, name, items = _holder(root, path)
    try:
        setattr(holder, name, _rebuilt(getattr(holder, name), items, value))
    except (AttributeError, TypeError) as error:
        hint = f"cannot be set to {value!r}: {error}. Make it a plain attribute"
        raise PlanError(f"{_where(root, path)}: {hint}") from error


def remember(root: object, path: str) -> Callable[[], None]:
    """Give a function that puts back, as the same object, what the path's attribute holds now."""
    holder, name, _ = _holder(root, path)
    old, own = getattr(holder, name), name in getattr(holder, "__dict__", {})

    def undo() -> None:
        if getattr(holder, name) is old:  # nothing to do, and it may be a property that cannot be set
            return
        if own or name not in getattr(holder, "__dict__", {}):
            setattr(holder, name, old)
        else:
            delattr(holder, name)  # it came from the class, and does so again

    return undo


def split_path(path: str) -> list[str | int]:
    """Give the attributes, items and keys of a path.

    >>> split_path("config.sizes[1]")
    ['config', 'sizes', 1]
    """
    return [key for _, key in _parse(path)]


def config_objects(config: object, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (path, object) of a config and of those inside it, such as ``text_config``; paths end in a dot.

    >>> from types import SimpleNamespace
    >>> text = SimpleNamespace(width=2)
    >>> [where for where, _ in config_objects(SimpleNamespace(text_config=text, other=text))]
    ['', 'text_config.']
    """
    seen: set[int] = set()
    pending: list[tuple[str, Any]] = [(path, config)]
    while pending:
        where, one = pending.pop()
        if id(one) in seen or not hasattr(one, "__dict__") or isinstance(one, (nn.Module, type, Mapping)):
            continue
        seen.add(id(one))
        yield where, one
        pending += [(f"{where}{k}.", v) for k, v in vars(one).items() if k.endswith("config")]


@lru_cache(maxsize=4096)
def _parse(path: str) -> tuple[Token, ...]:
    tokens: list[Token] = []
    end = 0
    for part in _PART.finditer(path):
        if part.start() != end:
            break
        end = part.end()
        if part["name"] is not None:
            tokens.append(("attr", part["name"]))
        else:
            tokens.append(("item", int(part["index"]) if part["index"] is not None else part["key"]))
    if end != len(path) or not tokens or tokens[0][0] != "attr" or path.startswith("."):
        raise PlanError(f"{path!r} is no path; write an attribute: num_heads, shape[0], config.width")
    return tuple(tokens)


def _follow(root: object, tokens: tuple[Token, ...], path: str) -> Any:
    value: Any = root
    for kind, key in tokens:
        try:
            value = getattr(value, key) if kind == "attr" else value[key]
        except (AttributeError, LookupError, TypeError) as error:
            raise PlanError(f"{_where(root, path)}: not found ({error}); plan and model differ") from error
    return value


def _holder(root: object, path: str) -> tuple[Any, str, tuple[Token, ...]]:
    """Split a path into the object to assign to, its attribute, and the items below that."""
    tokens = _parse(path)
    last = max(i for i, (kind, _) in enumerate(tokens) if kind == "attr")
    _follow(root, tokens, path)
    return _follow(root, tokens[:last], path), tokens[last][1], tokens[last + 1 :]


def _rebuilt(container: Any, items: tuple[Token, ...], value: Scalar) -> Any:
    if not items:
        return value
    key = items[0][1]
    inner = _rebuilt(container[key], items[1:], value)
    if isinstance(container, tuple):
        values = list(container)
        values[key] = inner
        make = getattr(type(container), "_make", type(container))  # named tuples take their fields one by one
        return make(values)
    changed = copy.copy(container)
    changed[key] = inner
    return changed


def _where(root: object, path: str) -> str:
    return f"{type(root).__name__}.{path}"


@dataclass(frozen=True)
class _Before:
    """A module's own tensors, by local name, before or after the cut."""

    module: nn.Module
    shapes: Mapping[str, tuple[int, ...]]
    rewritten: Mapping[str, Scalar]

    def dim(self, tensor: str, dim: int) -> int | None:
        shape = self.shapes.get(tensor)
        return shape[dim] if shape is not None and -len(shape) <= dim < len(shape) else None

    def number(self, name: str, default: int) -> int:
        value = self.rewritten.get(name, getattr(self.module, name, default))
        return value if isinstance(value, int) else default


_Rule: TypeAlias = Callable[[_Before], int | None]


def _size(*places: tuple[str, int], times: str = "", over: int = 1) -> _Rule:
    """Size of the first tensor that is there, times an attribute (``groups``), over a number of gates."""

    def rule(view: _Before) -> int | None:
        found = next((n for n in (view.dim(*place) for place in places) if n is not None), None)
        factor = view.number(times, 1) if times else 1
        return None if found is None else found * factor // over

    return rule


def _recurrent(gates: int) -> dict[str, _Rule]:
    return {
        "input_size": _size(("weight_ih_l0", 1), ("weight_ih", 1)),
        "hidden_size": _size(("weight_ih_l0", 0), ("weight_ih", 0), over=gates),
        "proj_size": _size(("weight_hr_l0", 0)),
    }


_LINEAR = {"in_features": _size(("weight", 1)), "out_features": _size(("weight", 0))}
_CONV = {"in_channels": _size(("weight", 1), times="groups"), "out_channels": _size(("weight", 0))}
_NORM = {
    "num_features": _size(("weight", 0), ("running_mean", 0)),
    "num_channels": _size(("weight", 0)),
    **{f"normalized_shape[{i}]": _size(("weight", i)) for i in range(4)},
}
_EMBEDDING = {"num_embeddings": _size(("weight", 0)), "embedding_dim": _size(("weight", 1))}

# First match wins, subclasses included. A rule is believed only where it explains the present value.
_TABLE: tuple[tuple[type[nn.Module] | tuple[type[nn.Module], ...], dict[str, _Rule]], ...] = (
    (nn.Linear, _LINEAR),
    (
        nn.Bilinear,
        {
            "in1_features": _size(("weight", 1)),
            "in2_features": _size(("weight", 2)),
            "out_features": _size(("weight", 0)),
        },
    ),
    (
        _ConvTransposeNd,
        {"in_channels": _size(("weight", 0)), "out_channels": _size(("weight", 1), times="groups")},
    ),
    (_ConvNd, _CONV),
    ((_NormBase, nn.LayerNorm, nn.RMSNorm, nn.GroupNorm), _NORM),
    ((nn.Embedding, nn.EmbeddingBag), _EMBEDDING),
    (nn.PReLU, {"num_parameters": _size(("weight", 0))}),
    ((nn.LSTM, nn.LSTMCell), _recurrent(4)),
    ((nn.GRU, nn.GRUCell), _recurrent(3)),
    ((nn.RNN, nn.RNNCell), _recurrent(1)),
    (
        nn.MultiheadAttention,
        {
            "embed_dim": _size(("in_proj_weight", 1), ("q_proj_weight", 1)),
            "kdim": _size(("in_proj_weight", 1), ("k_proj_weight", 1)),
            "vdim": _size(("in_proj_weight", 1), ("v_proj_weight", 1)),
        },
    ),
)
# For modules that only resemble these: a hand-written norm with num_features, a LoRA layer with in_features.
_LOOKALIKE = {**_LINEAR, **_CONV, **_NORM, **_EMBEDDING}


def cosmetic_rewrites(model: nn.Module, plan: Plan) -> tuple[Rewrite, ...]:
    """List the declarative attributes that the plan's cuts make untrue: ``in_features``, ``num_features`` ...

    Attributes that the plan already rewrites are left to it; ``groups`` and the heads of an attention patch
    are read from it. An attribute that does not say today what the rule expects is left alone.

    Args:
        model: The model before the cut.
        plan: Cuts, and the rewrites and patches decided by the engine.

    Returns:
        Rewrites to add to the plan, in the order of ``model.named_modules()``.

    >>> from lightning_prune.plan import Cut
    >>> cosmetic_rewrites(nn.Linear(3, 4), Plan(cuts=(Cut("weight", 0, 4, (0, 2)),)))
    (Rewrite(module='', path='out_features', before=4, after=2),)
    """
    after = _shapes_after(model, plan)
    decided: dict[str, dict[str, Scalar]] = {}
    for rewrite in plan.rewrites:
        decided.setdefault(rewrite.module, {})[rewrite.path] = rewrite.after
    heads = {p.module: dict(p.values) for p in plan.patches if p.kind == "attention"}
    found: list[Rewrite] = []
    for name, module in model.named_modules():
        done = decided.get(name, {})
        found += [r for r in _of_module(name, module, after, done) if r.path not in done]
        found += [r for r in _of_heads(name, module, heads.get(name, {})) if r.path not in done]
    return tuple(found)


def _shapes_after(model: nn.Module, plan: Plan) -> dict[int, tuple[int, ...]]:
    """New shape per cut tensor, by identity: a tied tensor is cut under all its names."""
    tensors = {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }
    after: dict[int, tuple[int, ...]] = {}
    for name, cuts in plan.by_tensor().items():
        if name in tensors:
            kept = {cut.dim: cut.kept for cut in cuts}
            after[id(tensors[name])] = tuple(kept.get(d, n) for d, n in enumerate(tensors[name].shape))
    return after


def _of_module(
    name: str, module: nn.Module, after: Mapping[int, tuple[int, ...]], done: Mapping[str, Scalar]
) -> Iterator[Rewrite]:
    tables = (module._parameters, module._buffers)
    own = {key: t for table in tables for key, t in table.items() if t is not None}
    parametrized = getattr(module, "parametrizations", None)
    if isinstance(parametrized, nn.ModuleDict):  # the tensor is computed; its largest source has its shape
        for key, sources in parametrized.items():
            own[key] = max(sources.parameters(), key=lambda t: math.prod(t.shape))
    if not any(id(t) in after for t in own.values()):
        return
    now = _Before(module, {k: tuple(t.shape) for k, t in own.items()}, {})
    then = replace(now, shapes={k: after.get(id(t), tuple(t.shape)) for k, t in own.items()}, rewritten=done)
    rules = next((rules for types, rules in _TABLE if isinstance(module, types)), _LOOKALIKE)
    for path, rule in rules.items():
        yield from _changed(name, module, path, rule(now), rule(then))


def _of_heads(name: str, module: nn.Module, values: Mapping[str, Scalar]) -> Iterator[Rewrite]:
    for path in ("num_heads", "head_dim"):
        if path in values:
            yield from _changed(name, module, path, getattr(module, path, None), values[path])


def _changed(name: str, module: nn.Module, path: str, expected: Scalar, value: Scalar) -> Iterator[Rewrite]:
    try:
        before = get_path(module, path)
    except PlanError:
        return
    if isinstance(before, int) and not isinstance(before, bool) and before == expected and before != value:
        yield Rewrite(name, path, int(before), value)
