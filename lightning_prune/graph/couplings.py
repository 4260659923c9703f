"""One group as a graph: which of its layers the forward ties to which, and by what."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lightning_prune.graph.analysis import Analysis
from lightning_prune.graph.explaining import atoms_of
from lightning_prune.graph.groups import Group
from lightning_prune.tracing.labels import FROZEN, Ints

__all__ = ["Coupling", "couplings"]


@dataclass(frozen=True)
class Coupling:
    """A tie between two places of a group.

    Args:
        left: ``(tensor, dim)``.
        right: ``(tensor, dim)``.
        reason: Operation, module and source line of the tie.
    """

    left: tuple[str, int]
    right: tuple[str, int]
    reason: str


def couplings(analysis: Analysis, group: Group) -> tuple[Coupling, ...]:
    """List the ties between the places of a group, in the order of the forward, each once.

    Args:
        analysis: Where the group was found.
        group: One of its groups.
    """
    ledger, places = analysis.graph.tracer.ledger, [(m.tensor, m.dim) for m in group.members]
    owner = _owners(analysis, places)
    found: dict[Coupling, None] = {}
    for left, right, why in ledger.ties:
        pairs = np.unique(np.stack([owner[left], owner[right]]), axis=1).T
        for a, b in pairs.tolist():
            if a >= 0 and b >= 0 and a != b:
                found[Coupling(places[a], places[b], ledger.explain(why))] = None
    return tuple(found)


def _owners(analysis: Analysis, places: list[tuple[str, int]]) -> Ints:
    """[n_atoms] number of the place whose positions an atom is, splits or merges; else -1."""
    ledger = analysis.graph.tracer.ledger
    owner = np.full(ledger.count, -1, np.int64)
    for number, (tensor, dim) in enumerate(places):
        atoms = atoms_of(analysis, tensor, dim)
        if atoms is not None:
            owner[atoms.ravel()] = number
    known = -1
    while known != (known := int((owner >= 0).sum())):  # through splits of splits, and what was merged again
        for rows, cells, leaves in ledger.ands:
            for there, here in ((rows, leaves), (cells, leaves), (leaves, rows)):
                free = owner[there] < 0
                owner[there[free]] = owner[here[free]]
    owner[FROZEN] = -1
    return owner
