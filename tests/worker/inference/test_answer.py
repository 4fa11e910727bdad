"""Requests to chunks: choices driven by hand over the tiny model, one plain forward of all tokens a step."""

import time
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from shared.errors import InvalidRequest
from shared.specs import AdapterShare, Chunk, GenerationRequest
from worker.base_model import BaseModel
from worker.inference.answer import Answer, Choice, fingerprint
from worker.inference.prompt import PromptReader
from worker.inference.sampling import Chosen, choose_all
from worker.inference.stream import ChunkStream


def ask(**given: Any) -> GenerationRequest:
    options: dict[str, Any] = {"prompt": "hello", "max_tokens": 12, "temperature": 0.0, "ignore_eos": True}
    return GenerationRequest(
        request_id="r", base_model_id="b", **options | {"deadline_unix_s": time.time() + 60} | given
    )


def answer_to(base: BaseModel, request: GenerationRequest) -> Answer:
    return Answer(
        request,
        prompt=PromptReader(base).read(request),
        stream=ChunkStream(lambda: None),
        tokenizer=base.tokenizer,
        eos_token_ids=base.eos_token_ids,
    )


def logits_after(base: BaseModel, token_ids: Sequence[int]) -> torch.Tensor:
    with torch.no_grad():
        return base.model(torch.tensor([list(token_ids)])).logits[0, -1]


def generate(base: BaseModel, request: GenerationRequest) -> tuple[Answer, list[Chunk]]:
    """All choices side by side, one token of each at a time, as the engine does it."""
    answer = answer_to(base, request)
    for choice in answer.choices:
        choice.begin("fp")
    open_choices = list(answer.choices)
    while open_choices:
        rows = torch.stack([logits_after(base, [*choice.prompt.ids, *choice.token_ids]) for choice in open_choices])
        for choice, chosen in zip(list(open_choices), choose_all(rows, open_choices), strict=True):
            assert isinstance(chosen, Chosen)
            if choice.take(chosen):
                open_choices.remove(choice)
    return answer, list(answer.stream)


def feed(answer: Answer, token_ids: Sequence[int], index: int = 0) -> list[bool]:
    """Give one choice these tokens; what `take` says of each."""
    return [answer.choices[index].take(Chosen(token_id)) for token_id in token_ids]


def written(answer: Answer) -> list[Chunk]:
    """What is on the stream so far."""
    answer.stream.cancel()
    return list(answer.stream)


def text_of(chunks: Sequence[Chunk], index: int = 0) -> str:
    return "".join(chunk.text for chunk in chunks if chunk.index == index)


def ids_of(base: BaseModel, text: str) -> list[int]:
    return list(base.tokenizer(text, add_special_tokens=False)["input_ids"])


# -- how it ends


def test_an_answer_ends_after_max_tokens(tiny_base: BaseModel) -> None:
    """With the reason "length" and the exact counts in its last chunk, and in no other."""
    _, chunks = generate(tiny_base, ask())

    assert [chunk.usage for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    last = chunks[-1]
    assert last.usage is not None
    assert (last.finish_reason, last.usage.prompt_tokens, last.usage.completion_tokens) == ("length", 5, 12)


def test_a_stop_string_over_tokens_ends_an_answer(tiny_base: BaseModel) -> None:
    """Nothing of it is told, the reason is "stop", and the tokens that spelled it are counted."""
    answer = answer_to(tiny_base, ask(stop=["STOP"]))

    ended = feed(answer, ids_of(tiny_base, "ab STOP"))

    chunks = list(answer.stream)
    assert ended == [False] * 6 + [True]
    assert text_of(chunks) == "ab "
    assert chunks[-1].finish_reason == "stop"
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 7


def test_what_only_began_a_stop_string_is_told(tiny_base: BaseModel) -> None:
    """At the latest when the answer ends."""
    answer = answer_to(tiny_base, ask(stop=["STOP"], max_tokens=5))

    feed(answer, ids_of(tiny_base, "ab ST"))

    assert text_of(list(answer.stream)) == "ab ST"


def test_eos_ends_an_answer_without_text(tiny_base: BaseModel) -> None:
    """It counts as a token."""
    answer = answer_to(tiny_base, ask(ignore_eos=False))

    ended = feed(answer, [*ids_of(tiny_base, "hi"), 2])

    chunks = list(answer.stream)
    assert ended == [False, False, True]
    assert (text_of(chunks), chunks[-1].finish_reason) == ("hi", "stop")
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 3


def test_eos_that_is_ignored_has_no_text_and_ends_nothing(tiny_base: BaseModel) -> None:
    """The answer goes on to its last token."""
    answer = answer_to(tiny_base, ask(max_tokens=5))

    ended = feed(answer, [*ids_of(tiny_base, "hi"), 2, *ids_of(tiny_base, "ho")])

    chunks = list(answer.stream)
    assert ended == [False] * 4 + [True]
    assert (text_of(chunks), chunks[-1].finish_reason) == ("hiho", "length")


def test_the_first_chunk_comes_with_the_first_token(tiny_base: BaseModel) -> None:
    """Even where that has no text yet: it says that the prompt was read, and names the weights."""
    answer = answer_to(tiny_base, ask(stop=["STOP"]))
    answer.choices[0].begin("fp_1")

    feed(answer, ids_of(tiny_base, "ST"))

    assert [(chunk.text, chunk.fingerprint) for chunk in written(answer)] == [("", "fp_1")]


def test_a_chunk_holds_whole_characters(tiny_base: BaseModel) -> None:
    """Four tokens make one character, and one chunk beside the first."""
    answer = answer_to(tiny_base, ask())

    feed(answer, ids_of(tiny_base, "a😀é"))

    assert [chunk.text for chunk in written(answer)] == ["a", "😀", "é"]


def test_a_character_cut_off_by_max_tokens_is_told_as_such(tiny_base: BaseModel) -> None:
    """As one U+FFFD, at the end and nowhere else."""
    answer = answer_to(tiny_base, ask(max_tokens=4))

    feed(answer, ids_of(tiny_base, "a😀"))

    assert text_of(list(answer.stream)) == "a\ufffd"


def test_usage_comes_once_all_choices_have_ended(tiny_base: BaseModel) -> None:
    """Each choice has a reason of its own; the sum of all tokens stands in the very last chunk."""
    answer = answer_to(tiny_base, ask(n=2, ignore_eos=False, max_tokens=3))

    feed(answer, [*ids_of(tiny_base, "a"), 2], index=1)
    feed(answer, ids_of(tiny_base, "bcd"), index=0)

    ends = [chunk for chunk in answer.stream if chunk.finish_reason is not None]
    assert [(chunk.index, chunk.finish_reason) for chunk in ends] == [(1, "stop"), (0, "length")]
    assert ends[0].usage is None
    assert ends[1].usage is not None
    assert ends[1].usage.completion_tokens == 5


def test_a_choice_that_has_ended_is_gone_and_the_others_are_not(tiny_base: BaseModel) -> None:
    """Its row is free; theirs are not."""
    answer = answer_to(tiny_base, ask(n=2, max_tokens=1))

    feed(answer, [5], index=0)

    assert [choice.is_gone for choice in answer.choices] == [True, False]


# -- who waits


def test_a_deadline_is_told_once_and_then_nobody_waits(tiny_base: BaseModel) -> None:
    """By the first choice that is asked, for all of them."""
    answer = answer_to(tiny_base, ask(n=2, deadline_unix_s=time.time() - 1))

    assert [choice.is_gone for choice in answer.choices] == [True, True]
    [chunk] = answer.stream
    assert chunk.error is not None
    assert chunk.error.code == "deadline_exceeded"


def test_before_its_deadline_somebody_waits(tiny_base: BaseModel) -> None:
    """Nothing is told by asking."""
    answer = answer_to(tiny_base, ask())

    assert not answer.choices[0].is_gone
    assert written(answer) == []


def test_a_cancelled_answer_is_gone_with_all_its_choices(tiny_base: BaseModel) -> None:
    """And is told nothing more, not even that it is late."""
    answer = answer_to(tiny_base, ask(n=2, deadline_unix_s=time.time() - 1))

    answer.stream.cancel()

    assert [choice.is_gone for choice in answer.choices] == [True, True]
    assert list(answer.stream) == []


def test_a_choice_that_fails_fails_the_answer_once(tiny_base: BaseModel) -> None:
    """Whoever fails first is told; tokens and errors that come later are not."""
    answer = answer_to(tiny_base, ask(n=2))

    answer.choices[1].fail(InvalidRequest("first"))
    answer.choices[0].fail(InvalidRequest("second"))
    feed(answer, ids_of(tiny_base, "a"))

    assert [choice.is_gone for choice in answer.choices] == [True, True]
    assert [chunk.error.message for chunk in answer.stream if chunk.error] == ["first"]


def test_an_error_that_is_nobodys_fault_is_logged_and_hidden(
    tiny_base: BaseModel, caplog: pytest.LogCaptureFixture
) -> None:
    """A client learns that it failed, an operator why; a domain error is shown as it is."""
    answer = answer_to(tiny_base, ask())

    answer.choices[0].fail(ValueError("secret"))

    [chunk] = answer.stream
    assert chunk.error is not None
    assert (chunk.error.code, "secret" in chunk.error.message) == ("internal_error", False)
    assert "secret" in caplog.text


# -- whose weights


def test_a_fingerprint_names_weights_and_their_shares() -> None:
    """Order does not count; base, adapters and weights do."""
    mixed = fingerprint("base", [("a", 0.5), ("b", 1.0)])

    assert mixed == fingerprint("base", [("b", 1.0), ("a", 0.5)])
    assert mixed.startswith("fp_")
    others = [
        fingerprint("base", []),
        fingerprint("other", [("a", 0.5), ("b", 1.0)]),
        fingerprint("base", [("a", 1.0), ("b", 0.5)]),
        fingerprint("base", [("a", 0.5)]),
    ]
    assert len({mixed, *others}) == 5


def test_a_choice_says_which_adapters_it_wants(tiny_base: BaseModel) -> None:
    """The bare base is none."""
    share = AdapterShare(version_id="adv-1", weight=0.5)

    [choice] = answer_to(tiny_base, ask(adapters=[share])).choices
    [bare] = answer_to(tiny_base, ask()).choices

    assert isinstance(choice, Choice)
    assert (choice.adapters, bare.adapters) == ((share,), ())
