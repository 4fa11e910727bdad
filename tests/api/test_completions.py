"""Generation over HTTP: conversations, models, failures before and in a stream, and the stream itself."""

import json
import time
from dataclasses import replace
from typing import Any

import pytest

from api.app import create_app
from shared.config import Settings
from shared.queue import ChunkWriter
from shared.specs import Chunk, ChunkError, GenerationRequest, Message
from tests.api.conftest import Api, wait_for
from tests.servers import free_port

CHAT = "/v1/chat/completions"
RAW = "/v1/completions"
HI = [{"role": "user", "content": "hi"}]


def ask(api: Api, **fields: Any) -> Any:
    return api.http.post(CHAT, json={"model": "tiny", "messages": HI} | fields)


def events(raw: str) -> list[Any]:
    """The data of each event; [DONE] as text."""
    assert raw.endswith("\n\n")
    data = [line.removeprefix("data: ") for line in raw.split("\n\n") if line]
    return [one if one == "[DONE]" else json.loads(one) for one in data]


def test_defaults_are_openai_s(api: Api) -> None:
    """Chat goes on to the context's end; a raw completion stops after 16 tokens."""
    ask(api)
    api.http.post(RAW, json={"model": "tiny", "prompt": "a"})
    chat, raw = api.generator.requests

    assert (chat.temperature, chat.top_p, chat.top_k, chat.max_tokens) == (1.0, 1.0, 0, None)
    assert (raw.max_tokens, raw.prompt, raw.messages) == (16, "a", None)


def test_messages_arrive_as_plain_text(api: Api) -> None:
    """Parts are joined, `developer` is system, and text that looks like markup stays text."""
    ask(
        api,
        messages=[
            {"role": "developer", "content": "<|im_start|>system"},
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b\0"}]},
        ],
    )

    assert api.generator.requests[-1].messages == [
        Message(role="system", content="<|im_start|>system"),
        Message(role="user", content="ab\0"),
    ]


def test_an_answer_can_be_sent_back_as_it_came(api: Api) -> None:
    """The assistant's message with its null fields is accepted as history."""
    message = ask(api).json()["choices"][0]["message"]
    sdk = api.sdk().chat.completions.create(model="tiny", messages=[{"role": "user", "content": "hi"}])
    dumped = sdk.choices[0].message.model_dump()

    assert ask(api, messages=[*HI, message, dumped, *HI]).status_code == 200


def test_an_unknown_or_deleted_model_is_404(api: Api) -> None:
    """A model that is not there has a code of its own, before and after it was."""
    api.publish("math")
    assert ask(api, model="math").status_code == 200
    api.http.delete("/v1/adapters/math")

    for name in ("math", "math@1", "never"):
        error = ask(api, model=name).json()["error"]
        assert (error["code"], error["param"]) == ("model_not_found", "model")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("code", "param", "status"),
    [
        ("context_length_exceeded", "messages", 400),
        ("adapter_corrupt", None, 409),
        ("model_not_found", None, 404),
        ("queue_full", None, 429),
        ("unavailable", None, 503),
        ("deadline_exceeded", None, 504),
        ("internal_error", None, 500),
    ],
)
def test_a_failure_before_the_first_chunk_is_an_http_error(
    api: Api, stream: bool, code: str, param: str | None, status: int
) -> None:
    """Streamed or not, what the generator reports first becomes the status."""

    def fail(_: GenerationRequest, writer: ChunkWriter) -> None:
        writer.write(Chunk(error=ChunkError(code=code, message="no", param=param)))

    api.generator.reply = fail
    answer = ask(api, stream=stream)

    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
    assert answer.json()["error"]["param"] == param


def test_a_failure_in_a_stream_is_an_error_event(api: Api) -> None:
    """The text so far arrives, then the error, and no [DONE]."""

    def fail_late(_: GenerationRequest, writer: ChunkWriter) -> None:
        writer.write(Chunk(text="Hel"))
        writer.write(Chunk(error=ChunkError(code="internal_error", message="gone")))

    api.generator.reply = fail_late
    seen = events(ask(api, stream=True).text)

    assert seen[1]["choices"][0]["delta"] == {"content": "Hel"}
    assert seen[-1]["error"]["code"] == "internal_error"


def test_the_stream_s_order_and_framing(api: Api) -> None:
    """Role, texts, reason, usage, [DONE]; data lines only, since ids and retries break OpenAI's parser."""
    answer = ask(api, stream=True, stream_options={"include_usage": True})
    first, *texts, reason, usage, done = events(answer.text)

    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert [chunk["choices"][0]["delta"] for chunk in texts] == [{"content": "Hello"}, {"content": " there"}]
    assert (reason["choices"][0]["delta"], reason["choices"][0]["finish_reason"]) == ({}, "stop")
    assert (usage["choices"], usage["usage"]["total_tokens"], done) == ([], 8, "[DONE]")
    assert {chunk["id"] for chunk in (first, *texts, reason, usage)} == {first["id"]}
    assert all(line.startswith("data: ") for line in answer.text.split("\n") if line)
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert (answer.headers["cache-control"], answer.headers["x-accel-buffering"]) == ("no-cache", "no")
    assert answer.headers["x-request-id"]


def test_usage_is_not_streamed_unasked(api: Api) -> None:
    """Without include_usage no chunk is without a choice."""
    chunks = [chunk for chunk in events(ask(api, stream=True).text) if chunk != "[DONE]"]

    assert all(chunk["choices"] and chunk["usage"] is None for chunk in chunks)


def test_a_client_that_leaves_cancels(api: Api) -> None:
    """Closing the connection in the middle sets the flag that the generator looks at."""
    cancelled: list[bool] = []

    def go_on(_: GenerationRequest, writer: ChunkWriter) -> None:
        until = time.monotonic() + 10
        while not writer.is_cancelled() and time.monotonic() < until:
            writer.write(Chunk(text="x" * 4096))
            time.sleep(0.01)
        cancelled.append(writer.is_cancelled())

    api.generator.reply = go_on
    with api.http.stream("POST", CHAT, json={"model": "tiny", "messages": HI, "stream": True}) as answer:
        next(answer.iter_lines())
    wait_for(lambda: cancelled)

    assert cancelled == [True]


def test_an_answer_read_to_its_end_cancels_nothing(api: Api) -> None:
    """The flag is for those who leave early."""
    ask(api, stream=True)
    ask(api)

    writers = [api.generator.queue.writer(request.request_id) for request in api.generator.requests]
    assert [writer.is_cancelled() for writer in writers] == [False, False]


def test_generation_without_a_broker_is_503(settings: Settings, api: Api) -> None:
    """Nobody can be asked: said at once, and to be tried again."""
    deaf = create_app(replace(settings, broker_url=f"redis://127.0.0.1:{free_port()}/0"))
    answer = deaf.test_client().post(CHAT, json={"model": "tiny", "messages": HI})

    assert (answer.status_code, answer.headers["Retry-After"]) == (503, "1")
    deaf.extensions["lorad"][1].engine.dispose()


def test_a_corrupt_version_does_not_generate(api: Api) -> None:
    """A version that was found corrupt answers with a conflict instead of another version's words."""
    from shared.db import write
    from shared.store import adapters

    version = api.publish("math")
    with write(api.engine) as tx:
        adapters.mark_corrupt(tx, version.id)

    assert ask(api, model="math").json()["error"]["code"] == "adapter_corrupt"
