"""A decoder layer of Llama's kind as one call of compiled code, or as four with room between them."""

# Shapes: T tokens, I hidden features, F the MLP's width, H query heads, G key-value heads, D head width, N places.

import ctypes
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from worker.kernels.native.step_kernels import StepKernels
from worker.kernels.native.streamed_product import StreamedProduct
from worker.lora.sites import AddUpdates
from worker.lora.update_table import UpdateTable

SITES = ("qkv", "output", "gate_up", "down")
"""The layer's linear layers, in order: those that are given the same input together."""


def _structure(name: str, **fields: Any) -> type[ctypes.Structure]:
    return type(name, (ctypes.Structure,), {"_fields_": list(fields.items())})


_POINTER, _SIZE, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
# As in layer.c.
_Site = _structure("_Site", weight=_POINTER, bias=_POINTER, out_features=_SIZE, place=_SIZE)
_Table = _structure("_Table", pieces=_POINTER, num_pieces=_SIZE, shares=_POINTER, members=_POINTER)
_Layer = _structure(
    "_Layer",
    **dict.fromkeys(("hidden", "inner", "queries", "groups", "width"), _SIZE),
    **dict.fromkeys(("attention_norm", "mlp_norm"), _POINTER),
    **dict.fromkeys(SITES, _Site),
    **dict.fromkeys(("keys", "values"), _POINTER),
    **dict.fromkeys(("attention_eps", "mlp_eps", "scale"), _FLOAT),
)
_Step = _structure(
    "_Step",
    **dict.fromkeys(("tokens", "threads"), _SIZE),
    **dict.fromkeys(("cos", "sin", "where"), _POINTER),
    **dict.fromkeys(SITES, _Table),
    **dict.fromkeys(("normed", "heads", "seen", "middle", "gates", "gated"), _POINTER),
)


@dataclass(frozen=True)
class Norm:
    """w x / sqrt(mean(x^2) + eps)."""

    weight_I: Tensor
    eps: float


@dataclass(frozen=True)
class Linears:
    """Linear layers that are given the same input, and which of those of their kind they are."""

    product: StreamedProduct
    place: int


class LayerStep:
    """What all layers of a step share: positions, places, updates, and room for what is formed in between."""

    def __init__(self, x_TI: Tensor, cos_TD: Tensor, sin_TD: Tensor, where_T: Tensor, sizes: tuple[int, ...],
                 tables: Mapping[str, UpdateTable]) -> None:  # fmt: skip
        """`sizes`: features of what is formed: normed, heads, seen, middle, gates and gated. `tables`, by site."""
        num_tokens = len(x_TI)
        self.normed, self.heads, self.seen, self.middle, self.gates, self.gated = (
            x_TI.new_empty(num_tokens, size) for size in sizes
        )
        assert cos_TD.is_contiguous()
        assert sin_TD.is_contiguous()
        assert cos_TD.dtype == sin_TD.dtype == x_TI.dtype
        assert where_T.dtype == torch.int64
        assert cos_TD.shape == sin_TD.shape
        assert len(cos_TD) == len(where_T) == num_tokens
        assert all(table.num_tokens <= num_tokens for table in tables.values())
        formed = (self.normed, self.heads, self.seen, self.middle, self.gates, self.gated)
        self._kept = (cos_TD, sin_TD, where_T, tables)
        self.tokens = num_tokens
        self.raw = _Step(
            num_tokens, torch.get_num_threads(), cos_TD.data_ptr(), sin_TD.data_ptr(), where_T.data_ptr(),
            *(_table(tables.get(site)) for site in SITES), *(one.data_ptr() for one in formed),
        )  # fmt: skip
        self.at = ctypes.addressof(self.raw)


class DecoderLayer:
    """h = x + o(attention(turn(q, k), v)),  y = h + down(silu(gate) up), with the updates that a step has tables of.

    Values are those of the same done one by one in float32, rounded after each operation to the layer's dtype.
    """

    def __init__(self, kernels: StepKernels, linears: Mapping[str, Linears], norms: tuple[Norm, Norm], *,
                 num_queries: int, num_groups: int, width: int, scale: float) -> None:  # fmt: skip
        """`linears` by site; norms before attention and before the MLP."""
        products = [linears[site].product for site in SITES]
        _, output, gate_up, down = products
        self._kernels, self._kept = kernels, (products, norms)
        hidden, inner = output.out_features, down.in_features
        self.sizes = (hidden, products[0].out_features, num_queries * width, hidden, gate_up.out_features, inner)
        self.raw = _Layer(
            hidden, inner, num_queries, num_groups, width, *(norm.weight_I.data_ptr() for norm in norms),
            *(_Site(*product.pointers, product.out_features, linears[site].place)
              for site, product in zip(SITES, products, strict=True)),
            None, None, *(norm.eps for norm in norms), scale,
        )  # fmt: skip
        self._at = ctypes.addressof(self.raw)

    def __call__(self, step: LayerStep, x_TI: Tensor, keys_NGD: Tensor, values_NGD: Tensor, first_T: Tensor,
                 count_T: Tensor, updates: Mapping[str, AddUpdates] | None = None) -> Tensor:  # fmt: skip
        """y (T, I). Each token sees `count` places of the cache from `first` on, its own among them.

        With `updates`, by site, they are called as (input, output) of each site as soon as that is there.
        """
        assert x_TI.is_contiguous()
        assert keys_NGD.is_contiguous()
        assert values_NGD.is_contiguous()
        assert x_TI.dtype == keys_NGD.dtype == values_NGD.dtype == self._kernels.dtype
        assert len(first_T) == len(count_T) == len(x_TI) == step.tokens
        y_TI = torch.empty_like(x_TI)
        self.raw.keys, self.raw.values = keys_NGD.data_ptr(), values_NGD.data_ptr()
        arguments = (self._at, step.at, x_TI.data_ptr(), y_TI.data_ptr(), first_T.data_ptr(), count_T.data_ptr())
        if updates is None:
            self._kernels.layer(*arguments, 0, len(SITES))
            return y_TI
        ends = {
            "qkv": (step.normed, step.heads),
            "output": (step.seen, step.middle),
            "gate_up": (step.normed, step.gates),
            "down": (step.gated, y_TI),
        }
        for number, site in enumerate(SITES):
            self._kernels.layer(*arguments, number, number + 1)
            updates[site](*ends[site])
        return y_TI


def _table(table: UpdateTable | None) -> ctypes.Structure:
    if table is None:
        return _Table()
    return _Table(table.pieces_at, table.num_pieces, table.shares_at, table.members_at)
