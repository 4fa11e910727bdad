"""Rows of one batch against Transformers' own cache and attention, for every supported architecture."""

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tests.worker.test_attention import CONFIGS, SLIDING, VOCAB, WINDOW
from worker import attention
from worker.base_model import SUPPORTED, BaseModel
from worker.inference.cache import FEWEST_POSITIONS
from worker.inference.forward import RowForward
from worker.lora.manager import AdapterManager

LENGTHS = (1, 3, 2 * WINDOW, 17)
STEPS = 3 * WINDOW
# Float32 sums in another order; the logits are of order 1 to 10.
CLOSE = {"atol": 2e-5, "rtol": 2e-5}


def tiny(model_type: str, implementation: str, **changed: Any) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = AutoConfig.for_model(model_type, **CONFIGS[model_type] | changed)
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=implementation).eval()


def rows_on(model: Any, max_rows: int = 4) -> RowForward:
    base = BaseModel(
        model=model, tokenizer=None, name="tiny", digest="", context_length=model.config.max_position_embeddings,
        architecture=model.config.model_type, eos_token_ids=frozenset(), device=torch.device("cpu"),
        dtype=torch.float32,
    )  # fmt: skip
    return RowForward(base, AdapterManager(model), max_rows=max_rows)


@pytest.fixture
def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(2, VOCAB, (length,), generator=generator).tolist() for length in LENGTHS]


def alone(model: Any, ids: list[int]) -> torch.Tensor:
    """The logits after a whole sequence, in one forward without any cache."""
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]
    return logits


@pytest.mark.parametrize("model_type", sorted(SUPPORTED))
def test_each_row_equals_its_own_sequence_without_a_cache(model_type: str, prompts: list[list[int]]) -> None:
    """Rows that start at different lengths and go beyond the sliding window have at each step the logits that eager
    attention over the whole sequence gives, whose masks and softmax are Transformers' own."""
    model, eager = tiny(model_type, attention.NAME), tiny(model_type, "eager")
    forward = rows_on(model)
    sequences = [list(prompt) for prompt in prompts]
    logits = torch.stack([forward.prefill(prompt, None) for prompt in prompts])

    for _ in range(STEPS):
        torch.testing.assert_close(logits, torch.stack([alone(eager, ids) for ids in sequences]), **CLOSE)
        chosen = logits.argmax(-1).tolist()
        for ids, token in zip(sequences, chosen, strict=True):
            ids.append(token)
        logits = forward.decode(chosen, [None] * len(chosen))


@pytest.mark.parametrize("model_type", SLIDING)
def test_the_window_matters_at_these_lengths(model_type: str, prompts: list[list[int]]) -> None:
    """The opposite: with a window that covers everything the same prompts give other logits."""
    narrow = rows_on(tiny(model_type, attention.NAME)).prefill(prompts[3], None)
    wide = rows_on(tiny(model_type, attention.NAME, sliding_window=64)).prefill(prompts[3], None)

    assert (narrow - wide).abs().max() > 0.01


def test_a_row_is_unchanged_when_others_leave(prompts: list[list[int]]) -> None:
    """The last row takes a freed number and goes on as if it had always been alone."""
    model = tiny("llama", attention.NAME)
    forward = rows_on(model)
    for prompt in prompts:
        forward.prefill(prompt, None)
    forward.decode([5] * 4, [None] * 4)

    forward.remove(0)  # row 3 becomes row 0
    forward.remove(1)  # row 2 becomes row 1
    logits = forward.decode([6, 7], [None] * 2)

    expected = torch.stack([alone(model, [*prompts[3], 5, 6]), alone(model, [*prompts[2], 5, 7])])
    torch.testing.assert_close(logits, expected, **CLOSE)


def test_a_freed_slot_carries_nothing_over(prompts: list[list[int]]) -> None:
    """A row of NaN leaves nothing behind: the slot's next, shorter row beside a longer one has finite, right logits."""
    model = tiny("llama", attention.NAME)
    forward = rows_on(model)
    forward.prefill(prompts[3], None)
    norm = model.model.layers[0].input_layernorm
    sane = norm.weight.clone()
    norm.weight.data.fill_(float("nan"))
    assert forward.prefill(prompts[3], None).isnan().all()
    norm.weight.data.copy_(sane)

    forward.remove(1)
    forward.prefill(prompts[0], None)
    logits = forward.decode([3, 4], [None, None])

    torch.testing.assert_close(logits[1], alone(model, [*prompts[0], 4]), **CLOSE)


def test_the_cache_grows_past_its_first_size_and_is_given_back() -> None:
    """A row may outgrow the first allocation without losing what it holds; with the last row all room is freed."""
    model = tiny("llama", attention.NAME, max_position_embeddings=1000)
    forward = rows_on(model)
    ids = torch.randint(2, VOCAB, (FEWEST_POSITIONS - 1,), generator=torch.Generator().manual_seed(2)).tolist()
    forward.prefill(ids, None)
    small = forward.cache_bytes

    for token in (5, 6, 7):
        logits = forward.decode([token], [None])

    torch.testing.assert_close(logits[0], alone(model, [*ids, 5, 6, 7]), **CLOSE)
    assert forward.cache_bytes > small > 0
    forward.remove(0)
    assert forward.cache_bytes == 0


def test_a_prompt_that_fails_takes_no_row(prompts: list[list[int]]) -> None:
    """A forward that raises in a prefill leaves the rows as they were."""
    model = tiny("llama", attention.NAME)
    forward = rows_on(model)
    forward.prefill(prompts[1], None)

    with pytest.raises(IndexError):
        forward.prefill([VOCAB + 1], None)
    logits = forward.decode([4], [None])

    torch.testing.assert_close(logits[0], alone(model, [*prompts[1], 4]), **CLOSE)
