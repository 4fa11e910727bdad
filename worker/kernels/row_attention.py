"""Attention of one generation step: a token of each decoding row and chunks of prompts, each over its row's cache."""

# Shapes: S slots of the cache, B decoding rows, L positions, n tokens of one chunk, H query heads, G key-value heads,
# g = H / G query heads of one key-value head, D head width.

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from worker.kernels import varlen
from worker.kernels.native.step_kernels import StepKernels
from worker.kernels.softcap import softcapped_attention

M = TypeVar("M")

Mask = Tensor | Literal["causal"] | None
"""Added to the scores, broadcast over (b, h, q, k); None where all may be seen."""


@dataclass(frozen=True)
class Chunk:
    """`num_tokens` tokens of the row in `slot`, the first of which stands at position `start` of it."""

    slot: int
    start: int
    num_tokens: int

    @property
    def end(self) -> int:
        return self.start + self.num_tokens


@dataclass(frozen=True)
class RowAttention:
    """The stream of one step, [T]: first one token of each row in `decode`, then the tokens of each of `prefill`.

    Keys and values come as the whole of a layer's cache, (S, G, L, D), into which the step's own have been written.
    """

    decode: Sequence[Chunk]
    prefill: Sequence[Chunk]
    device: torch.device
    kernels: StepKernels | None = None
    """Compiled ones, on a CPU that has them."""
    _shared: dict[object, Any] = field(default_factory=dict)

    def __call__(self, query_1HTD: Tensor, key_SGLD: Tensor, value_SGLD: Tensor, *,
                 scaling: float | None, window: int | None, softcap: float | None) -> Tensor:  # fmt: skip
        """softmax(cap(scaling q k^T) + mask) v of every token over what its row holds up to it; (1, T, H, D)."""
        if softcap is None and varlen.suits(query_1HTD, value_SGLD):
            return varlen.cached_attention(query_1HTD, key_SGLD, value_SGLD, self._ragged(key_SGLD.shape[2]),
                                           scaling=scaling, window=window)  # fmt: skip
        if self.kernels is not None and softcap is None and self.kernels.suit(query_1HTD, key_SGLD, value_SGLD):
            first_T, count_T = self.seen(window, key_SGLD.shape[2])
            scale = query_1HTD.shape[-1] ** -0.5 if scaling is None else scaling
            query_THD = query_1HTD[0].transpose(0, 1)
            return self.kernels.attend(query_THD, key_SGLD, value_SGLD, first_T, count_T, scale)[None]
        parts = []
        if self.decode:
            parts.append(self._decoded(query_1HTD, key_SGLD, value_SGLD, scaling, window, softcap))
        first = len(self.decode)
        for chunk in self.prefill:
            q = query_1HTD[:, :, first : first + chunk.num_tokens]
            k, v = (held[chunk.slot : chunk.slot + 1, :, : chunk.end] for held in (key_SGLD, value_SGLD))
            is_whole = chunk.start == 0 and softcap is None and (window is None or chunk.end <= window)
            mask: Mask = "causal" if is_whole else self._chunk_mask(chunk, window, q.dtype)
            parts.append(attended(q, k, v, mask, scaling, softcap))
            first += chunk.num_tokens
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def _decoded(self, query: Tensor, key: Tensor, value: Tensor, scaling: float | None,
                 window: int | None, softcap: float | None) -> Tensor:  # fmt: skip
        """All decoding rows as one batch over the slots 0 to the last of theirs; (1, B, H, D).

        The query heads of a key-value head count as its queries, so that no key is copied.
        """
        num_slots = self._num_slots
        num_heads, groups = query.shape[1], key.shape[1]
        q_BHD = query[0, :, : len(self.decode)].transpose(0, 1)
        if num_slots != len(self.decode):  # slots in between are still being prefilled: their result is not used
            q_BHD = torch.zeros(num_slots, *q_BHD.shape[1:], dtype=q_BHD.dtype, device=q_BHD.device).index_copy_(
                0, self._slots, q_BHD
            )
        longest = max(chunk.end for chunk in self.decode)
        q_SGgD = q_BHD.reshape(num_slots, groups, num_heads // groups, -1)
        out_SgGD = attended(q_SGgD, key[:num_slots, :, :longest], value[:num_slots, :, :longest],
                          self._decode_mask(window, longest, query.dtype), scaling, softcap)  # fmt: skip
        out_SHD = out_SgGD.transpose(1, 2).reshape(num_slots, num_heads, -1)
        if num_slots != len(self.decode):
            out_SHD = out_SHD.index_select(0, self._slots)
        return out_SHD[None]

    def _ragged(self, num_positions: int) -> varlen.Ragged:
        """All chunks, for one kernel that reads each over its row, of which each has so many positions."""

        def make() -> varlen.Ragged:
            chunks = [*self.decode, *self.prefill]
            lengths = [chunk.num_tokens for chunk in chunks]
            numbers = [
                *accumulate(lengths, initial=0),
                *(chunk.slot * num_positions for chunk in chunks), 0,
                *(chunk.end for chunk in chunks),
            ]  # fmt: skip
            there = torch.tensor(numbers, dtype=torch.int32).pin_memory().to(self.device, non_blocking=True)
            runs, rows, ends = torch.split(there, [len(chunks) + 1, len(chunks) + 1, len(chunks)])
            return varlen.Ragged(runs, rows, ends, max(lengths), max(chunk.end for chunk in chunks))

        return self.made("ragged", make)

    def seen(self, window: int | None, num_positions: int) -> tuple[Tensor, Tensor]:
        """Where what each token sees begins, among all places of rows of so many positions, and how many it is: (T,)
        each."""

        def make() -> tuple[Tensor, Tensor]:
            # Lists, since an operation for each chunk costs more than all of this.
            ends = [
                (chunk.slot * num_positions, end)
                for chunk in (*self.decode, *self.prefill)
                for end in range(chunk.start + 1, chunk.end + 1)
            ]
            starts = [0 if window is None else max(0, end - window) for _, end in ends]
            first = [row + start for (row, _), start in zip(ends, starts, strict=True)]
            count = [end - start for (_, end), start in zip(ends, starts, strict=True)]
            return torch.tensor(first), torch.tensor(count)

        return self.made((window, "seen"), make)

    @property
    def _num_slots(self) -> int:
        return max(chunk.slot for chunk in self.decode) + 1

    @property
    def _slots(self) -> Tensor:
        return self.made("slots", lambda: torch.tensor([chunk.slot for chunk in self.decode], device=self.device))

    def _decode_mask(self, window: int | None, longest: int, dtype: torch.dtype) -> Tensor | None:
        """(S, 1, 1, L), 0 where a slot's token may look and -inf elsewhere; None if every one may look everywhere."""
        starts = {chunk.slot: chunk.start for chunk in self.decode}
        positions = [starts.get(slot, 0) for slot in range(self._num_slots)]
        if min(positions) + 1 == longest and (window is None or longest <= window):
            return None
        return self.made(
            (window, dtype),
            lambda: _additive(torch.tensor(positions, device=self.device)[:, None, None, None], longest, window, dtype),
        )

    def _chunk_mask(self, chunk: Chunk, window: int | None, dtype: torch.dtype) -> Tensor | None:
        """(1, 1, n, L), for a chunk of its row that ends at L; None if it may look everywhere."""
        if chunk.num_tokens == 1 and (window is None or chunk.end <= window):
            return None
        return self.made(
            (window, dtype, chunk.start, chunk.end),
            lambda: _additive(
                torch.arange(chunk.start, chunk.end, device=self.device)[None, None, :, None], chunk.end, window, dtype
            ),
        )

    def made(self, key: object, make: Callable[[], M]) -> M:
        """Made by the first layer that needs it, shared by all."""
        return _once(self._shared, key, make)


@dataclass(frozen=True)
class SlotAttention:
    """A step of one token for each of the slots 0 to S - 1, at positions (S,) that only the GPU knows: nothing depends
    on them but what is computed there, so that a step can be captured and replayed at others.

    `longest`: no row may have more positions then, the step's own included.
    """

    positions_S: Tensor
    longest: int
    _shared: dict[object, Any] = field(default_factory=dict)

    def __call__(self, query_1HTD: Tensor, key_SGLD: Tensor, value_SGLD: Tensor, *,
                 scaling: float | None, window: int | None, softcap: float | None) -> Tensor:  # fmt: skip
        """As RowAttention's; (1, S, H, D)."""
        num_slots, groups = len(self.positions_S), key_SGLD.shape[1]
        if softcap is None and varlen.suits(query_1HTD, value_SGLD):
            ragged = _once(self._shared, "ragged", partial(self._ragged, key_SGLD.shape[2]))
            return varlen.cached_attention(query_1HTD, key_SGLD, value_SGLD, ragged, scaling=scaling, window=window)
        mask_S11L = _once(
            self._shared,
            (window, query_1HTD.dtype),
            lambda: _additive(self.positions_S[:, None, None, None], self.longest, window, query_1HTD.dtype),
        )
        q_SGgD = query_1HTD[0].transpose(0, 1).reshape(num_slots, groups, query_1HTD.shape[1] // groups, -1)
        key, value = (held[:num_slots, :, : self.longest] for held in (key_SGLD, value_SGLD))
        out_SgGD = attended(q_SGgD, key, value, mask_S11L, scaling, softcap)
        return out_SgGD.transpose(1, 2).reshape(1, num_slots, query_1HTD.shape[1], -1)

    def _ragged(self, num_positions: int) -> varlen.Ragged:
        starts_S1 = torch.arange(len(self.positions_S) + 1, dtype=torch.int32, device=self.positions_S.device)
        lengths_S = (self.positions_S + 1).to(torch.int32)
        return varlen.Ragged(starts_S1, starts_S1 * num_positions, lengths_S, 1, self.longest)


Rows = RowAttention | SlotAttention


def _once(made: dict[object, Any], key: object, make: Callable[[], M]) -> M:
    if key not in made:
        made[key] = make()
    found: M = made[key]
    return found


def _additive(positions: Tensor, num_keys: int, window: int | None, dtype: torch.dtype) -> Tensor:
    """A query at position p sees keys 0 to p, with a window w only p - w + 1 to p."""
    behind = positions - torch.arange(num_keys, device=positions.device)
    hidden = behind < 0
    if window is not None:
        hidden |= behind >= window
    return torch.zeros(hidden.shape, dtype=dtype, device=positions.device).masked_fill_(hidden, -torch.inf)


def attended(query: Tensor, key: Tensor, value: Tensor, mask: Mask,
             scaling: float | None, softcap: float | None) -> Tensor:  # fmt: skip
    """torch's fused attention, or step by step where a soft cap is asked for."""
    groups = query.shape[1] // key.shape[1]
    if softcap is None:
        options: dict[str, Any] = {"enable_gqa": True} if groups > 1 else {}
        options |= {"is_causal": True} if isinstance(mask, str) else {"attn_mask": mask}
        out = torch.nn.functional.scaled_dot_product_attention(query, key, value, scale=scaling, **options)
        return out.transpose(1, 2)
    assert not isinstance(mask, str)
    return softcapped_attention(query, key, value, mask, scaling=scaling, softcap=softcap)
