"""Carry the state of optimizers across a cut: momenta are sliced like their parameters, not reset."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.optim import LBFGS, Adagrad, Optimizer

from lightning_prune.errors import PruneError, StrategyError
from lightning_prune.plan import Cut, Plan
from lightning_prune.surgery.cutting import cut_tensor

__all__ = ["Carrier", "StateSlicer", "register_state_slicer"]

logger = logging.getLogger(__name__)

State: TypeAlias = dict[str, Any]
StateSlicer: TypeAlias = Callable[[State, tuple[int, ...], tuple[Cut, ...]], State]
_SLICERS: dict[type[Optimizer], StateSlicer] = {}


def register_state_slicer(optimizer_cls: type[Optimizer], slicer: StateSlicer) -> None:
    """Teach the package the state of an optimizer of your own, subclasses included.

    Args:
        optimizer_cls: Class whose state the slicer knows.
        slicer: ``slicer(state, shape, cuts) -> state`` for one parameter: its state, its shape before the
            cut, and the cuts of its dimensions. It returns a new dict and leaves the old one as it is;
            ``cut_tensor`` does the cutting. An empty dict means: start again.

    >>> register_state_slicer(torch.optim.SGD, lambda state, shape, cuts: {})
    >>> _ = _SLICERS.pop(torch.optim.SGD)
    """
    _SLICERS[optimizer_cls] = slicer


@dataclass(frozen=True, eq=False)
class _Carried:
    """New state of one parameter in one optimizer; None starts it again. ``shape`` is that after the cut."""

    optimizer: Optimizer
    parameter: Tensor
    group: Mapping[str, Any]
    shape: tuple[int, ...]
    state: State | None
    checked: bool


class Carrier:
    """State of optimizers as it will be after a cut, computed before it.

    Parameter groups, their parameters and hyper-parameters are never touched. Between ``of`` and ``commit``
    the model is cut, and the optimizers do not step.

    >>> from lightning_prune.plan import Cut
    >>> layer = nn.Linear(3, 4)
    >>> sgd = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9)
    >>> layer(torch.ones(2, 3)).sum().backward(); sgd.step()
    >>> carrier = Carrier.of(sgd, layer, Plan(cuts=(Cut("bias", 0, 4, (0, 2)),)))
    >>> layer.bias.data = layer.bias.data[[0, 2]]
    >>> carrier.commit()
    >>> sgd.state[layer.bias]["momentum_buffer"].tolist()
    [2.0, 2.0]
    """

    def __init__(self, carried: list[_Carried], flattened: list[Optimizer]) -> None:
        self._carried = carried
        self._flattened = flattened

    @staticmethod
    def of(optimizers: Any, model: nn.Module, plan: Plan) -> Carrier:
        """Slice the state of every cut parameter, without changing anything yet.

        Args:
            optimizers: One optimizer or an iterable of them; wrappers that hold theirs as ``_optimizer``
                (Lightning's) are looked through.
            model: The model before the cut.
            plan: What will be applied to it.

        Raises:
            StrategyError: If an optimizer shards its state over processes.
        """
        cuts = _cuts_by_tensor(model, plan)
        carried: list[_Carried] = []
        flattened: list[Optimizer] = []
        warned: set[tuple[str, str]] = set()
        for optimizer in _unwrapped(optimizers):
            touched = [(p, g) for g in optimizer.param_groups for p in g["params"] if id(p) in cuts]
            if isinstance(optimizer, LBFGS):  # its directions span all parameters in one vector
                flattened += [optimizer] if touched else []
            else:
                carried += [
                    _carry(optimizer, p, g, cuts[id(p)], warned) for p, g in touched if optimizer.state.get(p)
                ]
        return Carrier(carried, flattened)

    def commit(self) -> None:
        """Give the optimizers their new state; the model has been cut by now.

        Raises:
            PruneError: If a state does not have the shape of its parameter. Nothing was changed then.
        """
        for item in self._carried:
            _check(item)
        for item in self._carried:
            state = _restarted(item) if item.state is None else item.state
            if state:
                item.optimizer.state[item.parameter] = state
            else:
                item.optimizer.state.pop(item.parameter, None)
        for optimizer in self._flattened:
            logger.info(
                "LBFGS keeps its history as one flat vector, which no cut can follow: it starts again"
            )
            optimizer.state.clear()
            vars(optimizer)["_numel_cache"] = None


def _unwrapped(optimizers: Any) -> Iterator[Optimizer]:
    several = isinstance(optimizers, Iterable) and not hasattr(optimizers, "param_groups")
    for optimizer in optimizers if several else (optimizers,):
        raw = getattr(optimizer, "_optimizer", optimizer)
        if any(cls.__name__ == "ZeroRedundancyOptimizer" for cls in type(raw).__mro__):
            raise StrategyError(
                "ZeroRedundancyOptimizer shards its state over processes, so it cannot follow a cut; "
                "use the optimizer that it wraps"
            )
        yield raw


def _cuts_by_tensor(model: nn.Module, plan: Plan) -> dict[int, tuple[Cut, ...]]:
    table = plan.by_tensor()
    named = model.named_parameters(remove_duplicate=False)
    return {id(parameter): table[name] for name, parameter in named if name in table}


def _carry(
    optimizer: Optimizer,
    parameter: Tensor,
    group: Mapping[str, Any],
    cuts: tuple[Cut, ...],
    warned: set[tuple[str, str]],
) -> _Carried:
    before, after = tuple(parameter.shape), list(parameter.shape)
    for cut in cuts:
        after[cut.dim] = cut.kept
    old = dict(optimizer.state[parameter])
    slicer = next((_SLICERS[cls] for cls in type(optimizer).__mro__ if cls in _SLICERS), None)
    if slicer is not None:
        return _Carried(optimizer, parameter, group, tuple(after), slicer(old, before, cuts), checked=False)
    new = {key: _sliced(value, before, cuts) for key, value in old.items()}
    unknown = [key for key, value in new.items() if value is _UNKNOWN]
    for key in unknown:
        _warn_once(optimizer, key, old[key], before, warned)
    return _Carried(optimizer, parameter, group, tuple(after), None if unknown else new, checked=True)


_UNKNOWN = object()


def _sliced(value: Any, shape: tuple[int, ...], cuts: tuple[Cut, ...]) -> Any:
    """Cut what has the parameter's dimensions, each of full size or 1 (factored moments); pass numbers on."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if type(value) not in {Tensor, nn.Parameter}:
        return _UNKNOWN
    if value.dim() == 0:
        return value
    if value.dim() != len(shape) or any(
        n not in {full, 1} for n, full in zip(value.shape, shape, strict=True)
    ):
        return _UNKNOWN
    own = [cut for cut in cuts if value.shape[cut.dim] == shape[cut.dim]]
    if any(cut.rows > 1 for cut in own) and value.shape[0] != shape[0]:
        return _UNKNOWN  # one entry for rows that now keep different indices
    return cut_tensor(value, own) if own else value


def _warn_once(
    optimizer: Optimizer, key: str, value: Any, shape: tuple[int, ...], warned: set[tuple[str, str]]
) -> None:
    name = type(optimizer).__name__
    if (name, key) in warned:
        return
    warned.add((name, key))
    found = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
    warnings.warn(
        f"{name} keeps {key!r} ({found}) for a parameter of shape {shape}; it cannot be sliced, so the state "
        "of such parameters starts again. To carry it over, see optimizers.register_state_slicer",
        UserWarning,
        stacklevel=4,
    )


def _restarted(item: _Carried) -> State:
    """State of a parameter that starts again: none, except where the optimizer made it in its constructor."""
    if not isinstance(item.optimizer, Adagrad):
        return {}
    start = item.group.get("initial_accumulator_value", item.optimizer.defaults["initial_accumulator_value"])
    step = item.optimizer.state[item.parameter].get("step", torch.zeros(()))
    return {
        "step": torch.zeros_like(torch.as_tensor(step)),
        "sum": torch.full_like(item.parameter.detach(), start),
    }


def _check(item: _Carried) -> None:
    shape = tuple(item.parameter.shape)
    if shape != item.shape:
        raise PruneError(
            f"{type(item.optimizer).__name__}: a parameter was to have shape {item.shape} and has {shape}; "
            "apply the plan that the state was carried for, then commit"
        )
    tensors = {k: v for k, v in (item.state or {}).items() if isinstance(v, Tensor) and v.dim() == len(shape)}
    for key, value in tensors.items() if item.checked else ():
        if any(n not in {full, 1} for n, full in zip(value.shape, shape, strict=True)):
            raise PruneError(
                f"{type(item.optimizer).__name__}: {key!r} has shape {tuple(value.shape)}, its parameter has "
                f"{shape}; a fused optimizer would run on it silently. Report this, or register a slicer"
            )
