"""Graph -> units and groups."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Kind = Literal["channel", "head", "head_dim"]


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


GroupList = Sequence[Group]
