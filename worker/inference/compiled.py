"""Decoder layers of Llama's kind on a CPU as single calls of compiled code."""

# Shapes: T tokens of a step, I hidden features.

from collections.abc import Iterable, Mapping
from typing import Any, Final, cast

import torch
from torch import Tensor, nn

from worker.attention import current_rows
from worker.inference.lean import LeanLayer
from worker.kernels import norms
from worker.kernels.native.decoder_layer import SITES, DecoderLayer, LayerStep, Linears, Norm
from worker.kernels.native.step_kernels import StepKernels
from worker.kernels.native.streamed_product import StreamedProduct
from worker.kernels.row_attention import RowAttention
from worker.lora.bank import AdapterBank
from worker.lora.sites import Site
from worker.lora.update_table import UpdateTable

_STEP: Final = "layer step"


class CompiledLayer:
    """A lean layer's forward, of which a generation step takes one call of C, or four if some of the step's adapters
    are not for the kernel. Equal to it within rounding."""

    def __init__(self, lean: LeanLayer, compiled: DecoderLayer, bank: AdapterBank, dtype: torch.dtype) -> None:
        self._lean, self._compiled, self._bank, self._dtype = lean, compiled, bank, dtype
        self._sites = dict(zip(SITES, _sites_of(lean), strict=True))
        self._kinds = tuple(site.kind for site in self._sites.values())
        self._updates = {name: site.add_updates for name, site in self._sites.items() if site.add_updates is not None}
        assert len(self._updates) == len(SITES), "the bank comes first"

    def __call__(self, hidden_states: Tensor, *args: Any, cache: Any = None,
                 position_embeddings: tuple[Tensor, Tensor] | None = None, **options: Any) -> Tensor:  # fmt: skip
        rows = current_rows()
        if not isinstance(rows, RowAttention) or position_embeddings is None or not self._takes(position_embeddings):
            return self._lean(
                hidden_states, *args, cache=cache, position_embeddings=position_embeddings, **options
            )  # fmt: skip
        x_TI, tables = hidden_states[0], self._bank.tables
        keys_NGD, values_NGD, where_T = cache.places(self._lean.index)

        cos_1TD, sin_1TD = position_embeddings

        def begin() -> tuple[LayerStep, Tensor]:
            by_site = self._by_site(tables or {})
            return LayerStep(x_TI, cos_1TD[0], sin_1TD[0], where_T, self._compiled.sizes, by_site), cos_1TD

        # Layers may be turned by different angles. The tensor is kept, so that no other one gets its id.
        step, _ = rows.made((_STEP, self._compiled.sizes, self._kinds, id(cos_1TD)), begin)
        first_T, count_T = rows.seen(self._lean.heads.window, cache.room[1])
        updates = None if tables is not None else self._updates
        return self._compiled(step, x_TI, keys_NGD, values_NGD, first_T, count_T, updates)[None]

    def _takes(self, position_embeddings: tuple[Tensor, Tensor]) -> bool:
        """True for what it would read: a layer may turn a part of each head only."""
        width = self._lean.heads.width
        return all(part.dtype == self._dtype and part.shape[-1] == width for part in position_embeddings)

    def _by_site(self, tables: Mapping[int, UpdateTable]) -> dict[str, UpdateTable]:
        return {name: tables[site.kind] for name, site in self._sites.items() if site.kind in tables}


def compile_layers(layers: Iterable[nn.Module], bank: AdapterBank, kernels: StepKernels) -> None:
    """Give those of the lean layers whose sizes the kernels take a compiled forward."""
    for layer in layers:
        lean = vars(layer)["forward"]
        compiled = _compiled(lean, kernels)
        if compiled is not None:
            vars(layer)["forward"] = CompiledLayer(lean, compiled, bank, kernels.dtype)


def _compiled(lean: LeanLayer, kernels: StepKernels) -> DecoderLayer | None:
    heads = lean.heads
    products = [site.product for site in _sites_of(lean)]
    linears = {
        name: Linears(product, site.place)
        for name, site, product in zip(SITES, _sites_of(lean), products, strict=True)
        if isinstance(product, StreamedProduct)
    }
    can_attend = kernels.attends(heads.num_query, heads.num_key, heads.width) and heads.softcap is None
    if len(linears) < len(SITES) or not can_attend or not all(map(norms.fused_forward, lean.norms)):
        return None
    before_attention, before_mlp = (Norm(cast(Tensor, one.weight), norms.eps_of(one)) for one in lean.norms)
    return DecoderLayer(
        kernels, linears, (before_attention, before_mlp), num_queries=heads.num_query, num_groups=heads.num_key,
        width=heads.width, scale=heads.width**-0.5 if heads.scaling is None else heads.scaling,
    )  # fmt: skip


def _sites_of(lean: LeanLayer) -> tuple[Site, ...]:
    return lean.qkv, lean.output, lean.gate_up, lean.down
