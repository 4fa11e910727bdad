"""CUDA graphs of steps in which every row gets one token: starting some thousand kernels one by one takes the processor
longer than the GPU takes to run them."""

# Shapes: S slots of the cache, R columns of the adapters' stacks, V vocabulary.

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import torch
from torch import Tensor

from worker.attention import cached_rows
from worker.base_model import BaseModel
from worker.inference.cache import SlotCache
from worker.kernels import varlen
from worker.kernels.recording import GraphRoom
from worker.kernels.row_attention import Chunk, SlotAttention
from worker.lora.bank import AdapterBank
from worker.lora.bank_route import Route, Shares

log = logging.getLogger("lorad.inference")

PAYS_FROM: Final = 2
"""Which step of the same size is captured, which takes about as long as two; those before run kernel by kernel."""
MOST_GRAPHS: Final = 64

Run = Callable[[Tensor, Tensor], Tensor]
"""(token ids (S,), positions (S,)) -> logits (S, V)."""


@dataclass(frozen=True)
class Size:
    """What a graph is made for: so many slots, of which each has room for `num_positions` and holds at most `longest`;
    adapters in the stacks as they were laid out for the `layout`-th time, None for steps of the bare base."""

    num_slots: int
    num_positions: int
    longest: int
    layout: int | None
    num_columns: int
    is_weighted: bool


class Captured:
    """A step of one token for each of the slots 0 to S - 1, at the tokens, positions and adapters that are given."""

    def __init__(self, run: Run, cache: SlotCache, bank: AdapterBank, size: Size, route: Route | None,
                 room: GraphRoom, device: torch.device) -> None:  # fmt: skip
        """Raises whatever `run` raises where it cannot be captured, as where a layer waits for a value."""
        self._given = torch.zeros(3, size.num_slots, dtype=torch.int64, device=device)
        self._given[2] = cache.spare  # until a step is given, nobody's tokens
        self._followed: Route | None = None
        self._route = None
        if route is not None:
            assert route.hidden_B1R is not None
            weights = None if route.weights_B1R is None else route.weights_B1R.clone()
            self._route = replace(route, hidden_B1R=route.hidden_B1R.clone(), weights_B1R=weights)
        ids_S, positions_S, where_S = self._given

        def step() -> Tensor:
            cache.write_to(where_S)
            with bank.following(self._route), cached_rows(SlotAttention(positions_S, size.longest)):
                return run(ids_S, positions_S)

        step()  # libraries set themselves up at a first call, which a graph cannot hold
        self._graph = torch.cuda.CUDAGraph()
        with room.capturing(self._graph):
            self._logits_SV = step()

    def step(self, numbers_3S: Tensor, route: Route | None) -> Tensor:
        """(S, V), which the next step of any graph writes over. `numbers_3S`: ids, positions, places in the cache."""
        self._given.copy_(numbers_3S.pin_memory(), non_blocking=True)
        if route is not self._followed:
            assert route is not None
            assert self._route is not None
            for ours, its in ((self._route.hidden_B1R, route.hidden_B1R), (self._route.weights_B1R, route.weights_B1R)):
                if ours is not None and its is not None:
                    ours.copy_(its)
            self._followed = route
        self._graph.replay()
        return self._logits_SV


class StepGraphs:
    """The graphs of one model, its cache and its adapters, made as they come to pay. One thread at a time."""

    def __init__(self, base: BaseModel, cache: SlotCache, bank: AdapterBank, run: Run) -> None:
        self._run, self._cache, self._bank, self._device = run, cache, bank, base.device
        self._room = GraphRoom(base.device)
        self._made: dict[Size, Captured] = {}
        self._seen: Counter[Size] = Counter()
        self._works = True
        config: Any = base.model.config
        has_softcap = getattr(config.get_text_config(), "attn_logit_softcapping", None) is not None
        # Attention that goes by masks computes all of `longest`; the other kind only what rows hold.
        self._goes_by_masks = base.dtype not in varlen.DTYPES or not varlen.is_available(base.device) or has_softcap

    @staticmethod
    def can_serve(base: BaseModel) -> bool:
        """Whether steps of this model can be captured at all: nothing may depend on the largest position."""
        if base.device.type != "cuda":
            return False
        config: Any = base.model.config
        rope = getattr(config.get_text_config(), "rope_parameters", None) or {}
        kinds = [rope, *(one for one in rope.values() if isinstance(one, dict))]  # some have one for each kind of layer
        return not any(kind.get("rope_type") in ("longrope", "dynamic") for kind in kinds)

    def step(self, ids: Sequence[int], chunks: Sequence[Chunk], shares: Sequence[Shares]) -> Tensor | None:
        """The logits (S, V) of a step by slot, for one token of each chunk, in the order of their slots: valid until
        the next step. None where it does not pay to capture it, not yet, or cannot be done: nothing has been read then.
        """
        if not self._works:
            return None
        num_rows, num_positions = self._cache.room
        num_slots = min(_rounded(chunks[-1].slot + 1), num_rows)
        by_slot: list[Shares] = [()] * num_slots
        for chunk, own in zip(chunks, shares, strict=True):
            by_slot[chunk.slot] = own
        route = self._bank.route([(1, own) for own in by_slot], by_stacks=True)
        if route is not None and (route.spans or route.num_stacked != num_slots or route.hidden_B1R is None):
            return None
        size = Size(
            num_slots,
            num_positions,
            self._longest(chunks, num_positions),
            None if route is None else self._bank.num_layouts,
            0 if route is None or route.hidden_B1R is None else route.hidden_B1R.shape[-1],
            route is not None and route.weights_B1R is not None,
        )
        try:
            captured = self._find(size, route)
        except Exception as error:
            log.warning("generation goes on without CUDA graphs", exc_info=error)
            self._works = False
            self.clear()
            return None
        if captured is None:
            return None
        numbers = [[0] * num_slots, [0] * num_slots, [self._cache.spare] * num_slots]
        for token, chunk in zip(ids, chunks, strict=True):
            place = chunk.slot * num_positions + chunk.start
            numbers[0][chunk.slot], numbers[1][chunk.slot], numbers[2][chunk.slot] = token, chunk.start, place
        self._cache.announce([(chunk.slot, chunk.start, 1) for chunk in chunks])
        return captured.step(torch.tensor(numbers), route)

    def _longest(self, chunks: Sequence[Chunk], num_positions: int) -> int:
        if not self._goes_by_masks:
            return num_positions
        return min(num_positions, max(64, 1 << max(chunk.start for chunk in chunks).bit_length()))

    def clear(self) -> None:
        """Let go of all graphs and of their memory."""
        self._made.clear()
        self._seen.clear()

    def _find(self, size: Size, route: Route | None) -> Captured | None:
        """The graph of this size, captured now if it comes to pay with this step; else None."""
        made = self._made.pop(size, None)
        if made is None:
            self._seen[size] += 1
            if self._seen[size] < PAYS_FROM:
                return None
            self._make_room()
            made = Captured(self._run, self._cache, self._bank, size, route, self._room, self._device)
        self._made[size] = made  # put last: the first is the next to be dropped
        return made

    def _make_room(self) -> None:
        """Drop the graphs of stacks that are gone, and of those that may still be used the one that was not longest."""
        for size in [size for size in self._seen if size.layout not in (None, self._bank.num_layouts)]:
            self._made.pop(size, None)
            del self._seen[size]
        while len(self._made) >= MOST_GRAPHS:
            del self._made[next(iter(self._made))]
        if not self._made:  # the pool went with the last of them
            self._room = GraphRoom(self._device)


def _rounded(num_slots: int) -> int:
    """Up to 16 the next power of two, then in steps of 16."""
    return 1 << (num_slots - 1).bit_length() if num_slots <= 16 else -(-num_slots // 16) * 16
