"""LoRALinear: a frozen linear layer with any number of named low-rank updates."""

# Shapes: I in features, O out features, R rank, N rows of one adapter; ... any leading shape.

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from worker.lora.routing import Routing
from worker.lora.update import Linear, Update, updated_linear, weight_OI

__all__ = ["Linear", "LoRALinear", "LowRank", "Routing", "initial_a"]


def initial_a(rank: int, in_features: int, generator: torch.Generator) -> Tensor:
    """A fresh A (R, I) in fp32 on the CPU, Kaiming-uniform with a = sqrt(5): as nn.Linear draws its weight.

    That is U(-1/sqrt(I), 1/sqrt(I)). Drawn from `generator` only; torch's global generator is left alone.
    """
    a_RI = torch.empty(rank, in_features, dtype=torch.float32)
    nn.init.kaiming_uniform_(a_RI, a=math.sqrt(5), generator=generator)
    return a_RI


class LowRank(nn.Module):
    """The update of one adapter at one layer: A (R, I), B (O, R), s.

    Its dropout draws from `draws`; where a part of the input has a seed, from `draws` seeded anew with that and `salt`,
    which sets the layers of an adapter apart.
    """

    def __init__(
        self, a_RI: Tensor, b_OR: Tensor, *, scaling: float, dropout: float, draws: torch.Generator, salt: int = 0
    ) -> None:
        super().__init__()
        self.lora_A = nn.Parameter(a_RI)
        self.lora_B = nn.Parameter(b_OR)
        self.scaling = scaling
        self.dropout = dropout
        self.draws = draws
        self.salt = salt

    def kept(
        self, shape: tuple[int, int], device: torch.device, parts: Sequence[tuple[int, int]] = ()
    ) -> Tensor | None:
        """Which inputs dropout lets through, bool (N, I); None where nothing is dropped. `parts`: (rows, seed)."""
        if not (self.training and self.dropout):
            return None
        kept_NI = torch.empty(shape, dtype=torch.bool, device=self.draws.device)
        start = 0
        for num_rows, seed in parts:
            self.draws.manual_seed(_mixed(seed, self.salt))
            kept_NI[start : start + num_rows].bernoulli_(1.0 - self.dropout, generator=self.draws)
            start += num_rows
        if not parts:
            kept_NI.bernoulli_(1.0 - self.dropout, generator=self.draws)
        return kept_NI.to(device)

    def extra_repr(self) -> str:
        return f"r={self.lora_A.shape[0]}, scaling={self.scaling:g}, dropout={self.dropout:g}"


class LoRALinear(nn.Module):
    """A frozen linear layer plus any number of named low-rank updates.

    Semantics, for a row routed to adapter a:  y = x W^T + b + s_a (dropout(x) A_a^T) B_a^T
    A row routed to no adapter, or to one that this layer does not have, gets exactly what the wrapped layer gives.

    Shapes: x (..., I), W (O, I) or, in Conv1D, (I, O); A (R, I), B (O, R), y (..., O). A and B are fp32 parameters and
    are used in the dtype and on the device of x. Dropout acts on the update's input only, in training mode only, and
    draws from the adapter's own generator. The wrapped layer is frozen until `unwrap` gives it back as it was.

    Routing is read when forward runs, so recomputing a forward later (activation checkpointing) must route it again.
    Source: Hu et al. 2021, arXiv:2106.09685, section 4.1.
    """

    def __init__(self, wrapped: Linear, routing: Routing) -> None:
        super().__init__()
        self.wrapped = wrapped
        self.routing = routing
        self.updates = nn.ModuleDict()
        self.out_features, self.in_features = weight_OI(wrapped).shape
        self._required_grad = {name: p.requires_grad for name, p in wrapped.named_parameters()}
        wrapped.requires_grad_(False)
        self.training = wrapped.training

    @property
    def weight(self) -> Tensor:
        """The wrapped layer's weight: some models ask a layer for its weight's dtype or device."""
        return self.wrapped.weight

    @property
    def bias(self) -> Tensor | None:
        return self.wrapped.bias

    def attach(self, name: str, update: LowRank) -> None:
        """Add a named update; the others stay as they are. The name must be free and the shapes must fit."""
        assert name not in self, f"{name!r} is attached already"
        shapes = tuple(update.lora_A.shape), tuple(update.lora_B.shape)
        rank = update.lora_A.shape[0]
        if shapes != ((rank, self.in_features), (self.out_features, rank)):
            raise ValueError(f"A, B are {shapes}; this layer needs (R, {self.in_features}), ({self.out_features}, R)")
        update.train(self.training)
        self.updates[_key(name)] = update

    def detach(self, name: str) -> None:
        """Drop a named update; the others stay as they are."""
        del self.updates[_key(name)]

    def update(self, name: str) -> LowRank:
        found = self.updates[_key(name)]
        assert isinstance(found, LowRank)
        return found

    def __contains__(self, name: str) -> bool:
        return _key(name) in self.updates

    def unwrap(self) -> Linear:
        """The wrapped layer, its parameters requiring gradients as they did before; this one is of no use after."""
        for name, parameter in self.wrapped.named_parameters():
            parameter.requires_grad_(self._required_grad[name])
        return self.wrapped

    def forward(self, x: Tensor) -> Tensor:
        """x (..., I) -> y (..., O), routed by `routing.route`; ValueError if x is not of the shape that was routed."""
        shares = [share for share in self.routing.route.shares if share.adapter in self]
        if not shares:
            y: Tensor = self.wrapped(x)
            return y
        lead = self.routing.route.shape_of(x)
        tokens_per_place = math.prod(lead[1:])
        updates = []
        for share in shares:
            low, places = self.update(share.adapter), share.places_on(x.device)
            num_places = len(range(lead[0])[places]) if isinstance(places, slice) else len(places)
            kept_NI = low.kept((num_places * tokens_per_place, self.in_features), x.device, share.draws)
            updates.append(Update(places, low.lora_A, low.lora_B, low.scaling, kept_NI, low.dropout))
        return updated_linear(x, self.wrapped, lead, updates)


def _mixed(seed: int, salt: int) -> int:
    """A 63-bit seed that any change of either number changes all over.

    Source: the finalizer of SplitMix64, Steele, Lea and Flood 2014, doi:10.1145/2660193.2660195, figure 16.
    """
    mixed = (seed + (salt + 1) * 0x9E3779B97F4A7C15) % 2**64
    mixed = (mixed ^ mixed >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    mixed = (mixed ^ mixed >> 27) * 0x94D049BB133111EB % 2**64
    return (mixed ^ mixed >> 31) >> 1


def _key(name: str) -> str:
    """A ModuleDict key for any adapter name: no dots, and never the name of one of ModuleDict's own attributes."""
    return "lora " + name.replace("%", "%25").replace(".", "%2E")
