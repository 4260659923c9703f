"""Why a dimension stays, or with what it is tied."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt
from scipy.sparse import coo_array
from scipy.sparse.csgraph import breadth_first_order

from lightning_prune.errors import OptionError
from lightning_prune.graph.analysis import Analysis
from lightning_prune.graph.groups import Grid, Group
from lightning_prune.tracing.labels import FROZEN, Ints, along

Bools = npt.NDArray[np.bool_]

SHOWN = 8
CHANNEL_DIMS = 2  # those after are a kernel's height and width


@dataclass(frozen=True)
class Frozen:
    """A channel dimension of which something stays whatever is asked.

    Args:
        tensor: Name of a parameter.
        dim: Dimension, 0 or 1.
        stays: Positions that stay, >= 1.
        size: Length of the dimension.
        reason: Operation, module and source line of what holds it; a chain of such where there is one.
    """

    tensor: str
    dim: int
    stays: int
    size: int
    reason: str


def explain(analysis: Analysis, name: str, dim: int, held: Iterable[tuple[Bools, str]] = ()) -> str:
    """One paragraph on one dimension.

    Args:
        analysis: The analysis.
        name: Parameter or buffer, or a module, which stands for its weight.
        dim: Dimension; negative counts from the end.
        held: Units that the last choice could not let go, [n_units], with the reasons.

    Raises:
        OptionError: If there is no such tensor or dimension.
    """
    leaves = analysis.graph.tracer.leaves
    if name not in leaves and f"{name}.weight" in leaves:
        name = f"{name}.weight"
    if name not in leaves:
        near = [n for n in leaves if name.split(".")[-1] in n][:5] or list(leaves)[:5]
        raise OptionError(f"explain: {name!r} is no parameter or buffer; nearest names: {', '.join(near)}")
    if not -len(leaves[name]) <= dim < len(leaves[name]):
        raise OptionError(f"explain: {name} has {len(leaves[name])} dimensions, {dim} is none of them")
    dim %= len(leaves[name])
    atoms = atoms_of(analysis, name, dim)
    if atoms is None:
        return f"{name} dim {dim} has length 1 or holds whole numbers: there is nothing to remove."
    classes = analysis.graph.classes.of[atoms].ravel()
    frozen = int((classes == FROZEN).sum())
    lines = [f"{name} dim {dim}: {len(classes) - frozen} of {len(classes)} positions can be removed."]
    if frozen:
        lines.append(f"{frozen} stay: {why_frozen(analysis, atoms.ravel()[classes == FROZEN])}")
    units = analysis.graph.unit_of[np.unique(classes)]
    for mask, reason in held:
        if mask[units[units >= 0]].any():
            lines.append(f"Units that were to go in the last choice stay: {reason}")
    lines += _ties(analysis, name, dim)
    reasons = _tie_reasons(analysis, classes)
    if reasons:
        lines.append(f"Ties: {'; '.join(reasons)}.")
    return "\n".join(lines)


def atoms_of(analysis: Analysis, name: str, dim: int) -> Ints | None:
    """Atoms of a dimension, [rows, n]."""
    tracer = analysis.graph.tracer
    if dim == 1 and name in tracer.ragged:
        return tracer.ragged[name]
    label = tracer.leaves[name][dim]
    return None if label is None else along(label, dim)


def list_frozen(analysis: Analysis) -> tuple[Frozen, ...]:
    """List the channel dimensions of parameters of which something stays, in model order."""
    found = []
    for name, parameter in analysis.model.named_parameters():
        for dim in range(min(CHANNEL_DIMS, parameter.dim())):
            atoms = atoms_of(analysis, name, dim)
            if atoms is None:
                continue
            held = analysis.graph.classes.of[atoms] == FROZEN
            stays = int(held.any(axis=0).sum())
            if stays:
                reason = why_frozen(analysis, atoms[held])
                found.append(Frozen(name, dim, stays, atoms.shape[1], reason))
    return tuple(found)


def _ties(analysis: Analysis, name: str, dim: int) -> list[str]:
    lines = []
    for group in analysis.groups:
        if any((m.tensor, m.dim) == (name, dim) for m in group.members):
            others = [f"{m.tensor} dim {m.dim}" for m in group.members if (m.tensor, m.dim) != (name, dim)]
            more = f" and {len(others) - SHOWN} more" if len(others) > SHOWN else ""
            tied = ", ".join(others[:SHOWN]) + more if others else "nothing else"
            lines.append(
                f"{group.n_units} units of kind {group.kind!r} in group {group.name}, tied with {tied}."
            )
            held = held_by(analysis, group)
            if held:
                lines.append(f"Their count follows one of positions that stay: {held}.")
    return lines


def held_by(analysis: Analysis, group: Group) -> str:
    """Where the count of a group is bound, through other counts or directly, to positions that all stay.

    Returns:
        The reason of the grid that holds it, one line; empty if none does.
    """
    if group.kind == "head":
        return ""
    grids, units = _grids(analysis)
    seen: set[int] = set()
    reached = set(group.units.tolist())
    while True:
        near = [i for i, mine in enumerate(units) if i not in seen and mine & reached]
        if not near:
            return ""
        for i in near:
            if any((row < 0).all() for row in grids[i].rows):
                return grids[i].reason
        seen |= set(near)
        reached |= set().union(*(units[i] for i in near))


@lru_cache(maxsize=2)
def _grids(analysis: Analysis) -> tuple[list[Grid], list[set[int]]]:
    """Grids while all heads live, and the units of each."""
    grids = analysis.constraints.cell_grids(np.ones(len(analysis.graph.unit_of), bool))
    return grids, [{int(u) for row in grid.rows for u in row.tolist() if u >= 0} for grid in grids]


def _tie_reasons(analysis: Analysis, classes: Ints) -> list[str]:
    """Operations that tie these classes, in the order of the forward."""
    ledger, of = analysis.graph.tracer.ledger, analysis.graph.classes.of
    mine = np.zeros(len(analysis.graph.unit_of), bool)
    mine[analysis.graph.classes.elements(classes)[1]] = True
    mine[classes] = True
    mine[FROZEN] = False
    found = dict.fromkeys(ledger.explain(why) for a, _, why in ledger.ties if mine[of[a]].any())
    return [*list(found)[:SHOWN], *([f"and {len(found) - SHOWN} more"] if len(found) > SHOWN else [])]


def why_frozen(analysis: Analysis, atoms: Ints) -> str:
    """The shortest chain of reasons from a frozen atom to what froze it."""
    ledger = analysis.graph.tracer.ledger
    previous, edge = _tree(analysis)
    for atom in atoms[:1]:
        steps: list[str] = []
        current = int(atom)
        while current != FROZEN and previous[current] >= 0:
            steps.append(edge(int(previous[current]), current))
            current = int(previous[current])
        if current == FROZEN and steps:
            return " <- ".join(list(dict.fromkeys(reversed(steps)))[:4])
    return "it is a block that no attention head is, or is cut in two ways" if ledger.ands else "unknown"


@lru_cache(maxsize=2)
def _tree(analysis: Analysis) -> tuple[Ints, Callable[[int, int], str]]:
    """Breadth-first tree of reasons from the frozen atom."""
    ledger = analysis.graph.tracer.ledger
    left = np.concatenate([a for a, _, _ in ledger.ties])
    right = np.concatenate([b for _, b, _ in ledger.ties])
    why = np.concatenate([np.full(len(a), w) for a, _, w in ledger.ties])
    if ledger.ands:
        leaf = np.concatenate([p[2] for p in ledger.ands])
        for k in (0, 1):
            left = np.concatenate([left, np.concatenate([p[k] for p in ledger.ands])])
            right = np.concatenate([right, leaf])
        why = np.concatenate([why, np.full(2 * len(leaf), -1)])
    graph = coo_array(
        (np.ones(len(left), np.int8), (left, right)), shape=(ledger.count, ledger.count)
    ).tocsr()
    _, previous = breadth_first_order(graph, FROZEN, directed=False, return_predecessors=True)
    number: dict[tuple[int, int], int] = {}
    for a, b, w in zip(left.tolist(), right.tolist(), why.tolist(), strict=True):
        number.setdefault((a, b), w)
        number.setdefault((b, a), w)

    def edge(a: int, b: int) -> str:
        w = number[a, b]
        return "part of a split dimension" if w < 0 else ledger.explain(w)

    return previous, edge
