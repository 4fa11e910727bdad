"""Holding a share of a data set out for validation."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from shared.errors import InvalidTrainingFile
from tests.worker.training.conftest import spec_of
from worker.training.dataset import TokenisedDataset, Tokeniser, split

Read = Callable[..., TokenisedDataset]


@pytest.fixture
def read(tiny_tokenizer: PreTrainedTokenizerFast, write_lines: Callable[..., Path]) -> Read:
    """read(pairs, **changes) -> the data set that training would see of (prompt, completion) pairs."""

    def of(pairs: list[tuple[str, str]], **changes: Any) -> TokenisedDataset:
        path = write_lines([{"prompt": p, "completion": c} for p, c in pairs])
        ends = frozenset({tiny_tokenizer.eos_token_id})
        return Tokeniser(tiny_tokenizer, ends, spec_of(**changes), longest=256).read(path)

    return of


def samples(data: TokenisedDataset) -> list[tuple[tuple[int, ...], tuple[bool, ...]]]:
    return [
        (tuple(tokens.tolist()), tuple(is_label.tolist())) for tokens, is_label in (data[i] for i in range(len(data)))
    ]


PAIRS = [(f"{i} is ", f"number {i}") for i in range(40)]


@settings(max_examples=40, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(num=st.integers(2, 40), share=st.floats(0.001, 0.5), seed=st.integers(0, 2**31 - 1))
def test_each_sample_is_on_one_side(num: int, share: float, seed: int, read: Read) -> None:
    """The halves are disjoint, together the whole, keep its order, and the held-out one has the share asked for."""
    data = read(PAIRS[:num])
    train, held_out = split(data, share=share, seed=seed)
    whole = samples(data)

    assert sorted(samples(train) + samples(held_out)) == sorted(whole)
    assert [s for s in whole if s in samples(train)] == samples(train)
    assert [s for s in whole if s in samples(held_out)] == samples(held_out)
    assert len(held_out) == max(1, round(share * num))


def test_split_depends_on_the_seed_only(read: Read) -> None:
    """The same seed holds the same samples out, whenever it is asked; another seed holds out others."""
    data = read(PAIRS)
    first = samples(split(data, share=0.25, seed=3)[1])

    assert samples(split(read(PAIRS), share=0.25, seed=3)[1]) == first
    assert samples(split(data, share=0.25, seed=4)[1]) != first


def test_split_is_not_the_order_of_an_epoch(read: Read) -> None:
    """It is drawn for itself and is neither the front nor the end of the file."""
    held_out = samples(split(read(PAIRS), share=0.25, seed=3)[1])

    assert held_out not in (samples(read(PAIRS[:10])), samples(read(PAIRS[-10:])))


def test_reports_of_the_halves(read: Read) -> None:
    """Each half counts its own samples, tokens and labels; what was dropped is counted with the training half."""
    data = read([*PAIRS, ("x" * 50, "y"), *PAIRS[:3], ("a", "b" * 50)], max_seq_len=24)
    train, held_out = split(data, share=0.3, seed=1)

    for half in (train, held_out):
        assert (
            half.report.num_used
            == len(half)
            == sum(b.num_samples for b in half.report.histogram) - half.report.num_dropped
        )
        assert half.report.num_tokens == sum(half.num_tokens(i) for i in range(len(half))) == len(half.tokens)
        assert half.report.num_label_tokens == sum(half.num_labels(i) for i in range(len(half)))
        assert half.report.longest == max(half.num_tokens(i) for i in range(len(half)))
        assert half.digest == data.digest
    assert (train.report.num_dropped, held_out.report.num_dropped) == (1, 0)
    assert train.report.dropped_lines == [41]
    assert train.report.num_samples + held_out.report.num_samples == data.report.num_samples
    assert sorted(train.report.truncated_lines + held_out.report.truncated_lines) == [41, 45]


def test_a_half_is_a_copy(read: Read) -> None:
    """Halves share no memory with the whole, which can be freed."""
    data = read(PAIRS)
    train, held_out = split(data, share=0.5, seed=1)
    before = samples(train), samples(held_out)
    data.tokens.zero_()

    assert (samples(train), samples(held_out)) == before


@pytest.mark.parametrize("share", [0.01, 0.5])
def test_one_sample_cannot_be_split(share: float, read: Read) -> None:
    """With one usable sample there is nothing to hold out, and the error says the numbers."""
    data = read([("a", "b"), ("x" * 50, "y")], max_seq_len=24)

    with pytest.raises(InvalidTrainingFile, match=rf"split of {share:g} needs .* and 1 of 2 samples can be used"):
        split(data, share=share, seed=1)


def test_two_samples_can_be_split(read: Read) -> None:
    """The opposite: two are enough for one on each side, however small the share."""
    assert [len(half) for half in split(read(PAIRS[:2]), share=0.001, seed=1)] == [1, 1]
