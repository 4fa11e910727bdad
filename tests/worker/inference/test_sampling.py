"""Choosing tokens: against frequencies and cut-offs computed here."""

import math

import pytest
import torch

from worker.inference.sampling import Sampler, Sampling, choose_all

P = torch.tensor([0.5, 0.2, 0.15, 0.1, 0.05])
LOGITS = P.log()


def frequencies(sampling: Sampling, draws: int = 4000) -> torch.Tensor:
    sampler = Sampler(sampling)
    return torch.bincount(torch.tensor([sampler.choose(LOGITS) for _ in range(draws)]), minlength=len(P)) / draws


def test_temperature_zero_takes_the_likeliest() -> None:
    """Whatever the seed."""
    assert {Sampler(Sampling(temperature=0.0, seed=seed)).choose(LOGITS) for seed in range(20)} == {0}


def test_tokens_come_as_often_as_they_are_likely() -> None:
    """At temperature 1 the frequencies are the model's probabilities, within four standard errors of 4,000 draws."""
    error = 4 * (P * (1 - P) / 4000).sqrt()

    assert ((frequencies(Sampling(seed=0)) - P).abs() < error).all()


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_temperature_divides_the_logits(temperature: float) -> None:
    """p is proportional to p^(1/T)."""
    expected = P.double() ** (1 / temperature)

    p = Sampler(Sampling(temperature=temperature)).probabilities(LOGITS)

    torch.testing.assert_close(p, expected / expected.sum(), rtol=1e-6, atol=0)


def test_top_k_keeps_the_k_likeliest() -> None:
    """The others get nothing, these keep their ratios."""
    p = Sampler(Sampling(top_k=2)).probabilities(LOGITS)

    torch.testing.assert_close(p, torch.tensor([5 / 7, 2 / 7, 0, 0, 0], dtype=torch.float64), rtol=1e-6, atol=0)


@pytest.mark.parametrize(("top_p", "kept"), [(0.01, 1), (0.49, 1), (0.51, 2), (0.69, 2), (0.71, 3), (1.0, 5)])
def test_top_p_keeps_the_fewest_that_reach_it(top_p: float, kept: int) -> None:
    """Cumulative probabilities here are 0.5, 0.7, 0.85, 0.95, 1."""
    p = Sampler(Sampling(top_p=top_p)).probabilities(LOGITS)

    assert int((p > 0).sum()) == kept
    assert math.isclose(float(p.sum()), 1.0)


def test_top_p_counts_within_top_k() -> None:
    """After top_k = 2 the first token alone has 5/7 of what is left, so top_p = 0.7 keeps it alone."""
    p = Sampler(Sampling(top_k=2, top_p=0.7)).probabilities(LOGITS)

    assert p.tolist() == [1, 0, 0, 0, 0]


def test_a_tiny_temperature_is_no_division_by_zero() -> None:
    """The smallest positive temperature samples the likeliest token, even from logits far apart."""
    logits = torch.tensor([1000.0, -1000.0, 999.0])

    assert Sampler(Sampling(temperature=5e-324)).choose(logits) == 0


def test_the_same_seed_draws_the_same_tokens() -> None:
    """And another seed draws others."""

    def drawn(seed: int) -> list[int]:
        sampler = Sampler(Sampling(seed=seed))
        return [sampler.choose(LOGITS) for _ in range(50)]

    assert drawn(5) == drawn(5)
    assert drawn(5) != drawn(6)


@pytest.mark.parametrize("seed", [-1, 2**80])
def test_any_integer_is_a_seed(seed: int) -> None:
    """Clients send what they like."""
    assert 0 <= Sampler(Sampling(seed=seed)).choose(LOGITS) < 5


def test_no_seed_draws_differently_each_time() -> None:
    """Two samplers without a seed do not share a stream."""
    streams = [Sampler(Sampling()) for _ in range(2)]

    first, second = ([s.choose(LOGITS) for _ in range(100)] for s in streams)

    assert first != second


def test_global_randomness_is_left_alone() -> None:
    """Sampling neither draws from torch's own generator nor moves it."""
    before = torch.get_rng_state()

    frequencies(Sampling(seed=1), draws=10)

    assert torch.equal(torch.get_rng_state(), before)


def test_rows_choose_for_themselves_and_unusable_ones_choose_nothing() -> None:
    """A row with NaN or infinite logits has no next token; the rows beside it have theirs."""
    bad = LOGITS.clone()
    bad[3] = math.nan
    rows = torch.stack([LOGITS, bad, LOGITS.flip(0), torch.full_like(LOGITS, math.inf)])

    chosen = choose_all(rows, [Sampler(Sampling(temperature=0.0)) for _ in rows])

    assert chosen == [0, None, 4, None]
