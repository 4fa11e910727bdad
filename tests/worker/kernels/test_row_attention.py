"""Attention of a step that can be captured against that of one whose rows are known beforehand."""

import pytest
import torch
from torch import Tensor

from worker.kernels.row_attention import Chunk, RowAttention, SlotAttention

POSITIONS = [0, 6, 2, 9]
SLOTS, GROUPS, HEADS, WIDTH, ROOM = len(POSITIONS), 2, 4, 8, 16
CPU = torch.device("cpu")


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("longest", [10, ROOM])
def test_a_token_of_every_slot_sees_what_it_sees_in_a_known_step(
    window: int | None, softcap: float | None, longest: int
) -> None:
    """Positions that only a tensor knows, and a row length that is rounded up, change nothing."""
    query = drawn(1, HEADS, SLOTS, WIDTH)
    keys, values = drawn(SLOTS, GROUPS, ROOM, WIDTH), drawn(SLOTS, GROUPS, ROOM, WIDTH) * 2
    options = {"scaling": None, "window": window, "softcap": softcap}
    known = RowAttention([Chunk(slot, at, 1) for slot, at in enumerate(POSITIONS)], [], CPU)

    found = SlotAttention(torch.tensor(POSITIONS), longest)(query, keys, values, **options)

    torch.testing.assert_close(found, known(query, keys, values, **options), rtol=1e-5, atol=1e-5)
    elsewhere = SlotAttention(torch.tensor(POSITIONS[::-1]), longest)(query, keys, values, **options)
    assert (found - elsewhere).abs().max() > 0.1
