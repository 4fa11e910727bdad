"""The key-value cache of the rows that are being generated: one slot per row, no growth by concatenation."""

# Shapes: S slots, of which B hold rows (0 to B - 1), G key-value heads, L positions, T tokens of a step, D head width.

from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

FEWEST_POSITIONS: Final = 256


@dataclass(frozen=True)
class _Prefill:
    """This step writes positions `start` to `end` - 1 of one slot."""

    slot: int
    start: int
    end: int


@dataclass(frozen=True)
class _Decode:
    """This step writes one position in each of the first B slots. `end` is one past the last of these positions."""

    positions_B: Tensor
    start: int
    end: int


@dataclass
class _Plan:
    """What all layers share: the size that storage must have by now, and where the current step writes."""

    num_slots: int = 0
    num_positions: int = 0
    step: _Prefill | _Decode = field(default_factory=lambda: _Prefill(0, 0, 0))


class _SlotLayer(CacheLayerMixin):  # type: ignore[misc]  # transformers ships no types
    """Keys and values of one layer, (S, G, L, D) each. What no row has written is zero."""

    def __init__(self, plan: _Plan, max_positions: int) -> None:
        super().__init__()
        self._plan = plan
        self._max_positions = max_positions
        self.keys: Tensor | None = None
        self.values: Tensor | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.keys = _sized(self.keys, self._plan, like=key_states)
        self.values = _sized(self.values, self._plan, like=value_states)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Store the step's keys and values (B, G, T, D); returns views of all that its rows hold, (B, G, end, D).

        A decode step's views are as long as its longest row: the mask hides what shorter rows have not written.
        """
        self.lazy_initialization(key_states, value_states)
        assert self.keys is not None
        assert self.values is not None
        step = self._plan.step
        if isinstance(step, _Prefill):
            rows = slice(step.slot, step.slot + 1)
            self.keys[rows, :, step.start : step.end] = key_states
            self.values[rows, :, step.start : step.end] = value_states
        else:
            rows = slice(0, len(step.positions_B))
            each = torch.arange(len(step.positions_B), device=key_states.device)
            self.keys[each, :, step.positions_B] = key_states[:, :, 0]
            self.values[each, :, step.positions_B] = value_states[:, :, 0]
        return self.keys[rows, :, : step.end], self.values[rows, :, : step.end]

    def move(self, source: int, target: int, num_positions: int) -> None:
        """Give the last row's slot to its new place; `target` must be zero."""
        for held in (self.keys, self.values):
            if held is not None:
                held[target, :, :num_positions] = held[source, :, :num_positions]

    def clear(self, slot: int, num_positions: int) -> None:
        """Zero a slot again: a NaN left behind would reach its next row, since 0 times NaN is NaN."""
        for held in (self.keys, self.values):
            if held is not None and slot < held.shape[0]:
                held[slot, :, :num_positions].zero_()

    def release(self) -> None:
        self.keys = self.values = None
        self.is_initialized = False

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._plan.step.end, 0

    def get_seq_length(self) -> int:
        return self._plan.step.start

    def get_max_length(self) -> int:
        return self._max_positions


class SlotCache(Cache):  # type: ignore[misc]  # transformers ships no types
    """What a Transformers model takes as its `cache`, with a slot for each row that is being generated.

    Rows are compact: slots 0 to B - 1. Room grows between steps, in powers of two, and is given back when no row is
    left. Every layer keeps all positions; sliding windows are for the mask. Say `begin_prefill` or `begin_decode`
    right before the forward that it is about. One thread at a time.
    """

    def __init__(self, num_layers: int, *, max_rows: int, max_positions: int) -> None:
        self._plan = _Plan()
        self._max_rows = max_rows
        self._max_positions = max_positions
        self._lengths: list[int] = []
        super().__init__(layers=[_SlotLayer(self._plan, max_positions) for _ in range(num_layers)])

    @property
    def lengths(self) -> tuple[int, ...]:
        """How many positions each row holds, in order of their slots."""
        return tuple(self._lengths)

    @property
    def size_bytes(self) -> int:
        held = [tensor for layer in self.layers for tensor in (layer.keys, layer.values) if tensor is not None]
        return sum(tensor.nbytes for tensor in held)

    def add_row(self) -> int:
        """A slot for a new row, empty."""
        assert len(self._lengths) < self._max_rows, "no slot is free"
        self._lengths.append(0)
        return len(self._lengths) - 1

    def remove_row(self, slot: int) -> None:
        """Free a slot; the last row takes its place, so slots stay compact."""
        last = len(self._lengths) - 1
        for layer in self.layers:
            layer.clear(slot, self._lengths[slot])
            if slot != last:
                layer.move(last, slot, self._lengths[last])
                layer.clear(last, self._lengths[last])
        self._lengths[slot] = self._lengths[last]
        self._lengths.pop()
        if not self._lengths:
            self._plan.num_slots = self._plan.num_positions = 0
            for layer in self.layers:
                layer.release()

    def begin_prefill(self, slot: int, num_tokens: int) -> None:
        """The next forward appends `num_tokens` tokens, (1, T), to one row."""
        start, end = self._lengths[slot], self._lengths[slot] + num_tokens
        self._reserve(end)
        self._lengths[slot] = end
        self._plan.step = _Prefill(slot, start, end)

    def begin_decode(self, device: torch.device) -> Tensor:
        """The next forward appends one token to every row, (B, 1). Returns where it stands in its row, (B,)."""
        positions_B = torch.tensor(self._lengths, device=device)
        longest = max(self._lengths)
        self._reserve(longest + 1)
        self._lengths = [length + 1 for length in self._lengths]
        self._plan.step = _Decode(positions_B, longest, longest + 1)
        return positions_B

    def _reserve(self, num_positions: int) -> None:
        assert num_positions <= self._max_positions, f"{num_positions} positions, there are {self._max_positions}"
        if len(self._lengths) > self._plan.num_slots:
            self._plan.num_slots = min(_power_of_two(len(self._lengths)), self._max_rows)
        if num_positions > self._plan.num_positions:
            wanted = max(FEWEST_POSITIONS, _power_of_two(num_positions))
            self._plan.num_positions = min(wanted, self._max_positions)


def _sized(held: Tensor | None, plan: _Plan, *, like: Tensor) -> Tensor:
    """`held` if it has the planned size, else a copy of it in a zeroed tensor that has."""
    size = (plan.num_slots, like.shape[1], plan.num_positions, like.shape[3])
    if held is not None and held.shape == size:
        return held
    fresh = torch.zeros(size, dtype=like.dtype, device=like.device)
    if held is not None:
        fresh[: held.shape[0], :, : held.shape[2]] = held
    return fresh


def _power_of_two(at_least: int) -> int:
    return 1 << (at_least - 1).bit_length()
