"""The learning-rate schedule, and AdamW against torch's own."""

import pytest
import torch
from torch import nn

from tests.worker.training.conftest import spec_of
from worker.training.optimizer import AdapterOptimizer, learning_rate


def rates(total_steps: int, **changes: object) -> list[float]:
    return [learning_rate(spec_of(learning_rate=0.5, **changes), step, total_steps) for step in range(total_steps)]


def test_linear_schedule_falls_to_nearly_nothing() -> None:
    """Without warm-up the rate falls in equal steps from its full value; zero would come one step after the last."""
    assert rates(4) == pytest.approx([0.5, 0.375, 0.25, 0.125])


def test_warmup_rises_to_the_full_rate() -> None:
    """Warm-up rises in equal steps, none of them zero, to the full rate in the first step after it."""
    assert rates(6, warmup_steps=3) == pytest.approx([0.125, 0.25, 0.375, 0.5, 0.5 * 2 / 3, 0.5 / 3])


def test_constant_schedule() -> None:
    """A constant rate stays, after its warm-up."""
    assert rates(4, lr_schedule="constant", warmup_steps=1) == pytest.approx([0.25, 0.5, 0.5, 0.5])


def test_cosine_schedule() -> None:
    """The rate falls along half a cosine: slowly, fast, slowly, and would be zero one step after the last."""
    expected = [0.5, 0.5 * (1 + 0.5**0.5) / 2, 0.25, 0.5 * (1 - 0.5**0.5) / 2]

    assert rates(4, lr_schedule="cosine") == pytest.approx(expected)


def test_warmup_longer_than_the_training() -> None:
    """A warm-up that never ends rises all the time."""
    assert rates(3, warmup_steps=100) == pytest.approx([0.125, 0.25, 0.375])


def parameters() -> dict[str, nn.Parameter]:
    draws = torch.Generator().manual_seed(1)
    return {name: nn.Parameter(torch.randn(3, 2, generator=draws)) for name in "ab"}


def gradients(step: int) -> list[torch.Tensor]:
    return [torch.full((3, 2), 0.1 * (step + 1) * factor) for factor in (1, -2)]


def test_clips_the_joint_norm() -> None:
    """Gradients are scaled together so that their norm over all parameters is the limit; the old norm is returned."""
    named = parameters()
    before = torch.cat([g.flatten() for g in gradients(9)])
    norm = AdapterOptimizer(named, spec_of(max_grad_norm=0.5)).set_gradients(gradients(9))
    after = torch.cat([p.grad.flatten() for p in named.values()])

    assert float(norm) == pytest.approx(float(before.norm()))
    torch.testing.assert_close(after, before * 0.5 / before.norm(), rtol=1e-5, atol=0)


def test_small_gradients_are_not_clipped() -> None:
    """A norm below the limit changes nothing."""
    named = parameters()
    AdapterOptimizer(named, spec_of(max_grad_norm=100)).set_gradients(gradients(9))

    assert all(torch.equal(p.grad, given) for p, given in zip(named.values(), gradients(9), strict=True))


def test_steps_are_adamw_at_the_given_rate() -> None:
    """Each step is torch's plain AdamW at that step's rate, and leaves no gradient behind."""
    ours, theirs = parameters(), parameters()
    spec = spec_of(weight_decay=0.2, max_grad_norm=100)
    optimizer = AdapterOptimizer(ours, spec)
    reference = torch.optim.AdamW(theirs.values(), weight_decay=0.2, foreach=False)
    for step, rate in enumerate((0.1, 0.05, 0.2)):
        optimizer.set_gradients(gradients(step))
        optimizer.step(rate)
        for parameter, gradient in zip(theirs.values(), gradients(step), strict=True):
            parameter.grad = gradient
        reference.param_groups[0]["lr"] = rate
        reference.step()

    for name in ours:  # one fused kernel and a chain of them round differently
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-6, atol=1e-6)
    assert all(p.grad is None for p in ours.values())
    assert not torch.allclose(ours["a"], parameters()["a"], atol=0.01)


def test_lora_plus_moves_b_faster() -> None:
    """With a ratio of 16, the first step moves B sixteen times as far as A, which moves as without."""
    moved = {}
    for ratio in (1.0, 16.0):
        named = {f"q.lora_{half}": nn.Parameter(torch.zeros(3, 2)) for half in "AB"}
        optimizer = AdapterOptimizer(named, spec_of(lora_plus_ratio=ratio))
        optimizer.set_gradients([torch.ones(3, 2), torch.ones(3, 2)])
        optimizer.step(0.01)
        moved[ratio] = {name: float(p.detach().abs().mean()) for name, p in named.items()}

    assert moved[1.0]["q.lora_B"] == pytest.approx(moved[1.0]["q.lora_A"]) == pytest.approx(moved[16.0]["q.lora_A"])
    assert moved[16.0]["q.lora_B"] == pytest.approx(16 * moved[16.0]["q.lora_A"])


def test_restored_standing_goes_on_exactly() -> None:
    """Back at a standing, the same gradients give the same parameters again, bit for bit; also from before step 1."""
    named = parameters()
    optimizer = AdapterOptimizer(named, spec_of(weight_decay=0.1))

    def three_steps() -> list[torch.Tensor]:
        for step in range(3):
            optimizer.set_gradients(gradients(step))
            optimizer.step(0.1)
        return [p.detach().clone() for p in named.values()]

    for _ in range(2):
        standing = optimizer.standing()
        first = three_steps()
        optimizer.restore(standing)
        assert all(torch.equal(a, b) for a, b in zip(three_steps(), first, strict=True))
    assert optimizer.updates == 6
