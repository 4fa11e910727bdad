"""Attention with a soft cap on its scores, step by step, since torch's fused attention has none."""

# Shapes: B rows, H query heads, G key-value heads, Q query tokens, K key tokens, D head width.

import torch
from torch import Tensor


def softcapped_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *, scaling: float | None,
                         softcap: float, dropout: float = 0.0) -> Tensor:  # fmt: skip
    """softmax(softcap tanh(scaling q k^T / softcap) + mask) v, softmax in float32; result (B, Q, H, D).

    query (B, H, Q, D), key and value (B, G, K, D). `mask` broadcasts over (B, H, Q, K): booleans, True where a query
    may look, or numbers that are added; None lets all look everywhere. Source: Gemma 2, arXiv:2408.00118, section 2.
    """
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores_BHQK = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    scores_BHQK = softcap * torch.tanh(scores_BHQK / softcap)
    if mask is not None:
        lowest = torch.finfo(scores_BHQK.dtype).min
        scores_BHQK = scores_BHQK.masked_fill(~mask, lowest) if mask.dtype == torch.bool else scores_BHQK + mask
    weights_BHQK = torch.softmax(scores_BHQK, dim=-1, dtype=torch.float32).to(query.dtype)
    weights_BHQK = torch.nn.functional.dropout(weights_BHQK, p=dropout, training=dropout > 0)
    return (weights_BHQK @ value).transpose(1, 2).contiguous()
