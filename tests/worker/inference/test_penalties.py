"""Penalties, against their formulas written down naively."""

from collections import Counter

import numpy as np
import pytest
import torch

from tests.worker.inference.test_sampling import Row, choose
from worker.inference.cuts import Cuts
from worker.inference.penalties import Penalties
from worker.inference.sampling import Sampler, choose_all

LOGITS = np.array([2.0, -1.0, 0.5, 0.0, 3.0, -2.0], np.float32)
NEUTRAL = {"repetition": 1.0, "frequency": 0.0, "presence": 0.0}


def penalised(prompt: list[int], answer: list[int], **given: float) -> list[float]:
    penalties = Penalties(prompt, **NEUTRAL | given)
    for token_id in answer:
        penalties.add(token_id)
    logits = LOGITS.copy()
    penalties.apply(logits)
    return [float(value) for value in logits]


def test_repetition_divides_positive_and_multiplies_negative_logits() -> None:
    """Of tokens in prompt or answer, once however often they are there; a zero stays zero; all others stay."""
    got = penalised([0, 1, 1, 3], [0, 5], repetition=2.0)

    assert got == [1.0, -2.0, 0.5, 0.0, 3.0, -4.0]


def test_frequency_counts_in_the_answer_alone() -> None:
    """Each time a token was generated takes off as much; the prompt does not count."""
    assert penalised([4, 4, 4], [0, 0, 2], frequency=0.5) == [1.0, -1.0, 0.0, 0.0, 3.0, -2.0]


def test_presence_counts_once() -> None:
    """However often the token was generated; the prompt does not count."""
    assert penalised([4], [0, 0, 2], presence=0.5) == [1.5, -1.0, 0.0, 0.0, 3.0, -2.0]


def test_negative_penalties_reward() -> None:
    """OpenAI allows down to -2."""
    assert penalised([], [1], frequency=-1.0, presence=-1.0)[1] == 1.0


def test_all_three_come_in_order() -> None:
    """Repetition first, then what is subtracted."""
    assert penalised([0], [0, 0], repetition=2.0, frequency=0.25, presence=0.5)[0] == 2.0 / 2 - 0.25 * 2 - 0.5


def test_long_answers_are_remembered_whole() -> None:
    """Beyond any first capacity: 1,000 tokens against a plain counter."""
    draws = np.random.default_rng(0)
    answer = draws.integers(0, 400, 1_000).tolist()
    penalties = Penalties([7], repetition=1.5, frequency=0.3, presence=0.7)
    for token_id in answer:
        penalties.add(token_id)
    logits = draws.normal(size=500).astype(np.float32)
    counts = Counter(answer)
    expected = [
        (x if i not in counts and i != 7 else x / 1.5 if x > 0 else x * 1.5) - 0.3 * counts[i] - 0.7 * (counts[i] > 0)
        for i, x in enumerate(logits.tolist())
    ]

    penalties.apply(logits)

    np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("changed", [{"repetition": 1.1}, {"frequency": 0.1}, {"presence": -0.1}])
def test_only_neutral_penalties_are_neutral(changed: dict[str, float]) -> None:
    """And neutral ones change nothing."""
    assert not Penalties([0], **NEUTRAL | changed).are_neutral
    assert Penalties([0], **NEUTRAL).are_neutral
    assert penalised([0], [1, 2]) == LOGITS.tolist()


def test_a_penalised_row_chooses_another_token() -> None:
    """The likeliest was generated before, so the second comes; without the penalty the likeliest comes again."""
    sampler = Sampler(Cuts(temperature=0.0), penalties=Penalties([], repetition=1.0, frequency=2.0, presence=0.0))
    logits = torch.from_numpy(LOGITS)

    first = choose(logits, sampler).token_id
    sampler.add(first)

    assert (first, choose(logits, sampler).token_id) == (4, 0)
    assert choose_all(logits[None], [Row(Sampler(Cuts(temperature=0.0)))])[0].token_id == 4  # type: ignore[union-attr]
