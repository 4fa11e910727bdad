"""The compiled kernels against torch on small inputs, since a compiler may get one wrong."""

# Shapes: T tokens, I in features, O out features, H query heads, g of one key-value head, G key-value heads, D head
# width, N places.

from collections.abc import Callable
from functools import partial
from typing import Final

import torch
from torch import Tensor
from torch.nn import functional

from worker.kernels.native.decoder_layer import SITES, DecoderLayer, LayerStep, Linears, Norm
from worker.kernels.native.step_kernels import StepKernels
from worker.kernels.native.streamed_product import StreamedProduct
from worker.lora.stack import Part
from worker.lora.update_table import UpdateTable

_ROUNDINGS: Final = 2
_LEAST: Final = 1e-5
"""How far apart two ways to compute the same may be, relative to the largest value: so many roundings of the elements'
type, but at least this, since e^x enlarges what its argument is off."""


@torch.inference_mode()
def failures(kernels: StepKernels) -> list[str]:
    """The kernels that do not give what torch gives in float32."""
    trials: dict[str, Callable[[StepKernels, _Draws], bool]] = {
        "attend": _attention_agrees,
        "add_updates": _updates_agree,
        "product": _product_agrees,
        "layer": _layer_agrees,
    }
    return [name for name, agrees in trials.items() if not agrees(kernels, _Draws(kernels.dtype))]


class _Draws:
    """Random tensors, each other than the one before."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._generator = torch.Generator().manual_seed(0)

    def __call__(self, *shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=self._generator) * scale).to(self._dtype)


def _agree(found: Tensor, expected: Tensor, *, many: int = 1) -> bool:
    """`many`: how many operations follow each other."""
    tolerance = many * max(_ROUNDINGS * torch.finfo(found.dtype).eps, _LEAST)
    return bool((found.float() - expected.float()).abs().max() <= tolerance * expected.abs().max())


def _layer_agrees(kernels: StepKernels, drawn: _Draws) -> bool:
    """Two tokens of a row of 5 places, one with an adapter at each site, as a whole and site by site."""
    hidden, inner, queries, groups, width, places = 64, 96, 4, 2, 32, torch.tensor([1, 4])
    shapes = {
        "qkv": ((queries + 2 * groups) * width, hidden), "output": (hidden, queries * width),
        "gate_up": (2 * inner, hidden), "down": (hidden, inner),
    }  # fmt: skip
    weights = {site: drawn(*shape, scale=0.2) for site, shape in shapes.items()}
    biases = {"qkv": drawn(shapes["qkv"][0]), "output": None, "gate_up": None, "down": drawn(hidden)}
    parts = {
        site: Part((0,), 3, drawn(2, 3, in_features, scale=0.2), (drawn(2, 3, out_features, scale=0.2),))
        for site, (out_features, in_features) in shapes.items()
    }
    norms = Norm(drawn(hidden), 1e-5), Norm(drawn(hidden), 1e-3)
    linears = {site: Linears(StreamedProduct(kernels, weights[site], biases[site]), place=1) for site in SITES}
    layer = DecoderLayer(
        kernels, linears, norms, num_queries=queries, num_groups=groups, width=width, scale=width**-0.5
    )
    x_TI, cos_TD, sin_TD = drawn(2, hidden), drawn(2, width), drawn(2, width)
    keys_NGD, values_NGD = drawn(5, groups, width), drawn(5, groups, width)
    first_T, count_T = torch.tensor([0, 2]), torch.tensor([2, 3])
    tables = {site: UpdateTable.of([(1, 1, ((part, 0.5),))], (shapes[site][0],)) for site, part in parts.items()}
    updates = {site: partial(kernels.add_updates, table, 1) for site, table in tables.items()}

    def site(name: str, x_TI: Tensor) -> Tensor:
        y_TO, bias_O, part = x_TI @ weights[name].float().t(), biases[name], parts[name]
        y_TO[1] += 0.5 * x_TI[1] @ part.a_NMI[1].float().t() @ part.b_NrO[0][1].float()
        return y_TO if bias_O is None else y_TO + bias_O.float()

    def norm(x_TI: Tensor, norm: Norm) -> Tensor:
        return functional.rms_norm(x_TI, [hidden], norm.weight_I.float(), norm.eps)

    x = x_TI.float()
    heads_THD = site("qkv", norm(x, norms[0])).view(2, -1, width)
    first_half, second_half = heads_THD[:, : queries + groups].chunk(2, dim=-1)
    turned_THD = heads_THD[:, : queries + groups] * cos_TD.float()[:, None]
    turned_THD += torch.cat((-second_half, first_half), dim=-1) * sin_TD.float()[:, None]
    keys, values = (held.to(torch.float32, copy=True) for held in (keys_NGD, values_NGD))
    keys[places], values[places] = turned_THD[:, queries:], heads_THD[:, queries + groups :]
    seen = _attended(turned_THD[:, :queries], keys, values, first_T, count_T, width**-0.5)
    h = x + site("output", seen.flatten(1))
    gate, up = site("gate_up", norm(h, norms[1])).chunk(2, dim=-1)
    expected = h + site("down", functional.silu(gate) * up)
    for own_tables, own_updates in ((tables, None), ({}, updates)):
        k, v = keys_NGD.clone(), values_NGD.clone()
        step = LayerStep(x_TI, cos_TD, sin_TD, places, layer.sizes, own_tables)
        found = layer(step, x_TI, k, v, first_T, count_T, own_updates)
        if not all(map(partial(_agree, many=8), (found, k, v), (expected, keys, values))):
            return False
    return True


def _attention_agrees(kernels: StepKernels, drawn: _Draws) -> bool:
    rows, room, queries, groups = 3, 64, 6, 2
    first_T, count_T = torch.tensor([0, room + 5, 2 * room]), torch.tensor([1, 40, room])
    for width in (32, 64, 128):
        keys, values = drawn(rows, room, groups, width), drawn(rows, room, groups, width)
        query_THD = drawn(rows, queries + 2 * groups, width)[:, :queries]
        found = kernels.attend(query_THD, keys.transpose(1, 2), values.transpose(1, 2), first_T, count_T, width**-0.5)
        k, v = (held.flatten(0, 1).float() for held in (keys, values))
        if not _agree(found, _attended(query_THD.float(), k, v, first_T, count_T, width**-0.5)):
            return False
    return True


def _attended(query_THD: Tensor, keys_NGD: Tensor, values_NGD: Tensor, first_T: Tensor, count_T: Tensor,
              scaling: float) -> Tensor:  # fmt: skip
    """softmax(scaling q k^T) v of each token over the places that it sees."""
    found = []
    for query_HD, first, count in zip(query_THD, first_T.tolist(), count_T.tolist(), strict=True):
        k, v = keys_NGD[first : first + count], values_NGD[first : first + count]
        query_GgD = query_HD.view(k.shape[1], -1, k.shape[2])
        weights = torch.einsum("ghd,lgd->ghl", query_GgD, k).mul(scaling).softmax(-1)
        found.append(torch.einsum("ghl,lgd->ghd", weights, v).flatten(0, 1))
    return torch.stack(found)


def _updates_agree(kernels: StepKernels, drawn: _Draws) -> bool:
    sizes, layers, features, layer = (80, 16, 32), 2, 48, 1
    parts = [
        Part(members, rank, drawn(layers, len(members) * rank, features),
             tuple(drawn(layers, rank, sizes[member]) for member in members))
        for members, rank in (((0, 2), 5), ((1,), 8))
    ]  # fmt: skip
    one, both = ((parts[0], 1.0),), ((parts[0], 0.5), (parts[1], -2.0))
    runs = [(0, 1, one), (2, 7, both), (9, 3, one)]
    x_TI, y_TO = drawn(13, features), drawn(13, sum(sizes))
    expected = y_TO.to(torch.float32, copy=True)
    for first, num_tokens, own in runs:
        for part, weight in own:
            for i, member in enumerate(part.members):
                rows, start = slice(first, first + num_tokens), sum(sizes[:member])
                a_rI = part.a_NMI[layer, i * part.rank : (i + 1) * part.rank].float()
                added = weight * x_TI[rows].float() @ a_rI.t() @ part.b_NrO[i][layer].float()
                expected[rows, start : start + sizes[member]] += added
    kernels.add_updates(UpdateTable.of(runs, sizes), layer, x_TI, y_TO)
    return _agree(y_TO, expected)


def _product_agrees(kernels: StepKernels, drawn: _Draws) -> bool:
    weight_OI, bias_O = drawn(64, 48), drawn(64)
    packed = kernels.pack(weight_OI)
    for num_tokens in (*range(1, 10), 19):
        x_TI, onto_TO = drawn(num_tokens, 48), drawn(num_tokens, 64)
        expected = x_TI.float() @ weight_OI.float().t()
        if not _agree(kernels.product(x_TI, packed, None, None), expected):
            return False
        if not _agree(kernels.product(x_TI, packed, bias_O, onto_TO), expected + bias_O.float() + onto_TO.float()):
            return False
    return True
