"""Causal attention inside each segment of a packed stream as one kernel, where the GPU and the installed torch can."""

# Shapes: T tokens of the stream, S segments, H query heads, G key-value heads, D head width.

from dataclasses import dataclass
from functools import cache
from typing import Final

import torch
from torch import Tensor

DTYPES: Final = (torch.bfloat16, torch.float16)
WIDEST: Final = 256
"""FlashAttention-2's limits, arXiv:2307.08691: half precision, heads of at most 256 in steps of 8, Ampere or later."""


def suits(q_1HTD: Tensor, v_1GTD: Tensor) -> bool:
    """Whether `segment_attention` can take tensors like these. Looks at no value."""
    width = q_1HTD.shape[-1]
    return (
        q_1HTD.device.type == "cuda"
        and q_1HTD.dtype in DTYPES
        and width == v_1GTD.shape[-1]
        and width <= WIDEST
        and width % 8 == 0
        and is_available(q_1HTD.device)
    )


@dataclass(frozen=True)
class Ragged:
    """Runs of tokens and the rows of a cache that they go on, as int32 tensors on the GPU.

    `run_starts`: where each run starts and the last one ends, (B + 1,). `row_starts`: where each one's row starts among
    all positions of the cache, (B + 1,), of which the last says nothing. `row_lengths`: with the run's own, (B,).
    """

    run_starts: Tensor
    row_starts: Tensor
    row_lengths: Tensor
    longest_run: int
    longest_row: int


@cache
def is_available(device: torch.device) -> bool:
    """Whether this GPU and the installed torch have the kernel, with a scale, a window and the lengths of rows."""
    if device.type != "cuda" or torch.version.hip is not None or torch.cuda.get_device_capability(device) < (8, 0):
        return False
    forward = getattr(torch.ops.aten, "_flash_attention_forward", None)
    if forward is None or not torch.backends.cuda.is_flash_attention_available():
        return False
    knows = {argument.name for argument in forward.default._schema.arguments}
    return {"scale", "window_size_left", "window_size_right", "seqused_k"} <= knows


def segment_attention(
    q_1HTD: Tensor,
    k_1GTD: Tensor,
    v_1GTD: Tensor,
    starts_S1: Tensor,
    *,
    longest: int,
    scaling: float,
    window: int | None,
) -> Tensor:
    """softmax(scaling q k^T + mask) v inside each segment, causally; result (1, T, H, D).

    Query head h reads key-value head h // (H / G). A query sees itself and the `window` - 1 keys before it; None: all.
    `starts_S1` holds where each segment starts and the last one ends, int32 on the device; segments may be empty.
    `longest` is the most tokens of a segment, or more. Differentiable; the gradient of q adds up in no fixed order.

    It is the operator that torch.nn.attention.varlen calls, which adds 0.8 ms of Python to each layer's forward and
    backward (H100, torch 2.11): more than the kernels take.
    """
    q_THD, k_TGD, v_TGD = (x[0].transpose(0, 1) for x in (q_1HTD, k_1GTD, v_1GTD))
    out_THD: Tensor = torch.ops.aten._flash_attention_forward(
        q_THD, k_TGD, v_TGD, starts_S1, starts_S1, longest, longest, 0.0, window is None, False,
        scale=scaling, window_size_left=-1 if window is None else window - 1, window_size_right=0,
    )[0]  # fmt: skip
    return out_THD[None]


def cached_attention(
    q_1HTD: Tensor,
    k_SGLD: Tensor,
    v_SGLD: Tensor,
    ragged: "Ragged",
    *,
    scaling: float | None,
    window: int | None,
) -> Tensor:
    """The same for runs of tokens that go on where rows of a cache end, each over its own row; result (1, T, H, D).

    A query sees itself and what stands before it in its row, of what lies in (S, L, G, D) one after the other: k and v
    are transposed views of such. Where all runs are of one token, the query heads of a key-value head go together and
    long rows are read in parts.
    """
    q_THD = q_1HTD[0].transpose(0, 1)
    k_KGD, v_KGD = (x.transpose(1, 2).flatten(0, 1) for x in (k_SGLD, v_SGLD))
    is_open = ragged.longest_run == 1 and window is None  # one query that may see all of its row needs no mask
    out_THD: Tensor = torch.ops.aten._flash_attention_forward(
        q_THD, k_KGD, v_KGD, ragged.run_starts, ragged.row_starts, ragged.longest_run, ragged.longest_row, 0.0,
        window is None and not is_open, False, scale=q_1HTD.shape[-1] ** -0.5 if scaling is None else scaling,
        window_size_left=-1 if window is None else window - 1, window_size_right=-1 if is_open else 0,
        seqused_k=ragged.row_lengths,
    )[0]  # fmt: skip
    return out_THD[None]
