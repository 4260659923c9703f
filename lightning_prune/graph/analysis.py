"""Model -> graph with its constraints, and the certificate that a pruned model restricts the original."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import nn

from lightning_prune.errors import CertificateError
from lightning_prune.graph.equations import Constraints
from lightning_prune.graph.groups import Graph, Group, Place, build_graph
from lightning_prune.graph.planning import make_plan, predicted_macs, predicted_parameters
from lightning_prune.plan import Plan
from lightning_prune.tracing.labels import FROZEN, Site, along
from lightning_prune.tracing.solver import Classes, solve
from lightning_prune.tracing.trace import trace

Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Analysis:
    """One look at a model: its graph, its constraints and its cost."""

    model: nn.Module
    graph: Graph
    constraints: Constraints

    @property
    def groups(self) -> tuple[Group, ...]:
        """Groups of units."""
        return self.graph.groups

    def alive(self, keep: Bools) -> Bools:
        """[n_classes] that live when ``keep`` [n_units] stays."""
        return self.graph.alive_classes(keep)

    def plan(self, keep: Bools) -> tuple[Plan, tuple[str, ...]]:
        """What is kept, as a Plan, and what is to be said about configs."""
        return make_plan(self.model, self.graph, self.constraints, keep)

    def macs(self, keep: Bools) -> int:
        """Predicted multiply-accumulates of one forward on the example inputs."""
        return predicted_macs(self.graph, self.constraints, self.alive(keep))

    def parameters(self, keep: Bools) -> int:
        """Predicted number of parameters."""
        return predicted_parameters(self.model, self.graph, self.alive(keep))


def analyse(
    model: nn.Module,
    example_inputs: Any,
    *,
    forward_fn: Callable[..., Any] | None = None,
    output_transform: Callable[..., Any] | None = None,
    custom: Any = None,
    prepare: Callable[..., None] | None = None,
) -> Analysis:
    """Trace and solve a model. The model is not touched.

    Raises:
        TraceError: If it cannot be run on the example inputs.
    """
    tracer = trace(
        model,
        example_inputs,
        forward_fn=forward_fn,
        output_transform=output_transform,
        custom=custom,
        prepare=prepare,
    )
    parameters = [name for name, _ in model.named_parameters()]
    buffers = [name for name, _ in model.named_buffers()]
    graph = build_graph(tracer, [*parameters, *buffers], frozenset(buffers))
    return Analysis(model, graph, Constraints(graph))


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
    _same_numbers(before, after)
    classes = _expected(before, keep)
    old = {(p.tensor, p.dim): classes.of[_atoms(before, p)] for p in before.graph.places}
    kept = {(c.tensor, c.dim): c for c in plan.cuts}
    pairs: list[Ints] = []
    names: list[str] = []
    owner: list[Ints] = []
    for place in after.graph.places:
        source = old.get((place.tensor, place.dim))
        if source is None:
            continue
        mapped = _mapped(source, place, kept)
        pairs.append(np.stack([place.classes.ravel(), mapped.ravel()]))
        owner.append(np.full(mapped.size, len(names), np.int64))
        names.append(f"{place.tensor} dim {place.dim}")
    if not pairs:
        return
    table, where = np.concatenate(pairs, axis=1), np.concatenate(owner)
    live = (table[0] != FROZEN) & (table[1] != FROZEN)
    table, where = table[:, live], where[live]
    width = int(table[1].max(initial=0)) + 1
    keys, first = np.unique(table[0] * width + table[1], return_index=True)
    unique = np.divmod(keys, width)
    mixed = unique[0][1:][unique[0][1:] == unique[0][:-1]]
    if len(mixed):
        places = sorted({names[where[i]] for i in first[np.isin(unique[0], mixed)]})
        raise CertificateError(
            f"The pruned model was to be a restriction of the original, but {len(np.unique(mixed))} of its "
            f"couplings join channels that were apart, in {', '.join(places[:6])}. The cut was undone; add "
            "these layers to ignored_layers and report the model, please."
        )


def _same_numbers(before: Analysis, after: Analysis) -> None:
    """Plain numbers in the forward must not have followed a size."""
    new: dict[tuple[str, Site], list[tuple[float, ...]]] = {}
    for op, now, site in after.graph.tracer.scalars:
        new.setdefault((op, site), []).append(now)
    for op, was, site in before.graph.tracer.scalars:
        again = new.get((op, site))
        if again and not any(_equal(was, now) for now in again):
            raise CertificateError(
                f"A number that the forward computes with was to stay, but {list(was)} became "
                f"{list(again[0])}: {site}. It is computed from a size that was cut. The cut was undone; "
                "compute the number once in __init__ and read it from there, or add the layer to "
                "ignored_layers."
            )


def _equal(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    return len(a) == len(b) and bool(np.allclose(a, b, rtol=1e-6, atol=0.0, equal_nan=True))


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
        left = np.unique(of[owners][alive[of[owners]]])
        if len(left) == 1 and len(np.unique(of[owners])) > 1:
            lone.append(owners[of[owners] == left[0]])
    atoms = np.unique(np.concatenate(lone))
    return solve(ledger, atoms) if len(atoms) else before.graph.classes


def _mapped(source: Ints, place: Place, kept: dict[tuple[str, int], Any]) -> Ints:
    """Class in the original of every position of the pruned tensor, [rows, size]."""
    cut = kept.get((place.tensor, place.dim))
    table = source
    if cut is not None:
        rows = cut.by_row()
        table = np.stack([table[r if len(table) > 1 else 0][list(keep)] for r, keep in enumerate(rows)])
    if table.shape[1] != place.classes.shape[1]:
        raise CertificateError(
            f"{place.tensor} dim {place.dim} has {place.classes.shape[1]} indices after the cut, "
            f"{table.shape[1]} were planned. The cut was undone."
        )
    return np.broadcast_to(table[: len(place.classes)] if len(table) > 1 else table, place.classes.shape)
