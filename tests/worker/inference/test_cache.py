"""The key-value cache: what fits, what waits, what can never fit, and what stays when rows move."""

import pytest
import torch

from worker.inference.cache import Plane, SlotCache

PLANES = [Plane(2, 4, torch.float32)] * 4  # 2 layers
TOKEN_BYTES = 4 * 2 * 4 * 4
CPU = torch.device("cpu")


def cache(num_tokens: int, *, max_rows: int = 8, max_positions: int = 1024) -> SlotCache:
    return SlotCache(
        PLANES, max_rows=max_rows, max_positions=max_positions, budget_bytes=num_tokens * TOKEN_BYTES, device=CPU
    )


def write(held: SlotCache, row: int, values: list[float]) -> None:
    """Append tokens whose keys and values, in all layers, are these numbers."""
    held.begin([(row, held.lengths[row], len(values))])
    states = torch.tensor(values)[None, None, :, None].expand(1, 2, -1, 4).contiguous()
    for layer in held.layers:
        layer.update(states, -states)
    held.commit()


def read(held: SlotCache, row: int) -> list[float]:
    keys = held.layers[1].keys[row, 0, : held.lengths[row], 0]
    assert torch.equal(held.layers[0].values[row, 1, : held.lengths[row], 3], -keys)
    return keys.tolist()


def test_as_many_short_rows_fit_as_the_budget_has_room_for() -> None:
    """256 tokens are four rows of 64; a fifth waits until one leaves."""
    held = cache(256)
    assert [held.add_row(50) for _ in range(5)] == [0, 1, 2, 3, None]

    held.remove_row(2)

    assert held.add_row(64) == 3


def test_a_long_row_waits_until_the_short_ones_leave_room() -> None:
    """A row as long as the whole budget gets it once nobody else is there, and then nobody else gets a row."""
    held = cache(256)
    held.add_row(10)
    assert held.add_row(256) is None
    held.remove_row(0)

    assert held.add_row(256) == 0
    assert held.add_row(1) is None


def test_no_more_rows_than_were_agreed_on() -> None:
    """Room alone is not enough."""
    held = cache(1024, max_rows=2)

    assert [held.add_row(4) for _ in range(3)] == [0, 1, None]


def test_the_longest_row_is_the_budget_or_the_context() -> None:
    """What can never fit can be told before it is asked for."""
    assert cache(300).most_positions == 300
    assert cache(10_000).most_positions == 1024


def test_a_budget_without_room_for_a_token_is_refused() -> None:
    """A setting that cannot work says so with its numbers."""
    with pytest.raises(ValueError, match="100 bytes hold no token of 128 bytes"):
        SlotCache(PLANES, max_rows=1, max_positions=8, budget_bytes=100, device=CPU)


def test_rows_keep_what_they_hold_through_every_move() -> None:
    """Longer places, shorter places, and the number of a row that left."""
    held = cache(512)
    for row in range(3):
        held.add_row(30)
        write(held, row, [row + 1.0] * (row + 2))

    assert held.add_row(100) == 3  # 4 rows of 128
    write(held, 3, [9.0] * 100)
    held.remove_row(0)  # row 3 becomes row 0
    assert [read(held, row) for row in range(3)] == [[9.0] * 100, [2.0] * 3, [3.0] * 4]
    held.remove_row(0)  # row 2 becomes row 0
    assert [held.add_row(20) for _ in range(6)] == [2, 3, 4, 5, 6, 7]  # 8 rows of 64

    assert [read(held, row) for row in range(3)] == [[3.0] * 4, [2.0] * 3, []]


def test_what_no_row_holds_is_zero() -> None:
    """Also after rows left, moved, or were written by a step that was not taken; and the check can fail."""
    held = cache(512)
    for row in range(3):
        held.add_row(40)
        write(held, row, [float("nan")] * 20)
    held.begin([(2, 20, 5)])
    held.layers[0].update(torch.ones(1, 2, 5, 4), torch.ones(1, 2, 5, 4))  # and no commit

    for _ in range(3):
        held.remove_row(0)
    assert held.is_zero()

    held.layers[0].keys[0, 0, 0, 0] = 1.0
    assert not held.is_zero()


def test_the_budget_takes_no_memory_before_it_is_used() -> None:
    """Room for a million tokens is there at once and costs no pages."""
    import psutil

    before = psutil.Process().memory_info().rss
    held = cache(1 << 24, max_rows=64, max_positions=1 << 20)

    assert held.size_bytes == TOKEN_BYTES << 24
    assert psutil.Process().memory_info().rss - before < 64 << 20
