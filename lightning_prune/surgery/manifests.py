"""The plan of a pruned model, written into the config that the model saves itself with.

A Hugging Face model writes its config beside its weights, whatever that holds. So what is noted on a model
travels with ``model.save_pretrained``, as one line of JSON, the kept indices as bits.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import pairwise
from typing import Any

from torch import nn

from lightning_prune.plan import Cut, Plan, Rewrite, Scalar
from lightning_prune.surgery.attributes import config_objects, split_path

__all__ = ["KEY", "dense_config", "pack", "tell_configs", "unpack"]

KEY = "lightning_prune"


def pack(plan: Plan) -> str:
    """Give a plan as JSON, its kept indices as hexadecimal bits where they are in order.

    >>> pack(Plan((Cut("weight", 0, 8, (0, 1, 7)),), sizes=(("weight", (8,)),)))
    '{"format":1,"cuts":[["weight",0,8,"83",1]],"rewrites":[],"patches":[],"sizes":[["weight",[8]]]}'
    """
    cuts = [[c.tensor, c.dim, c.size, _bits(c), c.rows] for c in plan.cuts]
    return json.dumps({**plan.as_dict(), "cuts": cuts}, separators=(",", ":"))


def unpack(text: str) -> Plan:
    """Read what ``pack`` wrote.

    Raises:
        PlanError, LookupError, TypeError, ValueError: If it is no such thing.
    """
    data = json.loads(text)
    cuts = [
        [tensor, dim, size, _indices(keep, size, rows) if isinstance(keep, str) else keep, rows]
        for tensor, dim, size, keep, rows in data["cuts"]
    ]
    return Plan.from_dict({**data, "cuts": cuts})


def tell_configs(module: nn.Module, plan: Plan) -> None:
    """Write its part of ``plan`` into every config below ``module`` that is saved with its model.

    Args:
        module: What the plan's names are relative to.
        plan: Everything kept so far; an empty one takes the entry away.
    """
    for name, config in list(_saved_configs(module)):
        part = _below(plan, name)
        if part or KEY in vars(config):
            copies: dict[int, Any] = {}  # other models may hold the same object
            mine = copy.deepcopy(config, copies)
            for holder in module.modules():
                for key, value in list(vars(holder).items()):
                    if key.endswith("config") and id(value) in copies:
                        vars(holder)[key] = copies[id(value)]
            vars(mine).pop(KEY, None)
            if part:
                vars(mine)[KEY] = pack(part)


def dense_config(data: Mapping[str, Any], plan: Plan) -> dict[str, Any]:
    """Give a saved config as it was before the cut.

    Raises:
        ValueError: If it does not say what the plan left it with.
    """
    dense = copy.deepcopy(dict(data))
    dense.pop(KEY, None)
    for rewrite in plan.rewrites:
        root, *steps = split_path(rewrite.path)
        if rewrite.module == "" and root == "config" and steps:
            _put_back(dense, steps, rewrite)
    return dense


def _put_back(dense: dict[str, Any], steps: list[Any], rewrite: Rewrite) -> None:
    place: Any = dense
    for step in steps[:-1]:
        place = place.setdefault(step, {}) if isinstance(step, str) else place[step]
    last = steps[-1]
    says: Scalar = place.get(last, rewrite.after) if isinstance(last, str) else place[last]
    if says != rewrite.after:
        raise ValueError(f"config.json says {says!r} for {rewrite.path}, it was left with {rewrite.after!r}")
    place[last] = rewrite.before


def _saved_configs(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """Outermost configs that write themselves."""
    seen: set[int] = set()
    for name, owner in module.named_modules():
        config = vars(owner).get("config")
        if config is None or id(config) in seen or not hasattr(config, "__dict__"):
            continue
        seen |= {id(one) for _, one in config_objects(config)}
        if callable(getattr(config, "save_pretrained", None)):
            yield name, config


def _below(plan: Plan, name: str) -> Plan:
    """The part of a plan that concerns a submodule, in its own names."""
    if not name:
        return plan
    inside = f"{name}."

    def here(module: str) -> bool:
        return module == name or module.startswith(inside)

    return Plan(
        tuple(
            replace(c, tensor=c.tensor.removeprefix(inside)) for c in plan.cuts if c.tensor.startswith(inside)
        ),
        tuple(replace(r, module=_inner(r.module, name)) for r in plan.rewrites if here(r.module)),
        tuple(replace(p, module=_inner(p.module, name)) for p in plan.patches if here(p.module)),
        tuple((n.removeprefix(inside), shape) for n, shape in plan.sizes if n.startswith(inside)),
    )


def _inner(module: str, name: str) -> str:
    return "" if module == name else module.removeprefix(f"{name}.")


def _bits(cut: Cut) -> str | list[int]:
    flat = [row * cut.size + i for row, keep in enumerate(cut.by_row()) for i in keep]
    if any(b <= a for a, b in pairwise(flat)):
        return list(cut.keep)  # not in order: bits would lose it
    mask = bytearray((flat[-1] if flat else 0) // 8 + 1)
    for i in flat:
        mask[i // 8] |= 1 << i % 8
    return f"{int.from_bytes(mask, 'little'):x}"


def _indices(bits: str, size: int, rows: int) -> list[int]:
    if len(bits) > size * rows // 4 + 1:
        raise ValueError(f"{len(bits)} hexadecimal digits for {size * rows} positions")
    digits = bin(int(bits, 16))[:1:-1]
    return [i % size for i, digit in enumerate(digits) if digit == "1"]
