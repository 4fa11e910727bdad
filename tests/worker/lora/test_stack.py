"""A stack's products once they keep their matrices as the processor likes them."""

import pytest
import torch
from torch import Tensor

from worker.kernels.packed_linear import PackedProduct, can_pack
from worker.lora.product import MakeProduct, PlainProduct
from worker.lora.stack import PACK_AFTER, Part, Stack

LAYERS, IN, SIZES, RANK = 2, 48, (32, 16, 24), 8
# Products in another order, on values of order 1 to 10.
CLOSE = {torch.float32: {"atol": 1e-4, "rtol": 1e-4}, torch.bfloat16: {"atol": 0.2, "rtol": 0.05}}


def part(seed: int, members: tuple[int, ...], dtype: torch.dtype) -> Part:
    draws = torch.Generator().manual_seed(seed)
    tensors = {
        (layer, member): (
            torch.randn(RANK, IN, generator=draws) * 0.3, torch.randn(SIZES[member], RANK, generator=draws) * 0.3, 2.0,
        )
        for layer in range(LAYERS)
        for member in members
    }  # fmt: skip
    return Part.of(tensors, num_layers=LAYERS, dtype=dtype, device=torch.device("cpu"))


def added(stack: Stack, layer: int, x: Tensor, columns: slice, num_columns: int) -> Tensor:
    y = torch.zeros(len(x), sum(SIZES), dtype=x.dtype)
    hidden = torch.ones(len(x), 1, num_columns, dtype=torch.bool)
    hidden[:, :, columns] = False
    stack.add(layer, x, y, hidden, None)
    return y


def expected(one: Part, layer: int, x: Tensor) -> Tensor:
    y = torch.zeros(len(x), sum(SIZES), dtype=x.dtype)
    one.add(layer, x, y, SIZES, places=slice(None), weight=1.0)
    return y


@pytest.mark.parametrize("num_columns", [16, 128], ids=["joint", "a product each"])
@pytest.mark.parametrize("dtype", CLOSE)
@pytest.mark.parametrize("product", [PlainProduct, PackedProduct])
def test_packing_changes_nothing_and_a_new_adapter_is_seen_at_once(
    product: MakeProduct, dtype: torch.dtype, num_columns: int
) -> None:
    """Steps before, at and after the one that packs add the same; an adapter put into the same columns afterwards adds
    its own from the very next step on."""
    if product is PackedProduct and not can_pack([torch.zeros(8, 8, dtype=dtype)]):
        pytest.skip("this build of torch cannot pack")
    members = (0, 2)
    stack = Stack(
        members, SIZES, num_layers=LAYERS, in_features=IN, num_columns=num_columns, dtype=dtype,
        device=torch.device("cpu"), product=product,
    )  # fmt: skip
    x = torch.randn(5, IN, generator=torch.Generator().manual_seed(9)).to(dtype)
    columns = slice(4, 4 + RANK)
    one, other = part(1, members, dtype), part(2, members, dtype)
    stack.put(slice(0, 4), None)
    stack.put(columns, one)

    for _ in range(PACK_AFTER + 2):
        for layer in range(LAYERS):
            found = added(stack, layer, x, columns, num_columns)
            torch.testing.assert_close(found, expected(one, layer, x), **CLOSE[dtype])
    stack.put(columns, other)

    for layer in range(LAYERS):
        found = added(stack, layer, x, columns, num_columns)
        torch.testing.assert_close(found, expected(other, layer, x), **CLOSE[dtype])
        assert not torch.allclose(found, expected(one, layer, x), **CLOSE[dtype])
