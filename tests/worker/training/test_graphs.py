"""The sizes that CUDA graphs are made for."""

import pytest

from worker.training.graphs import Size


@pytest.mark.parametrize(
    "lengths",
    [[1], [64], [3, 9, 200], [255] * 8, [1000, 1], [700] * 11, [5] * 100],
    ids=lambda lengths: f"{len(lengths)}x{lengths[0]}",
)
def test_size_holds_the_stream(lengths: list[int]) -> None:
    """All tokens fit, with at most a quarter more, or 63; so do the segments with one of what is left over."""
    size = Size.of(lengths)
    left = size.num_tokens - sum(lengths)

    assert 0 <= left <= max(63, sum(lengths) / 4)
    assert size.num_segments >= len(lengths) + 1
    assert size.longest >= max(*lengths, left)


def test_streams_of_about_a_size_share_it() -> None:
    """Few sizes serve many streams: eight samples of 150 to 250 tokens make no more than six."""
    sizes = {Size.of([150 + step] * 8) for step in range(101)}

    assert 1 < len(sizes) <= 6
