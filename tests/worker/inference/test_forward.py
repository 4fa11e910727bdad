"""Steps over rows of one cache against Transformers' own attention over whole sequences, for every architecture."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from tests.worker.test_attention import CONFIGS, SLIDING, VOCAB, WINDOW
from worker import attention
from worker.base_model import SUPPORTED, BaseModel
from worker.inference.forward import Piece, RowForward

pytestmark = pytest.mark.usefixtures("computed_by")
LENGTHS = (1, 3, 2 * WINDOW, 17)
STEPS = 3 * WINDOW
# Float32 sums in another order; the logits are of order 1 to 10.
CLOSE = {"atol": 2e-5, "rtol": 2e-5}


def tiny(model_type: str, implementation: str, **changed: Any) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = AutoConfig.for_model(model_type, **CONFIGS[model_type] | changed)
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=implementation).eval()


class Rows:
    """A RowForward without adapters, fed by row."""

    def __init__(self, model: Any, max_rows: int = 4) -> None:
        base = BaseModel(
            model=model, tokenizer=None, name="tiny", digest="", context_length=model.config.max_position_embeddings,
            architecture=model.config.model_type, eos_token_ids=frozenset(), device=torch.device("cpu"),
            dtype=torch.float32,
        )  # fmt: skip
        self.forward = RowForward(base, max_rows=max_rows, cache_bytes=1 << 24)

    def add(self, num_positions: int = 64) -> int:
        row = self.forward.add_row(num_positions)
        assert row is not None
        return row

    def read(self, *parts: tuple[int, Sequence[int]]) -> Tensor:
        """The logits after each (row, tokens), all read in one step."""
        return self.forward.step([Piece(row, ids, ()) for row, ids in parts])

    def prefill(self, prompt: Sequence[int]) -> Tensor:
        return self.read((self.add(), prompt))[0]

    def decode(self, tokens: Sequence[int]) -> Tensor:
        return self.read(*((row, [token]) for row, token in enumerate(tokens)))


@pytest.fixture
def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(2, VOCAB, (length,), generator=generator).tolist() for length in LENGTHS]


def alone(model: Any, ids: list[int]) -> Tensor:
    """The logits after a whole sequence, in one forward without any cache."""
    with torch.no_grad():
        logits: Tensor = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]
    return logits


@pytest.mark.parametrize("model_type", sorted(SUPPORTED))
def test_each_row_equals_its_own_sequence_without_a_cache(model_type: str, prompts: list[list[int]]) -> None:
    """Rows read together, of different lengths and beyond the sliding window, have at each step the logits that eager
    attention over the whole sequence gives, whose masks and softmax are Transformers' own."""
    rows, eager = Rows(tiny(model_type, attention.NAME)), tiny(model_type, "eager")
    sequences = [list(prompt) for prompt in prompts]
    logits = rows.read(*((rows.add(), prompt) for prompt in prompts))

    for _ in range(STEPS):
        torch.testing.assert_close(logits, torch.stack([alone(eager, ids) for ids in sequences]), **CLOSE)
        chosen = logits.argmax(-1).tolist()
        for ids, token in zip(sequences, chosen, strict=True):
            ids.append(token)
        logits = rows.decode(chosen)


@pytest.mark.parametrize("model_type", sorted(SUPPORTED))
def test_a_prompt_in_pieces_beside_rows_that_decode_is_the_same(model_type: str, prompts: list[list[int]]) -> None:
    """A row that joins late and is read in uneven pieces, one of a single token, ends where one forward ends; and what
    decodes meanwhile, on both sides of it, is not disturbed."""
    rows, eager = Rows(tiny(model_type, attention.NAME)), tiny(model_type, "eager")
    long = [*prompts[2], *prompts[3]]
    first, joining, second = rows.add(), rows.add(), rows.add()
    rows.read((first, prompts[0]), (second, prompts[1]))
    sequences = [list(prompts[0]), list(prompts[1])]

    for start, stop in ((0, 5), (5, 6), (6, len(long) - 2), (len(long) - 2, len(long))):
        for ids in sequences:
            ids.append(3 + start)
        logits = rows.read((first, [3 + start]), (joining, long[start:stop]), (second, [3 + start]))

        expected = [alone(eager, sequences[0]), alone(eager, long[:stop]), alone(eager, sequences[1])]
        torch.testing.assert_close(logits, torch.stack(expected), **CLOSE)


@pytest.mark.parametrize("model_type", SLIDING)
def test_the_window_matters_at_these_lengths(model_type: str, prompts: list[list[int]]) -> None:
    """The opposite: with a window that covers everything the same prompts give other logits."""
    narrow = Rows(tiny(model_type, attention.NAME)).prefill(prompts[3])
    wide = Rows(tiny(model_type, attention.NAME, sliding_window=64)).prefill(prompts[3])

    assert (narrow - wide).abs().max() > 0.01


def test_only_wanted_logits_come_back(prompts: list[list[int]]) -> None:
    """A piece that does not end its prompt has no logits; one that does has those of its last token."""
    model = tiny("llama", attention.NAME)
    rows = Rows(model)
    pieces = [Piece(rows.add(), prompts[2], (), wants_next=False), Piece(rows.add(), prompts[3], ())]

    logits = rows.forward.step(pieces)

    torch.testing.assert_close(logits, alone(model, prompts[3])[None], **CLOSE)
    assert rows.forward.step([Piece(0, [4], (), wants_next=False)]).shape[0] == 0


def test_a_row_is_unchanged_when_others_leave(prompts: list[list[int]]) -> None:
    """The last row takes a freed number and goes on as if it had always been alone."""
    model = tiny("llama", attention.NAME)
    rows = Rows(model)
    for prompt in prompts:
        rows.prefill(prompt)
    rows.decode([5] * 4)

    rows.forward.remove_row(0)  # row 3 becomes row 0
    rows.forward.remove_row(1)  # row 2 becomes row 1
    logits = rows.decode([6, 7])

    expected = torch.stack([alone(model, [*prompts[3], 5, 6]), alone(model, [*prompts[2], 5, 7])])
    torch.testing.assert_close(logits, expected, **CLOSE)


def test_a_freed_row_carries_nothing_over(prompts: list[list[int]]) -> None:
    """A row of NaN leaves nothing behind: the next, shorter one in its place beside a longer one has right logits."""
    model = tiny("llama", attention.NAME)
    rows = Rows(model)
    rows.prefill(prompts[3])
    norm = model.model.layers[0].input_layernorm
    sane = norm.weight.clone()
    norm.weight.data.fill_(float("nan"))
    assert rows.prefill(prompts[3]).isnan().all()
    norm.weight.data.copy_(sane)

    rows.forward.remove_row(1)
    assert rows.forward.cache.is_zero()
    rows.prefill(prompts[0])
    logits = rows.decode([3, 4])

    torch.testing.assert_close(logits[1], alone(model, [*prompts[0], 4]), **CLOSE)


def test_rows_that_are_laid_out_anew_go_on_as_before() -> None:
    """A long row joins short ones, which are carried over into longer places, and later back into shorter ones."""
    model = tiny("llama", attention.NAME, max_position_embeddings=1000)
    rows = Rows(model, max_rows=8)
    ids = torch.randint(2, VOCAB, (300,), generator=torch.Generator().manual_seed(2)).tolist()
    rows.read((rows.add(20), ids[:7]))
    rows.read((rows.add(310), ids))
    logits = rows.decode([5, 6])
    torch.testing.assert_close(logits, torch.stack([alone(model, [*ids[:7], 5]), alone(model, [*ids, 6])]), **CLOSE)

    rows.forward.remove_row(1)
    for _ in range(7):
        rows.prefill(ids[:3])

    expected = [alone(model, [*ids[:7], 5, 7]), *[alone(model, [*ids[:3], 7])] * 7]
    torch.testing.assert_close(rows.decode([7] * 8), torch.stack(expected), **CLOSE)


def test_a_step_that_fails_can_be_tried_again_in_parts(prompts: list[list[int]]) -> None:
    """A forward that raises leaves every row as long as it was, and the others' next logits right."""
    model = tiny("llama", attention.NAME)
    rows = Rows(model)
    rows.prefill(prompts[1])
    bad = rows.add()

    with pytest.raises(IndexError):
        rows.read((0, [4]), (bad, [VOCAB + 1]))
    logits = rows.read((0, [4]))

    torch.testing.assert_close(logits[0], alone(model, [*prompts[1], 4]), **CLOSE)


def test_closing_gives_the_model_back(prompts: list[list[int]]) -> None:
    """After close the model computes by itself what it computed before, with its own modules and methods."""
    model = tiny("llama", attention.NAME)
    before, modules = alone(model, prompts[3]), dict(model.named_modules())
    rows = Rows(model)
    assert any("forward" in vars(module) for module in model.modules())

    rows.forward.close()

    assert not any("forward" in vars(module) for module in model.modules())
    assert dict(model.named_modules()) == modules
    torch.testing.assert_close(alone(model, prompts[3]), before, rtol=0, atol=0)
