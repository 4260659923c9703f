"""Every option of the pruner, once, typed and checked at construction."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lightning_prune.errors import OptionError

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

    def __post_init__(self) -> None:
        """Check what can be checked without a model.

        Raises:
            OptionError: Naming the option, what was given and what is meant.
        """
        _share("max_pruning_ratio", self.max_pruning_ratio, closed=True)
        _share("head_pruning_ratio", self.head_pruning_ratio)
        for name in ("pruning_ratio_dict", "head_pruning_ratio_dict"):
            table = getattr(self, name)
            if table is not None and not isinstance(table, Mapping):
                raise OptionError(f"{name} must be a mapping {{name: ratio}}, got {type(table).__name__}")
            for key, value in (table or {}).items():
                _share(f"{name}[{key!r}]", value)
        if self.round_to is not None and (not _is_int(self.round_to) or self.round_to < 1):
            raise OptionError(
                f"round_to must be a whole number >= 1 or None, got {self.round_to!r}; 8 keeps multiples of 8"
            )
        for name in ("global_pruning", "isomorphic", "prune_num_heads", "prune_head_dims", "include_bias"):
            if not isinstance(getattr(self, name), bool):
                raise OptionError(f"{name} must be True or False, got {getattr(self, name)!r}")
        for name, low, high in (("reg", 0.0, float("inf")), ("alpha", 0.0, 64.0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
                raise OptionError(f"{name} must be a number in [{low:g}, {high:g}], got {value!r}")
        if self.nan_policy not in ("raise", "skip", "zero"):
            raise OptionError(f"nan_policy must be 'raise', 'skip' or 'zero', got {self.nan_policy!r}")
        if isinstance(self.ignored_layers, str) or not isinstance(self.ignored_layers, Iterable):
            raise OptionError(
                f"ignored_layers must be a list of modules, names, globs or types, got {self.ignored_layers!r}"
            )
        for name in ("forward_fn", "output_transform"):
            if getattr(self, name) is not None and not callable(getattr(self, name)):
                raise OptionError(
                    f"{name} must be callable or None, got {type(getattr(self, name)).__name__}"
                )
        if self.budget is not None:
            check_budget(self.budget)


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _share(name: str, value: Any, *, closed: bool = False) -> None:
    good = (
        isinstance(value, (int, float))
        and not isinstance(value, bool)
        and (0 <= value < 1 or (closed and value == 1))
    )
    if not good:
        raise OptionError(
            f"{name} must be a number in [0, 1{']' if closed else ')'}, got {value!r}; 0.3 is 30 % of the units"
        )


def check_budget(budget: Mapping[str, float]) -> dict[str, float]:
    """One of macs or params, a share in (0, 1].

    >>> check_budget({"macs": 0.5})
    {'macs': 0.5}
    """
    if not isinstance(budget, Mapping) or len(budget) != 1 or next(iter(budget)) not in ("macs", "params"):
        raise OptionError(f'budget must be {{"macs": share}} or {{"params": share}}, got {budget!r}')
    ((name, share),) = budget.items()
    if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 < share <= 1:
        raise OptionError(f"budget {name} must be a share of the dense model in (0, 1], got {share!r}")
    return {str(name): float(share)}
