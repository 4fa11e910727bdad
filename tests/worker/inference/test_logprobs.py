"""Log-probabilities, against torch's log-softmax in float64."""

from typing import Any

import pytest
import torch

from tests.worker.inference.test_sampling import choose
from tests.worker.inference.test_tokens import byte_fallback_tokenizer
from worker.inference import logprobs
from worker.inference.cuts import Cuts
from worker.inference.penalties import Penalties
from worker.inference.sampling import Sampler
from worker.inference.tokens import TokenTable

LOGITS = torch.randn(9_001, generator=torch.Generator().manual_seed(0)) * 3
EXPECTED = torch.log_softmax(LOGITS.double(), dim=0)


@pytest.mark.parametrize("num_top", [0, 1, 5, 20])
def test_they_are_the_log_softmax(num_top: int) -> None:
    """Of the token chosen and of as many of the likeliest as were asked for, in order; 2e-6 is float32's share."""
    chosen = choose(LOGITS, Sampler(Cuts(), seed=3, num_top=num_top))

    assert chosen.logprob == pytest.approx(float(EXPECTED[chosen.token_id]), abs=2e-6)
    values, ids = EXPECTED.topk(num_top)
    assert [i for i, _ in chosen.top] == ids.tolist()
    assert [value for _, value in chosen.top] == pytest.approx(values.tolist(), abs=2e-6)


def test_they_are_the_models_own() -> None:
    """Temperature, cuts and penalties change what is chosen and not what is told of it."""
    penalties = Penalties(range(100), repetition=1.5, frequency=1.0, presence=1.0)

    chosen = choose(LOGITS, Sampler(Cuts(temperature=0.3, top_k=3), penalties=penalties, seed=0, num_top=5))

    assert [i for i, _ in chosen.top] == EXPECTED.topk(5).indices.tolist()
    assert chosen.logprob == pytest.approx(float(EXPECTED[chosen.token_id]), abs=2e-6)


def test_nobody_is_told_who_did_not_ask() -> None:
    """They cost a pass over the vocabulary."""
    chosen = choose(LOGITS, Sampler(Cuts(temperature=0.0)))

    assert (chosen.logprob, chosen.top) == (None, ())


def test_more_than_there_are_tokens_is_all_of_them() -> None:
    """A vocabulary may be smaller than 20."""
    chosen = choose(LOGITS[:4], Sampler(Cuts(temperature=0.0), num_top=20))

    assert [i for i, _ in chosen.top] == LOGITS[:4].argsort(descending=True).tolist()


def test_half_a_character_is_told_by_its_bytes(tiny_tokenizer: Any) -> None:
    """Its text can only be U+FFFD; the bytes of consecutive tokens put together are the text."""
    table = TokenTable.of(tiny_tokenizer)

    told = [logprobs.told(table, i, -1.0, [(i, -1.0)]) for i in tiny_tokenizer("é")["input_ids"]]

    assert [token.token for token in told] == ["\ufffd", "\ufffd"]
    assert bytes(byte for token in told for byte in token.bytes).decode() == "é"
    assert [token.top[0].bytes for token in told] == [token.bytes for token in told]


def test_words_and_byte_tokens_of_sentencepiece_are_told_as_text() -> None:
    """Not as the vocabulary writes them: a space, not "▁", and a byte, not its hexadecimal name."""
    table = TokenTable.of(byte_fallback_tokenizer())

    told = [logprobs.told(table, i, -1.0, []) for i in (258, 2 + 0x41, 2 + 0xC3)]

    assert [(token.token, token.bytes) for token in told] == [(" Once", [*b" Once"]), ("A", [0x41]), ("\ufffd", [0xC3])]


def test_special_tokens_are_told_by_name(tiny_tokenizer: Any) -> None:
    """The token that ends an answer adds no byte to its text, but it has a probability."""
    told = logprobs.told(TokenTable.of(tiny_tokenizer), 2, -1.0, [])

    assert (told.token, told.bytes) == ("<|im_end|>", [])
