"""Attributes that have to be true after a cut, compared with the shapes that they describe."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from oracle import call, relative_error, tensors_in
from torch import Tensor, nn

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def false_attributes(
    dense: nn.Module, pruned: nn.Module, inputs: Any, *, notes: Sequence[str] = ()
) -> list[str]:
    """List what an attribute says that is not so.

    Args:
        dense: The model before the cut.
        pruned: The model after it.
        inputs: Example inputs of both.
        notes: What the pruner said of configs that do not tell everything.
    """
    false = [f"{name}: {fault}" for name, module in pruned.named_modules() for fault in _layer(module)]
    return false + _timm(dense, pruned, inputs) + _config(dense, pruned, inputs, notes)


def _config(dense: Any, pruned: Any, inputs: Any, notes: Sequence[str]) -> list[str]:
    """A Hugging Face model can be built again from its ``config``, or a note says what that cannot tell."""
    config = getattr(pruned, "config", None)
    if config is None or not hasattr(config, "to_dict"):
        return []
    said = [note for note in notes if note.startswith("config ")]
    wrong = _other_shapes(pruned, config)
    if wrong:
        if not said:
            return wrong
        told = {name for name, _ in pruned.named_parameters() if f" for {name}, " in said[0]}
        known = [fault for fault in wrong if any(f" for {name}, " in fault for name in told)]
        worse = len(wrong) > len(_other_shapes(pruned, dense.config))
        return [*([] if known else [f"the note names no difference: {said[0]}"]), *(wrong if worse else [])]
    if _computes_alike(pruned, config, inputs):
        return [f"the config tells everything, and yet: {note}" for note in said]
    return [] if said else ["a model built from the config, with the same weights, computes something else"]


def _other_shapes(pruned: Any, config: Any) -> list[str]:
    try:
        with torch.device("meta"):
            again = type(pruned)(copy.deepcopy(config))
    except Exception as error:  # whatever a wrong config leads to
        return [f"config builds no model: {type(error).__name__}: {error}"]
    want = {n: tuple(p.shape) for n, p in again.named_parameters()}
    return [
        f"config says {list(want.get(n, ()))} for {n}, it is {list(p.shape)}"
        for n, p in pruned.named_parameters()
        if want.get(n) != tuple(p.shape)
    ]


@torch.no_grad()
def _computes_alike(pruned: Any, config: Any, inputs: Any) -> bool:
    again = type(pruned)(copy.deepcopy(config)).eval()
    again.load_state_dict(pruned.state_dict())
    torch.manual_seed(0)
    try:
        got = tensors_in(call(again, inputs))
    except RuntimeError:  # it has the shapes, but does not run with them
        return False
    torch.manual_seed(0)
    want = tensors_in(call(copy.deepcopy(pruned), inputs))
    return len(got) == len(want) and all(relative_error(g, w) < 1e-4 for g, w in zip(got, want, strict=True))


def _layer(module: Any) -> list[str]:
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor):
        return []
    said: dict[str, int] = {}
    if isinstance(module, nn.Linear):
        said = {"out_features": weight.shape[0], "in_features": weight.shape[1]}
    elif isinstance(module, _CONVOLUTIONS):
        said = {"out_channels": weight.shape[0], "in_channels": weight.shape[1] * module.groups}
    elif isinstance(module, nn.Embedding):
        said = {"embedding_dim": weight.shape[1]}
    elif isinstance(module, nn.modules.batchnorm._NormBase):
        said = {"num_features": len(weight)}
    elif isinstance(module, nn.GroupNorm):
        said = {"num_channels": len(weight)}
    elif isinstance(module, nn.LayerNorm) and tuple(module.normalized_shape) != tuple(weight.shape):
        return ["normalized_shape is not the shape of the weight"]
    return [
        f"{name} is {getattr(module, name)}, the weight says {size}"
        for name, size in said.items()
        if getattr(module, name) != size
    ]


@torch.no_grad()
def _timm(dense: Any, pruned: Any, inputs: Any) -> list[str]:
    """``num_features`` names the channels of ``forward_features`` wherever it did before."""
    if not (hasattr(dense, "forward_features") and hasattr(dense, "num_features")):
        return []
    shape = call(_Features(dense), inputs)
    if not isinstance(shape, Tensor):
        return []
    at = [d for d, n in enumerate(shape.shape) if n == dense.num_features]
    after = call(_Features(pruned), inputs).shape
    if len(at) == 1 and after[at[0]] != pruned.num_features:
        return [f"num_features is {pruned.num_features}, forward_features gives {list(after)}"]
    return []


class _Features(nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model.forward_features(*args, **kwargs)
