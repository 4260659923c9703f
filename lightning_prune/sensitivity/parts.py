"""The parts of a network whose ratio can be chosen alone, and cutting one of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from lightning_prune.errors import OptionError
from lightning_prune.pruner import GroupNormPruner
from lightning_prune.selection.choosing import Choice
from lightning_prune.selection.requests import owned

Bools = npt.NDArray[np.bool_]

__all__ = ["Bools", "Part", "cut_parts", "parts_of"]


@dataclass(frozen=True)
class Part:
    """Groups that only go together, because sizes in the code bind their counts.

    Args:
        name: Of the first group.
        groups: Numbers of the groups.
        keys: What ``pruning_ratio_dict`` calls them; empty where no name reaches these groups alone.
        heads: Whether they are whole heads, whose ratios stand in ``head_pruning_ratio_dict``.
    """

    name: str
    groups: tuple[int, ...]
    keys: tuple[str, ...]
    heads: bool


def parts_of(pruner: GroupNormPruner) -> tuple[Part, ...]:
    """List the parts that the options allow to prune, in model order."""
    groups, constraints = pruner.groups(), pruner.analysis.constraints
    n_units = pruner.analysis.graph.n_units
    group_of = np.zeros(n_units, np.int64)
    for number, group in enumerate(groups):
        group_of[group.units] = number
    root = list(range(len(groups)))

    def find(number: int) -> int:
        while root[number] != number:
            number = root[number]
        return number

    everything = pruner.analysis.alive(np.ones(n_units, bool))
    for grid in (*constraints.cell_grids(everything), *constraints.head_grids()):
        units = np.concatenate([row[row >= 0] for row in grid.rows]) if grid.rows else np.zeros(0, np.int64)
        for number in np.unique(group_of[units]).tolist()[1:]:
            root[find(number)] = find(int(group_of[units].min()))
    pressed = {id(group) for group in pruner.pressed_groups()}
    together: dict[int, list[int]] = {}
    for number, group in enumerate(groups):
        if id(group) in pressed:
            together.setdefault(find(number), []).append(number)
    return tuple(_part(pruner, tuple(numbers)) for numbers in together.values())


def _part(pruner: GroupNormPruner, numbers: tuple[int, ...]) -> Part:
    groups = pruner.groups()
    heads = groups[numbers[0]].kind == "head"
    keys: list[str] = []
    for number in numbers:
        for member in groups[number].members:
            mask = owned(pruner.analysis, frozenset({member.tensor}))
            reached = {i for i, g in enumerate(groups) if (g.kind == "head") == heads and mask[g.units].any()}
            if number in reached and reached <= set(numbers):
                keys.append(member.tensor)
                break
    return Part(groups[numbers[0]].name, numbers, tuple(dict.fromkeys(keys)), heads)


def cut_parts(pruner: GroupNormPruner, parts: Mapping[Part, float], locked: Bools | None = None) -> Choice:
    """Choose the units that stay if each part loses its share and nothing else loses any.

    Args:
        pruner: Of the network as it is.
        parts: Share of the units to remove, in [0, 1), per part.
        locked: [n_units] units that stay beside those of the options.

    Raises:
        OptionError: If a share is out of range.
    """
    ratios = [0.0] * len(pruner.groups())
    for part, ratio in parts.items():
        if not 0 <= ratio < 1:
            raise OptionError(f"a share to remove is a number in [0, 1), got {ratio!r} for {part.name}")
        for number in part.groups:
            ratios[number] = ratio
    stays = pruner.goal.locked if locked is None else pruner.goal.locked | locked
    alone = replace(pruner.goal, ratio=tuple(ratios), scope=tuple(range(len(ratios))), locked=stays)
    return pruner.chooser().choose(alone, ratios)
