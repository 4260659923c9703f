"""cuDNN wants the weights of a recurrent layer side by side; else it copies them in every call."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator

from torch import Tensor, nn

__all__ = ["holders_of", "lay_side_by_side"]


def holders_of(modules: Iterable[nn.Module], tensors: Container[int]) -> Iterator[nn.RNNBase]:
    """Yield the recurrent layers that hold one of some tensors.

    Args:
        modules: Where to look.
        tensors: The ``id`` of each.
    """
    for module in modules:
        if isinstance(module, nn.RNNBase) and any(id(p) in tensors for p in module.parameters(recurse=False)):
            yield module


def lay_side_by_side(model: nn.Module, changed: Iterable[Tensor]) -> None:
    """Put the weights of recurrent layers into one piece of memory again. No effect on a CPU.

    Args:
        model: Its layers are looked at.
        changed: Tensors that have got memory of their own.
    """
    for layer in holders_of(model.modules(), {id(tensor) for tensor in changed}):
        layer.flatten_parameters()
