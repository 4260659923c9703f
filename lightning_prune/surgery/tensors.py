"""The parameters and buffers of a model by name, found in one walk."""

from __future__ import annotations

from torch import Tensor, nn

__all__ = ["tensors_of"]


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """List every parameter, then every buffer, each once under its first name.

    The same as ``named_parameters()`` and ``named_buffers()``, which walk over the modules twice, and hash
    every tensor.

    >>> list(tensors_of(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2, affine=False))))[:3]
    ['0.weight', '0.bias', '1.running_mean']
    """
    found: tuple[dict[str, Tensor], dict[str, Tensor]] = {}, {}
    seen: tuple[set[int], set[int]] = set(), set()
    for name, module in model.named_modules():
        prefix = f"{name}." if name else ""
        for table, known, held in zip(found, seen, (module._parameters, module._buffers), strict=True):
            for key, tensor in held.items():
                if tensor is not None and id(tensor) not in known:
                    known.add(id(tensor))
                    table[prefix + key] = tensor
    return {**found[0], **found[1]}
