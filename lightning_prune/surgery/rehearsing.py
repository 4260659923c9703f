"""What torch would say of a state dict, found out on a twin without values, before the model is touched.

Which keys may be absent and which shapes fit is for torch and for the modules to say, and they say it while
they load. So the load is tried first, on a copy of the module tree whose tensors have shapes and no storage.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

__all__ = ["Verdict", "rehearse"]


class Verdict(NamedTuple):
    """What a load would find: keys that are missing, keys of no use, and what does not fit in words."""

    missing: list[str]
    unexpected: list[str]
    errors: list[str]


def rehearse(
    model: nn.Module,
    shapes: Mapping[str, tuple[int, ...]],
    state: Mapping[str, Any],
    *,
    own_hook: Callable[..., Any],
) -> Verdict | None:
    """Load ``state`` into a twin of ``model``, which is not touched.

    Args:
        model: Root of the load.
        shapes: Shapes of its tensors at the time of the load, where they are others than now.
        state: The state dict, its keys relative to ``model``.
        own_hook: The pre-hook that leads to those shapes; the twin does without it.

    Returns:
        The verdict; None where it cannot be known, since other hooks have a word in the load, or since a
        module does not load on a twin.
    """
    if any(_has_other_hooks(module, own_hook) for module in model.modules()):
        return None
    metadata = getattr(state, "_metadata", None) or {}
    verdict = Verdict([], [], _without_values(model, state, metadata))
    held = {key: _emptied(value) for key, value in state.items()}
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # copies into tensors without storage do nothing
            _load(_twin(model, _by_identity(model, shapes)), held, metadata, "", verdict)
    except Exception:  # of a module's own loading code, which will speak for itself
        return None
    return verdict


def _has_other_hooks(module: nn.Module, own_hook: Callable[..., Any]) -> bool:
    before = [getattr(hook, "hook", hook) for hook in module._load_state_dict_pre_hooks.values()]
    return bool(module._load_state_dict_post_hooks) or any(hook is not own_hook for hook in before)


def _without_values(model: nn.Module, state: Mapping[str, Any], metadata: Mapping[str, Any]) -> list[str]:
    if metadata.get("", {}).get("assign_to_params_buffers"):
        return []
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return [
        f"{key!r} in the state dict has no values (it lies on the meta device)"
        for key, value in state.items()
        if isinstance(value, Tensor) and value.is_meta and key in tensors and not tensors[key].is_meta
    ]


def _emptied(value: Any) -> Any:
    if type(value) in {Tensor, nn.Parameter}:
        return torch.empty_like(value, device="meta", requires_grad=False)
    return value


def _by_identity(model: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> dict[int, tuple[int, ...]]:
    """Tied tensors have several names, and ``shapes`` may know one of them."""
    named = (
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    )
    return {id(tensor): shapes[name] for name, tensor in named if name in shapes}


def _twin(module: nn.Module, shapes: Mapping[int, tuple[int, ...]]) -> nn.Module:
    def empty(tensor: Tensor | None) -> Tensor | None:
        if tensor is None:
            return None
        shape = shapes.get(id(tensor), tuple(tensor.shape))
        new = torch.empty(shape, dtype=tensor.dtype, device="meta")
        return nn.Parameter(new, requires_grad=False) if isinstance(tensor, nn.Parameter) else new

    twin: nn.Module = object.__new__(type(module))
    vars(twin).update(vars(module))
    vars(twin).update(
        _parameters={name: empty(tensor) for name, tensor in module._parameters.items()},
        _buffers={name: empty(tensor) for name, tensor in module._buffers.items()},
        _modules={name: c if c is None else _twin(c, shapes) for name, c in module._modules.items()},
        _load_state_dict_pre_hooks={},
        set_extra_state=lambda state: None,
    )
    return twin


def _load(
    twin: nn.Module, state: dict[str, Any], metadata: Mapping[str, Any], prefix: str, verdict: Verdict
) -> None:
    """Do as ``load_state_dict`` does."""
    twin._load_from_state_dict(state, prefix, dict(metadata.get(prefix[:-1], {})), True, *verdict)
    for name, child in twin._modules.items():
        if child is not None:
            below = f"{prefix}{name}."
            part = {key: value for key, value in state.items() if key.startswith(below)}
            _load(child, part, metadata, below, verdict)
