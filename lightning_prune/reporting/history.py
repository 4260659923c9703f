"""What a fit leaves behind for its report: the spread of unit norms per epoch, and what each cut chose by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lightning_prune.graph.groups import Group
from lightning_prune.scores.importance import IMPORTANCES, Evidence

__all__ = ["LEVELS", "ClassScores", "Cut", "Spread", "record_cut", "record_spread"]

LEVELS = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)  # of the quantiles of a Spread
BINS = 24
WIDEST = 1e6  # scores further below the largest share the lowest bin
MAX_CLASSES = 8  # more would be too many panels; the smallest are counted together

Bools = npt.NDArray[np.bool_]
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Spread:
    """How far unit norms lie apart at the end of an epoch.

    Args:
        epoch: 0-based.
        quantiles: At ``LEVELS``, of the squared norm of a unit by the mean of its group.
    """

    epoch: int
    quantiles: tuple[float, ...]

    @classmethod
    def of(cls, data: Mapping[str, Any]) -> Spread:
        """Read what ``asdict`` or JSON made of one."""
        return cls(int(data["epoch"]), tuple(data["quantiles"]))


@dataclass(frozen=True)
class ClassScores:
    """Scores of the units of one isomorphism class at a cut.

    Args:
        name: Readable: its first group, and how many are like it.
        kept: Units that stay, per bin.
        removed: Units that go, per bin.
        line: Highest score that goes; None if nothing does.
    """

    name: str
    kept: tuple[int, ...]
    removed: tuple[int, ...]
    line: float | None


@dataclass(frozen=True)
class Cut:
    """What one cut chose by.

    Args:
        epoch: 0-based epoch that began with it.
        edges: [n_bins + 1] bounds of the bins; logarithmic where all are positive.
        classes: One per isomorphism class, largest first.
        unscored: Units without a finite score; they are in no bin.
        notes: What rounding, caps and grids have changed about what was asked.
    """

    epoch: int
    edges: tuple[float, ...]
    classes: tuple[ClassScores, ...]
    unscored: int = 0
    notes: tuple[str, ...] = ()

    @classmethod
    def of(cls, data: Mapping[str, Any]) -> Cut:
        """Read what ``asdict`` or JSON made of one."""
        classes = tuple(
            ClassScores(str(c["name"]), tuple(c["kept"]), tuple(c["removed"]), c["line"])
            for c in data["classes"]
        )
        return cls(int(data["epoch"]), tuple(data["edges"]), classes, data["unscored"], tuple(data["notes"]))


@torch.no_grad()
def record_spread(
    epoch: int, groups: Sequence[Group], tensors: Mapping[str, Tensor], *, include_bias: bool = False
) -> Spread | None:
    """Take the quantiles of all unit norms, each by the mean of its group; None if there is no finite one.

    Args:
        epoch: 0-based.
        groups: Those that sparse learning presses.
        tensors: All named parameters.
        include_bias: Whether biases count.

    >>> record_spread(0, [], {}) is None
    True
    """
    evidence = Evidence(include_bias=include_bias, memo={})
    norms = [IMPORTANCES["group_norm"](group, tensors, evidence).double() for group in groups]
    relative = [n / n.mean() for n in norms if len(n) > 1]  # a lone unit is its own mean
    if not relative:
        return None
    found = torch.cat([values.cpu() for values in relative]).numpy()
    found = found[np.isfinite(found)]
    return Spread(epoch, tuple(np.quantile(found, LEVELS).tolist())) if len(found) else None


def record_cut(
    epoch: int,
    groups: Sequence[Group],
    scores: Sequence[Floats],
    kept: Sequence[Bools],
    notes: Sequence[str] = (),
) -> Cut | None:
    """Count the scores of a cut per isomorphism class; None where no unit has a finite score.

    Args:
        epoch: 0-based epoch that begins with it.
        groups: As they were before it.
        scores: [n_units] per group, higher = keep.
        kept: [n_units] per group, False for what goes.
        notes: What is to be said about it.
    """
    everything = np.concatenate([np.zeros(0), *scores])
    finite = everything[np.isfinite(everything)]
    if not len(finite):
        return None
    edges = _edges(finite)
    classes: dict[str, list[int]] = {}
    for i, group in enumerate(groups):
        classes.setdefault(group.isomorphism, []).append(i)
    largest = sorted(classes.values(), key=lambda mine: -sum(groups[i].n_units for i in mine))
    if len(largest) > MAX_CLASSES:
        rest = [i for mine in largest[MAX_CLASSES - 1 :] for i in mine]
        largest = [*largest[: MAX_CLASSES - 1], rest]
    counted = tuple(
        _class_scores(
            _name([groups[i] for i in mine]),
            np.concatenate([scores[i] for i in mine]),
            np.concatenate([kept[i] for i in mine]),
            edges,
        )
        for mine in largest
    )
    return Cut(epoch, tuple(edges.tolist()), counted, len(everything) - len(finite), tuple(notes))


def _edges(finite: Floats) -> Floats:
    """Bounds of the bins: equal ratios where scores are positive, else equal steps."""
    top, positive = float(finite.max()), finite[finite > 0]
    if float(finite.min()) < 0 or not len(positive):
        return np.linspace(float(finite.min()), max(top, float(finite.min()) + 1e-12), BINS + 1)
    low = max(float(positive.min()), top / WIDEST)
    return np.geomspace(low, top, BINS + 1) if low < top else np.geomspace(top / 2, top * 2, BINS + 1)


def _class_scores(name: str, scores: Floats, kept: Bools, edges: Floats) -> ClassScores:
    known = np.isfinite(scores)
    counts = [
        tuple(np.histogram(np.clip(scores[known & mask], edges[0], edges[-1]), edges)[0].tolist())
        for mask in (kept, ~kept)
    ]
    gone = scores[known & ~kept]
    return ClassScores(name, counts[0], counts[1], float(gone.max()) if len(gone) else None)


def _name(groups: Sequence[Group]) -> str:
    """Name a class by its first group and the number of the others.

    >>> none = np.zeros(0, np.int64)
    >>> _name([Group(f"block.{i}.fc.weight:0", "channel", none, (), "") for i in range(3)])
    'block.0.fc and 2 like it'
    """
    place = groups[0].name.partition(":")[0].removesuffix(".weight")
    kind = "" if groups[0].kind == "channel" else f" ({groups[0].kind.replace('_', ' ')}s)"
    alike = len({group.isomorphism for group in groups}) == 1
    more = f" and {len(groups) - 1} {'like it' if alike else 'others'}" if len(groups) > 1 else ""
    return f"{place}{kind}{more}"
