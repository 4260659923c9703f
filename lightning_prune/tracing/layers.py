"""Layers whose forward hides what it does: followed through an equal forward, or a user's rule."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prune.errors import OptionError
from lightning_prune.surgery.attention import attention_forward
from lightning_prune.surgery.patches import patch_values
from lightning_prune.tracing.labels import Tags
from lightning_prune.tracing.preparing import tracked
from lightning_prune.tracing.rules import tensors_in
from lightning_prune.tracing.tracer import Tracer

ATTENTION = "<attention>"


def replace_layers(t: Tracer, model: nn.Module, custom: Mapping[Any, Callable[..., None]] | None) -> None:
    """Give the traced copy forwards that can be followed."""
    for name, module in model.named_modules():
        rule = custom_rule(name, module, custom or {})
        if rule is not None:
            module.forward = _CustomForward(t, module, rule)
        elif isinstance(module, nn.MultiheadAttention):
            sizes = {
                key: tracked(t, name, f"{ATTENTION}.{key}", value) if isinstance(value, int) else value
                for key, value in attention_values(module).items()
            }
            module.forward = _AttentionForward(module, sizes)  # type: ignore[method-assign]


def attention_values(module: nn.MultiheadAttention) -> dict[str, Any]:
    """Sizes that a MultiheadAttention computes with: those of its patch, or its own."""
    patched = patch_values(module)
    if patched is not None:
        return patched
    d = module.head_dim
    return {"num_heads": module.num_heads, "head_dim": d, "v_head_dim": d, "scale": float(d) ** -0.5}


def custom_rule(name: str, module: nn.Module, custom: Mapping[Any, Any]) -> Callable[..., None] | None:
    """The user's rule for a module, by type, name or glob."""
    for key, rule in custom.items():
        if not callable(rule):
            raise OptionError(
                f"customized_pruners[{key!r}] must be a callable rule(layer), got {type(rule).__name__}"
            )
        by_type = isinstance(key, type) and isinstance(module, key)
        if by_type or key is module or (isinstance(key, str) and name and fnmatch.fnmatchcase(name, key)):
            return rule  # type: ignore[no-any-return]
    return None


class _AttentionForward:
    """nn.MultiheadAttention followed step by step."""

    def __init__(self, module: nn.MultiheadAttention, sizes: dict[str, Any]) -> None:
        self.module, self.sizes = module, sizes

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        compute: Callable[..., Any] = attention_forward
        return compute(self.module, *args, **self.sizes, **kwargs)


class Layer:
    """What a rule for a custom layer is given.

    Args:
        inputs: Tensors that went in, in order.
        outputs: Tensors that came out, in order.
        module: The layer.

    Dimensions are named by pairs: ``(tensor, dim)``, tensor being an input, an output, a parameter, or the
    name of a parameter ("weight").
    """

    def __init__(self, t: Tracer, module: nn.Module, inputs: list[Tensor], outputs: list[Tensor]) -> None:
        self._t, self.module, self.inputs, self.outputs = t, module, inputs, outputs

    def _label(self, place: tuple[Any, int]) -> tuple[Any, Tensor, int]:
        what, dim = place
        tensor = self.module.get_parameter(what) if isinstance(what, str) else what
        tags = self._t.tags(tensor)
        at = dim % tensor.ndim
        label = tags.dims[at]
        if label is None:
            return None, tensor, at
        scopes = [d for d in range(tensor.ndim) if d != at]
        return self._t.ledger.collapse(label, scopes, self._t.why("a custom layer")).reshape(-1), tensor, at

    def tie(self, *places: tuple[Any, int]) -> None:
        """These dimensions are cut alike."""
        labels = [self._label(place)[0] for place in places]
        present = [label for label in labels if label is not None]
        why = self._t.why("tied by a custom rule")
        for label in present:
            if len(present) < len(labels):
                self._t.ledger.freeze(label, why)
            else:
                self._t.ledger.tie(label, present[0], why)

    def carry(self, source: tuple[Any, int], target: tuple[Any, int]) -> None:
        """Dimension ``target`` of an output has the channels of ``source``."""
        label, _, _ = self._label(source)
        tensor, dim = target
        at = dim % tensor.ndim
        tags = self._t.tags(tensor)
        shape = [1] * tensor.ndim
        shape[at] = -1
        dims = list(tags.dims)
        dims[at] = None if label is None else label.reshape(shape)
        self._t.put(
            tensor, Tags(tuple(dims), tuple(label is not None and i == at for i in range(tensor.ndim)))
        )

    def freeze(self, *places: tuple[Any, int]) -> None:
        """These dimensions stay."""
        for place in places:
            self._t.freeze(self._label(place)[0], "frozen by a custom rule")


class _CustomForward:
    """Runs a layer without looking inside, then asks the user's rule."""

    def __init__(self, t: Tracer, module: nn.Module, rule: Callable[[Layer], None]) -> None:
        self.t, self.module, self.rule = t, module, rule

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self.t.silently():
            out = type(self.module).forward(self.module, *args, **kwargs)
        self.t.begin(type(self.module).__name__)
        inputs, outputs = tensors_in((*args, *kwargs.values())), tensors_in((out,))
        with self.t.silently(), torch._C.DisableTorchFunction():
            self.rule(Layer(self.t, self.module, inputs, outputs))
        return out
