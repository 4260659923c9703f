"""A cut is tried on a copy: the numbers that it has to keep, and that it restricts the original."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import nn

from lightning_prune.errors import CertificateError, PlanError
from lightning_prune.graph.analysis import Analysis, solved
from lightning_prune.graph.configs import config_doubts
from lightning_prune.graph.groups import Place
from lightning_prune.graph.keeping import KIND, patches_for, unkept
from lightning_prune.graph.planning import kept_units
from lightning_prune.plan import Patch, Plan
from lightning_prune.surgery.applying import apply, mask
from lightning_prune.surgery.patches import check_patch, installed_patches, remove_patches
from lightning_prune.tracing.labels import FROZEN, along, unique
from lightning_prune.tracing.numbers import OUTSIDE, Numbers
from lightning_prune.tracing.solver import Classes, solve
from lightning_prune.tracing.tracer import Tracer

Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]
Retrace = Callable[[Callable[[nn.Module], None], Numbers], Tracer]


class UnkeptError(CertificateError):
    """Numbers followed a size and cannot be kept.

    Args:
        reasons: What and where, one text each.
        axes: Sizes that numbers were computed from in these places; empty where nobody saw it.
    """

    def __init__(self, reasons: Iterable[str], axes: tuple[int, ...]) -> None:
        self.reasons, self.axes = tuple(dict.fromkeys(reasons)), axes
        more = f" and {len(self.reasons) - 3} more" if len(self.reasons) > 3 else ""
        super().__init__(
            "The pruned model was to do what the original does, but a size that was cut decides what it "
            f"computes with: {'; '.join(self.reasons[:3])}{more}. Nothing was cut; compute the number once "
            "in __init__ and read it from there, or add the layer to ignored_layers."
        )


@dataclass(frozen=True, eq=False)
class Trial:
    """A plan with the patches that it needs, the analysis of what it leaves, and what is to be said.

    Args:
        plan: The plan.
        after: Analysis of what it leaves.
        keep: [n_units] units of the original that stay.
        notes: One text each.
    """

    plan: Plan
    after: Analysis
    keep: Bools
    notes: tuple[str, ...]


def try_out(before: Analysis, plan: Plan, retrace: Retrace) -> Trial:
    """Cut a copy and run it, holding it against the original.

    The pruned model has to do what the original does. Where nothing but sizes differs, the run at
    hand says so. Else the original is run once more, as it is by now and with zeros where the plan cuts: then
    both compute with the same data, and what still differs has followed a size.

    Args:
        before: Analysis of the original.
        plan: What is to be kept; its patches of numbers, where it has any, are tried as they are.
        retrace: ``(change, numbers) -> tracer`` of a copy of the original.

    Raises:
        UnkeptError: If a number that followed a size cannot be kept, or the forward does something else.
    """

    def cut(twin: nn.Module) -> None:
        apply(twin, plan, on_meta=True)
        remove_patches(twin, KIND)

    reference = before.graph.tracer.numbers
    tracer = retrace(cut, Numbers(reference))
    if tracer.numbers.kept or tracer.numbers.partings:
        masked = retrace(lambda twin: mask(twin, plan), Numbers()).numbers
        if tracer.numbers.data_differ or not masked.equals(reference):
            tracer = retrace(cut, Numbers(masked, reference))
    patches = _settled(before, plan, tracer.numbers)
    notes = tuple(
        f"{p.module or 'the model'} goes another way because of its data, so that the rest of it could not "
        f"be compared: {p.text}"
        for p in tracer.numbers.partings
    )
    notes += config_doubts(before.model, frozenset(p.module for p in patches if p.values))
    others = tuple(p for p in plan.patches if p.kind != KIND)
    keep = kept_units(before.graph, plan)
    return Trial(replace(plan, patches=others + patches), solved(before.model, tracer), keep, notes)


def _settled(before: Analysis, plan: Plan, numbers: Numbers) -> tuple[Patch, ...]:
    """Patches of numbers that the plan needs.

    Raises:
        UnkeptError: If they would not do.
    """
    given = tuple(p for p in plan.patches if p.kind == KIND)
    patches = given or patches_for(numbers)
    wrong = [(p.module, p.text) for p in numbers.partings if not p.by_data] + unkept(numbers, patches)
    for patch in patches:
        try:
            check_patch(before.model, patch)
        except PlanError as error:
            wrong.append((patch.module, str(error)))
    if wrong:
        modules = {"" if module == OUTSIDE else module for module, _ in wrong}
        axes = {
            axis
            for left in before.graph.tracer.left
            if left.module in modules
            for axis in before.constraints.axes_of(left.expr)
        }
        raise UnkeptError((text for _, text in wrong), tuple(sorted(axes)))
    return patches + _withdrawn(before.model, patches)


def _withdrawn(model: nn.Module, patches: Iterable[Patch]) -> tuple[Patch, ...]:
    """Empty patches for modules that have one by an earlier step and need none any more."""
    needed = {p.module for p in patches}
    return tuple(
        Patch(p.module, KIND)
        for p in installed_patches(model)
        if p.kind == KIND and p.values and p.module not in needed
    )


def certify(before: Analysis, after: Analysis, keep: Bools, plan: Plan) -> None:
    """Hold a pruned model's trace against the original's.

    Positions that live or die together in the pruned model must have done so in the original: then every
    index still meets the index that it met before. What is left of a row as its only cell cannot be told
    from the row, so it counts as frozen in the original.

    Args:
        before: Analysis of the original.
        after: Analysis of the pruned model.
        keep: [n_units] units of the original that stay.
        plan: What was applied.

    Raises:
        CertificateError: If a class of the pruned model mixes several classes of the original.
    """
    classes = _expected(before, keep)
    old = {(p.tensor, p.dim): classes.of[_atoms(before, p)] for p in before.graph.places}
    kept = {(c.tensor, c.dim): c for c in plan.cuts}
    found = [p for p in after.graph.places if (p.tensor, p.dim) in old]
    if not found:
        return
    mapped = [_mapped(old[p.tensor, p.dim], p, kept).ravel() for p in found]
    table = np.stack([np.concatenate([p.classes.ravel() for p in found]), np.concatenate(mapped)])
    where = np.repeat(np.arange(len(found)), [len(m) for m in mapped])
    live = (table[0] != FROZEN) & (table[1] != FROZEN)
    table, where = table[:, live], where[live]
    width = int(table[1].max(initial=0)) + 1
    keys = table[0] * width + table[1]
    now = unique(keys) // width
    mixed = now[1:][now[1:] == now[:-1]]
    if len(mixed):
        _, first = np.unique(keys, return_index=True)
        numbers = {int(where[i]) for i in first[np.isin(table[0][first], mixed)]}
        places = sorted(f"{found[i].tensor} dim {found[i].dim}" for i in numbers)
        raise CertificateError(
            f"The pruned model was to be a restriction of the original, but {len(unique(mixed))} of its "
            f"couplings join channels that were apart, in {', '.join(places[:6])}. The cut was undone; add "
            "these layers to ignored_layers and report the model, please."
        )


def _atoms(analysis: Analysis, place: Place) -> Ints:
    tracer = analysis.graph.tracer
    if place.dim == 1 and place.tensor in tracer.ragged:
        return tracer.ragged[place.tensor]
    label = tracer.leaves[place.tensor][place.dim]
    assert label is not None
    return along(label, place.dim)


def _expected(before: Analysis, keep: Bools) -> Classes:
    """Classes of the original, cells that are left alone in their row being frozen."""
    ledger, of = before.graph.tracer.ledger, before.graph.classes.of
    alive = before.alive(keep)
    lone = [np.zeros(0, np.int64)]
    for rows in [*(rows for rows, _, _ in ledger.grids), *(_atoms(before, p) for p in before.graph.places)]:
        lives = alive[of[rows]]
        lone.append(rows[lives & (lives.sum(axis=1, keepdims=True) == 1) & (rows.shape[1] > 1)])
    for cells, outputs in ledger.depthwise:
        if (alive[of[cells]].sum(axis=-1) == 1).all():  # it has become depthwise: its outputs go together now
            lone.append(outputs.ravel())
    for owners in (o for _, o, _ in ledger.grids if o is not None):
        left = unique(of[owners][alive[of[owners]]])
        if len(left) == 1 and len(unique(of[owners])) > 1:
            lone.append(owners[of[owners] == left[0]])
    atoms = unique(np.concatenate(lone))
    return solve(ledger, atoms) if len(atoms) else before.graph.classes


def _mapped(source: Ints, place: Place, kept: dict[tuple[str, int], Any]) -> Ints:
    """Class in the original of every position of the pruned tensor, [rows, size]."""
    cut = kept.get((place.tensor, place.dim))
    table = source
    if cut is not None:
        if cut.rows == 1:
            table = table[:1, cut.table[0]]
        else:
            rows = np.broadcast_to(table[: cut.rows], (cut.rows, table.shape[1]))
            table = np.take_along_axis(rows, cut.table, axis=1)
    if table.shape[1] != place.classes.shape[1]:
        raise CertificateError(
            f"{place.tensor} dim {place.dim} has {place.classes.shape[1]} indices after the cut, "
            f"{table.shape[1]} were planned. The cut was undone."
        )
    if table.shape == place.classes.shape:
        return table
    return np.broadcast_to(table[: len(place.classes)] if len(table) > 1 else table, place.classes.shape)
