"""Ranking: the scores that selection compares, normalised per group, units without a finite score last."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeAlias

import torch
from torch import Tensor

from lightning_prune.errors import OptionError, PruneError
from lightning_prune.graph.groups import Group
from lightning_prune.scores.importance import IMPORTANCES, Evidence
from lightning_prune.scores.members import check_nan_policy, listed, non_finite
from lightning_prune.scores.normalizers import Normalizer, check_normalizer, normalize
from lightning_prune.surgery.scratch import Scratch

__all__ = ["UserImportance", "check_importance", "rank", "score"]

UserImportance: TypeAlias = Callable[[Group], Any]


def rank(
    groups: Sequence[Group],
    tensors: Mapping[str, Tensor],
    *,
    importance: str | UserImportance = "group_norm",
    normalizer: str | Normalizer | None = "mean",
    nan_policy: str = "skip",
    evidence: Evidence | None = None,
) -> list[Tensor]:
    """Give the scores that selection compares: normalised per group, units without a finite score last.

    Args:
        groups: The groups; their order matters to ``random`` alone.
        tensors: All named parameters, without buffers.
        importance: A name in ``IMPORTANCES`` or a callable ``group -> scores [n_units]``, higher = keep.
        normalizer: A name in ``NORMALIZERS``, None or a callable; see ``normalize``.
        nan_policy: Where a score is not finite: ``skip`` gives -inf, so that the unit goes first; ``zero``
            gives 0, which no norm is below, so that it is never strong; ``raise`` refuses. The first two warn
            once, with names.
        evidence: What scores may look at beyond the weights; the memo in it is replaced.

    Returns:
        Per group, [n_units] floating point, higher = keep, -inf where no finite score exists.

    Raises:
        OptionError: If an option is unknown, or a callable returns something else than it should.
        PruneError: If a score is not finite and ``nan_policy`` is ``raise``.
    """
    check_nan_policy(nan_policy)
    check_importance(importance)
    check_normalizer(normalizer)
    zero = nan_policy == "zero"
    wanted: dict[str, set[tuple[int, int]]] = {}
    for member in (m for g in groups for m in g.members if not m.is_buffer):
        wanted.setdefault(member.tensor, set()).add((member.dim, member.rows))
    evidence = replace(evidence or Evidence(), memo={}, wanted=wanted, scratch=Scratch())
    scores = [score(importance, group, tensors, evidence) for group in groups]
    bad = [i for i, s in enumerate(scores) if not bool(s.isfinite().all())]
    if bad:
        where = _culprits([groups[i] for i in bad], tensors)
        if nan_policy == "raise":
            raise PruneError(f"{where} (nan_policy='raise'); repair the weights, or use 'skip' or 'zero'")
        fate = "such units score 0" if zero else "units that hold such values are cut first"
        warnings.warn(f"{where}; {fate} (nan_policy={nan_policy!r})", stacklevel=2)
    if zero:
        scores = [torch.where(s.isfinite(), s, 0) for s in scores]
    return [normalize(s, normalizer) for s in scores]


def score(
    importance: str | UserImportance, group: Group, tensors: Mapping[str, Tensor], evidence: Evidence
) -> Tensor:
    """Score the units of one group, as they come: neither normalised nor freed of non-finite values.

    Args:
        importance: A name in ``IMPORTANCES`` or a callable ``group -> scores [n_units]``, higher = keep.
        group: The group.
        tensors: All named parameters.
        evidence: What scores may look at beyond the weights.

    Returns:
        [n_units] floating point.

    Raises:
        OptionError: If the name is unknown, or the callable does not return one real number per unit.
    """
    check_importance(importance)
    if not isinstance(importance, str):
        return _own(importance, group)
    return IMPORTANCES[importance](group, tensors, evidence)


def check_importance(importance: Any) -> None:
    """Refuse what is neither the name of an importance nor a callable.

    Raises:
        OptionError: With the names there are.
    """
    if callable(importance):
        return
    if not isinstance(importance, str):
        raise OptionError(
            f"importance must be a name or a callable group -> scores, got {type(importance).__name__}"
        )
    if importance not in IMPORTANCES:
        near = difflib.get_close_matches(importance, IMPORTANCES, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise OptionError(
            f"importance must be one of {', '.join(IMPORTANCES)} or a callable, got {importance!r}{hint}"
        )


def _own(importance: UserImportance, group: Group) -> Tensor:
    """Call a user's importance and hold it to one real number per unit."""
    name = getattr(importance, "__name__", type(importance).__name__)
    asked = f"importance {name!r} must give {group.n_units} real scores, one per unit of group {group.name!r}"
    try:
        found = torch.as_tensor(importance(group)).detach()
    except (TypeError, ValueError, RuntimeError) as error:
        raise OptionError(f"{asked}; it failed with {type(error).__name__}: {error}") from error
    if found.shape != (group.n_units,) or found.is_complex() or found.dtype == torch.bool:
        raise OptionError(f"{asked}, got {found.dtype} of shape {list(found.shape)}")
    return found if found.dtype == torch.float64 else found.float()


def _culprits(groups: Sequence[Group], tensors: Mapping[str, Tensor]) -> str:
    """Say where non-finite scores come from: the tensors at fault, else the groups."""
    names = non_finite((m.tensor for g in groups for m in g.members if not m.is_buffer), tensors)
    if names:
        return f"NaN or infinity in {listed(names)}"
    return f"the scores of {listed([g.name for g in groups])} are not finite, though the weights are"
