"""Kept units -> Plan: indices per tensor, attribute rewrites, patches."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from torch import nn

from lightning_prune.graph.configs import config_rewrites
from lightning_prune.graph.equations import Constraints
from lightning_prune.graph.groups import Graph, Member, Place
from lightning_prune.graph.widths import stated_widths
from lightning_prune.plan import Cut, Patch, Plan, Rewrite
from lightning_prune.surgery.attributes import cosmetic_rewrites
from lightning_prune.surgery.tensors import tensors_of
from lightning_prune.tracing.integers import mentions
from lightning_prune.tracing.layers import ATTENTION, attention_values

Bools = npt.NDArray[np.bool_]


def make_plan(
    model: nn.Module,
    graph: Graph,
    constraints: Constraints,
    keep: Bools,
    patched: frozenset[str] = frozenset(),
) -> tuple[Plan, tuple[str, ...]]:
    """Write down what is kept.

    Args:
        model: The model as it is, for shapes and declarative attributes.
        graph: Its graph.
        constraints: Its constraints.
        keep: [n_units] True for units that stay.
        patched: Modules that will compute in another way, as far as the plan itself does not say so.

    Returns:
        The plan, and what is to be said about configs.
    """
    if keep.all():
        return Plan(), ()
    alive = graph.alive_classes(keep)
    known: dict[int, Cut | None] = {}
    cuts = tuple(cut for place in graph.places if (cut := _cut(place, alive, known)) is not None)
    tensors = tensors_of(model)
    sizes = tuple(sorted((name, tuple(tensors[name].shape)) for name in {c.tensor for c in cuts}))
    values = constraints.attributes(alive)
    plan = Plan(
        cuts=cuts,
        rewrites=_rewrites(graph, values),
        patches=_attention_patches(model, graph, values, cuts),
        sizes=sizes,
    )
    cosmetic = {(r.module, r.path): r for r in cosmetic_rewrites(model, plan)}
    cosmetic.update({(r.module, r.path): r for r in plan.rewrites})
    rewrites = tuple(cosmetic.values())
    attributes = graph.tracer.attributes
    used = frozenset(
        (attributes[i].module, attributes[i].path)
        for e in graph.tracer.equations
        for i in mentions(e.expr, "attr")
    )
    patched |= {p.module for p in plan.patches}
    of_configs, notes = config_rewrites(model, plan.cuts, rewrites, used, patched)
    decided = frozenset((r.module, r.path) for r in rewrites + of_configs)
    stated, doubts = stated_widths(model, plan.cuts, _seen_widths(graph, constraints, alive), used | decided)
    return Plan(plan.cuts, rewrites + of_configs + stated, plan.patches, plan.sizes), notes + doubts


def _seen_widths(graph: Graph, constraints: Constraints, alive: Bools) -> dict[tuple[str, str], int | None]:
    """Widths that stated attributes were seen to speak of, after the cut; None = it stays."""
    count = constraints.counts(alive)
    seen: dict[tuple[str, str], int | None] = {}
    for place, axes in graph.tracer.stated.items():
        if len(widths := {None if axis is None else count(axis) for axis in axes}) == 1:
            seen[place] = widths.pop()
    return seen


def _cut(place: Place, alive: Bools, known: dict[int, Cut | None]) -> Cut | None:
    """What is kept of a place; ``known`` holds the cuts of columns that were met before."""
    if place.column not in known:
        kept, (rows, size) = alive[place.classes], place.classes.shape
        keep = tuple((np.flatnonzero(kept) % size).tolist())  # row after row
        known[place.column] = (
            Cut(place.tensor, place.dim, size, keep, rows) if len(keep) < kept.size else None
        )
    cut = known[place.column]
    return None if cut is None else cut.elsewhere(place.tensor, place.dim)


def _rewrites(graph: Graph, values: dict[int, int]) -> tuple[Rewrite, ...]:
    return tuple(
        Rewrite(a.module, a.path, a.value, values[i])
        for i, a in enumerate(graph.tracer.attributes)
        if values[i] != a.value and not a.path.startswith(ATTENTION)
    )


def _attention_patches(
    model: nn.Module, graph: Graph, values: dict[int, int], cuts: tuple[Cut, ...]
) -> tuple[Patch, ...]:
    """MultiheadAttention checks its sizes against each other; once one is cut it computes our way."""
    wanted: dict[str, dict[str, int]] = {}
    for i, a in enumerate(graph.tracer.attributes):
        if a.path.startswith(ATTENTION):
            wanted.setdefault(a.module, {})[a.path.removeprefix(f"{ATTENTION}.")] = values[i]
    cut_modules = {c.tensor.rpartition(".")[0] for c in cuts}
    cut_modules |= {name.removesuffix(".out_proj") for name in cut_modules}
    patches = []
    for name, sizes in wanted.items():
        if name in cut_modules:
            module = model.get_submodule(name)
            assert isinstance(module, nn.MultiheadAttention)
            patches.append(Patch(name, "attention", tuple({**attention_values(module), **sizes}.items())))
    return tuple(patches)


def predicted_macs(graph: Graph, constraints: Constraints, alive: Bools) -> int:
    """Multiply-accumulates of one forward on the example inputs, contractions only."""
    count = constraints.counts(alive)
    total = 0
    for work in graph.tracer.work:
        product = work.constant
        for axis in work.axes:
            product *= count(axis)
        total += product
    return total


def predicted_parameters(model: nn.Module, graph: Graph, alive: Bools) -> int:
    """Parameters left, tied ones counted once."""
    kept: dict[str, dict[int, int]] = {}
    for place in graph.places:
        kept.setdefault(place.tensor, {})[place.dim] = int(alive[place.classes].sum(axis=1).max())
    total = 0
    for name, p in model.named_parameters():
        sizes = kept.get(name, {})
        total += int(np.prod([sizes.get(d, n) for d, n in enumerate(p.shape)], dtype=np.int64))
    return total


def kept_units(graph: Graph, plan: Plan) -> Bools:
    """[n_units] True for units of which a plan keeps something in every member."""
    cuts = {(cut.tensor, cut.dim): cut for cut in plan.cuts}
    keep = np.ones(graph.n_units, bool)
    for group in graph.groups:
        seen: list[tuple[Member, Cut]] = []
        for m in group.members:
            cut = cuts.get((m.tensor, m.dim))
            if cut is None or any(_say_the_same(m, cut, *other) for other in seen):
                continue
            seen.append((m, cut))
            left = np.zeros((cut.rows, cut.size), bool)
            left[np.arange(cut.rows)[:, None], cut.table] = True
            stays = np.broadcast_to(left, (m.rows, m.size)).ravel()[m.index]
            any_left = np.zeros(group.n_units, bool)
            any_left[m.unit[stays]] = True
            keep[group.units] &= any_left
    return keep


def _say_the_same(member: Member, cut: Cut, other: Member, others_cut: Cut) -> bool:
    """Whether two members of a group have their units in the same positions, of which the same are kept."""
    is_alike = member.index is other.index and member.unit is other.unit
    return is_alike and cut.rows == others_cut.rows and cut.keep == others_cut.keep
