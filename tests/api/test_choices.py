"""Several choices in one answer, and the log-probabilities of their tokens, whole and streamed."""

import json
from collections.abc import Iterator
from typing import Any

import pytest

from shared.queue import ChunkWriter
from shared.specs import Chunk, GeneratedToken, GenerationRequest, Usage
from tests.api.conftest import HELLO, Api, token

USAGE = Usage(prompt_tokens=1, completion_tokens=4)
EURO = "a€b"
EURO_TOKENS = [
    token(b"a", -0.5, (b"a", -0.5), (b"b", -2.0)),
    token(b"\xe2\x82", -1.0),
    token(b"\xac", 0.0),
    token(b"b", -3.0),
]


def chunks(raw: str) -> list[Any]:
    """The chunks of a stream that ended well."""
    *data, done = [line.removeprefix("data: ") for line in raw.split("\n\n") if line]
    assert done == "[DONE]"
    return [json.loads(one) for one in data]


def of_choice(stream: list[Any], index: int) -> list[Any]:
    return [choice for chunk in stream for choice in chunk["choices"] if choice["index"] == index]


def say_euro(_: GenerationRequest, writer: ChunkWriter) -> None:
    """'a€b' in four tokens: the middle character is made of two, so no text comes with the first of them."""
    a, first, second, b = EURO_TOKENS
    writer.write(Chunk(text="a", logprobs=[a], fingerprint="fp-1"))
    writer.write(Chunk(logprobs=[first]))
    writer.write(Chunk(text="€b", logprobs=[second, b], finish_reason="stop", usage=USAGE))


def test_choices_come_in_the_order_of_their_index(api: Api) -> None:
    """A whole answer holds each choice once, however the pieces were mixed, and one usage for all."""

    def backwards(request: GenerationRequest, writer: ChunkWriter) -> None:
        for index in reversed(range(request.n)):
            writer.write(Chunk(index=index, text=f"{index}", fingerprint="fp-1"))
        for index in (1, 2, 0):
            writer.write(Chunk(index=index, text="!", finish_reason="length" if index == 1 else "stop"))
        writer.write(Chunk(usage=USAGE))

    api.generator.reply = backwards
    chat, raw = api.chat(n=3).json(), api.complete(n=3).json()

    assert [(one["index"], one["message"]["content"]) for one in chat["choices"]] == [(0, "0!"), (1, "1!"), (2, "2!")]
    assert [(one["index"], one["text"]) for one in raw["choices"]] == [(0, "0!"), (1, "1!"), (2, "2!")]
    assert [one["finish_reason"] for one in chat["choices"]] == ["stop", "length", "stop"]
    assert chat["usage"] == raw["usage"] == {"prompt_tokens": 1, "completion_tokens": 4, "total_tokens": 5}


def test_one_choice_is_the_default(api: Api) -> None:
    """Who asks for no number gets one choice, with index 0."""
    assert [choice["index"] for choice in api.chat().json()["choices"]] == [0]
    assert [choice["index"] for choice in api.chat(n=4).json()["choices"]] == [0, 1, 2, 3]


def test_an_answer_without_one_of_its_choices_has_broken_off(api: Api) -> None:
    """Usage says that the generator is done: a choice that has not ended by then is an error, not an empty text."""

    def forget_one(_: GenerationRequest, writer: ChunkWriter) -> None:
        writer.write(Chunk(index=0, text="a", finish_reason="stop", fingerprint="fp-1"))
        writer.write(Chunk(index=1, text="b", usage=USAGE))

    api.generator.reply = forget_one

    assert api.chat(n=2).status_code == 503
    assert api.chat(n=1).status_code == 200


def test_a_stream_mixes_choices(api: Api) -> None:
    """Each choice begins with its role and ends with its reason; pieces come as they are made; usage comes last."""
    *stream, usage = chunks(api.chat(n=3, stream=True, stream_options={"include_usage": True}).text)

    for index in range(3):
        first, *texts, last = of_choice(stream, index)
        assert (first["delta"], first["finish_reason"]) == ({"role": "assistant", "content": ""}, None)
        assert [piece["delta"] for piece in texts] == [{"content": text} for text in HELLO]
        assert (last["delta"], last["finish_reason"]) == ({}, "stop")
    assert [chunk["choices"][0]["index"] for chunk in stream[:6]] == [0, 1, 2, 0, 1, 2]
    assert (usage["choices"], usage["usage"]["completion_tokens"]) == ([], 9)
    assert all(chunk["usage"] is None and len(chunk["choices"]) == 1 for chunk in stream)


def test_a_raw_stream_mixes_choices(api: Api) -> None:
    """The raw dialect tells the same, in texts."""
    stream = chunks(api.complete(n=2, stream=True).text)

    for index in range(2):
        assert "".join(piece["text"] for piece in of_choice(stream, index)) == "".join(HELLO)
        assert [piece["finish_reason"] for piece in of_choice(stream, index)][-2:] == [None, "stop"]
    assert all(chunk["usage"] is None for chunk in stream)


@pytest.mark.parametrize("number", [0, 2])
def test_chat_logprobs(api: Api, number: int) -> None:
    """A token of each choice with its bytes, and as many alternatives as were asked for."""
    for index, choice in enumerate(api.chat(n=2, logprobs=True, top_logprobs=number).json()["choices"]):
        told = choice["logprobs"]["content"]
        assert [(one["token"], bytes(one["bytes"]), one["logprob"]) for one in told] == [
            (text, text.encode(), -1.0 - index) for text in HELLO
        ]
        assert [[likely["token"] for likely in one["top_logprobs"]] for one in told] == [["a", "b"][:number]] * 2
        assert choice["logprobs"]["refusal"] is None


def test_logprobs_are_null_unasked(api: Api) -> None:
    """Nobody pays for what was not asked, whole or streamed."""
    answers = [api.chat().json(), api.complete().json()]
    streams = [chunks(api.chat(stream=True).text), chunks(api.complete(stream=True).text)]

    assert {choice["logprobs"] for answer in answers for choice in answer["choices"]} == {None}
    assert {choice["logprobs"] for stream in streams for choice in of_choice(stream, 0)} == {None}


def test_an_answer_without_tokens_has_empty_logprobs(api: Api) -> None:
    """Asked for, but with nothing to say: a list without entries, since null would mean unasked."""

    def say_nothing(_: GenerationRequest, writer: ChunkWriter) -> None:
        writer.write(Chunk(finish_reason="stop", usage=USAGE, fingerprint="fp-1"))

    api.generator.reply = say_nothing

    assert api.chat(logprobs=True).json()["choices"][0]["logprobs"]["content"] == []
    assert api.complete(logprobs=0).json()["choices"][0]["logprobs"]["tokens"] == []


def test_streamed_logprobs_are_the_whole_ones(api: Api) -> None:
    """Put together, the pieces of a stream tell the tokens that the whole answer tells, each once."""
    api.generator.reply = say_euro
    whole = api.chat(logprobs=True, top_logprobs=2).json()["choices"][0]
    pieces = of_choice(chunks(api.chat(logprobs=True, top_logprobs=2, stream=True).text), 0)

    told = whole["logprobs"]["content"]
    assert [one for piece in pieces if piece["logprobs"] for one in piece["logprobs"]["content"]] == told
    assert "".join(piece["delta"].get("content", "") for piece in pieces) == whole["message"]["content"] == EURO
    assert b"".join(bytes(one["bytes"]) for one in told).decode() == EURO


def test_raw_logprobs_in_openai_s_columns(api: Api) -> None:
    """Tokens that are part of a character are written as bytes; alternatives hold the chosen token too."""
    api.generator.reply = say_euro
    told = api.complete(logprobs=2).json()["choices"][0]["logprobs"]

    assert told == {
        "tokens": ["a", r"bytes:\xe2\x82", r"bytes:\xac", "b"],
        "token_logprobs": [-0.5, -1.0, 0.0, -3.0],
        "top_logprobs": [{"a": -0.5, "b": -2.0}, {r"bytes:\xe2\x82": -1.0}, {r"bytes:\xac": 0.0}, {"b": -3.0}],
        "text_offset": [0, 1, 1, 2],
    }


@pytest.mark.parametrize("stream", [False, True])
def test_offsets_are_places_in_the_choice_s_text(api: Api, stream: bool) -> None:
    """At its offset each token stands in the text of its own choice, also when the text comes in pieces."""
    for index in range(3):
        text, columns = _text_and_columns(api, index, stream)
        assert text == "".join(HELLO)
        assert [text[offset : offset + len(word)] for word, offset in columns] == list(HELLO)


def test_offsets_go_on_in_a_stream(api: Api) -> None:
    """A character that two chunks share is one character before the next token."""
    api.generator.reply = say_euro
    pieces = of_choice(chunks(api.complete(logprobs=0, stream=True).text), 0)

    assert [offset for _, offset in _columns(pieces)] == [0, 1, 1, 2]


def test_a_special_token_takes_no_place(api: Api) -> None:
    """It has a name and no text, so that the token behind it stands where it stands."""
    ends = GeneratedToken(token="<|end|>", bytes=[], logprob=-0.1)

    def say_on(_: GenerationRequest, writer: ChunkWriter) -> None:
        told = [token(b"a", -1.0), ends, token(b"b", -1.0), ends]
        writer.write(Chunk(text="ab", logprobs=told, finish_reason="length", usage=USAGE, fingerprint="fp-1"))

    api.generator.reply = say_on
    told = api.complete(logprobs=0, ignore_eos=True).json()["choices"][0]["logprobs"]

    assert (told["tokens"], told["text_offset"]) == (["a", "<|end|>", "b", "<|end|>"], [0, 1, 1, 2])


def _text_and_columns(api: Api, index: int, stream: bool) -> tuple[str, list[tuple[str, int]]]:
    """The text of one of three choices, and its tokens with their offsets."""
    answer = api.complete(n=3, logprobs=1, stream=stream)
    pieces = of_choice(chunks(answer.text) if stream else [answer.json()], index)
    return "".join(piece["text"] for piece in pieces), list(_columns(pieces))


def _columns(pieces: list[Any]) -> Iterator[tuple[str, int]]:
    for piece in pieces:
        if piece["logprobs"]:
            yield from zip(piece["logprobs"]["tokens"], piece["logprobs"]["text_offset"], strict=True)
