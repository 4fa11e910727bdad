"""Which tokens may be drawn and how often, against a full sort in float64 and against frequencies."""

# Shapes: V vocabulary.

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from worker.inference.cuts import Cuts, largest

P = np.array([0.5, 0.2, 0.15, 0.1, 0.05])
LOGITS = np.log(P).astype(np.float32)
BORDER = 1e-5
"""How far a sum of probabilities in float32 may be off; tokens that a cut meets that closely may go either way."""


def naive(logits_V: NDArray[np.float32], cuts: Cuts) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """What is left, by sorting everything; and which tokens lie so near a border that they may go either way."""
    p_V = np.exp((logits_V.astype(np.float64) - logits_V.max()) / cuts.temperature)
    order_V = np.argsort(-p_V, kind="stable")
    doubtful_V = np.zeros(len(p_V), bool)
    if cuts.top_k:
        p_V[order_V[cuts.top_k :]] = 0
    p_V /= p_V.sum()
    if cuts.top_p < 1:
        before_V = p_V[order_V].cumsum() - p_V[order_V]
        doubtful_V[order_V] = abs(before_V - cuts.top_p) < BORDER
        p_V[order_V[before_V >= cuts.top_p]] = 0
    doubtful_V |= abs(p_V / p_V.max() - cuts.min_p) < BORDER * cuts.min_p
    p_V[p_V < cuts.min_p * p_V.max()] = 0
    return p_V / p_V.sum(), doubtful_V


def probabilities(logits_V: NDArray[np.float32], cuts: Cuts) -> NDArray[np.float64]:
    """What `draw` draws from."""
    kept = cuts.kept(logits_V)
    if kept is None:
        return naive(logits_V, cuts)[0]
    p_V = np.zeros(len(logits_V))
    p_V[kept[0]] = kept[1] / kept[1].sum()
    return p_V


@st.composite
def vocabularies(draw: st.DrawFn) -> NDArray[np.float32]:
    """Logits of a few to 20,000 tokens, flat to peaked, with equals among them or without."""
    size = draw(st.sampled_from([2, 7, 300, 5_000, 20_000]))
    scale = draw(st.sampled_from([0.01, 1.0, 3.0, 12.0]))
    logits_V = (np.random.default_rng(draw(st.integers(0, 2**32))).normal(size=size) * scale).astype(np.float32)
    return np.round(logits_V * 4) / np.float32(4) if draw(st.booleans()) else logits_V


@settings(max_examples=200, derandomize=True, deadline=None)
@given(
    logits_V=vocabularies(),
    cuts=st.builds(
        Cuts,
        temperature=st.sampled_from([0.2, 0.7, 1.0, 2.0]),
        top_k=st.sampled_from([0, 1, 5, 40, 256, 257, 4_000]),
        top_p=st.sampled_from([1e-6, 0.1, 0.5, 0.9, 0.99, 0.99999, 1.0]),
        min_p=st.sampled_from([0.0, 1e-4, 0.1, 1.0]),
    ),
)
def test_what_is_left_is_what_a_full_sort_leaves(logits_V: NDArray[np.float32], cuts: Cuts) -> None:
    """The same tokens but for those on a border, among equals those with lower ids, in the same proportions."""
    expected_V, doubtful_V = naive(logits_V, cuts)

    p_V = probabilities(logits_V, cuts)

    differing_V = (p_V > 0) != (expected_V > 0)
    assert not (differing_V & ~doubtful_V & (expected_V + p_V > 1e-12)).any()
    if not differing_V.any():
        np.testing.assert_allclose(p_V, expected_V, rtol=1e-6, atol=1e-12)


@given(logits_V=vocabularies(), k=st.sampled_from([1, 2, 5, 20, 100, 1_000, 4_999]))
@settings(derandomize=True, deadline=None)
def test_the_largest_are_those_of_a_full_sort(logits_V: NDArray[np.float32], k: int) -> None:
    """Exactly k, of equals the lower ids, in order of id."""
    k = min(k, len(logits_V) - 1)

    ids = largest(logits_V, k)

    assert ids.tolist() == sorted(np.argsort(-logits_V, kind="stable")[:k].tolist())


def test_tokens_that_are_ruled_out_are_never_among_the_largest() -> None:
    """Where fewer than k are not -inf, only those come."""
    logits_V = np.full(10_000, -np.inf, np.float32)
    logits_V[[5, 9_000]] = 0.0

    assert largest(logits_V, 20).tolist() == [5, 9_000]
    assert {Cuts(top_k=20).draw(logits_V, u) for u in (0.0, 0.3, 0.7, 0.999)} == {5, 9_000}


@pytest.mark.parametrize("cuts", [Cuts(), Cuts(top_p=0.9), Cuts(top_k=3), Cuts(min_p=0.25), Cuts(temperature=0.5)])
def test_tokens_come_as_often_as_they_are_likely(cuts: Cuts) -> None:
    """Uniform draws in steps of 1 / 10,000 give every token within one step of its probability."""
    expected_V, _ = naive(LOGITS, cuts)

    drawn = np.bincount([cuts.draw(LOGITS, (k + 0.5) / 10_000) for k in range(10_000)], minlength=len(P))

    np.testing.assert_allclose(drawn / 10_000, expected_V, atol=1.01e-4)


def test_a_large_vocabulary_is_drawn_from_in_order_of_id() -> None:
    """The draw by blocks is inverse transform over all tokens: it finds the token that a cumulative sum finds."""
    logits_V = np.random.default_rng(0).normal(size=5_000).astype(np.float32)
    cumulative_V = naive(logits_V, Cuts())[0].cumsum()

    for uniform in np.linspace(0, 0.999999, 500):
        token_id = Cuts().draw(logits_V, float(uniform))
        before = cumulative_V[token_id - 1] if token_id else 0.0
        assert before - 1e-6 <= uniform <= cumulative_V[token_id] + 1e-6


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_temperature_divides_the_logits(temperature: float) -> None:
    """p is proportional to p^(1/T)."""
    expected = P ** (1 / temperature)

    p = probabilities(LOGITS, Cuts(temperature=temperature, min_p=1e-9))

    np.testing.assert_allclose(p, expected / expected.sum(), rtol=1e-6)


@pytest.mark.parametrize(("top_p", "kept"), [(0.01, 1), (0.49, 1), (0.51, 2), (0.69, 2), (0.71, 3), (0.96, 5)])
def test_top_p_keeps_the_fewest_that_reach_it(top_p: float, kept: int) -> None:
    """Cumulative probabilities here are 0.5, 0.7, 0.85, 0.95, 1."""
    assert np.count_nonzero(probabilities(LOGITS, Cuts(top_p=top_p))) == kept


@pytest.mark.parametrize(("min_p", "kept"), [(0.05, 5), (0.15, 4), (0.25, 3), (0.35, 2), (0.45, 1), (1.0, 1)])
def test_min_p_keeps_those_likely_enough_beside_the_likeliest(min_p: float, kept: int) -> None:
    """The ratios to the likeliest here are 1, 0.4, 0.3, 0.2, 0.1."""
    assert np.count_nonzero(probabilities(LOGITS, Cuts(min_p=min_p))) == kept


def test_top_p_counts_within_top_k() -> None:
    """After top_k = 2 the first token alone has 5/7 of what is left, so top_p = 0.7 keeps it alone; without it, two."""
    assert probabilities(LOGITS, Cuts(top_k=2, top_p=0.7)).tolist() == [1, 0, 0, 0, 0]
    assert np.count_nonzero(probabilities(LOGITS, Cuts(top_p=0.71))) == 3


def test_a_tiny_temperature_is_no_division_by_zero() -> None:
    """The smallest positive temperature draws the likeliest token, even from logits far apart."""
    logits = np.array([1000.0, -1000.0, 999.0], np.float32)

    assert {Cuts(temperature=5e-324).draw(logits, u) for u in (0.0, 0.5, 0.999)} == {0}


def test_a_draw_never_gives_a_token_without_probability() -> None:
    """Not even the largest number below 1, on a row that ends in tokens which cannot come."""
    logits_V = np.full(1_000, -np.inf, np.float32)
    logits_V[:3] = 0.0

    assert Cuts().draw(logits_V, 1 - 2.0**-53) == 2
