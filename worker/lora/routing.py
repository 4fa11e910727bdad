"""Routing: which part of the current forward's input uses which adapter."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class Share:
    """The places along dimension 0 that one adapter updates: a slice where they are adjacent, else their indices.

    `draws`: (num_tokens, seed) of consecutive parts of the places, for each part the seed of what its dropout draws.
    """

    adapter: str
    places: slice | Tensor
    draws: tuple[tuple[int, int], ...] = ()
    _copies: dict[torch.device, Tensor] = field(default_factory=dict, compare=False, repr=False)

    def places_on(self, device: torch.device) -> slice | Tensor:
        """The places, indices on `device`; copied there once, not once per layer."""
        if isinstance(self.places, slice):
            return self.places
        if device not in self._copies:
            self._copies[device] = self.places.to(device)
        return self._copies[device]


@dataclass(frozen=True)
class Route:
    """The shares of one forward. What no share names is served by the base model alone.

    `num_rows` set: shares count the B rows of a batch. `num_tokens` set: shares count the T tokens of one flat
    stream. Neither: one adapter takes the whole input, whatever its shape.
    """

    shares: tuple[Share, ...] = ()
    num_rows: int | None = None
    num_tokens: int | None = None

    def shape_of(self, x: Tensor) -> tuple[int, ...]:
        """The leading shape of `x` (..., I) under which dimension 0 is what the shares count.

        A batch may come as (B, T, I), as (B, I), or flattened to (B T, I), as OPT does before its MLP; a stream as
        (1, T, I) or (T, I). Anything else is a ValueError: it would give rows to the wrong adapter.
        """
        lead = tuple(x.shape[:-1])
        if self.num_rows is not None:
            if len(lead) == 1 and lead[0] % self.num_rows == 0:
                return (self.num_rows, lead[0] // self.num_rows)
            if len(lead) > 1 and lead[0] == self.num_rows:
                return lead
            raise ValueError(f"routed {self.num_rows} rows, but the input is {tuple(x.shape)}")
        if self.num_tokens is not None:
            if lead[-1:] != (self.num_tokens,) or any(size != 1 for size in lead[:-1]):
                raise ValueError(f"routed {self.num_tokens} tokens, but the input is {tuple(x.shape)}")
            return (self.num_tokens,)
        return (math.prod(lead),)


BASE = Route()


def whole(adapter: str) -> Route:
    """Everything through one adapter."""
    return Route((Share(adapter, slice(None)),))


def rows(adapters: Sequence[str | None]) -> Route:
    """One adapter, or None for the base, per row of a batch."""
    return Route(_shares([(adapter, 1) for adapter in adapters]), num_rows=len(adapters))


def segments(parts: Sequence[tuple[str | None, int]], *, seeds: Sequence[int] | None = None) -> Route:
    """(adapter or None, num_tokens) for each contiguous segment of a flat token stream, in order.

    `seeds`, one per segment: dropout in training mode then drops in a segment what its seed says, whatever else is in
    the stream and wherever the segment stands. Without them it draws from the adapter's own generator.
    """
    if any(num_tokens < 0 for _, num_tokens in parts):
        raise ValueError(f"a segment cannot have a negative length: {[n for _, n in parts]}")
    if seeds is not None and len(seeds) != len(parts):
        raise ValueError(f"{len(parts)} segments need as many seeds, not {len(seeds)}")
    return Route(_shares(parts, seeds), num_tokens=sum(num_tokens for _, num_tokens in parts))


def _shares(runs: Sequence[tuple[str | None, int]], seeds: Sequence[int] | None = None) -> tuple[Share, ...]:
    """One share per adapter, so that dropout draws once for all its tokens, whoever stands between them."""
    spans: dict[str, list[tuple[int, int]]] = {}
    draws: dict[str, list[tuple[int, int]]] = {}
    start = 0
    for i, (adapter, length) in enumerate(runs):
        if adapter is not None and length:
            if seeds is not None:
                draws.setdefault(adapter, []).append((length, seeds[i]))
            own = spans.setdefault(adapter, [])
            if own and own[-1][1] == start:
                own[-1] = (own[-1][0], start + length)
            else:
                own.append((start, start + length))
        start += length
    return tuple(Share(name, _places(own), tuple(draws.get(name, ()))) for name, own in spans.items())


def _places(spans: list[tuple[int, int]]) -> slice | Tensor:
    if len(spans) == 1:
        return slice(*spans[0])
    return torch.cat([torch.arange(start, stop) for start, stop in spans])


class Routing:
    """The route of the current forward, shared by all LoRALinear layers of one model. For one thread."""

    def __init__(self) -> None:
        self.route = BASE

    @contextmanager
    def using(self, route: Route) -> Iterator[None]:
        """Route so inside the block; afterwards as it was before."""
        before = self.route
        self.route = route
        try:
            yield
        finally:
            self.route = before
