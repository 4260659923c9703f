"""Numbers that followed a size -> patches that keep them; what cannot be kept is named."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from lightning_prune.plan import Patch
from lightning_prune.surgery.numbers import entry, is_number, same, substituted, table_of
from lightning_prune.tracing.numbers import OUTSIDE, Call, Kept, Numbers

KIND = "numbers"


@dataclass
class _Place:
    """Pairs (found, kept) at one leaf of one operation, in and below one module."""

    kept: dict[Any, Any] = field(default_factory=dict)
    seen: list[Any] = field(default_factory=list)


def patches_for(numbers: Numbers) -> tuple[Patch, ...]:
    """Patches under which the pruned model computes with the numbers of the dense one.

    Args:
        numbers: Record of the pruned model, run without patches of this kind, against the dense one.
    """
    tables: dict[str, dict[tuple[str, int], _Place]] = {}
    for k in numbers.kept:
        if k.stack[-1] == OUTSIDE:
            continue
        place = tables.setdefault(k.stack[-1], {}).setdefault((k.name, k.leaf), _Place())
        place.kept.setdefault(k.found, k.kept)
    for visit, call, found in numbers.calls():
        for module in visit.stack:
            for (name, leaf), place in tables.get(module, {}).items():
                if name == call.name and leaf < len(found) and is_number(found[leaf]):
                    place.seen.append(found[leaf])
    return tuple(_patch(module, places) for module, places in tables.items())


def _patch(module: str, places: Mapping[tuple[str, int], _Place]) -> Patch:
    values: dict[str, Any] = {}
    for (name, leaf), place in places.items():
        for found, kept in place.kept.items():
            values.update([entry(name, leaf, found, kept)])
        for other in place.seen:
            if not any(same(other, found) for found in place.kept):
                values.update([entry(name, leaf, other, other)])
    return Patch(module, KIND, tuple(values.items()))


def unkept(numbers: Numbers, patches: Iterable[Patch]) -> list[tuple[str, str]]:
    """Calls that would not get the numbers of the record under these patches: (module, what and where).

    A patch knows a number by operation, place and value alone. So it can mistake another for it; and it does
    not reach what is computed outside of every module.
    """
    tables = {p.module: table_of(dict(p.values)) for p in patches if p.kind == KIND}
    sites = {(k.stack, k.name, k.leaf, k.found): k for k in numbers.kept}
    wrong: dict[tuple[str, str], None] = {}
    for visit, call, found in numbers.calls():
        if found is call.leaves and tables.keys().isdisjoint(visit.stack):
            continue
        now = found
        for module in reversed(visit.stack):
            changes = substituted(tables.get(module, {}), call.name, now)
            now = tuple(changes.get(i, leaf) for i, leaf in enumerate(now))
        for i, (got, wanted) in enumerate(zip(now, call.leaves, strict=True)):
            if not same(got, wanted):
                kept = sites.get((visit.stack, call.name, i, found[i]))
                wrong[visit.stack[-1], _told(call, i, found[i], got, kept)] = None
    return list(wrong)


def _told(call: Call, leaf: int, found: Any, got: Any, kept: Kept | None) -> str:
    if kept is None:
        return f"{call.name} computes with {found}, which cannot be told from a number that followed a size"
    if kept.stack[-1] == OUTSIDE:
        return f"{kept.kept} became {found} outside of every module: {kept.site}"
    return f"{kept.kept} became {found}, which is also met as another number there: {kept.site}"
