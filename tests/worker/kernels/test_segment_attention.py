"""Attention of a packed stream as batched products, against torch's own attention of each segment."""

import itertools

import pytest
import torch
from torch import Tensor

from worker.attention import _attention, packed_segments
from worker.kernels import attention as kernel
from worker.kernels.attention import segment_attention

HEADS, GROUPS, WIDTH = 6, 2, 4
BOUNDS = (0, 1, 6, 18, 21)


def stream(dtype: torch.dtype, num_tokens: int = BOUNDS[-1]) -> list[Tensor]:
    draws = torch.Generator().manual_seed(0)
    return [
        torch.randn(1, num_tokens, heads, WIDTH, generator=draws, dtype=torch.float64)
        .to(dtype)
        .transpose(1, 2)
        .requires_grad_()
        for heads in (HEADS, GROUPS, GROUPS)
    ]


def window_of(length: int) -> Tensor | None:
    behind = torch.arange(length)[:, None] - torch.arange(length)[None]
    return behind < 4


def no_window(length: int) -> None:
    return None


def each_by_torch(q: Tensor, k: Tensor, v: Tensor, scaling: float, *, is_windowed: bool) -> Tensor:
    parts = []
    for start, end in itertools.pairwise(BOUNDS):
        mask = torch.ones(end - start, end - start, dtype=torch.bool).tril()
        if is_windowed:
            mask &= window_of(end - start)
        rows = slice(start, end)
        parts.append(
            torch.nn.functional.scaled_dot_product_attention(
                q[:, :, rows], k[:, :, rows], v[:, :, rows], attn_mask=mask, scale=scaling, enable_gqa=True
            )
        )
    return torch.cat(parts, dim=2).transpose(1, 2)


@pytest.mark.parametrize("is_windowed", [False, True], ids=["causal", "window of 4"])
def test_equals_torchs_attention(is_windowed: bool) -> None:
    """Values and gradients are those of torch's attention over each segment by itself, to float64 rounding."""
    inputs = stream(torch.float64)
    found = segment_attention(*inputs, BOUNDS, 0.3, window_of if is_windowed else no_window)
    expected = each_by_torch(*inputs, 0.3, is_windowed=is_windowed)
    weights = torch.randn(found.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    torch.testing.assert_close(found, expected)
    for ours, theirs in zip(
        torch.autograd.grad((found * weights).sum(), inputs),
        torch.autograd.grad((expected * weights).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)


def test_gradient_is_the_derivative() -> None:
    """The hand-written gradients agree with finite differences of the values."""
    inputs = stream(torch.float64)

    assert torch.autograd.gradcheck(lambda q, k, v: segment_attention(q, k, v, BOUNDS, 0.3, window_of), inputs)


def test_bfloat16_is_as_near_as_torchs() -> None:
    """In bf16 the error against float64 is a few of bf16's own roundings (2^-9 each): scores, weights and result."""
    inputs = stream(torch.bfloat16)
    exact = each_by_torch(*(x.double() for x in inputs), 0.3, is_windowed=False)
    found = segment_attention(*inputs, BOUNDS, 0.3, no_window)

    assert (found - exact).norm() / exact.norm() < 4 * 2**-9


def test_long_segments_go_another_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """Segments above the limit, alone and beside short ones, give what they gave below it."""
    inputs = stream(torch.float64)
    lengths = [end - start for start, end in itertools.pairwise(BOUNDS)]
    module = torch.nn.Module()
    module.num_key_value_groups = HEADS // GROUPS
    results = []
    for longest in (kernel.LONGEST, 5, 0):
        monkeypatch.setattr("worker.attention.LONGEST", longest)
        with packed_segments(lengths):
            results.append(_attention(module, *inputs, None, scaling=0.3)[0])

    torch.testing.assert_close(results[1], results[0])
    torch.testing.assert_close(results[2], results[0])


def test_a_spoilt_segment_spoils_no_other() -> None:
    """NaN in one segment leaves values and gradients of the others as they were, bit for bit."""
    clean = stream(torch.float32)
    spoilt = [x.detach().clone().requires_grad_() for x in clean]
    spoilt[1].data[:, :, 2] = float("nan")  # the second segment
    others = [0, *range(BOUNDS[2], BOUNDS[-1])]
    values, grads = [], []
    for inputs in (clean, spoilt):
        values.append(segment_attention(*inputs, BOUNDS, 0.3, no_window))
        grads.append(torch.autograd.grad(values[-1].square().sum(), inputs))

    assert values[1].isnan().any()
    assert torch.equal(values[0][:, others], values[1][:, others])
    for ours, theirs in zip(grads[0], grads[1], strict=True):
        assert torch.equal(ours[:, :, others], theirs[:, :, others])
