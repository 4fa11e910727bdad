"""The engine, over a tiny Llama with real adapters; the reference is Transformers' own `generate`, alone."""

import contextlib
import dataclasses
import threading
import time

import pytest

from shared.errors import Unavailable
from tests.worker.inference.conftest import (
    AdapterShelf,
    CloseGate,
    StartEngine,
    answer,
    ask,
    generated_by_transformers,
    read,
    reference,
)
from worker.base_model import BaseModel
from worker.inference.forward import RowForward

# Of lengths 1 to 30, so that rows of a batch stand at quite different positions.
PROMPTS = ["a", "Once upon a time", "what is", "the quick brown fox jumps over", "xyz"]


def test_rows_of_a_mixed_batch_equal_generation_alone(base: BaseModel, shelf: AdapterShelf, start: StartEngine) -> None:
    """Rows of several adapters, ranks and prompt lengths, and of the base, each get what they would get alone."""
    adapters = [
        shelf.make("r2", r=2),
        None,
        shelf.make("r8", r=8),
        shelf.make("q", r=3, target_modules=["q_proj"]),
        None,
    ]
    expected = [reference(base, shelf, p, a) for p, a in zip(PROMPTS, adapters, strict=True)]
    engine = start()

    streams = [engine.submit(ask(p, a)) for p, a in zip(PROMPTS, adapters, strict=True)]

    assert [read(stream).text for stream in streams] == expected


def test_an_adapter_changes_the_answer(base: BaseModel, shelf: AdapterShelf, start: StartEngine) -> None:
    """The same prompt gets another answer, and another fingerprint, with each adapter and with the base."""
    names = [None, shelf.make("one", r=2), shelf.make("two", r=2)]
    engine = start()

    answers = [answer(engine, ask("Once upon", name)) for name in names]

    assert len({a.text for a in answers}) == 3
    assert len({a.last.fingerprint for a in answers}) == 3


def test_a_row_that_joins_late_changes_no_other_and_is_right(
    base: BaseModel, shelf: AdapterShelf, start: StartEngine, close_gate: CloseGate
) -> None:
    """A request that comes while another is decoded shares its steps, and both get what they would get alone."""
    name = shelf.make("late", r=4)
    expected = [reference(base, shelf, PROMPTS[1], None, 20), reference(base, shelf, PROMPTS[3], name)]
    engine, gate = start(), close_gate()

    first = engine.submit(ask(PROMPTS[1], max_tokens=20))
    for _ in range(4):
        gate.let_pass()
        gate.wait_for_forward()
    second = engine.submit(ask(PROMPTS[3], name))
    gate.open()

    assert [read(first).text, read(second).text] == expected
    assert gate.steps.count((2, 2)) > 0, "the two never shared a step"


def test_every_request_is_answered_when_there_are_more_than_rows(
    base: BaseModel, shelf: AdapterShelf, start: StartEngine
) -> None:
    """Requests beyond the free rows wait for their turn, and are answered as rightly as the first."""
    name = shelf.make("one", r=2)
    wanted = [(f"{i} and", name if i % 2 else None) for i in range(9)]
    expected = [reference(base, shelf, p, a) for p, a in wanted]
    engine = start(max_rows=2)

    streams = [engine.submit(ask(p, a, max_tokens=12)) for p, a in wanted]

    assert [read(stream).text for stream in streams] == expected


def test_a_request_follows_when_all_rows_end_in_one_step(start: StartEngine) -> None:
    """The only row ends in the very step after its prompt; who waited behind it is not forgotten."""
    engine = start(max_rows=1)

    streams = [engine.submit(ask(p, max_tokens=2)) for p in PROMPTS]

    assert [read(stream).finish_reason for stream in streams] == ["length"] * len(PROMPTS)


def test_no_more_rows_than_allowed_are_decoded_together(
    base: BaseModel, start: StartEngine, close_gate: CloseGate
) -> None:
    """`max_rows` bounds the batch, and the batch gets that large."""
    engine, gate = start(max_rows=3), close_gate()

    streams = [engine.submit(ask(p)) for p in PROMPTS]
    gate.open()
    for stream in streams:
        read(stream)

    assert max(rows for rows, _ in gate.steps) == 3


def test_the_last_chunk_counts_prompt_and_completion_tokens_exactly(base: BaseModel, start: StartEngine) -> None:
    """Usage is the prompt's tokens and the generated ones; only the last chunk has it."""
    answered = answer(start(), ask("eleven char", max_tokens=7))

    assert answered.usage is not None
    assert (answered.usage.prompt_tokens, answered.usage.completion_tokens) == (11, 7)
    assert answered.finish_reason == "length"
    assert [chunk.is_last for chunk in answered.chunks] == [False] * (len(answered.chunks) - 1) + [True]


def test_an_answer_ends_at_a_token_that_ends_answers(base: BaseModel, start: StartEngine) -> None:
    """Generation stops at EOS: the reason is stop, EOS counts as a token and shows no text."""
    whole = generated_by_transformers(base, "Once", 12)
    at = next(i for i in range(2, 12) if whole[i] not in whole[:i])
    eos = base.tokenizer.convert_tokens_to_ids(whole[at])
    engine = start(dataclasses.replace(base, eos_token_ids=frozenset({2, eos})))

    answered = answer(engine, ask("Once"))

    assert answered.text == whole[:at]
    assert answered.finish_reason == "stop"
    assert answered.usage is not None
    assert answered.usage.completion_tokens == at + 1


def test_a_stop_string_across_token_borders_ends_the_answer(base: BaseModel, start: StartEngine) -> None:
    """A stop string that comes as three tokens ends the answer right before it; no part of it is shown."""
    whole = generated_by_transformers(base, "Once", 12)
    stop = whole[5:8]
    assert whole.find(stop) == 5

    answered = answer(start(), ask("Once", stop=["never there", stop]))

    assert answered.text == whole[:5]
    assert answered.finish_reason == "stop"
    assert answered.usage is not None
    assert answered.usage.completion_tokens == 8


def test_text_that_only_begins_a_stop_string_is_shown(base: BaseModel, start: StartEngine) -> None:
    """What was held back because it might begin a stop string comes out when the answer ends without one."""
    whole = generated_by_transformers(base, "Once", 12)

    answered = answer(start(), ask("Once", stop=[whole[-2:] + "something else"]))

    assert answered.text == whole
    assert answered.finish_reason == "length"


def test_the_same_seed_gives_the_same_text_whatever_the_neighbours(shelf: AdapterShelf, start: StartEngine) -> None:
    """A sampled answer depends on its seed and prompt alone, not on who else is in the batch or came before."""
    name = shelf.make("one", r=2)
    sampled = {"temperature": 1.0, "seed": 7, "max_tokens": 40}
    engine = start()
    alone = answer(engine, ask("Once", name, **sampled)).text

    neighbours = [engine.submit(ask(p, temperature=1.5, max_tokens=60)) for p in PROMPTS]
    among = answer(engine, ask("Once", name, **sampled)).text
    for stream in neighbours:
        read(stream)

    assert among == alone


def test_another_seed_gives_another_text(start: StartEngine) -> None:
    """Seeds matter: 40 sampled tokens differ between two of them."""
    engine = start()

    texts = {answer(engine, ask("Once", temperature=1.0, seed=seed, max_tokens=40)).text for seed in (1, 2)}

    assert len(texts) == 2


def test_a_cancelled_answer_frees_its_row_within_two_steps(start: StartEngine, close_gate: CloseGate) -> None:
    """With one row, the next request's prompt is read at most two forwards after the cancel."""
    engine, gate = start(max_rows=1), close_gate()
    first = engine.submit(ask("long answer", max_tokens=200))
    second = engine.submit(ask("next"))
    for _ in range(3):
        gate.let_pass()
        gate.wait_for_forward()
    before = len(gate.steps)

    first.cancel()
    gate.open()

    assert len(read(second).text) == 12
    assert gate.steps.index((1, 4)) - before <= 2
    assert not any(chunk.is_last for chunk in first)


def test_a_waiting_request_can_be_cancelled(start: StartEngine, close_gate: CloseGate) -> None:
    """One cancelled before it got a row is never read."""
    engine, gate = start(max_rows=1), close_gate()
    first, second = engine.submit(ask("first")), engine.submit(ask("the second"))

    second.cancel()
    gate.open()

    assert len(read(first).text) == 12
    assert read(second).chunks == []
    assert (1, len("the second")) not in gate.steps


def test_a_request_past_its_deadline_is_told_so(start: StartEngine) -> None:
    """One whose deadline is over when it comes gets the error, and no text."""
    answered = answer(start(), ask("too late", deadline_unix_s=time.time() - 1))

    assert answered.error is not None
    assert answered.error.code == "deadline_exceeded"
    assert answered.text == ""


def test_a_deadline_ends_a_running_answer_but_not_its_neighbour(start: StartEngine, close_gate: CloseGate) -> None:
    """The deadline is looked at between steps, for each row by itself."""
    engine, gate = start(), close_gate()
    deadline = time.time() + 0.5
    late, fine = engine.submit(ask("late", max_tokens=200, deadline_unix_s=deadline)), engine.submit(ask("fine"))
    gate.let_pass()
    gate.wait_for_forward()
    gate.wait_for_forward()  # the second forward has begun: both are on their way or about to be
    threading.Event().wait(max(0.0, deadline - time.time()))

    gate.open()

    ended = read(late)
    assert ended.error is not None
    assert ended.error.code == "deadline_exceeded"
    assert len(ended.text) < 200
    assert read(fine).finish_reason == "length"


def test_a_step_that_fails_fails_its_rows_and_the_engine_goes_on(
    base: BaseModel, start: StartEngine, close_gate: CloseGate
) -> None:
    """Rows that fail together and alone end with internal_error; the next request is answered rightly."""
    expected = generated_by_transformers(base, "after")
    engine, gate = start(), close_gate()
    gate.fails = lambda ids: True
    streams = [engine.submit(ask(p)) for p in PROMPTS[:2]]
    gate.open()

    failed = [read(stream) for stream in streams]
    gate.fails = lambda ids: False

    assert [a.error.code for a in failed if a.error] == ["internal_error"] * 2
    assert "out of memory" not in failed[0].last.model_dump_json()
    assert answer(engine, ask("after")).text == expected


def test_a_row_that_fails_fails_alone(base: BaseModel, start: StartEngine, close_gate: CloseGate) -> None:
    """A prompt that the model cannot read ends its request; a row that is decoded beside it does not notice."""
    expected = generated_by_transformers(base, "good one")
    engine, gate = start(), close_gate()
    broken = base.tokenizer("b", add_special_tokens=False)["input_ids"][0]
    gate.fails = lambda ids: ids.count(broken) == 3
    good = engine.submit(ask("good one"))
    gate.wait_for_forward()
    bad = engine.submit(ask("bbb"))
    gate.open()

    error = read(bad).error
    assert error is not None
    assert error.code == "internal_error"
    assert read(good).text == expected


def test_a_step_that_fails_once_harms_nobody(base: BaseModel, start: StartEngine, close_gate: CloseGate) -> None:
    """Rows that cannot be computed together, for want of memory, are computed one after the other."""
    expected = [generated_by_transformers(base, p) for p in PROMPTS[:2]]
    engine, gate = start(), close_gate()
    gate.fails = lambda ids: len(ids) == 2
    streams = [engine.submit(ask(p)) for p in PROMPTS[:2]]
    gate.open()

    assert [read(stream).text for stream in streams] == expected
    assert gate.steps.count((2, 2)) > 0


def test_a_row_that_cannot_be_had_leaves_no_adapter_in_use(
    base: BaseModel, shelf: AdapterShelf, start: StartEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory that runs out while rows get room ends what is open, and nothing is held afterwards."""
    name = shelf.make("one", r=2)
    expected = reference(base, shelf, "after", name)
    engine, add_row = start(), RowForward.add_row
    fails = [True]

    def failing_once(forward: RowForward, num_positions: int) -> int | None:
        if fails.pop() if fails else False:
            raise RuntimeError("out of memory")
        return add_row(forward, num_positions)

    monkeypatch.setattr(RowForward, "add_row", failing_once)
    error = answer(engine, ask("first", name)).error

    assert error is not None
    assert error.code == "internal_error"
    assert answer(engine, ask("after", name)).text == expected
    engine.close()
    engine.check()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("num_rows", [1, 4])
def test_all_are_told_when_nothing_can_be_freed(
    num_rows: int, start: StartEngine, close_gate: CloseGate, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a lost device every open answer ends at once, and the engine takes no more instead of failing them all."""
    engine, gate = start(), close_gate()
    streams = [engine.submit(ask(f"{i}", max_tokens=100)) for i in range(num_rows)]
    for _ in range(3):
        gate.let_pass()
        gate.wait_for_forward()

    def lost(forward: RowForward, row: int) -> None:
        raise RuntimeError("device lost")

    monkeypatch.setattr(RowForward, "remove_row", lost)
    gate.fails = lambda ids: True
    gate.open()

    errors = [read(stream).error for stream in streams]
    assert [error.code for error in errors if error] == ["internal_error"] * num_rows
    until = time.time() + 10
    with contextlib.suppress(Unavailable):
        while time.time() < until:
            answer(engine, ask("too late", deadline_unix_s=until))
    assert time.time() < until


def test_weights_that_overflow_fail_their_own_row_only(
    base: BaseModel, shelf: AdapterShelf, start: StartEngine
) -> None:
    """An adapter that makes the model give NaN fails its request; neither neighbours nor the slot's next row see it."""
    wild = shelf.make("wild", r=2, size=1e30)
    expected = [generated_by_transformers(base, p) for p in PROMPTS]
    engine = start(max_rows=3)

    for _ in range(2):
        streams = [engine.submit(ask("poison", wild)), *(engine.submit(ask(p)) for p in PROMPTS)]
        answers = [read(stream) for stream in streams]
        error = answers[0].error
        assert error is not None
        assert error.code == "internal_error"
        assert [a.text for a in answers[1:]] == expected


def test_an_invalid_request_is_answered_by_its_stream(start: StartEngine) -> None:
    """A prompt that does not fit the context is an error chunk with the numbers, not an exception."""
    error = answer(start(), ask("x" * 300)).error

    assert error is not None
    assert (error.code, error.param) == ("context_length_exceeded", "prompt")
    assert "300" in error.message
    assert "256" in error.message


def test_closing_ends_open_answers_and_takes_no_more(start: StartEngine, close_gate: CloseGate) -> None:
    """Nobody waits forever on a closed engine: what runs and what waits ends with unavailable, submit raises it."""
    engine, gate = start(max_rows=1), close_gate()
    streams = [engine.submit(ask("running", max_tokens=200)), engine.submit(ask("waiting"))]
    gate.wait_for_forward()
    closing = threading.Thread(target=engine.close)
    closing.start()
    gate.let_pass()
    gate.open()
    closing.join()

    errors = [read(stream).error for stream in streams]
    assert [error.code for error in errors if error] == ["unavailable"] * 2
    with pytest.raises(Unavailable):
        engine.submit(ask("too late"))
