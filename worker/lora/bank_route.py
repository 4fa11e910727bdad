"""Which adapters each token of a serving step goes through, and by which products."""

# Shapes: B tokens that share the joint products, R their columns.

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor

from shared.specs import AdapterShare
from worker.lora.stack import Part
from worker.lora.update_table import UpdateTable

Shares = tuple[AdapterShare, ...]
Run = tuple[int, Shares]
"""Tokens that follow each other, and the adapters that they go through."""


@dataclass(frozen=True)
class PackedAdapter:
    """An adapter in the layout of one bank: A and s B of all layers of a kind in one tensor each, by kind."""

    parts: Mapping[int, Part]
    rank: int

    @property
    def size_bytes(self) -> int:
        return sum(part.size_bytes for part in self.parts.values())


@dataclass(frozen=True)
class Span:
    """Tokens that go through the same adapters."""

    places: slice | Tensor
    adapters: tuple[tuple[PackedAdapter, float], ...]


@dataclass(frozen=True)
class Route:
    """Who updates what in one step: the first `num_stacked` tokens by the stacks, `spans` one by one, and what is in
    `tables`, by the number of the kind of site, by a compiled kernel."""

    num_tokens: int
    num_stacked: int = 0
    hidden_B1R: Tensor | None = None
    weights_B1R: Tensor | None = None
    spans: tuple[Span, ...] = ()
    tables: Mapping[int, UpdateTable] = field(default_factory=dict)


def key_of(shares: Shares) -> tuple[tuple[str, float], ...]:
    return tuple((share.version_id, share.weight) for share in shares)


def span_places(own: Sequence[tuple[int, int, Shares]], device: torch.device) -> slice | Tensor:
    """Where runs (start, stop) lie: a slice if they follow each other."""
    if all(before[1] == after[0] for before, after in pairwise(own)):
        return slice(own[0][0], own[-1][1])
    return torch.cat([torch.arange(start, stop) for start, stop, _ in own]).to(device)
