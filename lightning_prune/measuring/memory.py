"""The memory of a forward at its worst moment, in bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_prune.measuring.forwards import ForwardFn, check_model, devices, measured_forward

__all__ = ["peak_memory_bytes"]


def peak_memory_bytes(
    model: nn.Module, example_inputs: Any, *, forward_fn: ForwardFn | None = None, allocator: bool = True
) -> int:
    """Measure the memory of an inference forward at its worst moment.

    That is parameters, buffers and the intermediate results alive then; the inputs are the caller's and do
    not count. On CUDA the allocator tells, workspaces included (its peak statistics are reset). Elsewhere
    every tensor that an operation returns is followed until it is freed: exact and repeatable, blind to
    a kernel's own workspace.

    Args:
        model: Any module; left as it was found.
        example_inputs: As for ``measure_cost``.
        forward_fn: ``forward_fn(model, example_inputs)`` replaces the call.
        allocator: Ask CUDA's allocator where there is one; False: follow the tensors on every device.

    Returns:
        Bytes.

    Raises:
        OptionError: If ``model`` is not a module.
        TraceError: If a parameter is uninitialised or the forward fails.

    >>> peak_memory_bytes(nn.Linear(3, 2), torch.ones(5, 3))  # (8 parameters + 10 results) * 4 bytes
    72
    """
    check_model(model)
    held = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
    gpus = [device for device in devices(model) if device.type == "cuda"]
    with measured_forward(model, example_inputs, forward_fn) as forward:
        if gpus and allocator:
            forward()  # the first call allocates libraries' workspaces for good
            return int(held) + _peak_allocated_bytes(forward, gpus)
        with _LiveBytes() as live:
            forward()
    return int(held + live.peak)


class _LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows the storages that operations return; ``peak`` is the most that was alive at once, in bytes."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = 0
        self._live: dict[int, tuple[StorageWeakRef, int]] = {}
        self._given: dict[int, StorageWeakRef] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # What comes in without having been made here is a parameter, a buffer or an input.
        for storage in _storages((args, kwargs)):
            if storage.cdata not in self._live:
                self._given[storage.cdata] = storage
        out = func(*args, **(kwargs or {}))
        dead = [key for key, (ref, _) in self._live.items() if ref.expired()]  # type: ignore[no-untyped-call]
        for key in dead:
            del self._live[key]
        for tensor in tree_leaves(out):
            for storage in _storages(tensor):
                if storage.cdata not in self._given:
                    self._live[storage.cdata] = (storage, tensor.untyped_storage().nbytes())
        self.peak = max(self.peak, sum(size for _, size in self._live.values()))
        return out


def _storages(tree: Any) -> Iterator[StorageWeakRef]:
    for leaf in tree_leaves(tree):
        if isinstance(leaf, Tensor) and leaf.layout is torch.strided:
            yield StorageWeakRef(leaf.untyped_storage())  # type: ignore[no-untyped-call]


def _peak_allocated_bytes(forward: Callable[[], Any], gpus: list[torch.device]) -> int:
    before: dict[torch.device, int] = {}
    for gpu in gpus:
        torch.cuda.synchronize(gpu)
        torch.cuda.reset_peak_memory_stats(gpu)
        before[gpu] = torch.cuda.memory_allocated(gpu)
    forward()
    for gpu in gpus:
        torch.cuda.synchronize(gpu)
    return sum(int(torch.cuda.max_memory_allocated(gpu)) - start for gpu, start in before.items())
