"""Units and groups: what can be removed, together with what, in competition with what.

A *unit* is one removable class of atoms with every (tensor, dim, index) that depends on it. Units with the
same signature {(tensor, dim)} form a *group*. *Grids* are the constraints between their counts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from lightning_prune.tracing.labels import FROZEN
from lightning_prune.tracing.solver import Classes
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
    """One dimension of one tensor with the class of every position.

    Args:
        tensor: Its name.
        dim: The dimension.
        classes: [rows, size]; places of one column share the array.
        is_buffer: Whether the tensor is a buffer.
        column: Number that all places with the same classes in the same order have.
    """

    tensor: str
    dim: int
    classes: Ints
    is_buffer: bool
    column: int


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
        position, element = self.classes.of_all
        result = np.ones(len(alive), bool)
        result[position[~alive[element]]] = False
        return result


def frozen_positions(graph: Graph, tensor: str, dim: int) -> Ints:
    """Positions of a dimension that no unit reaches."""
    for place in graph.places:
        if (place.tensor, place.dim) == (tensor, dim):
            return np.flatnonzero(place.classes.ravel() == FROZEN)
    return np.zeros(0, np.int64)
