"""The key-value cache: room for a number of tokens, given once, shared out as rows of equal length."""

# Shapes: P planes (keys and values of each layer), S rows of room, L positions of a row, T tokens of a step,
# G key-value heads, D head width.

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin

FEWEST_POSITIONS: Final = 64
"""A row has room for at least this many positions, if the model's context has."""


@dataclass(frozen=True)
class Plane:
    """Shape and dtype of what one layer keeps of a token as keys, or as values: G heads of width D."""

    num_heads: int
    width: int
    dtype: torch.dtype

    @property
    def token_bytes(self) -> int:
        return self.num_heads * self.width * self.dtype.itemsize


class SlotCache(Cache):  # type: ignore[misc]  # transformers ships no types
    """What a Transformers model takes as its `cache`: rows of tokens under one budget of memory.

    The budget is given at the start and holds `num_tokens` tokens over all layers; on a CPU its pages become real when
    they are first written. Rows are numbered 0 to B - 1. All have room for the same number of positions, which is a
    power of two and as small as the rows that are open allow: short rows leave room for many, and one that is as long
    as the budget has it for itself. What no row has written is zero. Every layer keeps all positions; sliding windows
    are for the mask. Say `begin` right before the forward that it is about. One thread at a time.
    """

    def __init__(self, planes: Sequence[Plane], *, max_rows: int, max_positions: int, budget_bytes: int,
                 device: torch.device) -> None:  # fmt: skip
        self._token_bytes = sum(plane.token_bytes for plane in planes)
        self.num_tokens = min(budget_bytes // self._token_bytes, max_rows * max_positions)
        if self.num_tokens < 1:
            raise ValueError(f"{budget_bytes} bytes hold no token of {self._token_bytes} bytes")
        self._max_rows = max_rows
        self._max_positions = min(max_positions, self.num_tokens)
        self._kinds: dict[Plane, Tensor] = {}
        self._shared: dict[Plane, Tensor] = {}
        self._places: list[tuple[Plane, int]] = []
        for plane in planes:
            self._places.append((plane, sum(1 for other, _ in self._places if other == plane)))
        for plane in dict.fromkeys(planes):
            shape = (planes.count(plane), self.num_tokens + 1, plane.num_heads, plane.width)
            self._kinds[plane] = _zeros(shape, plane.dtype, device)
        self._lengths: list[int] = []
        self._touched: list[int] = []
        """Positions of each row that may not be zero any more: a forward that failed has written some too."""
        self._needs: list[int] = []
        self._begun: Sequence[tuple[int, int, int]] = ()
        self._room = (0, 0)
        kept = [self._kinds[plane][at] for plane, at in self._places]
        super().__init__(layers=[_SlotLayer(self._max_positions, *kept[i : i + 2]) for i in range(0, len(kept), 2)])
        self._share_out(self._row_positions(FEWEST_POSITIONS))

    @property
    def lengths(self) -> tuple[int, ...]:
        """How many positions each row holds, by number."""
        return tuple(self._lengths)

    @property
    def num_promised(self) -> int:
        """Tokens that the open rows hold or may still come to hold."""
        return sum(self._needs)

    @property
    def most_positions(self) -> int:
        """The longest row that can ever be had."""
        return self._max_positions

    @property
    def room(self) -> tuple[int, int]:
        """How many rows there is room for, and of how many positions each. What is kept never moves in memory as long
        as these stay the same."""
        return self._room

    @property
    def spare(self) -> int:
        """A place that is no row's, for tokens that are computed for nobody."""
        return self.num_tokens

    @property
    def size_bytes(self) -> int:
        return self._token_bytes * self.num_tokens

    def add_row(self, num_positions: int) -> int | None:
        """A new, empty row that may grow to so many positions; None as long as the open rows leave no room for it."""
        assert num_positions <= self._max_positions, f"{num_positions} positions, there are {self._max_positions}"
        if len(self._lengths) == self._max_rows:
            return None
        needed = self._row_positions(max(num_positions, FEWEST_POSITIONS, *self._needs))
        num_rows, positions = self._room
        if needed > positions or len(self._lengths) == num_rows:
            if len(self._lengths) >= self._num_rows(needed):
                return None
            self._share_out(needed)
        self._lengths.append(0)
        self._touched.append(0)
        self._needs.append(num_positions)
        return len(self._lengths) - 1

    def remove_row(self, row: int) -> None:
        """Free a row and zero it again: a NaN left behind would reach the next one, since 0 times NaN is NaN.

        The last row takes its number.
        """
        last = len(self._lengths) - 1
        for held in self._shared.values():
            held[:, row, : self._touched[row]].zero_()
            if row != last:
                moved = held[:, last, : self._touched[last]]
                held[:, row, : self._touched[last]] = moved
                moved.zero_()
        for numbers in (self._lengths, self._touched, self._needs):
            numbers[row] = numbers[last]
            numbers.pop()

    def is_zero(self) -> bool:
        """True if all room that no row has is zero, as it must be; looks at everything."""
        for held in self._shared.values():
            for row in range(held.shape[1]):
                first = self._touched[row] if row < len(self._touched) else 0
                if bool(held[:, row, first:].any()):
                    return False
        return True

    def begin(self, parts: Sequence[tuple[int, int, int]]) -> None:
        """The next forward writes (row, first position, number of tokens) of each part, in order, as one stream."""
        self.announce(parts)
        # Lists, since an operation for each part costs more than all of this.
        first = [(row * self._room[1] + start, num_tokens) for row, start, num_tokens in parts]
        where_T = torch.tensor([place for start, num_tokens in first for place in range(start, start + num_tokens)])
        device = next(iter(self._kinds.values())).device
        self.write_to(where_T.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else where_T)

    def announce(self, parts: Sequence[tuple[int, int, int]]) -> None:
        """`begin` for a forward that has been told by `write_to` where to write."""
        self._begun = parts
        for row, start, num_tokens in parts:
            assert start + num_tokens <= self._needs[row], "a row outgrows what it said it needs"
            self._touched[row] = max(self._touched[row], start + num_tokens)

    def put(self, layer: int, keys_TGD: Tensor, values_TGD: Tensor) -> tuple[Tensor, Tensor]:
        """Store a layer's keys and values of the step; returns the whole layer's, (S, G, L, D)."""
        kept: tuple[Tensor, Tensor] = self.layers[layer].put(keys_TGD, values_TGD)
        return kept

    def places(self, layer: int) -> tuple[Tensor, Tensor, Tensor]:
        """All places of a layer's keys and values, (N, G, D) each, and which of them the step writes, (T,)."""
        own = self.layers[layer]
        return (*own.flat, own.where_T)

    def write_to(self, where_T: Tensor) -> None:
        """Forwards from now on write there: row times `room`'s positions plus position, or `spare`, of each token."""
        for layer in self.layers:
            layer.where_T = where_T

    def commit(self) -> None:
        """The forward has been: what it wrote is now part of the rows."""
        for row, start, num_tokens in self._begun:
            self._lengths[row] = start + num_tokens
        self._begun = ()

    def _row_positions(self, at_least: int) -> int:
        return min(1 << (at_least - 1).bit_length(), self._max_positions)

    def _num_rows(self, positions: int) -> int:
        return min(self._max_rows, self.num_tokens // positions)

    def _share_out(self, positions: int) -> None:
        """Give every row room for so many positions; the open ones are carried over."""
        kept = []
        for row, touched in enumerate(self._touched):
            used = {plane: held[:, row, :touched] for plane, held in self._shared.items()}
            kept.append({plane: one.clone() for plane, one in used.items()})
            for one in used.values():
                one.zero_()
        num_rows = self._num_rows(positions)
        self._room = (num_rows, positions)
        self._shared = {
            plane: whole[:, : num_rows * positions].view(len(whole), num_rows, positions, plane.num_heads, plane.width)
            for plane, whole in self._kinds.items()
        }
        for row, used in enumerate(kept):
            for plane, one in used.items():
                self._shared[plane][:, row, : one.shape[1]] = one
        for i, layer in enumerate(self.layers):
            layer.show(*(self._shared[plane][at] for plane, at in self._places[2 * i : 2 * i + 2]))


class _SlotLayer(CacheLayerMixin):  # type: ignore[misc]  # transformers ships no types
    """Keys and values of one layer, views (S, L, G, D) of the cache's room: of all its places, (N + 1, G, D)."""

    def __init__(self, max_positions: int, keys_NGD: Tensor, values_NGD: Tensor) -> None:
        super().__init__()
        self.flat = keys_NGD, values_NGD
        self._max_positions = max_positions
        self.where_T = torch.empty(0, dtype=torch.long)
        self.is_initialized = True

    def show(self, keys_SLGD: Tensor, values_SLGD: Tensor) -> None:
        self.keys, self.values = keys_SLGD.transpose(1, 2), values_SLGD.transpose(1, 2)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing: the room is there from the start."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """`put` of (1, G, T, D), as Transformers calls it."""
        return self.put(key_states[0].transpose(0, 1), value_states[0].transpose(0, 1))

    def put(self, keys_TGD: Tensor, values_TGD: Tensor) -> tuple[Tensor, Tensor]:
        """Store the step's keys and values; returns the whole layer's, (S, G, L, D)."""
        keys, values = self.flat
        keys.index_copy_(0, self.where_T, keys_TGD)
        values.index_copy_(0, self.where_T, values_TGD)
        return self.keys, self.values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, 0

    def get_seq_length(self) -> int:
        return 0

    def get_max_length(self) -> int:
        return self._max_positions


class PlaneProbe(Cache):  # type: ignore[misc]  # transformers ships no types
    """A cache that keeps nothing but what it is asked to keep: the planes of each layer, in order."""

    def __init__(self, num_layers: int) -> None:
        super().__init__(layers=[_ProbeLayer() for _ in range(num_layers)])

    @property
    def planes(self) -> list[Plane]:
        return [plane for layer in self.layers for plane in layer.planes]


class _ProbeLayer(CacheLayerMixin):  # type: ignore[misc]  # transformers ships no types
    def __init__(self) -> None:
        super().__init__()
        self.planes: list[Plane] = []
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to set up."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self.planes = [Plane(states.shape[1], states.shape[3], states.dtype) for states in (key_states, value_states)]
        return key_states, value_states

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, 0

    def get_seq_length(self) -> int:
        return 0

    def get_max_length(self) -> int:
        return -1


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros; on a CPU they take no memory until they are written, which torch's own would."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    num_bytes = int(np.prod(shape)) * dtype.itemsize
    return torch.from_numpy(np.zeros(num_bytes, dtype=np.uint8)).view(dtype).view(shape)
