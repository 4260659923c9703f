"""The judge: a dense float64 twin of the original, told by the plan alone which slices are gone.

It shares no code with the package. A removed unit's parameter slices are zeroed in the twin, and
normalisations over a pruned dimension take their statistics over the survivors; the pruned model has to give
the same numbers. What a plan keeps is cut here once more with plain torch indexing, and compared bit by bit.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prune.plan import Cut, Plan

Masks = dict[int, Tensor]  # dim -> [size] bool, True = survives
Survivor = Callable[[nn.Module, Masks], nn.Module]
Survivors = Mapping[str, Mapping[int, tuple[str, int]]]


# --- survivor-aware normalisations ---


def _outer(masks: Masks, shape: tuple[int, ...]) -> Tensor:
    """Combine one mask per dimension into one over ``shape``."""
    out = torch.ones(shape, dtype=torch.bool)
    for dim, mask in masks.items():
        view = [1] * len(shape)
        view[dim] = -1
        out = out & mask.view(view)
    return out


class SurvivorLayerNorm(nn.Module):
    """LayerNorm (or RMSNorm, with ``centred=False``) whose statistics see the surviving positions alone."""

    def __init__(self, norm: nn.Module, keep: Tensor, *, eps: float, centred: bool) -> None:
        super().__init__()
        self.weight = getattr(norm, "weight", None)
        self.bias = getattr(norm, "bias", None)
        self.register_buffer("keep", keep.double(), persistent=False)
        self.eps = eps
        self.centred = centred

    def forward(self, x: Tensor) -> Tensor:
        dims = tuple(range(-self.keep.ndim, 0))
        n = self.keep.sum()
        if self.centred:
            x = x - (x * self.keep).sum(dims, keepdim=True) / n
        power = (x.square() * self.keep).sum(dims, keepdim=True) / n
        y = x / (power + self.eps).sqrt()
        y = y if self.weight is None else y * self.weight
        y = y if self.bias is None else y + self.bias
        return y * self.keep


class SurvivorGroupNorm(nn.Module):
    """GroupNorm of the original groups, statistics over the survivors of each."""

    def __init__(self, norm: nn.GroupNorm, keep: Tensor) -> None:
        super().__init__()
        self.weight, self.bias = norm.weight, norm.bias
        self.num_groups, self.eps = norm.num_groups, norm.eps
        self.register_buffer("keep", keep.double(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        groups = self.num_groups
        cells = x.reshape(x.shape[0], groups, x.shape[1] // groups, -1)  # [n, g, c, s]
        keep = self.keep.view(1, groups, -1, 1)
        n = (keep.sum(2, keepdim=True) * cells.shape[3]).clamp(min=1)
        cells = cells - (cells * keep).sum((2, 3), keepdim=True) / n
        power = (cells.square() * keep).sum((2, 3), keepdim=True) / n
        y = (cells / (power + self.eps).sqrt()).reshape(x.shape)
        side = (1, -1) + (1,) * (x.ndim - 2)
        if self.weight is not None:
            y = y * self.weight.view(side) + self.bias.view(side)
        return y * self.keep.view(side)


def _layer_norm(norm: nn.Module, masks: Masks) -> nn.Module:
    assert isinstance(norm, nn.LayerNorm)
    return SurvivorLayerNorm(norm, _outer(masks, norm.normalized_shape), eps=norm.eps, centred=True)


def _rms_norm(norm: nn.Module, masks: Masks) -> nn.Module:
    assert isinstance(norm, nn.RMSNorm)
    eps = torch.finfo(torch.float64).eps if norm.eps is None else norm.eps
    return SurvivorLayerNorm(norm, _outer(masks, tuple(norm.normalized_shape)), eps=eps, centred=False)


def _group_norm(norm: nn.Module, masks: Masks) -> nn.Module:
    assert isinstance(norm, nn.GroupNorm)
    return SurvivorGroupNorm(norm, masks[0])


SURVIVORS: dict[type[nn.Module], Survivor] = {
    nn.LayerNorm: _layer_norm,
    nn.RMSNorm: _rms_norm,
    nn.GroupNorm: _group_norm,
}


def register_survivor(kind: type[nn.Module], make: Survivor) -> None:
    """Say how a custom normalisation computes when only some positions of its ``weight`` survive."""
    SURVIVORS[kind] = make


# --- masks from a plan ---


def _cuts_of(plan: Plan) -> dict[str, list[Cut]]:
    table: dict[str, list[Cut]] = {}
    for cut in plan.cuts:
        table.setdefault(cut.tensor, []).append(cut)
    return table


def _kept_mask(cut: Cut, shape: torch.Size) -> Tensor:
    """Where ``cut`` keeps a tensor of ``shape``: bool, broadcastable to it."""
    assert cut.size == shape[cut.dim], (
        f"{cut.tensor} dim {cut.dim}: the plan says {cut.size}, it is {shape[cut.dim]}"
    )
    lists = torch.tensor(cut.keep, dtype=torch.long).reshape(cut.rows, -1)
    rows = torch.zeros(cut.rows, cut.size, dtype=torch.bool)
    rows.scatter_(1, lists, torch.ones_like(lists, dtype=torch.bool))
    if cut.rows == 1:
        view = [1] * len(shape)
        view[cut.dim] = cut.size
        return rows.view(view)
    assert cut.dim > 0, f"{cut.tensor}: rows of dimension 0 cannot have indices along dimension 0"
    view = [shape[0]] + [1] * (len(shape) - 1)
    view[cut.dim] = cut.size
    return rows.repeat_interleave(shape[0] // cut.rows, dim=0).view(view)


def slice_by(tensor: Tensor, cuts: list[Cut]) -> Tensor:
    """Cut a tensor as the plan says, plainly: blocks of their own first, then whole dimensions."""
    for cut in sorted(cuts, key=lambda c: c.rows == 1):
        lists = [cut.keep[i * cut.kept : (i + 1) * cut.kept] for i in range(cut.rows)]
        blocks = tensor.chunk(cut.rows, 0) if cut.rows > 1 else [tensor]
        assert len(blocks) == cut.rows
        parts = [
            b.index_select(cut.dim, torch.tensor(k, dtype=torch.long))
            for b, k in zip(blocks, lists, strict=True)
        ]
        tensor = torch.cat(parts, 0) if cut.rows > 1 else parts[0]
    return tensor


def _is_direction(model: nn.Module, name: str, dim: int) -> bool:
    """Whether ``name`` dim 0 is normalised to length one (weight norm): zeroing a row of it would be 0/0.

    The row's magnitude is another parameter, and that one is zeroed.
    """
    if dim != 0:
        return False
    owner, _, leaf = name.rpartition(".")
    if leaf == "weight_v":
        return True
    if leaf != "original1":
        return False
    parent = model.get_submodule(owner)
    return any("WeightNorm" in type(m).__name__ for m in parent.children())


@torch.no_grad()
def masked_twin(dense: nn.Module, plan: Plan, survivors: Survivors | None = None) -> nn.Module:
    """Build the dense float64 twin in which everything that the plan removes is zero.

    Args:
        dense: The model before pruning; it is not touched.
        plan: What is kept.
        survivors: For norms with no weight: ``{module: {dim of its shape: (tensor, dim of tensor)}}``, the
            cut whose kept positions are those that the statistics see.
    """
    twin = copy.deepcopy(dense).double().eval()
    table = _cuts_of(plan)
    parameters = dict(twin.named_parameters())
    buffers = dict(twin.named_buffers())
    assert set(table) <= {*parameters, *buffers}, f"the plan names {set(table) - {*parameters, *buffers}}"
    for name, cuts in table.items():
        tensor = parameters[name] if name in parameters else buffers[name]
        for cut in cuts:
            gone = ~_kept_mask(cut, tensor.shape)
            if name in parameters:
                if not _is_direction(twin, name, cut.dim):
                    tensor.masked_fill_(gone, 0.0)
            elif tensor.is_floating_point():
                tensor.masked_fill_(gone, 1.0 if name.endswith(("var", "std")) else 0.0)
    _replace_norms(twin, table, survivors or {})
    return twin


def _replace_norms(twin: nn.Module, table: dict[str, list[Cut]], survivors: Survivors) -> None:
    canonical = {id(p): name for name, p in twin.named_parameters()}
    for name, module in list(twin.named_modules()):
        make = SURVIVORS.get(type(module))
        if make is None:
            continue
        weight = getattr(module, "weight", None)
        if name in survivors:
            wanted = dict(survivors[name])
        elif isinstance(weight, Tensor):
            wanted = {dim: (canonical[id(weight)], dim) for dim in range(weight.ndim)}
        else:
            wanted = {}
        masks = {dim: m for dim, at in wanted.items() if (m := _mask_at(table, *at)) is not None}
        if masks:
            parent, _, leaf = name.rpartition(".")
            setattr(twin.get_submodule(parent), leaf, make(module, masks))


def _mask_at(table: dict[str, list[Cut]], tensor: str, dim: int) -> Tensor | None:
    for cut in table.get(tensor, []):
        if cut.dim == dim and cut.rows == 1:
            mask = torch.zeros(cut.size, dtype=torch.bool)
            mask[list(cut.keep)] = True
            return mask
    return None


# --- running and comparing ---


def call(model: nn.Module, inputs: Any) -> Any:
    """Call a model with a tensor, a tuple of positional or a dict of keyword arguments."""
    if isinstance(inputs, Mapping):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, tuple) else model(inputs)


def tensors_in(value: Any) -> list[Tensor]:
    """List the tensors of a nested output in a fixed order."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        return [t for v in value.values() for t in tensors_in(v)]
    if isinstance(value, (tuple, list)):
        return [t for v in value for t in tensors_in(v)]
    if is_dataclass(value):
        return [t for f in fields(value) for t in tensors_in(getattr(value, f.name))]
    return []


def doubled(value: Any) -> Any:
    """Copy nested inputs, floats to float64."""
    if isinstance(value, Tensor):
        return value.detach().double() if value.is_floating_point() else value.detach().clone()
    if isinstance(value, Mapping):
        return {k: doubled(v) for k, v in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(doubled(v) for v in value)
    return value


@contextlib.contextmanager
def in_double() -> Iterator[None]:
    """Make float64 the default, so that constants written in a forward do not spoil the comparison."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def without_fast_path() -> Iterator[None]:
    """Switch off the fused transformer layer: it reads the parameters and never calls the replaced norms."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def run_double(model: nn.Module, inputs: Any, *, grad: bool = False) -> list[Tensor]:
    """Run a float64 copy in eval mode and list its output tensors."""
    with in_double(), torch.set_grad_enabled(grad):
        out = call(copy.deepcopy(model).double().eval(), doubled(inputs))
    return [t.detach() for t in tensors_in(out)]


def relative_error(got: Tensor, want: Tensor) -> float:
    """Largest absolute difference over the largest absolute value of ``want``; 0 if nothing differs."""
    assert got.shape == want.shape, f"shape {tuple(got.shape)}, expected {tuple(want.shape)}"
    if not want.is_floating_point():
        return 0.0 if torch.equal(got, want) else math.inf
    assert bool(torch.isfinite(want).all()), "the twin itself is not finite"
    if not bool(torch.isfinite(got).all()):
        return math.inf
    difference = float((got.double() - want.double()).abs().max()) if want.numel() else 0.0
    return 0.0 if difference == 0 else difference / max(float(want.abs().max()), 1e-300)


def assert_sliced(dense: nn.Module, pruned: nn.Module, plan: Plan) -> None:
    """Names and order unchanged, and every kept value the bit-same number at its kept index."""
    table = _cuts_of(plan)
    for kind in ("named_parameters", "named_buffers"):
        before, after = dict(getattr(dense, kind)()), dict(getattr(pruned, kind)())
        assert list(before) == list(after), f"{kind}: {list(before)} became {list(after)}"
        for name, tensor in before.items():
            want = slice_by(tensor.detach(), table.get(name, []))
            got = after[name].detach()
            assert got.dtype == want.dtype, f"{name}: dtype {want.dtype} became {got.dtype}"
            assert got.shape == want.shape, (
                f"{name}: shape {tuple(got.shape)}, the plan says {tuple(want.shape)}"
            )
            assert torch.equal(got.nan_to_num(7.0), want.nan_to_num(7.0)), (
                f"{name}: kept values moved or changed"
            )


def assert_same_objects(before: list[tuple[str, nn.Parameter]], model: nn.Module) -> None:
    """Parameters are the very objects that ``list(model.named_parameters())`` gave before."""
    after = list(model.named_parameters())
    assert [n for n, _ in before] == [n for n, _ in after]
    for (name, old), (_, new) in zip(before, after, strict=True):
        assert old is new, f"{name} is another object after the cut"


def assert_exact(
    dense: nn.Module,
    pruned: nn.Module,
    plan: Plan,
    inputs: Any,
    *,
    rtol: float = 1e-9,
    survivors: Survivors | None = None,
) -> None:
    """Hold the pruned model against the masked original, in float64 and eval mode.

    Args:
        dense: A copy of the model from before the cut.
        pruned: The model after it.
        plan: Everything that was kept between the two.
        inputs: A tensor, a tuple of positional or a dict of keyword arguments.
        rtol: Largest difference over the largest output value.
        survivors: See ``masked_twin``.
    """
    assert_sliced(dense, pruned, plan)
    twin = masked_twin(dense, plan, survivors)
    with without_fast_path():
        want = run_double(twin, inputs)
    for grad in (False, True):
        got = run_double(pruned, inputs, grad=grad)
        assert len(got) == len(want), f"{len(got)} output tensors, expected {len(want)}"
        for i, (g, w) in enumerate(zip(got, want, strict=True)):
            error = relative_error(g, w)
            assert error <= rtol, f"output {i} (grad {grad}): relative error {error:.3g} > {rtol:g}"


def _gradients(model: nn.Module, inputs: Any) -> dict[str, Tensor | None]:
    """Give every parameter's gradient of a fixed mixture of the outputs, in float64 and eval mode."""
    model = copy.deepcopy(model).double().eval()
    model.zero_grad()
    with in_double():
        outputs = [t for t in tensors_in(call(model, doubled(inputs))) if t.requires_grad]
        loss = sum((t * torch.arange(1.0, t.numel() + 1).view(t.shape).cos()).sum() for t in outputs)
        if isinstance(loss, Tensor):
            loss.backward()
    return {n: p.grad for n, p in model.named_parameters()}


def assert_same_gradients(
    dense: nn.Module,
    pruned: nn.Module,
    plan: Plan,
    inputs: Any,
    *,
    rtol: float = 1e-8,
    survivors: Survivors | None = None,
) -> None:
    """The pruned model learns as the twin's survivors would: equal gradients at the kept positions."""
    table = _cuts_of(plan)
    with without_fast_path():
        want = _gradients(masked_twin(dense, plan, survivors), inputs)
        got = _gradients(pruned, inputs)
    largest = max((float(g.abs().max()) for g in want.values() if g is not None), default=0.0)
    for name, gradient in want.items():
        mine = got[name]
        if gradient is None or mine is None:
            assert gradient is mine, f"{name}: only one of the two models has a gradient"
            continue
        difference = float((slice_by(gradient, table.get(name, [])) - mine).abs().max())
        assert difference <= rtol * largest, f"{name}: gradients differ by {difference:.3g} of {largest:.3g}"
