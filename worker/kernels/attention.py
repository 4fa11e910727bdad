"""Causal attention inside each segment of a packed stream, as a few batched matrix products: fast on a CPU."""

# Shapes: T tokens of the stream, n tokens of one segment, H query heads, G key-value heads, D head width.

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Any, Final

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

LONGEST: Final = 512
"""Tokens. On longer segments torch's fused attention, which skips the masked half of all scores, is as fast."""
MaskOf = Callable[[int], Tensor | None]
"""From a segment's length to its window as (n, n) booleans, True where a query may look; None: causal only."""


def segment_attention(q_1HTD: Tensor, k_1GTD: Tensor, v_1GTD: Tensor, bounds: Sequence[int], scaling: float,
                      window_of: MaskOf) -> Tensor:  # fmt: skip
    """softmax(scaling q k^T + mask) v inside each segment bounds[i]:bounds[i+1], causally; result (1, T, H, D).

    Query head h reads key-value head h // (H / G). Scores are rounded to the dtype of q, as in Transformers' eager
    attention; softmax runs in fp32 at least. Backward, with w the weights and g = do of a segment:
        dv = w^T g     ds = scaling w (g v^T - rowsum(w * g v^T))     dq = ds k     dk = ds^T q
    torch's fused attention has no fast backward on a CPU: in bf16 it takes 3.5 times as long at 100 to 250 tokens.
    """
    result: Tensor = _SegmentAttention.apply(q_1HTD, k_1GTD, v_1GTD, tuple(bounds), scaling, window_of)  # type: ignore[no-untyped-call]  # torch
    return result


class _SegmentAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q_1HTD: Tensor, k_1GTD: Tensor, v_1GTD: Tensor, bounds: tuple[int, ...], scaling: float,
                window_of: MaskOf) -> Tensor:  # fmt: skip
        heads, groups = q_1HTD.shape[1], k_1GTD.shape[1]
        out_THD = q_1HTD.new_empty(q_1HTD.shape[2], heads, v_1GTD.shape[-1])
        kept: list[Tensor] = []
        for rows, q_GmD, k_GnD, v_GnD in _segments(bounds, groups, q_1HTD, k_1GTD, v_1GTD):
            w_Gmn = _weights(q_GmD, k_GnD, scaling, window_of)
            out_THD[rows] = (w_Gmn @ v_GnD).view(heads, -1, out_THD.shape[-1]).transpose(0, 1)
            if any(ctx.needs_input_grad):
                kept.append(w_Gmn)
        ctx.save_for_backward(q_1HTD, k_1GTD, v_1GTD, *kept)
        ctx.bounds, ctx.scaling = bounds, scaling
        return out_THD[None]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out_1THD: Tensor) -> tuple[Tensor | None, ...]:
        q_1HTD, k_1GTD, v_1GTD, *kept = ctx.saved_tensors
        groups = k_1GTD.shape[1]
        dq_1HTD, dk_1GTD, dv_1GTD = (torch.empty_like(x) for x in (q_1HTD, k_1GTD, v_1GTD))
        weights = iter(kept)
        parts = _segments(ctx.bounds, groups, q_1HTD, k_1GTD, v_1GTD, d_out_1THD.transpose(1, 2))
        for rows, q_GmD, k_GnD, v_GnD, g_GmD in parts:
            w_Gmn = next(weights)
            dv_1GTD[0, :, rows] = w_Gmn.mT @ g_GmD
            dw_Gmn = g_GmD @ v_GnD.mT
            ds_Gmn = torch._softmax_backward_data(dw_Gmn, w_Gmn, -1, w_Gmn.dtype)
            dq_1HTD[0, :, rows] = (ds_Gmn @ k_GnD).view(-1, k_GnD.shape[1], k_GnD.shape[2])
            dk_1GTD[0, :, rows] = ds_Gmn.mT @ q_GmD
        return dq_1HTD.mul_(ctx.scaling), dk_1GTD.mul_(ctx.scaling), dv_1GTD, None, None, None


def _segments(bounds: tuple[int, ...], groups: int, *streams: Tensor) -> Iterator[tuple[Any, ...]]:
    """For each segment its rows, then each stream's part of it as (G, heads per group * n, D), heads of a group
    under each other: all queries of a group meet its keys in one product."""
    for start, end in pairwise(bounds):
        rows = slice(start, end)
        yield rows, *(stream[0, :, rows].reshape(groups, -1, stream.shape[-1]) for stream in streams)


def _weights(q_GmD: Tensor, k_GnD: Tensor, scaling: float, window_of: MaskOf) -> Tensor:
    scores_Gmn = q_GmD @ k_GnD.mT
    n = k_GnD.shape[1]
    window_nn = window_of(n)
    mask_nn = _causal_mask(n, scores_Gmn.dtype, scores_Gmn.device)
    if window_nn is not None:
        mask_nn = mask_nn.masked_fill(~window_nn, -torch.inf)
    scores_Hnn = scores_Gmn.view(-1, n, n)
    torch.add(mask_nn, scores_Hnn, alpha=scaling, out=scores_Hnn)
    return torch.softmax(scores_Gmn, dim=-1)


@lru_cache(maxsize=64)
def _causal_mask(n: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(n, n): 0 where a query may look, -inf in its future. Shared by all layers and steps: do not write to it."""
    return torch.full((n, n), -torch.inf, dtype=dtype, device=device).triu_(1)
