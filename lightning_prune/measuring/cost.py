"""What a model costs: parameters, multiply-accumulates, bytes. Units are in the names."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import nn
from torch.backends import cudnn, mha, mkldnn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from lightning_prune.measuring.forwards import ForwardFn, check_model, measured_forward

__all__ = ["Cost", "count_parameters", "measure_cost"]

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
    check_model(model)
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
