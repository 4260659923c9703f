"""Graph -> units and groups: what can be removed, together with what, in competition with what.

A *unit* is one removable class of atoms with every (tensor, dim, index) that depends on it. Units with the
same signature {(tensor, dim)} form a *group*. *Grids* are the constraints between their counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from lightning_prune.tracing.labels import FROZEN, Label, along
from lightning_prune.tracing.solver import Classes, solve
from lightning_prune.tracing.tracer import Tracer

Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]
Kind = Literal["channel", "head", "head_dim"]
KINDS: tuple[Kind, ...] = ("channel", "head_dim", "head")


@dataclass(frozen=True, eq=False)
class Member:
    """One dimension of one tensor, as far as a group's units reach into it.

    Args:
        tensor: Name as in ``named_parameters()`` / ``named_buffers()``.
        dim: Dimension, >= 0.
        rows: 1, or the number of equal blocks of dimension 0 that have indices of their own along
            ``dim`` (grouped convolution weight, dim 1).
        size: Length of the dimension.
        index: [m] positions, each ``row * size + i`` with i in [0, size).
        unit: [m] the unit that each position belongs to, in [0, n_units).
        is_buffer: True for buffers; they are cut but neither scored nor regularised.
    """

    tensor: str
    dim: int
    rows: int
    size: int
    index: Ints
    unit: Ints
    is_buffer: bool = False


@dataclass(frozen=True, eq=False)
class Group:
    """Units with the same signature: they compete with each other.

    Args:
        name: Readable and unique: first member's ``tensor:dim``, with the kind where it is not "channel".
        kind: "channel", "head" (a whole head, a kv head with its query heads) or "head_dim".
        units: [n_units] global unit ids, unique over all groups of a graph.
        members: What the units own, parameters in model order, then buffers.
        isomorphism: Groups with equal values are isomorphic (same node types and dims in order).
    """

    name: str
    kind: Kind
    units: Ints
    members: tuple[Member, ...]
    isomorphism: str

    @property
    def n_units(self) -> int:
        """Number of removable units."""
        return len(self.units)


@dataclass(frozen=True, eq=False)
class Grid:
    """Rows that must keep equally many positions: ``scale[r] * kept(r) + offset[r]`` is one number.

    Args:
        rows: Per row, [n] global unit ids of its positions; -1 is a position that always stays. A unit
            may stand in a row several times. A position dies with its unit.
        owners: [n_rows] global unit id of the head that owns the row, or -1. A row whose owner dies is
            out of the comparison; a row that lives keeps at least one position.
        scale: [n_rows] positive factors; all 1 for most grids.
        offset: [n_rows]; all 0 for most grids.
        reason: Why the rows are bound, one line with module and source line.
    """

    rows: tuple[Ints, ...]
    owners: Ints
    scale: tuple[float, ...]
    offset: tuple[int, ...]
    reason: str


@dataclass(frozen=True, eq=False)
class Place:
    """One dimension of one tensor with the class of every position: [rows, size]."""

    tensor: str
    dim: int
    classes: Ints
    is_buffer: bool


@dataclass(frozen=True, eq=False)
class Graph:
    """The solved trace: groups of units, and where every unit reaches.

    Args:
        tracer: What the trace learnt.
        classes: Atoms -> classes.
        places: Every labelled dimension of every tensor.
        groups: The groups.
        unit_of: [n_classes] global unit id of a removable class, -1 for others.
    """

    tracer: Tracer
    classes: Classes
    places: tuple[Place, ...]
    groups: tuple[Group, ...]
    unit_of: Ints

    @property
    def n_units(self) -> int:
        """Number of units in all groups."""
        return sum(g.n_units for g in self.groups)

    def alive_classes(self, keep: Bools) -> Bools:
        """[n_classes] True for classes all of whose units stay. ``keep``: [n_units]."""
        alive = np.ones(len(self.unit_of), bool)
        known = self.unit_of >= 0
        alive[known] = keep[self.unit_of[known]]
        everything = np.arange(len(alive))
        position, element = self.classes.elements(everything)
        result = np.ones(len(alive), bool)
        result[position[~alive[element]]] = False
        return result


def build_graph(tracer: Tracer, names: Sequence[str], buffers: frozenset[str]) -> Graph:
    """Solve a trace and collect its units.

    Args:
        tracer: A finished trace.
        names: Tensors in model order.
        buffers: Those of them that are buffers.
    """
    classes = solve(tracer.ledger)
    places = tuple(p for name in names for p in _places(tracer, classes, name, name in buffers))
    groups, unit_of = _groups(tracer, classes, places)
    return Graph(tracer, classes, places, groups, unit_of)


def _places(tracer: Tracer, classes: Classes, name: str, is_buffer: bool) -> list[Place]:
    found = []
    for dim, label in enumerate(tracer.leaves.get(name, ())):
        rows: Label | None = tracer.ragged[name] if dim == 1 and name in tracer.ragged else None
        if rows is None and label is not None:
            rows = along(label, dim)
        if rows is not None:
            found.append(Place(name, dim, classes.of[rows], is_buffer))
    return found


@dataclass(frozen=True, eq=False)
class _Reach:
    """Flat table: removable class, place number, position in the place."""

    element: Ints
    place: Ints
    position: Ints


def _reach(classes: Classes, places: tuple[Place, ...]) -> _Reach:
    flat = [p.classes.ravel() for p in places] or [np.zeros(0, np.int64)]
    everything = np.concatenate(flat)
    place = np.repeat(np.arange(len(places)), [len(f) for f in flat[: len(places)]])
    start = np.concatenate([[0], np.cumsum([len(f) for f in flat])])
    where, element = classes.elements(everything)
    order = np.lexsort((where, element))
    where, element = where[order], element[order]
    return _Reach(element, place[where], where - start[place[where]])


def _groups(tracer: Tracer, classes: Classes, places: tuple[Place, ...]) -> tuple[tuple[Group, ...], Ints]:
    unit_of = np.full(len(classes.row), -1, np.int64)
    reach = _owning_parameters(_reach(classes, places), places, len(classes.row))
    if not len(reach.element):
        return (), unit_of
    elements, key, first = _signatures(classes, reach)
    _, group_of = np.unique(key, return_inverse=True)
    order = np.lexsort((first[:, 1], first[:, 0], _rank_by_first(group_of, first)))
    elements, group_of = elements[order], group_of[order]
    bounds = np.flatnonzero(np.concatenate([[True], group_of[1:] != group_of[:-1], [True]]))
    unit_of[elements] = np.arange(len(elements))
    groups = []
    group_number = np.repeat(np.arange(len(bounds) - 1), np.diff(bounds))
    reach_unit = unit_of[reach.element]
    reach_group = group_number[reach_unit]
    by_group = np.argsort(reach_group, kind="stable")
    cuts = np.searchsorted(reach_group[by_group], np.arange(len(bounds)))
    taken: dict[str, int] = {}
    for g in range(len(bounds) - 1):
        rows = by_group[cuts[g] : cuts[g + 1]]
        kind = _kind(classes, int(elements[bounds[g]]))
        units = np.arange(bounds[g], bounds[g + 1])
        members = _members(places, reach.place[rows], reach.position[rows], reach_unit[rows] - bounds[g])
        groups.append(_group(tracer, kind, units, members, taken))
    return tuple(groups), unit_of


def _owning_parameters(reach: _Reach, places: tuple[Place, ...], n_classes: int) -> _Reach:
    """Classes that own no parameter are nothing to remove."""
    is_buffer = np.array([p.is_buffer for p in places], bool)
    owns = np.zeros(n_classes, bool)
    owns[reach.element[~is_buffer[reach.place]]] = True
    keep = owns[reach.element]
    return _Reach(reach.element[keep], reach.place[keep], reach.position[keep])


def _signatures(classes: Classes, reach: _Reach) -> tuple[Ints, Ints, Ints]:
    """Per removable class: its id, a hash of {places} and kind, and (first place, first position)."""
    # The table is in order of element, place and position: equal neighbours are all repeats there are.
    begins = np.concatenate([[True], reach.element[1:] != reach.element[:-1]])
    is_new = np.concatenate([[True], reach.place[1:] != reach.place[:-1]]) | begins
    weight = np.random.default_rng(0).integers(1, 2**62, int(reach.place.max()) + 1)
    head = np.flatnonzero(begins)
    elements = reach.element[head]
    key = np.add.reduceat(weight[reach.place[is_new]], np.flatnonzero(begins[is_new]))
    key = key * 3 + _kind_codes(classes, elements)
    first = np.column_stack([reach.place[head], reach.position[head]])
    return elements, key, first


def _kind_codes(classes: Classes, elements: Ints) -> Ints:
    return np.where(
        classes.is_head[elements] & classes.is_row[elements], 2, np.where(classes.is_head_dim[elements], 1, 0)
    )


def _kind(classes: Classes, element: int) -> Kind:
    return KINDS[int(_kind_codes(classes, np.array([element]))[0])]


def _rank_by_first(group_of: Ints, first: Ints) -> Ints:
    """Number the groups by the place and position where they begin."""
    key = first[:, 0] * (int(first[:, 1].max()) + 1) + first[:, 1]
    smallest = np.full(int(group_of.max()) + 1, np.iinfo(np.int64).max)
    np.minimum.at(smallest, group_of, key)
    rank = np.empty(len(smallest), np.int64)
    rank[np.argsort(smallest, kind="stable")] = np.arange(len(smallest))
    return rank[group_of]


def _members(places: tuple[Place, ...], place: Ints, position: Ints, unit: Ints) -> tuple[Member, ...]:
    order = np.lexsort((position, place))
    place, position, unit = place[order], position[order], unit[order]
    begins = np.flatnonzero(np.concatenate([[True], place[1:] != place[:-1]]))
    found = []
    for start, end in zip(begins, [*begins[1:], len(place)], strict=True):
        p = places[place[start]]
        rows, size = p.classes.shape
        found.append(Member(p.tensor, p.dim, rows, size, position[start:end], unit[start:end], p.is_buffer))
    return tuple(sorted(found, key=lambda m: m.is_buffer))


def _group(
    tracer: Tracer, kind: Kind, units: Ints, members: tuple[Member, ...], taken: dict[str, int]
) -> Group:
    name = f"{members[0].tensor}:{members[0].dim}" + ("" if kind == "channel" else f"/{kind}")
    taken[name] = taken.get(name, 0) + 1
    if taken[name] > 1:
        name = f"{name}#{taken[name]}"
    nodes = []
    for m in members:
        module, _, local = m.tensor.rpartition(".")
        nodes.append(f"{tracer.module_types.get(module, '')}.{local}:{m.dim}")
    return Group(name, kind, units, members, f"{kind}|" + "|".join(nodes))


def frozen_positions(graph: Graph, tensor: str, dim: int) -> Ints:
    """Positions of a dimension that no unit reaches."""
    for place in graph.places:
        if (place.tensor, place.dim) == (tensor, dim):
            return np.flatnonzero(place.classes.ravel() == FROZEN)
    return np.zeros(0, np.int64)
