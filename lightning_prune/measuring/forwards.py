"""A forward to measure: whatever is borrowed from the model for it is given back.

That is train flags, buffers, random states and grad mode.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_leaves, tree_map_only

from lightning_prune.errors import OptionError, TraceError
from lightning_prune.randomness import randomness_kept
from lightning_prune.surgery.tensors import tensors_of

__all__ = ["ForwardFn", "check_model", "devices", "measured_forward"]

ForwardFn = Callable[[nn.Module, Any], Any]


@contextmanager
def measured_forward(
    model: nn.Module, example_inputs: Any, forward_fn: ForwardFn | None = None
) -> Iterator[Callable[[], Any]]:
    """Give a call of the model in eval mode without gradients; afterwards the model is as it was found.

    Args:
        model: Any module.
        example_inputs: A tensor, a tuple of positional arguments or a mapping of keyword arguments; moved
            to the model's device where the model has only one.
        forward_fn: ``forward_fn(model, example_inputs)`` replaces the call.

    Yields:
        A function without arguments that runs one forward.

    Raises:
        TraceError: If that forward fails.

    >>> with measured_forward(nn.Dropout(), torch.ones(2)) as forward:
    ...     forward()
    tensor([1., 1.])
    """
    inputs = _on_device_of(model, example_inputs)

    def forward() -> Any:
        try:
            return _call(model, inputs, forward_fn)
        except Exception as error:
            raise TraceError(
                f"measuring {type(model).__name__} on {_describe(inputs)} was asked, but its forward raised "
                f"{type(error).__name__}: {error}. Pass inputs that model(...) takes, or a forward_fn."
            ) from error

    with _undisturbed(model), torch.no_grad():
        yield forward


def _call(model: nn.Module, inputs: Any, forward_fn: ForwardFn | None) -> Any:
    if forward_fn is not None:
        return forward_fn(model, inputs)
    if isinstance(inputs, Mapping):
        return model(**inputs)
    if isinstance(inputs, tuple):
        return model(*inputs)
    return model(inputs)


def _describe(inputs: Any) -> str:
    leaves = tree_leaves(dict(inputs) if isinstance(inputs, Mapping) else inputs)
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    shapes = [f"{str(t.dtype).removeprefix('torch.')}{list(t.shape)}" for t in tensors]
    return ", ".join(shapes) if shapes else f"a {type(inputs).__name__}"


def devices(model: nn.Module) -> list[torch.device]:
    """List where parameters and buffers lie."""
    return list(dict.fromkeys(t.device for t in (*model.parameters(), *model.buffers())))


def _on_device_of(model: nn.Module, inputs: Any) -> Any:
    places = devices(model)
    if len(places) != 1:
        return inputs
    plain = dict(inputs) if isinstance(inputs, Mapping) else inputs
    return tree_map_only(Tensor, lambda t: t.to(places[0]), plain)


def check_model(model: nn.Module) -> None:
    """See that there is something to run.

    Raises:
        OptionError: If ``model`` is not a module.
        TraceError: If a parameter is uninitialised.
    """
    if not isinstance(model, nn.Module):
        raise OptionError(
            f"expected model to be a torch.nn.Module but got {type(model).__name__}; pass the network itself"
        )
    lazy = [name for name, p in tensors_of(model).items() if is_lazy(p)]
    if lazy:
        raise TraceError(
            f"the cost of {type(model).__name__} was asked, but {len(lazy)} of its tensors have no shape yet "
            f"({', '.join(lazy[:4])}); run one batch through the model first"
        )


@contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    """Put the model into eval mode; give back train flags, buffers and every random state."""
    # Flags are set one by one: ``eval()`` may be overridden and do more than that, such as merging adapters.
    flags = [(module, module.training) for module in model.modules()]
    buffers = {name: (buffer, buffer.clone()) for name, buffer in model.named_buffers(remove_duplicate=False)}
    with randomness_kept():
        try:
            for module, _ in flags:
                module.training = False
            yield
        finally:
            for module, flag in flags:
                module.training = flag
            _restore_buffers(model, buffers)


def _restore_buffers(model: nn.Module, before: Mapping[str, tuple[Tensor, Tensor]]) -> None:
    now = dict(model.named_buffers(remove_duplicate=False))
    for name in now.keys() - before.keys():
        owner, _, leaf = name.rpartition(".")
        delattr(model.get_submodule(owner), leaf)
    for name, (buffer, copy) in before.items():
        if now.get(name) is not buffer:
            owner, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(owner), leaf, buffer)
        if not buffer.is_meta and not torch.equal(buffer, copy):
            buffer.copy_(copy)
