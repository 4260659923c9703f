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
    """What timm's models say of themselves is as true after the cut as it was before."""
    false = []
    now = _told(pruned, inputs)
    for what, (was, before) in _told(dense, inputs).items():
        at = [d for d, n in enumerate(before) if n == was]
        stated, shape = now[what]
        if len(at) == 1 and shape[at[0]] != stated:
            false.append(f"{what} is {stated}, it speaks of {list(shape)}")
    return false


def _told(model: Any, inputs: Any) -> dict[str, tuple[int, tuple[int, ...]]]:
    """``{attribute: (what it says, shape of the tensor that it speaks of)}``."""
    told: dict[str, tuple[int, tuple[int, ...]]] = {}

    def note(what: str, stated: Any, value: Any) -> None:
        value = value[0] if isinstance(value, (tuple, list)) and value else value
        if isinstance(value, Tensor) and isinstance(stated, int):
            told[what] = (stated, tuple(value.shape))

    handles = []
    for i, info in enumerate(_infos(model)):
        key, stated = f"feature_info[{i}]", info.get("num_chs")
        module = dict(model.named_modules()).get(info.get("module"))
        if module is not None and info.get("hook_type") == "forward_pre":
            handles.append(module.register_forward_pre_hook(lambda m, a, k=key, s=stated: note(k, s, a)))
        elif module is not None:
            handles.append(module.register_forward_hook(lambda m, a, out, k=key, s=stated: note(k, s, out)))
    classifier = model.get_classifier() if hasattr(model, "get_classifier") else None
    if isinstance(classifier, nn.Module):
        stated = getattr(model, "head_hidden_size", None)
        handles.append(
            classifier.register_forward_pre_hook(lambda m, a, s=stated: note("head_hidden_size", s, a))
        )
    call(model, inputs)
    for handle in handles:
        handle.remove()
    if hasattr(model, "forward_features"):
        note("num_features", getattr(model, "num_features", None), call(_Features(model), inputs))
    return told


def _infos(model: Any) -> list[dict[str, Any]]:
    infos = getattr(model, "feature_info", None)
    return [i for i in infos if isinstance(i, dict)] if isinstance(infos, (list, tuple)) else []


class _Features(nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model.forward_features(*args, **kwargs)
