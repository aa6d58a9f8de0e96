"""The function of `nn.MultiheadAttention` written out, so that its projections are ordinary linear calls.

    softmax(q k^T / sqrt(d)) v        for each head, between a joint input and an output projection

Source: Vaswani et al. 2017, arXiv 1706.03762. Sequences lead, as in `torch.nn.functional`; the projections read
`[batch, tokens, features]`, so that a padding mask applies to them.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

Sequences = Float[Tensor, "tokens batch features"]


def is_plain(**options: Any) -> bool:
    """Return whether `attend` covers the options: one joint projection, and nothing appended to keys and values."""
    rare = ("bias_k", "bias_v", "static_k", "static_v")
    return (
        all(options.get(name) is None for name in rare)
        and not options.get("add_zero_attn")
        and not options.get("use_separate_proj_weight")
    )


def attend(
    query: Sequences,
    key: Sequences,
    value: Sequences,
    *,
    num_heads: int,
    in_proj_weight: Tensor,
    in_proj_bias: Tensor | None,
    dropout_p: float,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    training: bool = True,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """Compute `torch.nn.functional.multi_head_attention_forward` for options that `is_plain` accepts."""
    del is_causal, options  # a hint only: PyTorch always gives the mask as well
    is_batched = query.ndim == 3
    q, k, v = _project(_batch_first(query), _batch_first(key), _batch_first(value), in_proj_weight, in_proj_bias)
    q, k, v = (_split_heads(part, num_heads) for part in (q, k, v))
    bias = _score_bias(key_padding_mask, attn_mask, q)
    mixed = F.scaled_dot_product_attention(q, k, v, bias, dropout_p if training else 0.0)
    out = F.linear(mixed.transpose(1, 2).flatten(2), out_proj_weight, out_proj_bias)
    weights = _weights(q, k, bias, average=average_attn_weights) if need_weights else None
    if is_batched:
        return out.transpose(0, 1), weights
    return out[0], None if weights is None else weights[0]


def _batch_first(values: Tensor) -> Float[Tensor, "batch tokens features"]:
    return values.transpose(0, 1) if values.ndim == 3 else values.unsqueeze(0)


def _project(query: Tensor, key: Tensor, value: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, ...]:
    # By address: the transposed views are new objects even where all three are the same sequence.
    if query.data_ptr() == key.data_ptr() == value.data_ptr() and query.shape == key.shape:
        return F.linear(query, weight, bias).chunk(3, -1)
    biases = (None, None, None) if bias is None else bias.chunk(3)
    triples = zip((query, key, value), weight.chunk(3), biases, strict=True)
    return tuple(F.linear(values, w, b) for values, w, b in triples)


def _split_heads(values: Tensor, count: int) -> Float[Tensor, "batch heads tokens size"]:
    return values.unflatten(-1, (count, -1)).transpose(1, 2)


def _score_bias(padding: Tensor | None, mask: Tensor | None, query: Tensor) -> Tensor | None:
    """Return both masks as one bias of the scores."""
    batch, heads = query.shape[:2]
    total = None
    if mask is not None:
        bias = _as_bias(mask, query.dtype)
        total = bias if mask.ndim == 2 else bias.unflatten(0, (batch, heads))
    if padding is not None:
        bias = _as_bias(padding, query.dtype).reshape(batch, 1, 1, -1)
        total = bias if total is None else total + bias
    return total


def _as_bias(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a mask as a bias; true in a boolean mask hides a key."""
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, -torch.inf)


def _weights(query: Tensor, key: Tensor, bias: Tensor | None, *, average: bool) -> Tensor:
    scores = query @ key.mT / query.shape[-1] ** 0.5
    weights = (scores if bias is None else scores + bias).softmax(-1)
    return weights.mean(1) if average else weights
