"""Where the plain oracle needs help: casts to float32, and norms that library classes write in their own way.

Nothing here knows the engine: masks come from the plan, by the name of a norm's own weight.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from oracle import SurvivorLayerNorm, _kept_mask
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from lightning_prune import Plan


class InDouble(TorchFunctionMode):
    """Language models cast norms, softmax and rotations to float32: here they stay in float64."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch._grouped_mm:
            return _grouped_product(*args, **(kwargs or {}))
        kwargs = {k: torch.float64 if v is torch.float32 else v for k, v in (kwargs or {}).items()}
        args = tuple(torch.float64 if a is torch.float32 else a for a in args)
        return func(*args, **kwargs) if func is not Tensor.float else args[0].double()


def _grouped_product(x: Tensor, weight: Tensor, *, offs: Tensor, **_: Any) -> Tensor:
    """Rows up to ``offs[i]`` meet ``weight[i]``; torch has no float64 kernel for it."""
    starts = [0, *offs.tolist()[:-1]]
    parts = [x[a:b] @ w for a, b, w in zip(starts, offs.tolist(), weight, strict=True)]
    rest = x.new_zeros(len(x) - sum(len(p) for p in parts), weight.shape[2])
    return torch.cat([*parts, rest])


class Survivors(TorchFunctionMode):
    """Functional norms of a twin take their statistics over the survivors.

    Args:
        twin: The masked model.
        plan: What it keeps.
    """

    def __init__(self, twin: nn.Module, plan: Plan) -> None:
        super().__init__()
        self.masks = masks_of(twin, plan)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        rule = _FUNCTIONAL.get(func)
        return func(*args, **kwargs) if rule is None else rule(self.masks, func, *args, **kwargs)


def masks_of(twin: nn.Module, plan: Plan) -> dict[int, Tensor]:
    """Where each parameter that a plan cuts survives: ``{id: [*shape] bool}``."""
    parameters = dict(twin.named_parameters())
    masks: dict[int, Tensor] = {}
    for cut in plan.cuts:
        p = parameters.get(cut.tensor)
        if p is not None:
            keep = _kept_mask(cut, p.shape).expand(p.shape)
            masks[id(p)] = masks[id(p)] & keep if id(p) in masks else keep
    return masks


def _layer_norm(masks: Mapping[int, Tensor], func: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    shape, weight, bias, eps = _bind(("normalized_shape", "weight", "bias", "eps"), args, kwargs)
    keep = x != 0 if weight is None else masks.get(id(weight))  # without: as the producers' zeros say
    if keep is None:
        return func(x, shape, weight, bias, 1e-5 if eps is None else eps)
    return _normalise(x, keep, len(shape), weight, bias, 1e-5 if eps is None else eps, centred=True)


def _rms_norm(masks: Mapping[int, Tensor], func: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    shape, weight, eps = _bind(("normalized_shape", "weight", "eps"), args, kwargs)
    keep = x != 0 if weight is None else masks.get(id(weight))
    if keep is None:
        return func(x, shape, weight, eps)
    eps = torch.finfo(torch.float64).eps if eps is None else eps
    return _normalise(x, keep, len(shape), weight, None, eps, centred=False)


def _group_norm(masks: Mapping[int, Tensor], func: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    groups, weight, bias, eps = _bind(("num_groups", "weight", "bias", "eps"), args, kwargs)
    eps = 1e-5 if eps is None else eps
    keep = (x != 0).movedim(1, 0).flatten(1).any(1) if weight is None else masks.get(id(weight))
    if keep is None:
        return func(x, groups, weight, bias, eps)
    cells = x.reshape(len(x), groups, x.shape[1] // groups, -1)  # [n, g, c, s]
    mask = keep.double().view(1, groups, -1, 1).expand(1, -1, -1, cells.shape[3])
    y = _standardise(cells, mask, (2, 3), eps).reshape(x.shape)
    side = (1, -1) + (1,) * (x.ndim - 2)
    y = y if weight is None else y * weight.view(side)
    y = y if bias is None else y + bias.view(side)
    return y * keep.view(side)


def _bind(names: tuple[str, ...], args: Any, kwargs: Any) -> list[Any]:
    given = dict(zip(names, args, strict=False)) | kwargs
    return [given.get(n) for n in names]


def _normalise(
    x: Tensor, keep: Tensor, ndim: int, weight: Any, bias: Any, eps: float, *, centred: bool
) -> Tensor:
    dims = tuple(range(-ndim, 0))
    y = _standardise(x, keep.double(), dims, eps, centred=centred)
    y = y if weight is None else y * weight
    y = y if bias is None else y + bias
    return y * keep


def _standardise(
    x: Tensor, keep: Tensor, dims: tuple[int, ...], eps: float, *, centred: bool = True
) -> Tensor:
    n = keep.sum(dims, keepdim=True).clamp(min=1)
    if centred:
        x = x - (x * keep).sum(dims, keepdim=True) / n
    power = (x.square() * keep).sum(dims, keepdim=True) / n
    return x / (power + eps).sqrt() * keep


_FUNCTIONAL: dict[Any, Callable[..., Any]] = {
    functional.layer_norm: _layer_norm,
    functional.rms_norm: _rms_norm,
    functional.group_norm: _group_norm,
}


# --- classes that compute a norm themselves ---


def adapt(twin: nn.Module, plan: Plan) -> None:
    """Let the hand-written norms of a twin see survivors alone, and zero what the plain oracle leaves."""
    masks = masks_of(twin, plan)
    for name, module in list(twin.named_modules()):
        if type(module).__name__ == "_WeightNorm" and module.dim not in (0, -1):
            _zero_direction(twin.get_submodule(name.rpartition(".")[0]), masks)
        rule = next((r for kind, r in _CLASSES.items() if type(module).__name__.endswith(kind)), None)
        weight = getattr(module, "weight", None)
        keep = masks.get(id(weight))
        if rule is not None and keep is not None:
            parent, _, leaf = name.rpartition(".")
            setattr(twin.get_submodule(parent), leaf, rule(module, keep))


def _eps(module: nn.Module) -> float:
    for name in ("variance_epsilon", "eps", "epsilon"):
        if hasattr(module, name):
            return float(getattr(module, name))
    raise AssertionError(f"{type(module).__name__} has no epsilon that the judge knows")


def _rms(module: nn.Module, keep: Tensor) -> nn.Module:
    return SurvivorLayerNorm(module, keep, eps=_eps(module), centred=False)


def _gemma(module: nn.Module, keep: Tensor) -> nn.Module:
    out = SurvivorLayerNorm(module, keep, eps=_eps(module), centred=False)
    assert isinstance(module.weight, Tensor)
    out.weight = nn.Parameter((1 + module.weight) * keep)
    return out


@torch.no_grad()
def _zero_direction(parametrised: Any, masks: Mapping[int, Tensor]) -> None:
    """Weight norm along another dimension than that of the rows: a removed row is part of every length."""
    v = parametrised.original1
    if id(v) in masks:
        v.masked_fill_(~masks[id(v)], 0.0)


class _Rms2d(nn.Module):
    """Root mean square over the channels of images, and the activation that some classes add."""

    def __init__(self, norm: nn.Module, keep: Tensor) -> None:
        super().__init__()
        self.inner = _rms(norm, keep)
        self.act = getattr(norm, "act", nn.Identity())

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.act(self.inner(x.movedim(1, -1)).movedim(-1, 1))
        return out


class _Response(nn.Module):
    """Global response norm: the mean over channels counts the survivors."""

    def __init__(self, norm: nn.Module, keep: Tensor) -> None:
        super().__init__()
        self.norm, self.n = norm, keep.sum()

    def forward(self, x: Tensor) -> Tensor:
        norm: Any = self.norm
        energy = x.norm(p=2, dim=norm.spatial_dim, keepdim=True)
        relative = energy / (energy.sum(norm.channel_dim, keepdim=True) / self.n + norm.eps)
        return x + norm.bias.view(norm.wb_shape) + norm.weight.view(norm.wb_shape) * (x * relative)


class _Standardised(nn.Module):
    """A convolution with a standardised weight is, in eval mode, one with another weight."""

    def __init__(self, conv: nn.Module, keep: Tensor) -> None:
        super().__init__()
        given: Any = conv
        w = given.weight.double().detach()
        w = _standardise(w, keep.double(), (1, 2, 3), given.eps)
        if hasattr(given, "gain"):
            w = w * given.gain.double().detach() * given.scale
        self.conv, self.fixed = given, w

    def forward(self, x: Tensor) -> Tensor:
        conv = self.conv
        if getattr(conv, "same_pad", False):
            from timm.layers import pad_same

            x = pad_same(x, conv.kernel_size, conv.stride, conv.dilation)
        return functional.conv2d(
            x, self.fixed, conv.bias, conv.stride, conv.padding, conv.dilation, conv.groups
        )


_CLASSES: dict[str, Callable[[nn.Module, Tensor], nn.Module]] = {
    "GemmaRMSNorm": _gemma,
    "Gemma2RMSNorm": _gemma,
    "Gemma3RMSNorm": _gemma,
    "RMSNorm": _rms,
    "RmsNorm2d": _Rms2d,
    "RmsNormAct2d": _Rms2d,
    "T5LayerNorm": _rms,
    "GlobalResponseNorm": _Response,
    "StdConv2d": _Standardised,
    "StdConv2dSame": _Standardised,
}
