"""The forward of ``nn.MultiheadAttention`` without its checks, which tie heads, head dims and width."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["attention_forward"]


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
