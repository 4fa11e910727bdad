"""The parameters of a generation: each reaches the generator as it was asked, and a bad one is refused by name."""

import time
from typing import Any

import pytest

from shared.specs import ResponseFormat
from tests.api.conftest import CONFIG, CONTEXT, Api

HI = [{"role": "user", "content": "hi"}]
SCHEMA: dict[str, Any] = {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"]}
SCHEMA_PARAM = "response_format.json_schema"


def with_schema(**changed: Any) -> dict[str, Any]:
    """A request for JSON of our schema but for what is changed."""
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "point", "schema": SCHEMA} | changed}}


KNOBS: dict[str, Any] = {
    "n": 3,
    "temperature": 0.5,
    "top_p": 0.9,
    "top_k": 7,
    "min_p": 0.05,
    "repetition_penalty": 1.2,
    "frequency_penalty": -0.5,
    "presence_penalty": 0.25,
    "seed": 3,
    "stop": ["a", "b"],
    "ignore_eos": True,
    "max_tokens": 9,
}


@pytest.mark.parametrize("dialect", ["chat", "raw"])
def test_every_knob_reaches_the_generator(api: Api, dialect: str) -> None:
    """Nothing that was asked for is lost on the way, in either dialect."""
    ask = api.chat if dialect == "chat" else api.complete
    ask(**KNOBS).raise_for_status()
    (request,) = api.generator.requests

    assert request.model_dump(include=set(KNOBS)) == KNOBS
    assert (request.base_model_id, request.adapters) == (api.base.id, [])
    assert 0 < request.deadline_unix_s - time.time() < 121


@pytest.mark.parametrize("knob", KNOBS)
def test_a_knob_that_is_null_is_left_alone(api: Api, knob: str) -> None:
    """Null means the default, which is what a request without the knob gets, and not what the knob can say."""
    api.chat(**{knob: None})
    api.chat()
    null, absent = (request.model_dump()[knob] for request in api.generator.requests)

    assert null == absent != KNOBS[knob]


@pytest.mark.parametrize(
    ("response_format", "expected"),
    [
        (None, None),
        ({"type": "text"}, None),
        ({"type": "json_object"}, ResponseFormat(type="json_object")),
        (
            {"type": "json_schema", "json_schema": {"name": "a", "description": "b", "strict": True, "schema": SCHEMA}},
            ResponseFormat(type="json_schema", json_schema=SCHEMA),
        ),
    ],
)
def test_a_response_format_reaches_the_generator(api: Api, response_format: Any, expected: Any) -> None:
    """OpenAI's shape is unpacked: the generator needs to know the schema, and what is plain text asks for nothing."""
    api.chat(response_format=response_format)
    api.complete(response_format=response_format)

    assert [request.response_format for request in api.generator.requests] == [expected, expected]


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [("a", "a"), (["a"], "a"), ("", ""), ([1, 99], [1, 99]), ([[1, 99]], [1, 99]), ([0], [0])],
)
def test_a_prompt_is_text_or_token_ids(api: Api, prompt: Any, expected: str | list[int]) -> None:
    """Alone or in a list of one, a prompt arrives as what it is."""
    assert api.complete(prompt=prompt).status_code == 200
    assert api.generator.requests[-1].prompt == expected


def test_echo_and_best_of_are_asked_for(api: Api) -> None:
    """`echo` is the generator's to do; `best_of` may say again what `n` says."""
    for fields in ({"echo": True, "n": 2, "best_of": 2}, {"echo": False, "best_of": 1}, {}):
        assert api.complete(**fields).status_code == 200

    assert [(request.echo, request.n) for request in api.generator.requests] == [(True, 2), (False, 1), (False, 1)]


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, None),
        ({"logprobs": False}, None),
        ({"logprobs": True}, 0),
        ({"logprobs": True, "top_logprobs": 0}, 0),
        ({"logprobs": True, "top_logprobs": 20}, 20),
    ],
)
def test_chat_logprobs_are_a_switch_and_a_number(api: Api, fields: dict[str, Any], expected: int | None) -> None:
    """Without the switch nothing is asked for, without the number no alternatives."""
    api.chat(**fields)

    assert api.generator.requests[-1].logprobs == expected


@pytest.mark.parametrize("number", [None, 0, 5])
def test_raw_logprobs_are_a_number(api: Api, number: int | None) -> None:
    """0 asks for the chosen tokens alone, which is not what null says."""
    api.complete(logprobs=number)

    assert api.generator.requests[-1].logprobs == number


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_tokens": 10**9}, "max_tokens"),
        ({"max_tokens": CONTEXT + 1}, "max_tokens"),
        ({"max_tokens": 1, "max_completion_tokens": 2}, "max_tokens"),
        ({"n": 0}, "n"),
        ({"n": 5}, "n"),
        ({"n": 1000}, "n"),
        ({"n": True}, "n"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": 2.1}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"stop": "x" * 65}, "stop"),
        ({"stop": ["a"] * 5}, "stop"),
        ({"stop": ["a", ""]}, "stop.1"),
        ({"frequency_penalty": 2.1}, "frequency_penalty"),
        ({"frequency_penalty": "0"}, "frequency_penalty"),
        ({"presence_penalty": -2.1}, "presence_penalty"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"repetition_penalty": 2.1}, "repetition_penalty"),
        ({"min_p": -0.1}, "min_p"),
        ({"min_p": 1.1}, "min_p"),
        ({"top_k": -1}, "top_k"),
        ({"seed": 1 << 63}, "seed"),
        ({"seed": 1.5}, "seed"),
        ({"ignore_eos": 1}, "ignore_eos"),
        ({"logprobs": 1}, "logprobs"),
        ({"top_logprobs": 5}, "top_logprobs"),
        ({"logprobs": False, "top_logprobs": 5}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": -1}, "top_logprobs"),
        ({"echo": True}, "echo"),
        ({"best_of": 1}, "best_of"),
        ({"logit_bias": {"5": 1}}, "logit_bias"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"response_format": "json_object"}, "response_format"),
        ({"response_format": {}}, "response_format.type"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, SCHEMA_PARAM),
        ({"response_format": {"type": "json_object", "json_schema": {"name": "a", "schema": SCHEMA}}}, SCHEMA_PARAM),
        ({"response_format": {"type": "text", "strict": True}}, "response_format.strict"),
        (with_schema(name="a b"), f"{SCHEMA_PARAM}.name"),
        (with_schema(name="a" * 65), f"{SCHEMA_PARAM}.name"),
        (with_schema(schema=[1]), f"{SCHEMA_PARAM}.schema"),
        (with_schema(schema=None), f"{SCHEMA_PARAM}.schema"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "a"}}}, f"{SCHEMA_PARAM}.schema"),
        (with_schema(extra=1), f"{SCHEMA_PARAM}.extra"),
        ({"reasoning_effort": "high"}, "reasoning_effort"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"usage": True}}, "stream_options.usage"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role"),
        ({"messages": [{"role": "user"}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages.0.content.0.type"),
        ({"messages": [{"role": "user", "content": "x", "name": "bob"}]}, "messages.0.name"),
        ({"prompt": "x"}, "prompt"),
        ({"chat_template": "{{ x }}"}, "chat_template"),
    ],
)
def test_a_bad_parameter_is_400_and_named(api: Api, fields: dict[str, Any], param: str) -> None:
    """A parameter out of bounds, or with a meaning that we do not have, is refused; no request is sent."""
    answer = api.chat(**fields)

    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)
    assert api.generator.requests == []


def test_neutral_values_are_accepted(api: Api) -> None:
    """What SDKs and tools send without meaning anything does not stand in the way."""
    answer = api.chat(
        n=1, frequency_penalty=0, presence_penalty=0.0, logprobs=False, top_logprobs=0, logit_bias={}, tools=[],
        tool_choice="none", response_format={"type": "text"}, user="me", store=False, temperature=None, stop=None,
        max_tokens=5, max_completion_tokens=5, stream=False, modalities=["text"], parallel_tool_calls=True,
    )  # fmt: skip

    assert answer.status_code == 200


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": 1}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": ["a", "b"]}, "prompt"),
        ({"prompt": [[1], [2]]}, "prompt"),
        ({"prompt": [1, "a"]}, "prompt.1"),
        ({"prompt": [-1]}, "prompt.0"),
        ({"prompt": [True]}, "prompt.0"),
        ({"prompt": [1 << 31]}, "prompt.0"),
        ({"prompt": [0, CONFIG["vocab_size"]]}, "prompt"),
        ({"best_of": 2}, "best_of"),
        ({"n": 2, "best_of": 3}, "best_of"),
        ({"logprobs": True}, "logprobs"),
        ({"logprobs": -1}, "logprobs"),
        ({"logprobs": 21}, "logprobs"),
        ({"logprobs": 0, "echo": True}, "logprobs"),
        ({"top_logprobs": 1}, "top_logprobs"),
        ({"echo": 1}, "echo"),
        ({"max_completion_tokens": 1}, "max_completion_tokens"),
        ({"suffix": "x"}, "suffix"),
        ({"messages": HI}, "messages"),
    ],
)
def test_a_bad_raw_parameter_is_400_and_named(api: Api, fields: dict[str, Any], param: str) -> None:
    """The raw dialect has parameters of its own to refuse."""
    answer = api.complete(**fields)

    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)
