"""The compiled kernels against torch on small inputs, since a compiler may get one wrong."""

# Shapes: T tokens, I in features, F the MLP's width, H query heads, G key-value heads, D head width, N places.

from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor
from torch.nn import functional

from worker.kernels.native.step_kernels import StepKernels, pack_weight
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
        "rms_norm": _norm_agrees,
        "gated": _gate_agrees,
        "turn": _turn_agrees,
        "attend": _attention_agrees,
        "add_updates": _updates_agree,
    }
    if kernels.has_product:
        trials["product"] = _product_agrees
    return [name for name, agrees in trials.items() if not agrees(kernels, _Draws(kernels.dtype))]


class _Draws:
    """Random tensors, each other than the one before."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._generator = torch.Generator().manual_seed(0)

    def __call__(self, *shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=self._generator) * scale).to(self._dtype)


def _agree(found: Tensor, expected: Tensor) -> bool:
    tolerance = max(_ROUNDINGS * torch.finfo(found.dtype).eps, _LEAST)
    return bool((found.float() - expected.float()).abs().max() <= tolerance * expected.abs().max())


def _norm_agrees(kernels: StepKernels, drawn: _Draws) -> bool:
    x_TI, weight_I = drawn(7, 80, scale=30.0), drawn(80)
    expected = functional.rms_norm(x_TI.float(), [80], weight_I.float(), 1e-5)
    return _agree(kernels.rms_norm(x_TI, weight_I, 1e-5), expected)


def _gate_agrees(kernels: StepKernels, drawn: _Draws) -> bool:
    x_T2F = drawn(7, 2 * 80, scale=50.0)  # as far as silu is 0 on one side and x on the other
    gate_TF, up_TF = x_T2F.float().chunk(2, dim=-1)
    return _agree(kernels.gated(x_T2F), functional.silu(gate_TF) * up_TF)


def _turn_agrees(kernels: StepKernels, drawn: _Draws) -> bool:
    tokens, queries, groups, width = 5, 4, 2, 32
    x_THD, cos_TD, sin_TD = drawn(tokens, queries + 2 * groups, width), drawn(tokens, width), drawn(tokens, width)
    keys_NGD, values_NGD = torch.zeros_like(x_THD[:, :groups]).repeat(3, 1, 1), drawn(3 * tokens, groups, width)
    where_T = torch.arange(tokens) * 3 + 1
    first, second = x_THD[:, : queries + groups].float().chunk(2, dim=-1)
    swapped = torch.cat((-second, first), dim=-1)
    turned = x_THD[:, : queries + groups].float() * cos_TD.float()[:, None] + swapped * sin_TD.float()[:, None]
    values = x_THD[:, queries + groups :].clone()
    kernels.turn(x_THD, cos_TD, sin_TD, keys_NGD, values_NGD, where_T)
    return (
        _agree(x_THD[:, : queries + groups], turned)
        and torch.equal(keys_NGD[where_T], x_THD[:, queries : queries + groups])
        and torch.equal(values_NGD[where_T], values)
        and int(keys_NGD.abs().sum(dim=(1, 2)).count_nonzero()) == tokens
    )


def _attention_agrees(kernels: StepKernels, drawn: _Draws) -> bool:
    rows, room, queries, groups = 3, 64, 6, 2
    for width in (32, 64, 128):
        keys, values = drawn(rows, room, groups, width), drawn(rows, room, groups, width)
        query_BHD = drawn(rows, queries + 2 * groups, width)[:, :queries]
        first_B, count_B = torch.tensor([0, room + 5, 2 * room]), torch.tensor([1, 40, room])
        found = kernels.attend(query_BHD, keys.transpose(1, 2), values.transpose(1, 2), first_B, count_B, width**-0.5)
        for row, (first, count) in enumerate(zip(first_B.tolist(), count_B.tolist(), strict=True)):
            k, v = (held.flatten(0, 1)[first : first + count].float() for held in (keys, values))
            q = query_BHD[row].float().view(groups, queries // groups, width)
            weights = torch.einsum("ghd,lgd->ghl", q, k).mul(width**-0.5).softmax(-1)
            if not _agree(found[row], torch.einsum("ghl,lgd->ghd", weights, v).reshape(queries, width)):
                return False
    return True


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
    expected = y_TO.float()
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
    packed = pack_weight(weight_OI)
    for num_tokens in (*range(1, 10), 19):
        x_TI, onto_TO = drawn(num_tokens, 48), drawn(num_tokens, 64)
        expected = x_TI.float() @ weight_OI.float().t()
        if not _agree(kernels.product(x_TI, packed, None, None), expected):
            return False
        if not _agree(kernels.product(x_TI, packed, bias_O, onto_TO), expected + bias_O.float() + onto_TO.float()):
            return False
    return True
