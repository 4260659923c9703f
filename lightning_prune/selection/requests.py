"""Options -> what is asked of a selection: pools, ratios, locks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import nn

from lightning_prune.errors import EmptyGroupError, OptionError
from lightning_prune.graph.analysis import Analysis
from lightning_prune.graph.groups import Group
from lightning_prune.options import PruningOptions
from lightning_prune.selection.naming import is_named, tensors_named
from lightning_prune.selection.selecting import Demand, Pool

Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

HEAD = "head|"


def key(group: Group) -> str:
    """Name of a group that stays the same from cut to cut."""
    places = ",".join(f"{m.tensor}:{m.dim}" for m in group.members if not m.is_buffer)
    return (HEAD if group.kind == "head" else "") + places


@dataclass(frozen=True)
class Targets:
    """Final ratio of every group, and which groups rank together.

    Args:
        ratio: [n_groups] final share to remove; 0 = stays whole.
        scope: [n_groups] groups with equal numbers rank together.
        locked: [n_units] units that stay.
    """

    ratio: tuple[float, ...]
    scope: tuple[int, ...]
    locked: Bools = field(compare=False)


def targets(
    analysis: Analysis,
    options: PruningOptions,
    ratio: float,
    head_dims: frozenset[str],
    *,
    is_new: bool = True,
) -> Targets:
    """Resolve ratios, dictionaries, ignored layers and scopes for one graph.

    Args:
        analysis: The graph.
        options: All options.
        ratio: Ratio of groups that no dictionary names.
        head_dims: Keys of groups that were head dims once.
        is_new: Whether nothing has been cut yet: later an entry may have run out of units.

    Raises:
        OptionError: If a name matches nothing.
        EmptyGroupError: If an entry of a dictionary holds no prunable unit.
    """
    groups = analysis.groups
    locked = np.zeros(analysis.graph.n_units, bool)
    for what in options.ignored_layers:
        locked |= owned(analysis, tensors_named(analysis.model, what, "ignored_layers"))
    ratios = [_default_ratio(g, options, ratio, head_dims) for g in groups]
    scopes = _default_scopes(groups, options)
    tables = (
        (options.pruning_ratio_dict, False, "pruning_ratio_dict"),
        (options.head_pruning_ratio_dict, True, "head_pruning_ratio_dict"),
    )
    for table, heads, name in tables:
        _apply_table(analysis, table or {}, heads, name, ratios, scopes, options, is_new)
    return Targets(tuple(ratios), tuple(scopes), locked)


def reaches_all(options: PruningOptions, ratio: float, keys: Iterable[str]) -> bool:
    """Say whether something is asked of every group, whatever the graph: the options leave none out.

    Args:
        options: All options.
        ratio: Ratio of groups that no dictionary names.
        keys: Names of the groups, as ``key`` gives them.
    """
    leaves_out = options.ignored_layers or options.pruning_ratio_dict or options.head_pruning_ratio_dict
    has_heads = any(name.startswith(HEAD) for name in keys)
    heads_go = options.prune_head_dims and (options.prune_num_heads or not has_heads)
    return ratio > 0 and heads_go and not leaves_out


def owned(analysis: Analysis, tensors: frozenset[str]) -> Bools:
    """[n_units] True for units that reach into these tensors, but not by the input side of a weight alone."""
    mask = np.zeros(analysis.graph.n_units, bool)
    for group in analysis.groups:
        for m in group.members:
            if m.tensor in tensors and (m.tensor, m.dim) not in analysis.graph.tracer.inputs:
                mask[group.units[m.unit]] = True
    return mask


def _default_ratio(group: Group, options: PruningOptions, ratio: float, head_dims: frozenset[str]) -> float:
    if group.kind == "head":
        return (options.head_pruning_ratio or ratio) if options.prune_num_heads else 0.0
    if (group.kind == "head_dim" or key(group) in head_dims) and not options.prune_head_dims:
        return 0.0
    return ratio


def _default_scopes(groups: Sequence[Group], options: PruningOptions) -> list[int]:
    """Alone, all together, or by isomorphism class; heads never rank against channels."""
    if options.isomorphic:
        classes = {name: i for i, name in enumerate(dict.fromkeys(g.isomorphism for g in groups))}
        return [classes[g.isomorphism] for g in groups]
    if options.global_pruning:
        return [1 if g.kind == "head" else 0 for g in groups]
    return list(range(len(groups)))


def _apply_table(
    analysis: Analysis,
    table: Mapping[Any, float],
    heads: bool,
    option: str,
    ratios: list[float],
    scopes: list[int],
    options: PruningOptions,
    is_new: bool,
) -> None:
    if heads and table and not options.prune_num_heads:
        raise OptionError(
            "head_pruning_ratio_dict was given with prune_num_heads=False; set prune_num_heads=True"
        )
    for number, (what, ratio) in enumerate(table.items()):
        check_ratio(f"{option}[{what!r}]", ratio)
        names = what if isinstance(what, tuple) else (what,)
        tensors = frozenset().union(*(tensors_named(analysis.model, n, option) for n in names))
        mask = owned(analysis, tensors)
        hit = [
            i for i, g in enumerate(analysis.groups) if (g.kind == "head") == heads and mask[g.units].any()
        ]
        if not hit and is_new:
            raise EmptyGroupError(
                f"{option}: {what!r} holds no prunable {'head' if heads else 'unit'}; "
                "explain(name, dim) says why its dimensions stay."
            )
        alone = _default_scopes(analysis.groups, options)
        for i in hit:
            ratios[i] = float(ratio)
            own = 0 if isinstance(what, tuple) else alone[i]
            scopes[i] = 10_000_000 + (2 * number + heads) * 100_000 + own


def check_ratio(name: str, value: Any) -> float:
    """A share to remove.

    >>> check_ratio("pruning_ratio", 0.5)
    0.5
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1:
        raise OptionError(f"{name} must be a number in [0, 1), got {value!r}; 0.3 removes 30 % of the units.")
    return float(value)


def demand(
    numbers: Sequence[int],
    goal: Targets,
    ratios: Sequence[float],
    initial: Ints,
    locked: Bools,
    options: PruningOptions,
) -> Demand:
    """What ``select`` is asked for some of the groups.

    Args:
        numbers: Which groups of the graph are handed to ``select``, in its order.
        goal: Scopes of all groups.
        ratios: [n_groups of the graph] share to be gone after this step.
        initial: [len(numbers)] initial counts.
        locked: [n_units] units that stay.
        options: Caps and rounding.
    """
    pools: dict[tuple[int, float], list[int]] = {}
    for place, i in enumerate(numbers):
        if ratios[i] > 0:
            pools.setdefault((goal.scope[i], ratios[i]), []).append(place)
    return Demand(
        pools=tuple(Pool(tuple(places), ratio) for (_, ratio), places in pools.items()),
        initial=initial,
        locked=locked,
        max_pruning_ratio=options.max_pruning_ratio,
        round_to=options.round_to,
    )


def check_counts(analysis: Analysis, options: PruningOptions) -> None:
    """Numbers of groups and heads that the user gave, against those of the trace."""
    for option in ("in_channel_groups", "out_channel_groups", "num_heads"):
        for what, asked in (getattr(options, option) or {}).items():
            names = tensors_named(analysis.model, what, option)
            found = _rows_found(analysis, names)
            if int(asked) != found:
                shown = what if isinstance(what, str) else type(what).__name__
                raise OptionError(
                    f"{option}: {asked} was given for {shown}, the trace found {found}. "
                    "Leave the option out, it is inferred."
                )


def check_custom(model: nn.Module, custom: Any) -> None:
    """Every key of ``customized_pruners`` names a module, a name, a glob or a type of the model.

    Raises:
        OptionError: If it is no mapping, or a key matches nothing.
    """
    if custom is not None and not isinstance(custom, Mapping):
        raise OptionError(
            f"customized_pruners must be a mapping {{type or name: rule}}, got {type(custom).__name__}"
        )
    for what in custom or {}:
        if not any(is_named(name, module, what) for name, module in model.named_modules()):
            tensors_named(model, what, "customized_pruners")


def _rows_found(analysis: Analysis, tensors: frozenset[str]) -> int:
    """Blocks that dimensions of these tensors split into: heads or convolution groups; 1 for none."""
    model = analysis.model
    for name, module in model.named_modules():
        if (
            isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d))
            and f"{name}.weight".lstrip(".") in tensors
            and module.groups > 1
        ):
            return int(module.groups)
    counts = [
        g.n_units for g in analysis.groups if g.kind == "head" and any(m.tensor in tensors for m in g.members)
    ]
    if counts:
        return max(counts)
    reached = {int(c) for p in analysis.graph.places if p.tensor in tensors for c in np.unique(p.classes)}
    for rows, owners, _ in analysis.graph.tracer.ledger.grids:
        classes = set(np.unique(analysis.graph.classes.of[rows]).tolist())
        if owners is not None and classes & reached - {0}:
            return len(rows)
    return 1


def unwrapped(model: nn.Module, given: Any) -> Callable[..., None] | None:
    """Channel dimensions of bare parameters as the user names them: every other dimension stays.

    Raises:
        OptionError: If a parameter or a dimension does not exist.
    """
    if not given:
        return None
    pairs = list(given.items()) if isinstance(given, Mapping) else list(given)
    names = {id(p): n for n, p in model.named_parameters()}
    table: dict[str, int] = {}
    for what, dim in pairs:
        name = what if isinstance(what, str) else names.get(id(what))
        parameters = dict(model.named_parameters())
        if name not in parameters:
            shown = what if isinstance(what, str) else "a tensor"
            raise OptionError(
                f"unwrapped_parameters: {shown} is no parameter of the model; "
                f"name one of {list(parameters)[:8]}"
            )
        if (
            isinstance(dim, bool)
            or not isinstance(dim, int)
            or not -parameters[name].ndim <= dim < parameters[name].ndim
        ):
            raise OptionError(
                f"unwrapped_parameters: {name} has {parameters[name].ndim} dimensions, "
                f"dim {dim!r} is none of them"
            )
        table[name] = dim % parameters[name].ndim

    def prepare(tracer: Any, twin: nn.Module) -> None:
        for name, dim in table.items():
            for d, label in enumerate(tracer.leaves[name]):
                if d != dim:
                    tracer.freeze(label, f"unwrapped_parameters says that dim {dim} carries the channels")

    return prepare
