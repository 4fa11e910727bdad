"""Bad models, generations and requests about objects, rows 39 to 55 of the catalogue in test_bad_inputs.py.

Adapters come from trainings only: there is no route to upload one, so rows 40 to 46 are held by what reads an adapter's
files (tests/worker/lora/test_hostile_files.py).
"""

from typing import Any

import pytest

from shared.queue import ChunkWriter
from shared.specs import Chunk, ChunkError, GenerationRequest
from tests.api.conftest import CONTEXT, Api
from tests.api.refused import CHAT, JOBS, Bad, assert_refused, assert_told, chosen, unchanged


@pytest.mark.parametrize("model", ["../x", "absent", "HuggingFaceTB/SmolLM2-135M", "tiny@1", "/etc", "https://hub/x"])
def test_row_39_a_base_model_is_one_of_the_registered(api: Api, model: str) -> None:
    """Neither a path nor a name of the Hub is looked up: only an administrator adds base models."""
    training_file = api.upload()["id"]
    with unchanged(api):
        answer = api.http.post(JOBS, json={"model": model, "training_file": training_file})

    assert_told(answer, 400, "model_not_found", "model")


@pytest.mark.parametrize("content", [b"\x80\x04K\x01.", b"PK\x03\x04", b"GGUF\x03", b"\x00" * 8])
def test_row_40_no_adapter_is_uploaded(api: Api, content: bytes) -> None:
    """The adapters' address takes no files, whatever they are."""
    with unchanged(api):
        answer = api.http.post("/v1/adapters", files={"adapter_model": ("adapter_model.safetensors", content)})

    assert_told(answer, 405, "method_not_allowed")


def chat(number: int, what: str, param: str, code: str = "invalid_value", **fields: Any) -> Bad:
    """A chat whose field `param` is wrong."""
    asked = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}
    return Bad(number, what, 400, code, param, path=CHAT, body=asked | fields)


GENERATIONS = [
    *(chat(48, f"max_tokens {n}", "max_tokens", max_tokens=n) for n in (0, -1, 10**9, CONTEXT + 1)),
    chat(48, "a thousand answers", "n", n=1000),
    chat(48, "temperature -1", "temperature", temperature=-1),
    chat(48, "long stop", "stop", stop="x" * 100_000),
    chat(48, "many stops", "stop", stop=["x"] * 5),
    Bad(48, "NaN", 400, "invalid_json", path=CHAT, content=b'{"model": "tiny", "temperature": NaN}'),
    Bad(48, "stop of 1 MB", 413, "payload_too_large", path=CHAT, body={"model": "tiny", "stop": "x" * 1_000_000}),
    Bad(47, "unknown", 404, "model_not_found", path=CHAT, body={"model": "absent", "messages": [
        {"role": "user", "content": "hi"}]}),
]  # fmt: skip


@pytest.mark.parametrize(**chosen(GENERATIONS))
def test_wrong_generations(api: Api, bad: Bad) -> None:
    """A generation that cannot be reaches no generator."""
    assert_refused(api, bad)
    assert api.generator.requests == []


def test_row_47_a_deleted_adapter_is_not_found(api: Api) -> None:
    """From the answer to the deletion on, the adapter is as one that never was."""
    api.publish("math")
    before = api.chat(model="math").status_code
    api.http.delete("/v1/adapters/math")

    assert before == 200
    assert_told(api.chat(model="math"), 404, "model_not_found")


def test_row_49_a_prompt_beyond_the_context_is_told_the_counts(api: Api) -> None:
    """What only the generator can count is 400 all the same, with its words."""

    def too_long(request: GenerationRequest, writer: ChunkWriter) -> None:
        message = f"the prompt has 300 tokens; the context of 'tiny' is {CONTEXT}"
        writer.write(Chunk(error=ChunkError(code="context_length_exceeded", message=message, param="messages")))

    api.generator.reply = too_long
    answer = api.chat()

    assert_told(answer, 400, "context_length_exceeded", "messages")
    assert "300" in answer.json()["error"]["message"]


def test_row_51_a_job_ends_once(api: Api) -> None:
    """Cancelling twice is once; a job that has succeeded cannot be cancelled, an unknown one is not found."""
    job = api.job()
    twice = [api.http.post(f"{JOBS}/{job['id']}/cancel") for _ in range(2)]
    api.publish("math")
    done = api.http.get(JOBS).json()["data"][0]["id"]

    assert twice[0].status_code == 200
    assert twice[1].status_code in (200, 409)
    with unchanged(api):
        assert_told(api.http.post(f"{JOBS}/{done}/cancel"), 409, "state_conflict")
        assert_told(api.http.post(f"{JOBS}/ftjob-{'0' * 32}/cancel"), 404, "not_found")


def test_row_52_an_adapter_is_deleted_once(api: Api) -> None:
    """The second time it is not found; a job that is about to make its next version goes on."""
    api.publish("math")
    job = api.job(suffix="math")
    claim = api.claim()
    answers = [api.http.delete("/v1/adapters/math") for _ in range(2)]

    assert answers[0].status_code == 200
    assert_told(answers[1], 404, "not_found")
    assert api.succeed(claim).version == 2
    assert api.http.get(f"{JOBS}/{job['id']}").json()["fine_tuned_model"] == "math@2"


OBJECTS = [
    *(
        Bad(53, query, 400, "invalid_value", query.partition("=")[0], method="GET", path=f"{JOBS}?{query}")
        for query in ("limit=1000000", "limit=0", "limit=-1", "limit=1e2", "limit=1_0", "after=ftjob-1", "after=x")
    ),
    Bad(53, "offset", 400, "unknown_parameter", "offset", method="GET", path=f"{JOBS}?offset=-1"),
    Bad(53, "twice", 400, "invalid_value", "limit", method="GET", path=f"{JOBS}?limit=1&limit=2"),
    *(
        Bad(55, f"{method} {path}", 405, "method_not_allowed", method=method, path=path)
        for method, path in (
            ("TRACE", JOBS), ("PUT", JOBS), ("PATCH", JOBS), ("DELETE", JOBS), ("OPTIONS", JOBS), ("TRACE", "/healthz"),
            ("POST", "/healthz"), ("POST", "/v1/models/tiny"), ("PUT", "/v1/files"), ("BREW", CHAT),
        )
    ),
]  # fmt: skip


@pytest.mark.parametrize(**chosen(OBJECTS))
def test_wrong_questions(api: Api, bad: Bad) -> None:
    """Pages of any size, cursors that nobody gave out, and methods that nobody offered are refused."""
    assert_refused(api, bad)
