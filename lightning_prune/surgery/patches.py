"""Replacements of how a module computes, for values that followed a size.

Two kinds: ``sdpa_scale`` keeps the scale of scaled_dot_product_attention when head dims go; ``attention``
replaces the forward of ``nn.MultiheadAttention``, whose checks tie heads, head dims and residual width.
"""

from __future__ import annotations

import copyreg
import functools
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from lightning_prune.errors import PlanError
from lightning_prune.plan import Patch, Scalar

__all__ = [
    "attention_forward",
    "check_patch",
    "install_patch",
    "patch_values",
    "remember_patch",
    "remove_patches",
]

Values: TypeAlias = Mapping[str, Scalar]
Forward: TypeAlias = Callable[..., Any]
_VALUES = "_lightning_prune_patch"
_NESTED = "_lightning_prune_use_nested"
_NEW: Any = vars(copyreg)["__newobj__"]  # how object.__reduce_ex__ makes an instance
_CLASSES: dict[tuple[type[nn.Module], str], type[nn.Module]] = {}

# Why a subclass made on the fly, and not a callable set as the instance's `forward` or a pair of hooks: the
# method belongs to the class, so deepcopy, pickle (spawned workers), DataParallel replicas, torch.compile and
# torch.export meet an ordinary module whose `self` is always the right one, and no reference cycle keeps its
# memory alive. Hooks would leave the mode behind on Ctrl-C and are skipped by a direct call of `forward`. The
# values live on the instance as plain numbers; the state dict does not change.


def check_patch(model: nn.Module, patch: Patch) -> None:
    """See whether a patch fits, without changing anything.

    Raises:
        PlanError: If the kind or the module is unknown, a value is missing or of a wrong type, or the module
            already computes in a way of its own.
    """
    if patch.kind not in _KINDS:
        raise PlanError(
            f"{patch.module!r}: unknown kind of patch {patch.kind!r}; known are {', '.join(_KINDS)}"
        )
    module = dict(model.named_modules(remove_duplicate=False)).get(patch.module)
    if module is None:
        raise PlanError(
            f"patch {patch.kind!r}: the model has no module {patch.module!r}; plan and model differ"
        )
    where = f"patch {patch.kind!r} of {patch.module!r} ({type(module).__name__})"
    expected, values = _KINDS[patch.kind][0], dict(patch.values)
    if set(values) != set(expected) or not all(_is(values[k], kind) for k, kind in expected.items()):
        wanted = ", ".join(f"{k}: {kind.__name__}" for k, kind in expected.items())
        raise PlanError(f"{where}: needs the positive numbers {wanted}; got {values}")
    if "forward" in vars(module):
        raise PlanError(
            f"{where}: its forward was replaced on the instance; undo that, or wrap it after pruning"
        )
    stock = _base(type(module)).forward is nn.MultiheadAttention.forward
    if patch.kind == "attention" and not stock:
        raise PlanError(
            f"{where}: only the forward of nn.MultiheadAttention can be replaced; keep its heads whole"
        )
    if patch.kind == "sdpa_scale" and stock:
        raise PlanError(
            f"{where}: nn.MultiheadAttention hides its attention; use a patch of kind 'attention'"
        )


def install_patch(model: nn.Module, patch: Patch) -> None:
    """Install a patch, or put new values in the place of those that a patch of the module has.

    Args:
        model: Model that holds the module.
        patch: ``sdpa_scale`` with ``scale`` (factor of q k^T before the softmax), or ``attention`` with
            ``num_heads``, ``head_dim``, ``v_head_dim`` (sizes after the cut) and ``scale``.

    Raises:
        PlanError: As ``check_patch``.
    """
    check_patch(model, patch)
    module = model.get_submodule(patch.module)
    setattr(module, _VALUES, dict(patch.values))
    if getattr(type(module), "_lightning_prune_kind", None) != patch.kind:
        module.__class__ = _patched_class(_base(type(module)), patch.kind)
    if patch.kind == "attention":
        # TransformerEncoderLayer's fused kernels read the weights past this forward; this switches them off.
        cast("nn.MultiheadAttention", module)._qkv_same_embed_dim = False
        for encoder in _encoders(model, patch.module):
            if not hasattr(encoder, _NESTED):
                setattr(encoder, _NESTED, encoder.use_nested_tensor)
            encoder.use_nested_tensor = False


def patch_values(module: nn.Module) -> dict[str, Scalar] | None:
    """Give the values of the patch that a module has, or None."""
    values = vars(module).get(_VALUES)
    return None if values is None else dict(values)


def remember_patch(model: nn.Module, patch: Patch) -> Callable[[], None]:
    """Give a function that puts back how the patch's module computes now."""
    touched = (model.get_submodule(patch.module), *_encoders(model, patch.module))
    kept = [(module, type(module), dict(vars(module))) for module in touched]

    def undo() -> None:
        for module, cls, before in kept:
            module.__class__ = cls
            for name in (_VALUES, _NESTED, "_qkv_same_embed_dim", "use_nested_tensor"):
                if name in before:
                    vars(module)[name] = before[name]
                else:
                    vars(module).pop(name, None)

    return undo


def remove_patches(model: nn.Module) -> None:
    """Give every patched module back its own forward; attention with heads cut does not run after that."""
    for module in model.modules():
        if "_lightning_prune_kind" in vars(type(module)):
            module.__class__ = _base(type(module))
            delattr(module, _VALUES)
            if isinstance(module, nn.MultiheadAttention):
                module._qkv_same_embed_dim = module.in_proj_weight is not None
        if hasattr(module, _NESTED):
            module.use_nested_tensor = getattr(module, _NESTED)
            delattr(module, _NESTED)


def _is(value: Scalar, kind: type) -> bool:
    allowed = (int, float) if kind is float else (int,)
    return isinstance(value, allowed) and not isinstance(value, bool) and value > 0


def _base(cls: type[nn.Module]) -> type[nn.Module]:
    return cast("type[nn.Module]", vars(cls).get("_lightning_prune_base", cls))


def _encoders(model: nn.Module, name: str) -> Iterator[Any]:
    """Ancestors that may hand nested tensors, which only the fused kernels understand, to their layers."""
    parts = name.split(".")
    for depth in range(len(parts)):
        ancestor = model.get_submodule(".".join(parts[:depth]))
        if isinstance(ancestor, nn.TransformerEncoder):
            yield ancestor


def _patched_class(base: type[nn.Module], kind: str) -> type[nn.Module]:
    """Subclass of ``base`` that goes by its name, pickles as a reference to it, and has a new forward."""
    if (base, kind) in _CLASSES:
        return _CLASSES[base, kind]

    def reduce(self: nn.Module, protocol: Any) -> Any:
        recipe: Any = base.__reduce_ex__(self, max(protocol, 2))
        if recipe[0] is _NEW and recipe[1][0] is patched:
            return (_rebuild, (base, kind, *recipe[1][1:]), *recipe[2:])
        return recipe

    body = {
        "forward": _KINDS[kind][1](base),
        "__reduce_ex__": reduce,
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
        "_lightning_prune_base": base,
        "_lightning_prune_kind": kind,
    }
    patched = _CLASSES[base, kind] = type(base.__name__, (base,), body)
    return patched


def _rebuild(base: type[nn.Module], kind: str, *arguments: Any) -> Any:
    cls = _patched_class(base, kind)
    return cls.__new__(cls, *arguments)


class _DefaultScale(TorchFunctionMode):
    """Give a scale to attention calls that name none. A nested patch is nearer to the call, so it wins."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is functional.scaled_dot_product_attention and kwargs.get("scale") is None:
            kwargs = {**kwargs, "scale": self.scale}
        return func(*args, **kwargs)


def _scaled_forward(base: type[nn.Module]) -> Forward:
    @functools.wraps(base.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with _DefaultScale(getattr(self, _VALUES)["scale"]):
            return base.forward(self, *args, **kwargs)

    return forward


def _attention_forward(base: type[nn.Module]) -> Forward:
    @functools.wraps(base.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        compute: Forward = attention_forward
        return compute(self, *args, **kwargs, **getattr(self, _VALUES))

    return forward


_KINDS: Mapping[str, tuple[Mapping[str, type], Callable[[type[nn.Module]], Forward]]] = MappingProxyType(
    {
        "sdpa_scale": ({"scale": float}, _scaled_forward),
        "attention": (
            {"num_heads": int, "head_dim": int, "v_head_dim": int, "scale": float},
            _attention_forward,
        ),
    }
)


def attention_forward(  # noqa: PLR0913, PLR0917 - the signature of nn.MultiheadAttention.forward
    module: nn.MultiheadAttention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
    *,
    num_heads: int,
    head_dim: int,
    v_head_dim: int,
    scale: float,
) -> tuple[Tensor, Tensor | None]:
    """Compute what ``nn.MultiheadAttention.forward`` computes, with heads and widths of any size.

    Reads the module's parameters, ``batch_first``, ``dropout``, ``training`` and ``add_zero_attn`` alone.
    Shapes: n batch, l target and s source tokens, h heads, d and dv head dims of query/key and of value;
    ``in_proj_weight`` has rows [q (h*d); k (h*d); v (h*dv)], ``out_proj.weight`` is [e_out, h*dv].

    Args:
        module: Where the parameters are.
        query: [n, l, e], [l, n, e] without ``batch_first``, or [l, e].
        key: As query, with s tokens.
        value: As key.
        key_padding_mask: [n, s] or [s]; True or -inf leaves a token out.
        need_weights: Also give the attention weights.
        attn_mask: [l, s] or [n * h, l, s]; True or -inf forbids a pair.
        average_attn_weights: Mean of the weights over heads.
        is_causal: Hint that ``attn_mask`` is causal; it needs the mask.
        num_heads: h.
        head_dim: d.
        v_head_dim: dv.
        scale: Factor of q k^T before the softmax; 1 / sqrt(d) of the module as it was built.

    Returns:
        Output laid out like ``query``, and the weights: None, [n, l, s], or [n, h, l, s] where not averaged.

    Raises:
        RuntimeError: If ``is_causal`` comes without ``attn_mask``, or a mask is for another number of heads.

    >>> attention, x = nn.MultiheadAttention(4, 2), torch.ones(3, 1, 4)
    >>> mine, _ = attention_forward(attention, x, x, x, num_heads=2, head_dim=2, v_head_dim=2, scale=2**-0.5)
    >>> torch.allclose(mine, attention(x, x, x)[0])
    True
    """
    if is_causal and attn_mask is None:
        raise RuntimeError(
            "is_causal is a hint that attn_mask is causal, but attn_mask is None; pass the mask"
        )
    batched = query.dim() == 3
    swap = batched and not module.batch_first
    query, key, value = (_batch_first(t, batched, swap) for t in (query, key, value))
    padding = key_padding_mask if batched or key_padding_mask is None else key_padding_mask.unsqueeze(0)
    causal = is_causal and padding is None and not need_weights
    mask = None if causal else _merged_mask(attn_mask, padding, query.shape[0], num_heads, query.dtype)
    q, k, v = _project(module, query, key, value, num_heads * head_dim)
    k, v, mask = _extended(module, k, v, mask)
    q, k, v = (
        _heads(t, num_heads, d) for t, d in ((q, head_dim), (k, head_dim), (v, v_head_dim))
    )  # [n, h, ., d]
    dropout = module.dropout if module.training else 0.0
    if need_weights:
        out, weights = _weighted(q, k, v, mask, dropout, scale)
    else:
        out, weights = (
            functional.scaled_dot_product_attention(q, k, v, mask, dropout, causal, scale=scale),
            None,
        )
    out = out.transpose(1, 2).reshape(out.shape[0], out.shape[2], num_heads * v_head_dim)
    out = functional.linear(out, module.out_proj.weight, module.out_proj.bias)
    out = out.transpose(0, 1) if swap else out if batched else out.squeeze(0)
    if weights is not None:
        weights = weights.mean(dim=1) if average_attn_weights else weights
        weights = weights if batched else weights.squeeze(0)
    return out, weights


def _batch_first(tensor: Tensor, batched: bool, swap: bool) -> Tensor:
    if not batched:
        return tensor.unsqueeze(0)
    return tensor.transpose(0, 1) if swap else tensor


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill(mask, float("-inf"))


def _merged_mask(
    attn_mask: Tensor | None, padding: Tensor | None, batch: int, num_heads: int, dtype: torch.dtype
) -> Tensor | None:
    """Sum of both masks, each as an additive [n or 1, h or 1, l or 1, s]."""
    merged = None
    if attn_mask is not None:
        merged = _additive(attn_mask, dtype)
        if merged.dim() == 3:
            if merged.shape[0] != batch * num_heads:
                raise RuntimeError(
                    f"attn_mask has {merged.shape[0]} rows, expected {batch} samples x {num_heads} heads; "
                    "build it for the heads that are left, or pass a 2-D mask"
                )
            merged = merged.reshape(batch, num_heads, merged.shape[1], merged.shape[2])
        else:
            merged = merged.unsqueeze(0).unsqueeze(0)
    if padding is not None:
        tokens = _additive(padding, dtype).unsqueeze(1).unsqueeze(1)
        merged = tokens if merged is None else merged + tokens
    return merged


def _project(
    module: nn.MultiheadAttention, query: Tensor, key: Tensor, value: Tensor, width: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Project to q, k [n, ., h*d] and v [n, s, h*dv]; ``width`` is h*d."""
    packed, bias = cast("Tensor | None", module.in_proj_weight), cast("Tensor | None", module.in_proj_bias)
    separate = (module.q_proj_weight, module.k_proj_weight, module.v_proj_weight)
    weights = separate if packed is None else _thirds(packed, width)
    biases = (None, None, None) if bias is None else _thirds(bias, width)
    q, k, v = (functional.linear(*each) for each in zip((query, key, value), weights, biases, strict=True))
    return q, k, v


def _thirds(packed: Tensor, width: int) -> tuple[Tensor, Tensor, Tensor]:
    return packed[:width], packed[width : 2 * width], packed[2 * width :]


def _extended(
    module: nn.MultiheadAttention, k: Tensor, v: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Append the tokens of ``add_bias_kv`` (learned) and ``add_zero_attn`` (zero); no mask hides them."""
    if module.bias_k is not None and module.bias_v is not None:
        k = torch.cat([k, module.bias_k.expand(k.shape[0], -1, -1)], dim=1)
        v = torch.cat([v, module.bias_v.expand(v.shape[0], -1, -1)], dim=1)
        mask = None if mask is None else functional.pad(mask, (0, 1))
    if module.add_zero_attn:
        k, v = functional.pad(k, (0, 0, 0, 1)), functional.pad(v, (0, 0, 0, 1))
        mask = None if mask is None else functional.pad(mask, (0, 1))
    return k, v, mask


def _heads(tensor: Tensor, num_heads: int, head_dim: int) -> Tensor:
    return tensor.reshape(tensor.shape[0], tensor.shape[1], num_heads, head_dim).transpose(1, 2)


def _weighted(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float, scale: float
) -> tuple[Tensor, Tensor]:
    scores = torch.matmul(q * scale, k.transpose(-2, -1))  # [n, h, l, s]
    weights = functional.softmax(scores if mask is None else scores + mask, dim=-1)
    weights = functional.dropout(weights, dropout) if dropout > 0.0 else weights
    return torch.matmul(weights, v), weights
