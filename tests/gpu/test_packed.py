"""Packed sequences on a GPU, against the same sequences one by one, for every supported architecture."""

from collections.abc import Callable

import pytest
import torch
from transformers import PreTrainedModel

from tests.gpu.conftest import CUDA, relative_error
from tests.worker.test_attention import (
    LENGTHS,
    SLIDING,
    every_architecture,
    gradients,
    restarting_positions,
    samples,
)
from worker.attention import packed_segments
from worker.kernels import varlen

MakeModel = Callable[..., PreTrainedModel]
BFLOAT16 = 3
"""How many times the rounding error of bfloat16 one by one a packed result may have, being another order of sums."""


def packed(model: PreTrainedModel) -> torch.Tensor:
    flat = torch.cat(samples()).to(CUDA)
    with packed_segments(LENGTHS):
        return model(input_ids=flat[None], position_ids=restarting_positions().to(CUDA), use_cache=False).logits[0]


def one_by_one(model: PreTrainedModel) -> torch.Tensor:
    return torch.cat([model(input_ids=ids.to(CUDA)[None], use_cache=False).logits[0] for ids in samples()])


def flat_gradients(model: PreTrainedModel, logits: torch.Tensor) -> torch.Tensor:
    return torch.cat([gradient.flatten() for _, gradient in sorted(gradients(model, logits.cpu()).items())])


@every_architecture
def test_packed_equals_one_by_one_in_float32(make_model: MakeModel, model_type: str) -> None:
    """Logits and the gradients of all weights, up to the order of fp32 sums."""
    model = make_model(model_type).to(CUDA)

    assert relative_error(packed(model), one_by_one(model)) < 2e-5
    assert relative_error(flat_gradients(model, packed(model)), flat_gradients(model, one_by_one(model))) < 2e-5


@every_architecture
def test_packed_rounds_as_one_by_one_in_bfloat16(make_model: MakeModel, model_type: str) -> None:
    """Logits and gradients are as far from those in fp32 as one by one in bfloat16 is, and not further."""
    exact = make_model(model_type).to(CUDA)
    logits, slopes = one_by_one(exact), flat_gradients(exact, one_by_one(exact))
    model = make_model(model_type).to(CUDA, torch.bfloat16)
    alone, together = one_by_one(model), packed(model)

    assert relative_error(together, logits) < BFLOAT16 * relative_error(alone, logits) < 0.1
    alone_slopes, together_slopes = flat_gradients(model, alone), flat_gradients(model, together)
    assert relative_error(together_slopes, slopes) < BFLOAT16 * relative_error(alone_slopes, slopes) < 0.5


@pytest.mark.parametrize("model_type", SLIDING)
def test_window_is_honoured(make_model: MakeModel, model_type: str) -> None:
    """In bfloat16 too, a segment longer than the sliding window does not see past it."""
    narrow = packed(make_model(model_type).to(CUDA, torch.bfloat16))
    wide = packed(make_model(model_type, sliding_window=32).to(CUDA, torch.bfloat16))

    assert relative_error(narrow[: LENGTHS[0]], wide[: LENGTHS[0]]) < 0.05
    assert relative_error(narrow, wide) > 0.05


def test_all_segments_are_one_kernel(make_model: MakeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """In bfloat16 each layer attends once, whatever the number of segments."""
    if not varlen.is_available(CUDA):
        pytest.skip("this GPU or torch has no attention over segments of any length")
    calls = []
    own = varlen.segment_attention

    def count(*arguments: torch.Tensor, **options: object) -> torch.Tensor:
        calls.append(options)
        return own(*arguments, **options)  # type: ignore[arg-type]  # passed on

    monkeypatch.setattr(varlen, "segment_attention", count)
    model = make_model("mistral").to(CUDA, torch.bfloat16)
    packed(model)

    assert len(calls) == model.config.num_hidden_layers


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("groups", [8, 2])
def test_kernel_against_float64(groups: int, window: int | None) -> None:
    """Value and gradients, grouped heads and window, against softmax(s q k^T + mask) v in float64."""
    if not varlen.is_available(CUDA):
        pytest.skip("this GPU or torch has no attention over segments of any length")
    draws = torch.Generator().manual_seed(1)
    lengths, heads, width, scaling = [70, 1, 9, 200], 8, 64, 0.2
    total = sum(lengths)

    def random(count: int) -> torch.Tensor:
        return torch.randn(1, count, total, width, generator=draws).to(CUDA, torch.bfloat16)

    inputs = [random(count).requires_grad_() for count in (heads, groups, groups)]
    weights = torch.randn(1, total, heads, width, generator=draws).to(CUDA, torch.bfloat16)
    starts = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32, device=CUDA)

    found = varlen.segment_attention(*inputs, starts, longest=256, scaling=scaling, window=window)
    slopes = torch.autograd.grad(found, inputs, weights)

    exact = [x.detach().double().requires_grad_() for x in inputs]
    q, k, v = exact[0], *(x.repeat_interleave(heads // groups, dim=1) for x in exact[1:])
    row = torch.arange(total, device=CUDA)
    segment = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).to(CUDA)
    behind = row[:, None] - row[None]
    may_look = (segment[:, None] == segment[None]) & (behind >= 0) & (behind < (window or total))
    scores = (scaling * q @ k.mT).masked_fill(~may_look, -torch.inf)
    expected = (scores.softmax(-1) @ v).transpose(1, 2)
    exact_slopes = torch.autograd.grad(expected, exact, weights.double())

    for ours, theirs in zip((found, *slopes), (expected, *exact_slopes), strict=True):
        assert relative_error(ours, theirs) < 1e-2
