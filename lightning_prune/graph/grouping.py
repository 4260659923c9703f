"""Solved trace -> graph: every removable class is a unit, and units of one signature are a group."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from lightning_prune.graph.groups import KINDS, Graph, Group, Ints, Kind, Member, Place
from lightning_prune.tracing.labels import along, starts
from lightning_prune.tracing.solver import Classes, solve
from lightning_prune.tracing.tracer import Tracer

__all__ = ["build_graph"]

Labelled: TypeAlias = tuple[str, int, Ints, bool]
"""Tensor, dimension, [rows, size] atoms, whether it is a buffer."""


def build_graph(tracer: Tracer, names: Sequence[str], buffers: frozenset[str]) -> Graph:
    """Solve a trace and collect its units.

    Args:
        tracer: A finished trace.
        names: Tensors in model order.
        buffers: Those of them that are buffers.
    """
    classes = solve(tracer.ledger)
    table = _Table.of(classes, [label for name in names for label in _labels(tracer, name, name in buffers)])
    groups, unit_of = _groups(tracer, classes, table)
    return Graph(tracer, classes, table.places, groups, unit_of)


def _labels(tracer: Tracer, name: str, is_buffer: bool) -> Iterator[Labelled]:
    for dim, label in enumerate(tracer.leaves.get(name, ())):
        if dim == 1 and name in tracer.ragged:
            yield name, dim, tracer.ragged[name], is_buffer
        elif label is not None:
            yield name, dim, along(label, dim), is_buffer


@dataclass(frozen=True, eq=False)
class _Table:
    """Positions and their classes. Many places have the same classes in the same order, and are one column.

    Args:
        places: All places.
        alike: Numbers of the places that are a column, ascending, for each column.
        classes: [n] class of every position of every column, in the order of their first places.
        column: [n] its number.
        start: [n_columns] where each column begins.
    """

    places: tuple[Place, ...]
    alike: tuple[list[int], ...]
    classes: Ints
    column: Ints
    start: Ints

    @staticmethod
    def of(classes: Classes, labelled: Sequence[Labelled]) -> _Table:
        places: list[Place] = []
        numbers: dict[tuple[tuple[int, ...], bytes], int] = {}
        columns: list[Ints] = []
        for tensor, dim, atoms, is_buffer in labelled:
            found = classes.of[atoms]
            column = numbers.setdefault((found.shape, found.tobytes()), len(columns))
            if column == len(columns):
                columns.append(found)
            places.append(Place(tensor, dim, columns[column], is_buffer, column))
        alike: tuple[list[int], ...] = tuple([] for _ in columns)
        for number, place in enumerate(places):
            alike[place.column].append(number)
        sizes = [column.size for column in columns]
        flat = np.concatenate([np.zeros(0, np.int64), *(column.ravel() for column in columns)])
        start = np.cumsum([0, *sizes])[:-1]
        return _Table(tuple(places), alike, flat, np.repeat(np.arange(len(sizes)), sizes), start)

    def sums(self, weight: Ints) -> Ints:
        """[n_columns] sum of a number per place over the places of each column."""
        total = np.zeros(len(self.alike), np.int64)
        for number, same in enumerate(self.alike):
            total[number] = weight[same].sum()
        return total


@dataclass(frozen=True, eq=False)
class _Reach:
    """Pairs of a removable class and a position that depends on it, in this order."""

    element: Ints
    where: Ints

    @staticmethod
    def of(classes: Classes, table: _Table) -> _Reach:
        """Classes that own no parameter are nothing to remove."""
        where, element = classes.elements(table.classes)
        element, where = _sorted(element, where)
        places = table.places
        is_parameter = np.array([not all(places[p].is_buffer for p in same) for same in table.alike], bool)
        owns = np.zeros(len(classes.row), bool)
        owns[element[is_parameter[table.column[where]]]] = True
        keep = owns[element]
        return _Reach(element[keep], where[keep])


def _groups(tracer: Tracer, classes: Classes, table: _Table) -> tuple[tuple[Group, ...], Ints]:
    unit_of = np.full(len(classes.row), -1, np.int64)
    reach = _Reach.of(classes, table)
    if not len(reach.element):
        return (), unit_of
    elements, group_of = _ranked(classes, reach, table)
    unit_of[elements] = np.arange(len(elements))
    first = np.flatnonzero(starts(group_of))
    members = _members(reach, table, unit_of, group_of, first)
    codes = _kind_codes(classes, elements[first]).tolist()
    taken: dict[str, int] = {}
    groups = []
    for begin, end, own, code in zip(first, [*first[1:], len(elements)], members, codes, strict=True):
        groups.append(_group(tracer, KINDS[code], np.arange(begin, end), own, taken))
    return tuple(groups), unit_of


def _ranked(classes: Classes, reach: _Reach, table: _Table) -> tuple[Ints, Ints]:
    """Removable classes by group, and within it by their first position; [n_units] number of the group."""
    elements, key, first = _signatures(classes, reach, table)
    group_of = _numbered(key, first)
    _, order = _sorted(first, np.arange(len(first)))
    order = order[_by_number(group_of[order])]
    return elements[order], group_of[order]


def _signatures(classes: Classes, reach: _Reach, table: _Table) -> tuple[Ints, Ints, Ints]:
    """Per removable class: its id, a hash of {places} and kind, and its first position."""
    column = table.column[reach.where]
    begins = starts(reach.element)
    is_new = begins | starts(column)  # equal neighbours are all repeats there are
    weight = table.sums(np.random.default_rng(0).integers(1, 2**62, len(table.places)))
    head = np.flatnonzero(begins)
    elements = reach.element[head]
    key = np.add.reduceat(weight[column[is_new]], np.flatnonzero(begins[is_new]))
    return elements, key * 3 + _kind_codes(classes, elements), reach.where[head]


def _kind_codes(classes: Classes, elements: Ints) -> Ints:
    return np.where(
        classes.is_head[elements] & classes.is_row[elements], 2, np.where(classes.is_head_dim[elements], 1, 0)
    )


def _numbered(key: Ints, first: Ints) -> Ints:
    """Number the groups of equal keys by the position where they begin."""
    order = np.argsort(key, kind="stable")
    begins = starts(key[order])
    smallest = np.minimum.reduceat(first[order], np.flatnonzero(begins))
    rank = np.empty(len(smallest), np.int64)
    rank[np.argsort(smallest, kind="stable")] = np.arange(len(smallest))
    number = np.empty(len(key), np.int64)
    number[order] = rank[np.cumsum(begins) - 1]
    return number


def _members(
    reach: _Reach, table: _Table, unit_of: Ints, group_of: Ints, first: Ints
) -> list[tuple[Member, ...]]:
    """Members of each group: parameters in model order, then buffers."""
    where, unit = _sorted(reach.where, unit_of[reach.element])
    order = _by_number(group_of[unit])
    where, unit = where[order], unit[order]
    group, column = group_of[unit], table.column[where]
    position, unit = where - table.start[column], unit - first[group]
    begins = np.flatnonzero(starts(group) | starts(column))
    ends = [*begins[1:].tolist(), len(where)]
    found: list[list[tuple[bool, int, Member]]] = [[] for _ in first]
    for begin, end, g, c in zip(
        begins.tolist(), ends, group[begins].tolist(), column[begins].tolist(), strict=True
    ):
        index, own = position[begin:end], unit[begin:end]
        for number in table.alike[c]:
            p = table.places[number]
            rows, size = p.classes.shape
            member = Member(p.tensor, p.dim, rows, size, index, own, p.is_buffer)
            found[g].append((p.is_buffer, number, member))
    return [tuple(member for _, _, member in sorted(members, key=_by_place)) for members in found]


def _by_place(found: tuple[bool, int, Member]) -> tuple[bool, int]:
    return found[:2]


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


def _sorted(first: Ints, second: Ints) -> tuple[Ints, Ints]:
    """Pairs in order of the first number, then of the second. One key sorts faster than two."""
    base = int(second.max(initial=0)) + 1
    first, second = np.divmod(np.sort(first * base + second), base)
    return first, second


def _by_number(numbers: Ints) -> Ints:
    """Order that sorts small numbers and leaves equal ones as they are; short types are sorted by digits."""
    return np.argsort(numbers.astype(np.min_scalar_type(int(numbers.max()))), kind="stable")
