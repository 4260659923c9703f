"""Importances: (group, tensors, evidence) -> scores [n_units], higher = keep.

One small pure function each, all of one signature, in the table ``IMPORTANCES``; a new one goes under
``@register``. Scores come as they are: what is not finite stays so, nothing is normalised (see ``ranking``).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor

from lightning_prune.errors import OptionError
from lightning_prune.graph.groups import Group, Member
from lightning_prune.scores.members import real, scored_members
from lightning_prune.surgery.scratch import Scratch

__all__ = [
    "IMPORTANCES",
    "NEEDS",
    "Evidence",
    "Importance",
    "Need",
    "position_sums",
    "register",
    "unit_sums",
]


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@dataclass(frozen=True)
class Evidence:
    """What a score may look at beyond the weights.

    Args:
        include_bias: Whether biases count.
        gradients: Per parameter name, the mean gradient, in the parameter's shape; for ``taylor``.
        squared_gradients: Per parameter name, the mean squared gradient; for ``hessian``.
        activations: Per weight name, the mean magnitude of its layer's output, [size of the weight's
            dimension 0]; for ``activation``.
        generator: Source of ``random``, on the CPU so that every device draws the same. Keep its
            ``get_state()`` to resume.
        memo: Sums over one dimension of one tensor, kept while several groups share that dimension.
            Leave it empty: ``rank`` makes one that lives as long as the weights stand still.
        wanted: Per tensor, the (dim, rows) pairs that some group asks for; all come from one pass. ``rank``
            lists them.
        scratch: Memory that squares of weights pass through, if there is one.
    """

    include_bias: bool = False
    gradients: Mapping[str, Tensor] = field(default_factory=dict)
    squared_gradients: Mapping[str, Tensor] = field(default_factory=dict)
    activations: Mapping[str, Tensor] = field(default_factory=dict)
    generator: torch.Generator = field(default_factory=_generator)
    memo: dict[tuple[str, str, int, int], Tensor] | None = None
    wanted: Mapping[str, Collection[tuple[int, int]]] = field(default_factory=dict)
    scratch: Scratch | None = None


Need: TypeAlias = Literal["gradients", "squared_gradients", "activations"]

# (group, all named parameters, evidence) -> [n_units] floats, on the parameters' device, no host sync.
Importance: TypeAlias = Callable[[Group, Mapping[str, Tensor], Evidence], Tensor]

IMPORTANCES: dict[str, Importance] = {}
NEEDS: dict[str, Need] = {}


def register(name: str, *, needs: Need | None = None) -> Callable[[Importance], Importance]:
    """Enter an importance into ``IMPORTANCES`` under a name of its own.

    Args:
        name: What ``importance=`` calls it.
        needs: Field of ``Evidence`` that has to be collected for it, None for the weights alone.

    Raises:
        OptionError: If the name is taken.
    """

    def enter(function: Importance) -> Importance:
        if name in IMPORTANCES:
            raise OptionError(f"an importance named {name!r} is registered already; choose another name")
        IMPORTANCES[name] = function
        if needs is not None:
            NEEDS[name] = needs
        return function

    return enter


def position_sums(values: Tensor, dim: int, rows: int = 1) -> Tensor:
    """Sum over everything but one dimension.

    Args:
        values: Of a parameter's shape, real.
        dim: The dimension that is kept.
        rows: With more than 1, dimension 0 is made of that many blocks and each keeps sums of its own.

    Returns:
        [rows * size], position ``row * size + i``; at least float32.

    >>> position_sums(torch.ones(4, 2, 3), 1, rows=2)
    tensor([6., 6., 6., 6.])
    """
    values = values if values.dtype == torch.float64 else values.float()
    if rows > 1:
        values = values.reshape(rows, -1, *values.shape[1:]).sum(1)  # [rows, ..., size, ...]
    before = range(1, dim) if rows > 1 else range(dim)
    # Leading dimensions first: what is left for the slow trailing sum is small.
    values = values.sum(tuple(before)) if len(before) else values  # [rows, size, ...] or [size, ...]
    kept = 2 if rows > 1 else 1
    return (values.flatten(kept).sum(kept) if values.dim() > kept else values).flatten()


def unit_sums(
    group: Group, members: Sequence[Member], per_position: Callable[[Member], Tensor], like: Tensor
) -> Tensor:
    """Add up what a group's units own, position by position.

    Args:
        group: The group.
        members: Those of its members that count.
        per_position: Member -> [rows * size], one number per position.
        like: Gives device and type of a group without members.

    Returns:
        [n_units].
    """
    total = torch.zeros(group.n_units, device=like.device)
    for member in members:
        sums = per_position(member)
        index = torch.from_numpy(member.index).to(sums.device)
        unit = torch.from_numpy(member.unit).to(sums.device)
        total = total.to(torch.promote_types(total.dtype, sums.dtype))
        total.index_add_(0, unit, sums.index_select(0, index).to(total.dtype))
    return total


def _sum_of(
    what: str,
    values: Callable[[str], Tensor],
    group: Group,
    tensors: Mapping[str, Tensor],
    evidence: Evidence,
) -> Tensor:
    """Sum a non-negative value per element over all of a unit's slices; ``what`` names it in the memo."""

    def per_position(member: Member) -> Tensor:
        key = (what, member.tensor, member.dim, member.rows)
        if evidence.memo is None:
            return position_sums(values(member.tensor), member.dim, member.rows)
        if key not in evidence.memo:
            found = values(member.tensor)
            for dim, rows in {(member.dim, member.rows), *evidence.wanted.get(member.tensor, ())}:
                evidence.memo[what, member.tensor, dim, rows] = position_sums(found, dim, rows)
        return evidence.memo[key]

    members = scored_members(group, tensors, include_bias=evidence.include_bias)
    with torch.no_grad():
        return unit_sums(group, members, per_position, _any(tensors))


@register("group_norm")
def group_norm(group: Group, tensors: Mapping[str, Tensor], evidence: Evidence) -> Tensor:
    """``I_k``: the sum of squares of all that unit k owns (DepGraph, CVPR 2023, section 3.3)."""
    return _sum_of(
        "square", lambda n: _squared(_wide(tensors[n]), evidence.scratch), group, tensors, evidence
    )


def _squared(values: Tensor, scratch: Scratch | None) -> Tensor:
    """Square what is summed at once; sums over one dimension alone would be the squares themselves."""
    values = values.detach()
    if scratch is None or values.dim() < 2 or not values.is_contiguous():
        return values.square()
    return torch.square(values, out=scratch.room(values.shape, values))


@register("l1")
def l1(group: Group, tensors: Mapping[str, Tensor], evidence: Evidence) -> Tensor:
    """Sum the magnitudes of all that the unit owns, over all members."""
    return _sum_of("magnitude", lambda n: _wide(tensors[n]).abs(), group, tensors, evidence)


@register("l2")
def l2(group: Group, tensors: Mapping[str, Tensor], evidence: Evidence) -> Tensor:
    """Take the Euclidean length of all that the unit owns: the square root of ``group_norm``.

    Within a group it orders as ``group_norm`` does; across groups it weighs outliers less.
    """
    return group_norm(group, tensors, evidence).sqrt()


@register("random")
def random(group: Group, tensors: Mapping[str, Tensor], evidence: Evidence) -> Tensor:
    """Draw uniformly from [0, 1): the baseline that every other importance has to beat."""
    drawn = torch.rand(group.n_units, generator=evidence.generator, device="cpu")
    return drawn.to(_any(tensors).device)


@register("taylor", needs="gradients")
def taylor(group: Group, tensors: Mapping[str, Tensor], evidence: Evidence) -> Tensor:
    """Sum ``(g * w) ** 2``: what the loss changes to first order (Molchanov et al., CVPR 2019)."""
    grads = _required("taylor", "gradients", evidence.gradients, group, tensors, evidence)
    return _sum_of(
        "taylor", lambda n: (_wide(tensors[n]) * _wide(grads[n])).square(), group, tensors, evidence
    )


@register("hessian", needs="squared_gradients")
def hessian(group: Group, tensors: Mapping[str, Tensor], evidence: Evidence) -> Tensor:
    """Sum ``h * w ** 2 / 2``, h the squared gradient for the Hessian's diagonal (LeCun, 1989)."""
    fisher = _required("hessian", "squared gradients", evidence.squared_gradients, group, tensors, evidence)
    return _sum_of(
        "hessian", lambda n: _wide(fisher[n]) * _wide(tensors[n]).square() / 2, group, tensors, evidence
    )


@register("bn_scale")
def bn_scale(group: Group, tensors: Mapping[str, Tensor], evidence: Evidence) -> Tensor:
    """Average the magnitude of the unit's norm scales (Network Slimming, Liu et al., ICCV 2017).

    Raises:
        OptionError: If the group holds no norm scale: a one-dimensional parameter that is no bias.
    """
    members = scored_members(group, tensors, include_bias=False)
    scales = [m for m in members if tensors[m.tensor].dim() == 1]
    if not scales:
        raise OptionError(
            f"importance 'bn_scale' needs a norm layer in every group, group {group.name!r} has none; "
            "put its layers into ignored_layers or choose another importance, such as 'group_norm'"
        )
    with torch.no_grad():
        total = unit_sums(group, scales, lambda m: _wide(tensors[m.tensor]).abs(), _any(tensors))
        count = unit_sums(group, scales, lambda m: torch.ones_like(_wide(tensors[m.tensor])), _any(tensors))
    return total / count.clamp(min=1)


@register("lamp")
def lamp(group: Group, tensors: Mapping[str, Tensor], evidence: Evidence) -> Tensor:
    """Divide ``I_k`` by the sum of all ``I_j`` that are not smaller (LAMP, Lee et al., ICLR 2021).

    The strongest unit of every group scores 1, so layers compete without further normalisation. Of equal
    units the one with the higher index counts as the larger, as in the paper.
    """
    norms = group_norm(group, tensors, evidence)
    finite = norms.isfinite()
    # A non-finite unit may not spoil the sums of the others.
    ordered, order = torch.sort(torch.where(finite, norms, 0), stable=True)
    # A GPU has no sum along the way that gives the same bits in every run.
    surviving = ordered.cpu().flip(0).cumsum(0).flip(0).to(ordered.device)
    relative = ordered / torch.where(surviving > 0, surviving, 1)
    return torch.where(finite, torch.empty_like(norms).scatter_(0, order, relative), torch.nan)


@register("fpgm")
def fpgm(group: Group, tensors: Mapping[str, Tensor], evidence: Evidence) -> Tensor:
    """Sum the distances to the group's other units: the middle is replaceable (FPGM, He et al., CVPR 2019).

    A unit is the vector of all that it owns.

    Raises:
        OptionError: If the units of the group do not own equally many positions of each tensor.
    """
    members = scored_members(group, tensors, include_bias=evidence.include_bias)
    with torch.no_grad():
        slices = [_unit_slices(group, m, _wide(tensors[m.tensor])) for m in members]
        if not slices:
            return torch.zeros(group.n_units, device=_any(tensors).device)
        units = torch.cat(slices, 1)
        finite = units.isfinite().all(1)
        # A non-finite unit has no place: it is no neighbour of the others, and gets no score itself.
        distances = torch.where(finite, torch.cdist(units, units), 0).sum(1)
        return torch.where(finite, distances, torch.nan)


@register("activation", needs="activations")
def activation(group: Group, tensors: Mapping[str, Tensor], evidence: Evidence) -> Tensor:
    """Average the mean output magnitude of the layers that produce the unit.

    Raises:
        OptionError: If no layer of the group was measured.
    """
    measured = evidence.activations
    members = scored_members(group, tensors, include_bias=False)
    producers = [m for m in members if m.dim == 0 and m.tensor in measured]
    if not producers:
        raise OptionError(
            f"importance 'activation' needs the outputs of a layer of group {group.name!r}, found those of "
            f"{len(measured)} other layer(s); run some batches within pruner.watch(), then pruner.collect()"
        )
    total = unit_sums(group, producers, lambda m: _wide(measured[m.tensor]), _any(tensors))
    count = unit_sums(group, producers, lambda m: torch.ones_like(_wide(measured[m.tensor])), _any(tensors))
    return total / count.clamp(min=1)


def _required(
    importance: str,
    what: str,
    found: Mapping[str, Tensor],
    group: Group,
    tensors: Mapping[str, Tensor],
    evidence: Evidence,
) -> dict[str, Tensor]:
    """Check that every trained parameter has its evidence; a frozen one has none and counts as 0."""
    table = {}
    for member in scored_members(group, tensors, include_bias=evidence.include_bias):
        tensor = tensors[member.tensor]
        got = found.get(member.tensor)
        if got is None and not tensor.requires_grad:
            got = torch.zeros_like(tensor)
        if got is None or got.shape != tensor.shape:
            has = "none" if got is None else f"shape {list(got.shape)}"
            raise OptionError(
                f"importance {importance!r} needs {what} of shape {list(tensor.shape)} for "
                f"{member.tensor!r}, got {has}; call pruner.collect() after the backward pass of some batches"
            )
        table[member.tensor] = got
    return table


def _unit_slices(group: Group, member: Member, values: Tensor) -> Tensor:
    """Give all that each unit owns of one member, [n_units, elements per unit]."""
    counts = np.bincount(member.unit, minlength=group.n_units)
    if counts.min() != counts.max():
        raise OptionError(
            f"importance 'fpgm' compares units element by element, but the units of group {group.name!r} own "
            f"between {counts.min()} and {counts.max()} positions of {member.tensor!r}; choose another one"
        )
    # [rows, size, everything else], then one line per position.
    blocks = values.reshape(member.rows, -1, *values.shape[1:]).movedim(member.dim + 1, 1)
    lines = blocks.reshape(member.rows * member.size, -1)
    by_unit = torch.from_numpy(member.index[np.argsort(member.unit, kind="stable")])
    return lines.index_select(0, by_unit.to(values.device)).view(group.n_units, -1)


def _wide(tensor: Tensor) -> Tensor:
    """Give at least float32: squares of float16 overflow from 256 on."""
    tensor = real(tensor.detach())
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _any(tensors: Mapping[str, Tensor]) -> Tensor:
    return next(iter(tensors.values()), torch.empty(0))
