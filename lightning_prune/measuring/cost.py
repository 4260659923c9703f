"""What a model costs: parameters, multiply-accumulates, bytes. Units are in the names.

Whatever is borrowed from the model to find out is given back: train flags, buffers, random state, grad mode.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.backends import cudnn, mha, mkldnn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import FlopCounterMode

from lightning_prune.errors import OptionError, TraceError
from lightning_prune.surgery.tensors import tensors_of

__all__ = ["Cost", "ForwardFn", "count_parameters", "measure_cost", "measured_forward", "peak_memory_bytes"]

ForwardFn = Callable[[nn.Module, Any], Any]
Shape = tuple[int, ...]
aten = torch.ops.aten


@dataclass(frozen=True)
class Cost:
    """What one forward pass takes.

    Args:
        parameters: Number of parameter elements; a tied tensor counts once.
        macs: Multiply-accumulates of convolutions, matrix products, attention and recurrent layers for the
            whole batch. One multiply with its add is one. Norms, activations and pooling count 0.
        parameter_bytes: Bytes of the parameters, tied tensors once.
        buffer_bytes: Bytes of the buffers, shared ones once.
        macs_by_module: MACs per module that was called, its children included, over all of its calls.
            Names as in ``named_modules()``, "" is the whole forward.
        uncounted: Operations from outside PyTorch's own set that ran and have no formula; what they
            multiply is missing from ``macs``.
    """

    parameters: int
    macs: int
    parameter_bytes: int
    buffer_bytes: int
    macs_by_module: Mapping[str, int] = field(default_factory=dict)
    uncounted: tuple[str, ...] = ()


def count_parameters(model: nn.Module) -> int:
    """Count parameter elements, tied tensors once.

    >>> count_parameters(nn.Linear(3, 2))
    8
    """
    return sum(p.numel() for p in model.parameters())


def measure_cost(model: nn.Module, example_inputs: Any, *, forward_fn: ForwardFn | None = None) -> Cost:
    """Measure parameters, MACs and bytes with one forward pass in eval mode.

    Works for models on any device; on ``meta`` nothing is computed. Attention and recurrent layers run their
    plain kernels meanwhile, because the fused ones hide their products.

    Args:
        model: Any module; left as it was found.
        example_inputs: A tensor, a tuple of positional arguments or a mapping of keyword arguments; moved
            to the model's device where the model has only one.
        forward_fn: ``forward_fn(model, example_inputs)`` replaces the call.

    Returns:
        The cost of the whole batch in ``example_inputs``.

    Raises:
        OptionError: If ``model`` is not a module.
        TraceError: If a parameter is uninitialised or the forward fails.

    >>> measure_cost(nn.Linear(3, 2), torch.ones(5, 3)).macs
    30
    """
    _check_model(model)
    names, calls = _NamedMacs(model), _ForeignCalls()
    with measured_forward(model, example_inputs, forward_fn) as forward, _plain_kernels(), calls, names:
        forward()
    return Cost(
        parameters=count_parameters(model),
        macs=names.total(),
        parameter_bytes=sum(p.numel() * p.element_size() for p in model.parameters()),
        buffer_bytes=sum(b.numel() * b.element_size() for b in model.buffers()),
        macs_by_module={"": names.total(), **names.macs},
        uncounted=tuple(sorted(calls.names)),
    )


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
    _check_model(model)
    held = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
    gpus = [device for device in _devices(model) if device.type == "cuda"]
    with measured_forward(model, example_inputs, forward_fn) as forward:
        if gpus and allocator:
            forward()  # the first call allocates libraries' workspaces for good
            return int(held) + _peak_allocated_bytes(forward, gpus)
        with _LiveBytes() as live:
            forward()
    return int(held + live.peak)


@contextmanager
def measured_forward(
    model: nn.Module, example_inputs: Any, forward_fn: ForwardFn | None = None
) -> Iterator[Callable[[], Any]]:
    """Give a call of the model in eval mode without gradients; afterwards the model is as it was found.

    Args:
        model: Any module.
        example_inputs: As for ``measure_cost``.
        forward_fn: As for ``measure_cost``.

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


def _devices(model: nn.Module) -> list[torch.device]:
    return list(dict.fromkeys(t.device for t in (*model.parameters(), *model.buffers())))


def _on_device_of(model: nn.Module, inputs: Any) -> Any:
    devices = _devices(model)
    if len(devices) != 1:
        return inputs
    plain = dict(inputs) if isinstance(inputs, Mapping) else inputs
    return tree_map_only(Tensor, lambda t: t.to(devices[0]), plain)


def _check_model(model: nn.Module) -> None:
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
    python_state, numpy_state = random.getstate(), np.random.get_state()
    gpus = [device for device in _devices(model) if device.type == "cuda"]
    with torch.random.fork_rng(devices=gpus):
        try:
            for module, _ in flags:
                module.training = False
            yield
        finally:
            for module, flag in flags:
                module.training = flag
            _restore_buffers(model, buffers)
            random.setstate(python_state)
            np.random.set_state(numpy_state)


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


@contextmanager
def _plain_kernels() -> Iterator[None]:
    """Switch off the kernels that compute several products in one operation, unseen by the counter."""
    fast, libraries = mha.get_fastpath_enabled(), (mkldnn.enabled, cudnn.enabled)
    try:
        mha.set_fastpath_enabled(False)
        # Without oneDNN and cuDNN a recurrent layer is a row of matrix products. Convolutions are counted
        # before a library is chosen. (flags() of either looks at TF32, too: it warns on builds without it,
        # and fails where a user has set it for convolutions alone.)
        mkldnn.enabled = cudnn.enabled = False  # type: ignore[assignment]  # annotated as their descriptors
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        mha.set_fastpath_enabled(fast)
        mkldnn.enabled, cudnn.enabled = libraries


class _NamedMacs(FlopCounterMode):
    """PyTorch's counter with the formulas it lacks, noting MACs by the names of ``named_modules()``."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(display=False, custom_mapping=_FLOPS)
        self.macs: dict[str, int] = {}
        self._model = model
        self._entered: dict[str, list[int]] = {}
        self._hooks = ExitStack()

    def total(self) -> int:
        """Count MACs so far; the formulas give two operations each."""
        return int(self.get_total_flops()) // 2

    def __enter__(self) -> _NamedMacs:
        for name, module in self._model.named_modules():
            if name:
                self._watch(name, module)
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        self._hooks.close()
        super().__exit__(*error)  # type: ignore[no-untyped-call]

    def _watch(self, name: str, module: nn.Module) -> None:
        def enter(*_: Any) -> None:
            self._entered.setdefault(name, []).append(self.total())

        def leave(*_: Any) -> None:
            start = self._entered[name].pop()
            if not self._entered[name]:  # a module that calls itself counts from its outermost call
                self.macs[name] = self.macs.get(name, 0) + self.total() - start

        self._hooks.callback(module.register_forward_pre_hook(enter).remove)
        self._hooks.callback(module.register_forward_hook(leave, always_call=True).remove)


class _ForeignCalls(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes the operations of other libraries: no formula counts what their kernels multiply."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace not in ("aten", "prim", "prims"):
            self.names.add(f"{func.namespace}::{func.name().split('::')[-1].split('.')[0]}")
        return func(*args, **(kwargs or {}))


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


def _peak_allocated_bytes(forward: Callable[[], Any], devices: list[torch.device]) -> int:
    before: dict[torch.device, int] = {}
    for device in devices:
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before[device] = torch.cuda.memory_allocated(device)
    forward()
    for device in devices:
        torch.cuda.synchronize(device)
    return sum(int(torch.cuda.max_memory_allocated(device)) - start for device, start in before.items())


# Formulas that torch.utils.flop_counter lacks: from shapes, two operations per MAC, as its own are.


def _mv_flops(matrix: Shape, *_: Any, **__: Any) -> int:
    return 2 * prod(matrix)  # [m, k] @ [k], and [k] . [k]


def _addmv_flops(bias: Shape, matrix: Shape, *_: Any, **__: Any) -> int:
    return 2 * prod(matrix)


def _trilinear_flops(*args: Any, **_: Any) -> int:
    # Three factors; each first gets dimensions of size 1 (arguments 3 to 5), then they broadcast.
    sides = [_with_ones(shape, dims) for shape, dims in zip(args[:3], args[3:6], strict=True)]
    return 2 * int(prod(max(sizes) for sizes in zip(*sides, strict=True)))


def _with_ones(shape: Shape, dims: Sequence[int]) -> Shape:
    sizes = iter(shape)
    return tuple(1 if d in dims else next(sizes) for d in range(len(shape) + len(dims)))


def _cpu_attention_flops(query: Shape, key: Shape, value: Shape, *_: Any, **__: Any) -> int:
    # [b, h, s, e] x [b, h_kv, t, e] -> [b, h, s, t], then x [b, h_kv, t, v] -> [b, h, s, v]
    return 2 * prod(query[:-1]) * key[-2] * (query[-1] + value[-1])


_FLOPS: dict[Any, Callable[..., int]] = {
    aten.mv: _mv_flops,
    aten.dot: _mv_flops,
    aten.addmv: _addmv_flops,
    aten._trilinear: _trilinear_flops,
    aten._scaled_dot_product_flash_attention_for_cpu: _cpu_attention_flops,
}
