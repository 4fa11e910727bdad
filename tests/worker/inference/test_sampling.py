"""Choosing tokens for rows: seeds, neighbours, rows that cannot choose."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from worker.inference.cuts import Cuts
from worker.inference.penalties import Penalties
from worker.inference.sampling import Chosen, Sampler, choose_all

LOGITS = torch.tensor([0.5, 0.2, 0.15, 0.1, 0.05]).log()
GREEDY = Cuts(temperature=0.0)


@dataclass
class Row:
    sampler: Sampler


def choose(logits: torch.Tensor, sampler: Sampler) -> Chosen:
    """What a row alone chooses."""
    [chosen] = choose_all(logits[None], [Row(sampler)])
    assert isinstance(chosen, Chosen)
    return chosen


def drawn(sampler: Sampler, count: int = 50) -> list[int]:
    return [choose(LOGITS, sampler).token_id for _ in range(count)]


def test_temperature_zero_takes_the_likeliest() -> None:
    """Whatever the seed."""
    assert {choose(LOGITS, Sampler(GREEDY, seed=seed)).token_id for seed in range(20)} == {0}


def test_tokens_come_as_often_as_they_are_likely() -> None:
    """The frequencies are the model's probabilities, within four standard errors of 4,000 draws."""
    p = LOGITS.exp()

    frequencies = torch.bincount(torch.tensor(drawn(Sampler(Cuts(), seed=0), 4_000)), minlength=5) / 4_000

    assert ((frequencies - p).abs() < 4 * (p * (1 - p) / 4_000).sqrt()).all()


def test_the_same_seed_draws_the_same_tokens() -> None:
    """And another seed draws others."""
    assert drawn(Sampler(Cuts(), seed=5)) == drawn(Sampler(Cuts(), seed=5))
    assert drawn(Sampler(Cuts(), seed=5)) != drawn(Sampler(Cuts(), seed=6))


@pytest.mark.parametrize("seed", [-1, 2**80])
def test_any_integer_is_a_seed(seed: int) -> None:
    """Clients send what they like; a sign makes another seed."""
    assert drawn(Sampler(Cuts(), seed=seed)) == drawn(Sampler(Cuts(), seed=seed))
    assert drawn(Sampler(Cuts(), seed=seed)) != drawn(Sampler(Cuts(), seed=-seed))


def test_no_seed_draws_differently_each_time() -> None:
    """Two samplers without a seed do not share a stream."""
    assert drawn(Sampler(Cuts()), 100) != drawn(Sampler(Cuts()), 100)


def test_global_randomness_is_left_alone() -> None:
    """Sampling neither draws from the generators of torch and NumPy nor moves them."""
    before = torch.get_rng_state(), np.random.get_state()[1].copy()

    drawn(Sampler(Cuts(), seed=1))

    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1] == before[1]).all()


def samplers() -> list[Sampler]:
    """Rows of every kind."""
    return [
        Sampler(GREEDY),
        Sampler(Cuts(), seed=1),
        Sampler(Cuts(top_p=0.9), seed=2, num_top=3),
        Sampler(Cuts(top_k=4, temperature=0.7), seed=3),
        Sampler(GREEDY, num_top=0),
        Sampler(GREEDY, penalties=Penalties([1, 2, 3], repetition=1.3, frequency=0.5, presence=0.5)),
        Sampler(Cuts(min_p=0.2), seed=4),
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_chooses_the_same_alone_and_among_others(dtype: torch.dtype) -> None:
    """Bit for bit, whatever its neighbours do and wherever in the batch it stands."""
    logits = torch.randn(7, 9_001, generator=torch.Generator().manual_seed(0)).mul(4).to(dtype)

    together = choose_all(logits, [Row(sampler) for sampler in samplers()])
    backwards = choose_all(logits.flip(0), [Row(sampler) for sampler in reversed(samplers())])

    alone = [choose(row, sampler) for row, sampler in zip(logits, samplers(), strict=True)]
    assert together == alone
    assert backwards == alone[::-1]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_on_a_gpu_choose_as_they_do_on_a_cpu(dtype: torch.dtype) -> None:
    """The same logits give the same tokens; a row with a NaN has none there either."""
    logits = torch.randn(7, 9_001, generator=torch.Generator().manual_seed(0)).mul(4).to(dtype)
    logits[4, 17] = math.nan
    logits[:, 100] = logits[:, :100].max() + 9  # no equals at the top, of which each device takes its own

    on_gpu = choose_all(logits.cuda(), [Row(sampler) for sampler in samplers()])

    assert on_gpu == choose_all(logits, [Row(sampler) for sampler in samplers()])
    assert on_gpu[4] is None


def test_the_logits_are_left_alone() -> None:
    """Penalties and constraints work on a copy; the model may keep its output in one place."""
    logits = torch.randn(7, 100, generator=torch.Generator().manual_seed(0))
    before = logits.clone()

    choose_all(logits, [Row(sampler) for sampler in samplers()])

    assert torch.equal(logits, before)


def test_logits_of_inference_mode_are_taken() -> None:
    """They are what a forward without gradients gives."""
    with torch.inference_mode():
        logits = LOGITS.clone()[None] * 1

        assert choose_all(logits, [Row(Sampler(GREEDY))]) == [Chosen(0)]


def test_no_rows_choose_nothing() -> None:
    """A step may have no row that is due."""
    assert choose_all(torch.empty(0, 5), []) == []


@pytest.mark.parametrize("cuts", [GREEDY, Cuts()])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_rows_that_are_not_finite_choose_nothing(bad: float, cuts: Cuts) -> None:
    """A row with a NaN or +inf, or with nothing above -inf, has no next token; the rows beside it have theirs."""
    spoilt = LOGITS.clone()
    spoilt[3] = bad
    rows = torch.stack([LOGITS, spoilt, torch.full_like(LOGITS, -math.inf), LOGITS.flip(0)])
    kinds = [Sampler(GREEDY), Sampler(cuts), Sampler(cuts), Sampler(GREEDY)]

    assert choose_all(rows, [Row(sampler) for sampler in kinds]) == [Chosen(0), None, None, Chosen(4)]


def test_tokens_at_minus_infinity_are_no_fault() -> None:
    """A model may rule tokens out."""
    logits = LOGITS.clone()
    logits[0] = -math.inf

    assert choose(logits, Sampler(GREEDY)).token_id == 1
    assert 0 not in [choose(logits, Sampler(Cuts(), seed=seed)).token_id for seed in range(50)]


class Broken:
    """A constraint that cannot be followed."""

    def mask(self, logits_V: NDArray[np.float32]) -> None:
        raise ValueError("broken")

    def add(self, token_id: int) -> None: ...

    @property
    def is_complete(self) -> bool:
        return False


def test_a_row_that_raises_hurts_no_other() -> None:
    """Its exception stands where its token would."""
    rows = [Row(Sampler(GREEDY)), Row(Sampler(GREEDY, constraint=Broken())), Row(Sampler(Cuts(), seed=0))]

    first, second, third = choose_all(torch.stack([LOGITS] * 3), rows)

    assert first == Chosen(0)
    assert isinstance(second, ValueError)
    assert isinstance(third, Chosen)


class Only:
    """A constraint that allows one token."""

    is_complete = False

    def __init__(self, token_id: int) -> None:
        self.token_id = token_id
        self.got: list[int] = []

    def mask(self, logits_V: NDArray[np.float32]) -> None:
        kept = logits_V[self.token_id]
        logits_V[:] = -np.inf
        logits_V[self.token_id] = kept

    def add(self, token_id: int) -> None:
        self.got.append(token_id)


@pytest.mark.parametrize("cuts", [GREEDY, Cuts(), Cuts(top_p=0.5), Cuts(top_k=2), Cuts(min_p=0.5)])
def test_a_constraint_rules_whatever_is_likely(cuts: Cuts) -> None:
    """The only token that it allows is chosen, and its log-probability is still the model's."""
    chosen = choose(LOGITS, Sampler(cuts, constraint=Only(4), num_top=1))

    assert chosen.token_id == 4
    assert chosen.logprob == pytest.approx(math.log(0.05), abs=1e-6)
    assert chosen.top[0][0] == 0


def test_a_constraint_that_allows_nothing_fails_its_row() -> None:
    """There is no token to take, and none is made up."""
    nothing: Any = Only(4)
    nothing.mask = lambda logits_V: logits_V.fill(-np.inf)

    [chosen] = choose_all(LOGITS[None], [Row(Sampler(Cuts(), constraint=nothing))])

    assert isinstance(chosen, Exception)


def test_the_tokens_taken_are_told_to_the_constraint() -> None:
    """It follows the sequence by them."""
    only = Only(4)

    Sampler(GREEDY, constraint=only).add(4)

    assert only.got == [4]
