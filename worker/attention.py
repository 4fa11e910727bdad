"""Attention over packed token streams, as Transformers' attention implementation "lorad".

Shapes: B rows, H query heads, G key-value heads, Q query tokens, K key tokens, D head width.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import Any, Final

import torch
from transformers import AttentionInterface, AttentionMaskInterface

from worker.kernels import varlen
from worker.kernels.attention import LONGEST, segment_attention
from worker.kernels.row_attention import Rows
from worker.kernels.softcap import softcapped_attention

NAME: Final = "lorad"
"""What to give a model as `attn_implementation`; importing this module registers it."""


@dataclass(frozen=True)
class _Packing:
    """Where the segments of the current packed stream begin and end, and what was made of that for all layers so far.

    `bounds` is None where that changes from one replay of a captured forward to the next; then `starts` has it.
    """

    num_tokens: int
    longest: int
    bounds: tuple[int, ...] | None
    starts: dict[torch.device, torch.Tensor] = field(default_factory=dict)
    window_masks: dict[tuple[int, int, torch.device], torch.Tensor] = field(default_factory=dict)

    def window_mask(self, length: int, window: int, device: torch.device) -> torch.Tensor:
        """(Q, K) booleans, True where a query may look; every layer of one forward shares it."""
        key = (length, window, device)
        if key not in self.window_masks:
            behind_QK = _tokens_behind(length, length, device)
            self.window_masks[key] = (behind_QK >= 0) & (behind_QK < window)
        return self.window_masks[key]

    def starts_on(self, device: torch.device) -> torch.Tensor:
        """(S + 1,) int32: where each segment starts and the last one ends."""
        if device not in self.starts:
            assert self.bounds is not None
            starts_S1 = torch.tensor(self.bounds, dtype=torch.int32)
            self.starts[device] = starts_S1.pin_memory().to(device, non_blocking=True)
        return self.starts[device]


# A context variable: each thread has its own, so the engines of one process do not see each other's packing.
_packing: ContextVar[_Packing | None] = ContextVar("lorad_packing", default=None)
_rows: ContextVar[Rows | None] = ContextVar("lorad_rows", default=None)


@contextmanager
def packed_segments(lengths: Sequence[int]) -> Iterator[None]:
    """Inside, a forward over one row of `sum(lengths)` tokens treats it as `len(lengths)` sequences laid end to end.

    A token attends causally inside its own segment and never outside of it, as if each segment had been a forward of
    its own; the model's sliding window, logit soft cap, scaling and grouped heads hold inside each segment. The caller
    gives `position_ids` that restart at 0 at each segment, no `attention_mask`, and `use_cache=False`.

    Holds for the current thread only; leaving restores the packing that was there before. The backward pass may come
    after leaving, unless it recomputes activations: that runs the forward again.
    """
    if not lengths or min(lengths) < 1:
        raise ValueError(f"segments of at least one token are needed, not {list(lengths)}")
    bounds = (0, *accumulate(lengths))
    with _packed(_Packing(bounds[-1], max(lengths), bounds)):
        yield


@contextmanager
def replayed_segments(starts_S1: torch.Tensor, *, num_tokens: int, longest: int) -> Iterator[None]:
    """`packed_segments` for a forward that is captured to be replayed over other segments, whose `starts_S1` (int32, on
    the GPU, the end of the last one included) are read each time: they cover `num_tokens`, none of more than `longest`.

    Raises NotImplementedError inside where a layer needs to know them before: only `varlen` does without.
    """
    with _packed(_Packing(num_tokens, longest, None, {starts_S1.device: starts_S1})):
        yield


@contextmanager
def _packed(packing: _Packing) -> Iterator[None]:
    token = _packing.set(packing)
    try:
        yield
    finally:
        _packing.reset(token)


@contextmanager
def cached_rows(rows: Rows) -> Iterator[None]:
    """Inside, a forward over one row of tokens is a generation step: `rows` says whose they are.

    The cache that the model is given returns a layer's whole keys and values, the step's own among them. Holds for the
    current thread only; leaving restores what was there before.
    """
    token = _rows.set(rows)
    try:
        yield
    finally:
        _rows.reset(token)


def current_rows() -> Rows | None:
    """The rows of the generation step that this thread is in."""
    return _rows.get()


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """softmax(cap(scaling q k^T) + mask) v, with cap(x) = softcap tanh(x / softcap) where the model asks for it.

    Shapes: query (B, H, Q, D), key and value (B, G, K, D), mask (B or 1, 1, Q, K), result (B, Q, H, D).
    A mask is boolean, True where a query may look, or is added to the scores.
    """
    rows = _rows.get()
    if rows is not None:
        return rows(query, key, value, scaling=scaling, window=sliding_window, softcap=softcap), None
    packing = _packing.get()
    if packing is None:
        return _attend(module, query, key, value, attention_mask, dropout, scaling, is_causal, softcap), None
    if attention_mask is not None:
        raise ValueError("a packed stream takes no attention mask: its segments are the mask")
    if not query.shape[2] == key.shape[2] == packing.num_tokens or query.shape[0] != 1:
        raise ValueError(
            f"the segments cover one row of {packing.num_tokens} tokens; "
            f"there are {query.shape[0]} rows of {query.shape[2]} queries and {key.shape[2]} keys"
        )

    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if softcap is None and not dropout and varlen.suits(query, value):
        starts_S1, longest = packing.starts_on(query.device), packing.longest
        return varlen.segment_attention(
            query, key, value, starts_S1, longest=longest, scaling=scale, window=sliding_window
        ), None
    if packing.bounds is None:
        raise NotImplementedError("these tensors cannot be attended to without knowing the segments before")

    def window_of(length: int) -> torch.Tensor | None:
        if sliding_window is None or length <= sliding_window:
            return None
        return packing.window_mask(length, sliding_window, query.device)

    # A GPU has fused attention with a fast backward also in fp32; a soft cap or dropout goes step by step.
    longest = LONGEST if query.device.type == "cpu" and softcap is None and not dropout else 0
    if packing.longest <= longest:
        return segment_attention(query, key, value, packing.bounds, scale, window_of), None
    parts = []
    for start, end in pairwise(packing.bounds):
        q, k, v = (x[:, :, start:end] for x in (query, key, value))
        if end - start <= longest:
            parts.append(segment_attention(q, k, v, (0, end - start), scale, window_of))
        else:
            window_QK = window_of(end - start)
            mask = None if window_QK is None else window_QK[None, None]
            parts.append(_attend(module, q, k, v, mask, dropout, scaling, True, softcap))
    return torch.cat(parts, dim=1), None


def _attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    dropout: float,
    scaling: float | None,
    is_causal: bool | None,
    softcap: float | None,
) -> torch.Tensor:
    """Attention of every query over every key that `mask` allows; without a mask, causally. Result (B, Q, H, D)."""
    if softcap is not None:
        if mask is None and is_causal is not False and query.shape[2] > 1:
            mask = _tokens_behind(query.shape[2], key.shape[2], query.device) >= 0
        return softcapped_attention(query, key, value, mask, scaling=scaling, softcap=softcap, dropout=dropout)
    output, _ = _sdpa(module, query, key, value, mask, dropout=dropout, scaling=scaling, is_causal=is_causal)
    return output  # type: ignore[no-any-return]  # transformers ships no types


def _tokens_behind(num_queries: int, num_keys: int, device: torch.device) -> torch.Tensor:
    """(Q, K): how many tokens each key lies behind each query, both counted from the start; negative is the future."""
    return torch.arange(num_queries, device=device)[:, None] - torch.arange(num_keys, device=device)[None, :]


def _mask(*args: Any, **kwargs: Any) -> torch.Tensor | None:
    """What `_attention` gets as its mask: what SDPA gets, but over a packed stream nothing, and none is built."""
    if _packing.get() is None and _rows.get() is None:
        return _sdpa_mask(*args, **kwargs)  # type: ignore[no-any-return]  # transformers ships no types
    if kwargs.get("attention_mask") is not None:
        raise ValueError("a packed stream takes no attention mask: its segments are the mask")
    return None


_sdpa = AttentionInterface()["sdpa"]
_sdpa_mask = AttentionMaskInterface()["sdpa"]
AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, _mask)
