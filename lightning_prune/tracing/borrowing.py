"""The traced copy reads the model's own parameters; a forward that writes there gets a copy of its own."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prune.errors import TraceError

__all__ = ["Borrowed", "SharedWriteError", "copy_for_tracing", "written_by"]

# What gives the memory of a tensor to code that cannot be watched.
_LEAVES_TORCH = frozenset(("numpy", "array", "data_ptr", "dlpack"))


class SharedWriteError(Exception):
    """The forward would have written into the user's parameters."""


class Borrowed:
    """Memory that the traced copy shares with the user's model.

    Args:
        model: The user's; None if nothing is shared.

    Attributes:
        was_written: Whether a write was tried, and refused. Whoever caught the error, the trace is then void.
    """

    def __init__(self, model: nn.Module | None = None) -> None:
        lent = [] if model is None else [p for p in model.parameters() if _can_be_lent(p)]
        self._storages = {p.untyped_storage()._cdata for p in lent}
        self.was_written = False

    def watch_function(self, name: str, args: Iterable[Any]) -> None:
        """Refuse to hand shared memory to code outside torch.

        Raises:
            SharedWriteError: If the function would.
        """
        if name in _LEAVES_TORCH:
            self._refuse(args)

    def watch_operation(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Refuse an operation that writes into shared memory; call this before it runs.

        Raises:
            SharedWriteError: If it does.
        """
        written = written_by(func)
        if written and self._storages:
            self._refuse(args[i] if i < len(args) else kwargs.get(name) for i, name in written)

    def _refuse(self, values: Iterable[Any]) -> None:
        for value in values:
            if isinstance(value, (list, tuple)):
                self._refuse(value)
            elif isinstance(value, Tensor) and self._holds(value):
                self.was_written = True
                raise SharedWriteError

    def _holds(self, tensor: Tensor) -> bool:
        return tensor.layout == torch.strided and tensor.untyped_storage()._cdata in self._storages


@lru_cache(maxsize=4096)
def written_by(func: Any) -> tuple[tuple[int, str], ...]:
    """Number and name of every argument that an operation writes into."""
    arguments = enumerate(func._schema.arguments)
    return tuple((i, a.name) for i, a in arguments if a.alias_info is not None and a.alias_info.is_write)


def _can_be_lent(parameter: Any) -> bool:
    return type(parameter) is nn.Parameter and parameter.layout == torch.strided


def copy_for_tracing(model: nn.Module, *, share: bool) -> nn.Module:
    """Deep copy in eval mode.

    Args:
        model: What is copied.
        share: Whether the parameters of the copy lie in the same memory; they are tensors of their own.

    Raises:
        TraceError: If the model cannot be copied.
    """
    memo: dict[int, Any] = _shells(model) if share else {}
    try:
        twin = copy.deepcopy(model, memo)
    except Exception as error:
        raise TraceError(
            f"The model {type(model).__name__} was to be traced on a copy, but copy.deepcopy failed with "
            f"{type(error).__name__}: {error}. Detach stored tensors and drop handles that cannot be copied."
        ) from error
    return twin.eval()


def _shells(model: nn.Module) -> dict[int, Any]:
    """What deepcopy need not walk through, by id: parameters, and the many empty dicts of modules."""
    memo: dict[int, Any] = {}
    for module in model.modules():
        for value in (*vars(module).values(), *module._parameters.values()):
            if _can_be_lent(value):
                memo[id(value)] = nn.Parameter(value.data, value.requires_grad)
            elif type(value) in (dict, OrderedDict) and not value:
                memo[id(value)] = type(value)()
    return memo
