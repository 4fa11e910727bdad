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


def test_warmup_longer_than_the_training() -> None:
    """A warm-up that never ends rises all the time."""
    assert rates(3, warmup_steps=100) == pytest.approx([0.125, 0.25, 0.375])


def parameters() -> dict[str, nn.Parameter]:
    draws = torch.Generator().manual_seed(1)
    return {name: nn.Parameter(torch.randn(3, 2, generator=draws)) for name in "ab"}


def give_gradients(to: dict[str, nn.Parameter], step: int) -> None:
    for name, parameter in to.items():
        parameter.grad = torch.full_like(parameter, 0.1 * (step + 1) * (1 if name == "a" else -2))


def test_clips_the_joint_norm() -> None:
    """Gradients are scaled together so that their norm over all parameters is the limit; the old norm is returned."""
    named = parameters()
    optimizer = AdapterOptimizer(named, spec_of(max_grad_norm=0.5), total_steps=4)
    give_gradients(named, 9)
    before = torch.cat([p.grad.flatten() for p in named.values()])
    norm = optimizer.clip()
    after = torch.cat([p.grad.flatten() for p in named.values()])

    assert norm == pytest.approx(float(before.norm()))
    torch.testing.assert_close(after, before * 0.5 / before.norm(), rtol=1e-5, atol=0)


def test_small_gradients_are_not_clipped() -> None:
    """A norm below the limit changes nothing."""
    named = parameters()
    optimizer = AdapterOptimizer(named, spec_of(max_grad_norm=100), total_steps=4)
    give_gradients(named, 9)
    before = [p.grad.clone() for p in named.values()]
    optimizer.clip()

    assert all(torch.equal(p.grad, old) for p, old in zip(named.values(), before, strict=True))


def test_steps_are_adamw_at_the_scheduled_rate() -> None:
    """Each step is torch's AdamW at that step's rate, and leaves no gradient behind."""
    ours, theirs = parameters(), parameters()
    spec = spec_of(learning_rate=0.1, weight_decay=0.2, warmup_steps=1)
    optimizer = AdapterOptimizer(ours, spec, total_steps=3)
    reference = torch.optim.AdamW(theirs.values(), weight_decay=0.2)
    for step in range(3):
        give_gradients(ours, step)
        give_gradients(theirs, step)
        optimizer.step(step)
        reference.param_groups[0]["lr"] = learning_rate(spec, step, 3)
        reference.step()

    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert all(p.grad is None for p in ours.values())
    assert not torch.equal(ours["a"], parameters()["a"])
