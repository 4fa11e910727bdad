"""The chunked loss against torch's own cross-entropy, and the head against the models' own logits."""

import pytest
import torch
from torch import Tensor
from transformers import CohereConfig, Gemma2Config, GraniteConfig, PreTrainedConfig

from tests.worker.conftest import TOKEN_IDS, random_model
from worker.attention import packed_segments
from worker.training import loss
from worker.training.loss import LogitHead, head_of, score, weighted_loss

HEADS = {
    "plain": (1.0, None, False),
    "with bias": (1.0, None, True),
    "scaled": (0.25, None, False),
    "capped": (1.0, 1.5, False),
    "capped, with bias": (1.0, 1.5, True),
}


def random_problem(kind: str, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, LogitHead]:
    """Seven positions, five hidden features, eleven words."""
    draws = torch.Generator().manual_seed(3)
    multiplier, softcap, has_bias = HEADS[kind]
    weight = torch.randn(11, 5, generator=draws, dtype=dtype)
    bias = torch.randn(11, generator=draws, dtype=dtype) if has_bias else None
    hidden = torch.randn(7, 5, generator=draws, dtype=dtype, requires_grad=True)
    return hidden, torch.randint(11, (7,), generator=draws), LogitHead(weight, bias, multiplier, softcap)


def plain_loss(hidden: Tensor, targets: Tensor, head: LogitHead) -> Tensor:
    """The definition, with all logits at once and torch's gradients."""
    logits = head.multiplier * torch.nn.functional.linear(hidden, head.weight, head.bias)
    if head.softcap is not None:
        logits = head.softcap * torch.tanh(logits / head.softcap)
    return torch.nn.functional.cross_entropy(logits, targets, reduction="sum")


def loss_sum(hidden: Tensor, targets: Tensor, head: LogitHead) -> Tensor:
    """The loss of all positions, each of weight 1."""
    return weighted_loss(hidden, targets, torch.ones(len(targets)), head)[0]


@pytest.fixture(params=[2, 1 << 20], ids=["chunks of 2", "one chunk"])
def chunk_rows(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(loss, "CHUNK_LOGITS", 11 * request.param)
    return int(request.param)


@pytest.mark.usefixtures("chunk_rows")
@pytest.mark.parametrize("kind", HEADS)
def test_loss_equals_cross_entropy(kind: str) -> None:
    """Value and gradient are those of cross-entropy over all logits, to float64 rounding."""
    hidden, targets, head = random_problem(kind)
    ours = loss_sum(hidden, targets, head)
    (our_grad,) = torch.autograd.grad(3 * ours, hidden)
    expected = plain_loss(hidden, targets, head)
    (expected_grad,) = torch.autograd.grad(3 * expected, hidden)

    torch.testing.assert_close(ours, expected)
    torch.testing.assert_close(our_grad, expected_grad)


@pytest.mark.parametrize("kind", HEADS)
def test_gradient_is_the_derivative(kind: str) -> None:
    """The hand-written gradient agrees with finite differences of the value."""
    hidden, targets, head = random_problem(kind)

    assert torch.autograd.gradcheck(lambda h: loss_sum(h, targets, head), (hidden,))


@pytest.mark.usefixtures("chunk_rows")
@pytest.mark.parametrize("kind", HEADS)
def test_each_position_has_its_weight(kind: str) -> None:
    """Losses come unweighted, one a position; total and gradient are those of their weighted sum."""
    hidden, targets, head = random_problem(kind)
    weights = torch.linspace(0.0, 2.0, 7, dtype=torch.float64)
    total, losses = weighted_loss(hidden, targets, weights, head)
    (grad,) = torch.autograd.grad(total, hidden)
    expected = torch.stack([plain_loss(hidden[i : i + 1], targets[i : i + 1], head) for i in range(7)])
    (expected_grad,) = torch.autograd.grad(weights @ expected, hidden)

    torch.testing.assert_close(losses, expected.detach())
    torch.testing.assert_close(total, weights @ losses)
    torch.testing.assert_close(grad, expected_grad)
    assert not losses.requires_grad


@pytest.mark.usefixtures("chunk_rows")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_spoilt_position_spoils_no_other(dtype: torch.dtype) -> None:
    """NaN and infinite hidden states leave every other position's loss and gradient as they were, bit for bit."""
    hidden, targets, head = random_problem("plain", dtype)
    total, losses = weighted_loss(hidden, targets, torch.ones(7), head)
    (grad,) = torch.autograd.grad(total, hidden)
    spoilt = hidden.detach().clone()
    spoilt[1], spoilt[4] = float("nan"), float("inf")
    total, spoilt_losses = weighted_loss(spoilt.requires_grad_(), targets, torch.ones(7), head)
    (spoilt_grad,) = torch.autograd.grad(total, spoilt)
    others = [0, 2, 3, 5, 6]

    assert torch.equal(spoilt_losses[others], losses[others])
    assert torch.equal(spoilt_grad[others], grad[others])
    assert not torch.isfinite(spoilt_losses[[1, 4]]).any()


def test_no_label_is_no_loss() -> None:
    """A stream without labels adds 0 and a gradient of nothing, not NaN."""
    hidden, targets, head = random_problem("plain")
    total = loss_sum(hidden[:0], targets[:0], head)
    (grad,) = torch.autograd.grad(total, hidden)

    assert total.item() == 0.0
    assert torch.equal(grad, torch.zeros_like(hidden))


def test_bfloat16_loses_little() -> None:
    """Softmax and sum run in fp32 on bf16 hidden states: the error is that of bf16 logits, 2^-8 of their size each."""
    hidden, targets, head = random_problem("plain", torch.bfloat16)
    exact = LogitHead(head.weight.double(), None, 1.0, None)

    assert loss_sum(hidden, targets, head).dtype == torch.float32
    assert loss_sum(hidden, targets, head).item() == pytest.approx(
        plain_loss(hidden.double(), targets, exact).item(), abs=7 * 4 * 2**-8
    )


@pytest.mark.usefixtures("chunk_rows")
@pytest.mark.parametrize("kind", HEADS)
def test_score(kind: str) -> None:
    """Evaluation measures the same loss, and counts the labels that have the largest logit."""
    hidden, targets, head = random_problem(kind)
    targets[:3] = head.logits(hidden[:3].detach()).argmax(dim=1)
    right = int((head.logits(hidden.detach()).argmax(dim=1) == targets).sum())
    scored = score(hidden, targets, head)

    assert scored.loss == pytest.approx(plain_loss(hidden, targets, head).item())
    assert (scored.num_correct, scored.num_labels) == (right, 7)
    assert right >= 3


SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
GQA = {**TOKEN_IDS, **SMALL, "initializer_range": 0.2, "num_key_value_heads": 2, "max_position_embeddings": 64}


@pytest.mark.parametrize(
    ("config", "is_plain"),
    [
        (Gemma2Config(**{**GQA, "pad_token_id": 0}, head_dim=8, final_logit_softcapping=0.5), False),
        (CohereConfig(**{**GQA, "pad_token_id": 0}, logit_scale=0.25), False),
        (GraniteConfig(**GQA, logits_scaling=4.0), False),
        (GraniteConfig(**GQA), True),
    ],
    ids=["capped Gemma 2", "scaled Cohere", "scaled Granite", "plain"],
)
def test_head_gives_the_models_logits(config: PreTrainedConfig, is_plain: bool) -> None:
    """On the trunk's hidden states it gives what the whole model gives, which the bare matrix does not always."""
    model = random_model(config)
    ids, positions = torch.arange(3, 12)[None], torch.arange(9)[None]
    with torch.no_grad(), packed_segments([9]):
        hidden = model.base_model(ids, position_ids=positions, use_cache=False).last_hidden_state
        expected = model(ids, position_ids=positions, use_cache=False).logits
    head = head_of(model)

    torch.testing.assert_close(head.logits(hidden[0]), expected[0])
    assert torch.allclose(LogitHead(head.weight, head.bias, 1.0, None).logits(hidden[0]), expected[0]) == is_plain
