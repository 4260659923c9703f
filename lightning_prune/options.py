"""Every option of the pruner, once, typed and checked at construction."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

__all__ = ["PruningOptions"]


@dataclass(frozen=True)
class PruningOptions:
    """Options of ``GroupNormPruner`` beyond ratio and steps; meanings in docs/options.md."""

    importance: str | Callable[..., Any] = "group_norm"
    pruning_ratio_dict: Mapping[Any, float] | None = None
    max_pruning_ratio: float = 1.0
    iterative_pruning_ratio_scheduler: str | Callable[[float, int], Sequence[float]] = "linear"
    global_pruning: bool = False
    isomorphic: bool = False
    ignored_layers: Sequence[Any] = ()
    round_to: int | None = None
    in_channel_groups: Mapping[Any, int] | None = None
    out_channel_groups: Mapping[Any, int] | None = None
    num_heads: Mapping[Any, int] | None = None
    prune_num_heads: bool = False
    prune_head_dims: bool = True
    head_pruning_ratio: float = 0.0
    head_pruning_ratio_dict: Mapping[Any, float] | None = None
    customized_pruners: Mapping[Any, Any] | None = None
    unwrapped_parameters: Any = None
    budget: Mapping[str, float] | None = None
    normalizer: str | Callable[..., Any] | None = "mean"
    include_bias: bool = False
    reg: float = 1e-4
    alpha: float = 4.0
    nan_policy: str = "skip"
    forward_fn: Callable[..., Any] | None = None
    output_transform: Callable[..., Any] | None = None
