"""Every option of the pruner, once, typed and checked at construction."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from importlib.util import find_spec
from typing import Any

import torch

from lightning_prune.errors import OptionError

__all__ = ["BUDGETS", "PruningOptions", "check_budget"]

BUDGETS = ("macs", "params", "memory", "latency")


@dataclass(frozen=True)
class PruningOptions:
    """Options of ``GroupNormPruner`` beyond ratio and steps; examples are in docs/options.md.

    A layer is named by the module, its name, a glob over names, or its type.

    Args:
        importance: How units are scored: ``group_norm``, ``l1``, ``l2``, ``lamp``, ``fpgm``, ``bn_scale``,
            ``random``; by data ``taylor``, ``hessian``, ``activation``; or a callable ``importance(group)``.
        pruning_ratio_dict: Ratio per layer, in [0, 1), instead of the overall one.
        max_pruning_ratio: Largest share to remove of any group, in [0, 1].
        iterative_pruning_ratio_scheduler: Course of the ratio over the steps: ``linear``, ``cubic``,
            ``exponential``, ``one_shot``, or a callable ``scheduler(ratio, steps)``.
        global_pruning: Rank the units of all groups together.
        isomorphic: Rank the units of groups of equal structure together.
        ignored_layers: Layers whose outputs stay whole: names as in ``named_modules()`` or globs
            (``head.*``); from Python also modules and types.
        round_to: Keep channel counts at multiples of this; None: any count.
        in_channel_groups: Blocks of a layer's inputs, to be compared with those that the trace found.
        out_channel_groups: Blocks of a layer's outputs, to be compared with those that the trace found.
        num_heads: Attention heads per layer, to be compared with those that the trace found.
        prune_num_heads: Remove whole heads.
        prune_head_dims: Make heads narrower.
        head_pruning_ratio: Share of the heads to remove, in [0, 1); needs ``prune_num_heads``.
        head_pruning_ratio_dict: The same per layer.
        customized_pruners: Rules for layers of your own, by layer.
        unwrapped_parameters: Dimension of a bare parameter to prune, instead of the one the trace finds.
        budget: ``{name: share}`` of the dense network to keep, in (0, 1], instead of the ratio; the name is
            ``macs``, ``params``, ``memory`` or ``latency``.
        normalizer: What brings scores of different groups to one scale: ``mean``, ``max``, ``none``, or a
            callable.
        include_bias: Count biases in scores and penalty.
        reg: Strength of the sparsity penalty, >= 0.
        alpha: The weakest unit is pressed ``2 ** alpha`` times as hard as the strongest, in [0, 64].
        nan_policy: What non-finite numbers do: ``raise``, ``skip`` or ``zero``.
        fused: Press weights by kernels of our own on a GPU (Triton) and by native loops on a CPU (Numba,
            extra ``fused``), in less time than PyTorch's operations take. None: where that is installed.
        forward_fn: ``forward_fn(model, example_inputs)`` replaces the call of the model.
        output_transform: Applied to the output of the traced forward.
    """

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
    fused: bool | None = None
    forward_fn: Callable[..., Any] | None = None
    output_transform: Callable[..., Any] | None = None

    def as_keywords(self) -> dict[str, Any]:
        """Give the fields as the keywords of ``GroupNormPruner``.

        >>> PruningOptions(round_to=8).as_keywords()["round_to"]
        8
        """
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def __post_init__(self) -> None:
        """Check what can be checked without a model.

        Raises:
            OptionError: Naming the option, what was given and what is meant.
        """
        _share("max_pruning_ratio", self.max_pruning_ratio, closed=True)
        _share("head_pruning_ratio", self.head_pruning_ratio)
        for name in ("pruning_ratio_dict", "head_pruning_ratio_dict"):
            _shares(name, getattr(self, name))
        flags = (
            "global_pruning",
            "isomorphic",
            "prune_num_heads",
            "prune_head_dims",
            "include_bias",
        )
        for name in flags:
            _one_of(name, getattr(self, name), (True, False))
        _one_of("fused", self.fused, (True, False, None))
        if self.fused:
            _can_fuse()
        _one_of("nan_policy", self.nan_policy, ("raise", "skip", "zero"))
        _number("reg", self.reg, float("inf"))
        _number("alpha", self.alpha, 64.0)
        _multiple("round_to", self.round_to)
        _callables(forward_fn=self.forward_fn, output_transform=self.output_transform)
        if isinstance(self.ignored_layers, str) or not isinstance(self.ignored_layers, Iterable):
            raise OptionError(
                f"ignored_layers must be a list of modules, names, globs or types, "
                f"got {self.ignored_layers!r}"
            )
        if self.budget is not None:
            check_budget(self.budget)


def _share(name: str, value: Any, *, closed: bool = False) -> None:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not (0 <= value < 1 or (closed and value == 1)):
        raise OptionError(
            f"{name} must be a number in [0, 1{']' if closed else ')'}, got {value!r}; "
            "0.3 is 30 % of the units"
        )


def _shares(name: str, table: Any) -> None:
    if table is not None and not isinstance(table, Mapping):
        raise OptionError(f"{name} must be a mapping {{name: ratio}}, got {type(table).__name__}")
    for key, value in (table or {}).items():
        _share(f"{name}[{key!r}]", value)


def _one_of(name: str, value: Any, allowed: tuple[Any, ...]) -> None:
    if not any(type(value) is type(a) and value == a for a in allowed):
        raise OptionError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")


def _number(name: str, value: Any, high: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= high:
        raise OptionError(f"{name} must be a number in [0, {high:g}], got {value!r}")


def _can_fuse() -> None:
    has_kernels = torch.cuda.is_available() and find_spec("triton") is not None
    if find_spec("numba") is None and not has_kernels:
        raise OptionError(
            "fused=True needs numba, which is not installed: pip install 'lightning-prune[fused]', "
            "or leave fused=None"
        )


def _multiple(name: str, value: Any) -> None:
    if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
        raise OptionError(
            f"{name} must be a whole number >= 1 or None, got {value!r}; 8 keeps multiples of 8"
        )


def _callables(**given: Any) -> None:
    for name, value in given.items():
        if value is not None and not callable(value):
            raise OptionError(f"{name} must be callable or None, got {type(value).__name__}")


def check_budget(budget: Mapping[str, float]) -> dict[str, float]:
    """One name of ``BUDGETS`` and a share in (0, 1].

    >>> check_budget({"macs": 0.5})
    {'macs': 0.5}
    """
    if not isinstance(budget, Mapping) or len(budget) != 1 or next(iter(budget)) not in BUDGETS:
        raise OptionError(f"budget must be {{name: share}} with one of {', '.join(BUDGETS)}, got {budget!r}")
    ((name, share),) = budget.items()
    if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 < share <= 1:
        raise OptionError(f"budget {name} must be a share of the dense model in (0, 1], got {share!r}")
    return {str(name): float(share)}
