"""The stock OpenAI client with strict response validation: choices, log-probabilities, JSON, mixes, full queues."""

import json
from dataclasses import replace
from itertools import groupby

import openai
import pytest
from openai.types.chat import ChatCompletionUserMessageParam
from pydantic import BaseModel

from api.app import create_app
from shared.answers import PREFIX
from shared.config import Settings
from shared.queue import ChunkWriter, generate_queue
from shared.specs import Chunk, ChunkError, GenerationRequest, ResponseFormat, Usage
from tests.api.conftest import HELLO, Api, say_hello
from tests.servers import Broker

HI: list[ChatCompletionUserMessageParam] = [{"role": "user", "content": "hi"}]


class Point(BaseModel):
    x: int
    y: int


def say_point(_: GenerationRequest, writer: ChunkWriter) -> None:
    """A point in JSON, in two pieces."""
    writer.write(Chunk(text='{"x": 1, ', fingerprint="fp-1"))
    writer.write(Chunk(text='"y": 2}', finish_reason="stop", usage=Usage(prompt_tokens=1, completion_tokens=2)))


def test_choices_whole(api: Api) -> None:
    """Each choice with its index, and the usage of all."""
    answer = api.sdk().chat.completions.create(model="tiny", messages=HI, n=3)

    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert {choice.message.content for choice in answer.choices} == {"Hello there"}
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 9


def test_choices_streamed(api: Api) -> None:
    """The client can tell the choices apart, and each has its own beginning and end."""
    stream = api.sdk().chat.completions.create(
        model="tiny", messages=HI, n=2, stream=True, stream_options={"include_usage": True}
    )
    *chunks, last = list(stream)
    choices = sorted((chunk.choices[0] for chunk in chunks), key=lambda choice: choice.index)

    for _, pieces in groupby(choices, key=lambda choice: choice.index):
        first, *texts, end = pieces
        assert (first.delta.role, end.finish_reason) == ("assistant", "stop")
        assert [piece.delta.content for piece in texts] == list(HELLO)
    assert last.usage is not None
    assert last.usage.completion_tokens == 6


def test_the_stream_helper_puts_choices_together(api: Api) -> None:
    """The client's own accumulator ends with what a whole answer holds."""
    with api.sdk().chat.completions.stream(model="tiny", messages=HI, n=2, logprobs=True, top_logprobs=1) as stream:
        final = stream.get_final_completion()

    assert [choice.message.content for choice in final.choices] == ["Hello there"] * 2
    assert final.choices[1].logprobs is not None
    assert [one.token for one in final.choices[1].logprobs.content or []] == list(HELLO)


def test_chat_logprobs(api: Api) -> None:
    """Tokens, bytes and alternatives pass the client's types; unasked there are none."""
    client = api.sdk()
    (asked,) = client.chat.completions.create(model="tiny", messages=HI, logprobs=True, top_logprobs=2).choices
    (unasked,) = client.chat.completions.create(model="tiny", messages=HI).choices

    assert asked.logprobs is not None
    assert asked.logprobs.content is not None
    assert "".join(one.token for one in asked.logprobs.content) == asked.message.content
    assert [len(one.top_logprobs) for one in asked.logprobs.content] == [2, 2]
    assert unasked.logprobs is None


def test_raw_completions_with_logprobs_and_token_ids(api: Api) -> None:
    """The legacy columns pass the client's types, and the prompt may be token ids."""
    answer = api.sdk().completions.create(model="tiny", prompt=[[1, 2]], logprobs=2, n=2)
    logprobs = answer.choices[1].logprobs

    assert api.generator.requests[-1].prompt == [1, 2]
    assert logprobs is not None
    assert (logprobs.tokens, logprobs.text_offset) == (list(HELLO), [0, 5])
    assert logprobs.top_logprobs is not None
    assert [sorted(one) for one in logprobs.top_logprobs] == [["Hello", "a", "b"], [" there", "a", "b"]]


def test_parse_gives_the_pydantic_model(api: Api) -> None:
    """`parse` sends the model's schema, which reaches the generator, and gets the model back."""
    api.generator.reply = say_point
    (choice,) = api.sdk().chat.completions.parse(model="tiny", messages=HI, response_format=Point).choices
    asked = api.generator.requests[-1].response_format

    assert choice.message.parsed == Point(x=1, y=2)
    assert asked is not None
    assert asked.json_schema is not None
    assert asked.json_schema["required"] == ["x", "y"]


def test_a_streamed_answer_is_parsed(api: Api) -> None:
    """The stream helper parses as it goes."""
    api.generator.reply = say_point
    with api.sdk().chat.completions.stream(model="tiny", messages=HI, response_format=Point) as stream:
        (choice,) = stream.get_final_completion().choices

    assert choice.message.parsed == Point(x=1, y=2)


def test_json_mode(api: Api) -> None:
    """`json_object` asks for any object, and what comes is text."""
    api.generator.reply = say_point
    answer = api.sdk().chat.completions.create(model="tiny", messages=HI, response_format={"type": "json_object"})

    assert api.generator.requests[-1].response_format == ResponseFormat(type="json_object")
    assert json.loads(answer.choices[0].message.content or "") == {"x": 1, "y": 2}


def test_our_parameters_ride_in_extra_body(api: Api) -> None:
    """What OpenAI's client has no argument for arrives all the same."""
    for name in ("math", "poetry"):
        api.publish(name)
    mix = [{"model": "math", "weight": 0.7}, {"model": "poetry", "weight": 0.3}]
    answer = api.sdk().chat.completions.create(
        model="tiny", messages=HI, extra_body={"lora_mix": mix, "min_p": 0.1, "repetition_penalty": 1.1}
    )

    assert answer.model == "tiny+math@1*0.7+poetry@1*0.3"
    assert (api.generator.requests[-1].min_p, api.generator.requests[-1].repetition_penalty) == (0.1, 1.1)


def _busy_once(api: Api) -> None:
    """Let the first request find a full queue, and the next an idle generator."""

    def reply(request: GenerationRequest, writer: ChunkWriter) -> None:
        if len(api.generator.requests) == 1:
            writer.write(Chunk(error=ChunkError(code="queue_full", message="Too many requests are waiting.")))
        else:
            say_hello(request, writer)

    api.generator.reply = reply


def test_a_full_queue_is_tried_again(api: Api) -> None:
    """The client waits as it is told to and asks once more, without its user noticing."""
    _busy_once(api)
    answer = api.sdk().with_options(max_retries=1).chat.completions.create(model="tiny", messages=HI)

    assert answer.choices[0].message.content == "Hello there"
    assert len(api.generator.requests) == 2


def test_a_full_queue_is_a_rate_limit(api: Api) -> None:
    """Who does not try again sees the client's own error, our code, and when to come back."""
    _busy_once(api)
    with pytest.raises(openai.RateLimitError) as full:
        api.sdk().chat.completions.create(model="tiny", messages=HI)

    assert (full.value.code, full.value.response.headers["retry-after"]) == ("queue_full", "1")


def test_a_queue_that_is_full_on_the_broker_is_429(api: Api, settings: Settings, broker: Broker) -> None:
    """The API says so itself, sends nothing, and says when to come back."""
    queue = PREFIX + generate_queue(api.add_base("idle").id)
    broker.client.lpush(queue, "somebody's request")
    full = create_app(replace(settings, max_queued_requests=1))
    answer = full.test_client().post("/v1/chat/completions", json={"model": "idle", "messages": HI})

    assert (answer.status_code, (answer.json or {})["error"]["code"]) == (429, "queue_full")
    assert 1 <= int(answer.headers["Retry-After"]) <= 120
    assert broker.client.llen(queue) == 1
    full.extensions["lorad"][1].engine.dispose()
