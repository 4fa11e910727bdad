"""`lorad chat`: the answer as it streams, one question or many."""

import pytest

from tests.shared.client.conftest import Lorad
from tests.shared.client.server import ContractServer


def test_a_prompt_is_answered_once(server: ContractServer, lorad: Lorad) -> None:
    """The streamed pieces come out joined, with a newline at the end."""
    ran = lorad("chat", "nya", "What is half of it?")

    (request,) = server.requests("POST", "/chat/completions")
    assert (ran.code, ran.out) == (0, "Half of it nya~\n")
    assert request.json == {
        "model": "nya",
        "messages": [{"role": "user", "content": "What is half of it?"}],
        "temperature": 0.0,
        "stream": True,
    }


def test_options_reach_the_service(server: ContractServer, lorad: Lorad) -> None:
    """System message, temperature, length and seed are sent."""
    lorad("chat", "nya@1", "q", "--system", "s", "--temperature", 0.5, "--max-tokens", 9, "--seed", 0)

    (request,) = server.requests("POST", "/chat/completions")
    body = request.json
    assert body["messages"][0] == {"role": "system", "content": "s"}
    assert (body["temperature"], body["max_tokens"], body["seed"]) == (0.5, 9, 0)
    assert body.keys() == {"model", "messages", "temperature", "stream", "max_tokens", "seed"}


def test_sampling_options_reach_the_service(server: ContractServer, lorad: Lorad) -> None:
    """Each is sent as it was given, in the service's words; what was not given is not sent."""
    lorad("chat", "nya", "q", "--top-p", 0.9, "--min-p", 0, "--repetition-penalty", 1.1, "--stop", "a", "--stop", "b c")

    (request,) = server.requests("POST", "/chat/completions")
    expected = {"top_p": 0.9, "min_p": 0.0, "repetition_penalty": 1.1, "stop": ["a", "b c"]}
    assert {name: request.json.get(name) for name in expected} == expected
    assert "lora_mix" not in request.json


def test_a_mix_is_sent_as_one(server: ContractServer, lorad: Lorad) -> None:
    """Adapters with their weights, 1 where none is given; the name is their base model's."""
    lorad("chat", "tiny", "q", "--mix", "math@3=0.7", "--mix", "poetry=-1", "--mix", "plain")

    (request,) = server.requests("POST", "/chat/completions")
    assert request.json["model"] == "tiny"
    assert request.json["lora_mix"] == [
        {"model": "math@3", "weight": 0.7},
        {"model": "poetry", "weight": -1.0},
        {"model": "plain", "weight": 1.0},
    ]


@pytest.mark.parametrize("share", ["math=", "=1", "math=much", "math=nan", "math=1=2"])
def test_a_share_that_is_none_is_wrong_usage(server: ContractServer, lorad: Lorad, share: str) -> None:
    """Said in one line before anything is asked."""
    ran = lorad("chat", "tiny", "q", "--mix", share)

    assert (ran.code, server.seen) == (2, [])
    assert share in ran.err


def test_json_says_who_answered(lorad: Lorad) -> None:
    """Programs get one object with the whole answer and the version that made it."""
    (answer,) = lorad("chat", "nya", "q", "--json").lines

    assert answer == {
        "model": "nya@1",
        "content": "Half of it nya~",
        "finish_reason": "stop",
        "system_fingerprint": "fp_1",
    }


def test_a_conversation_remembers(server: ContractServer, lorad: Lorad) -> None:
    """Each line of input is a turn; the second one carries the first and its answer. Empty lines are none."""
    ran = lorad("chat", "nya", stdin="one\n\ntwo\n")

    _, second = server.requests("POST", "/chat/completions")
    assert ran.out == "Half of it nya~\n" * 2
    assert [(m["role"], m["content"]) for m in second.json["messages"]] == [
        ("user", "one"),
        ("assistant", "Half of it nya~"),
        ("user", "two"),
    ]


def test_an_error_in_the_stream_is_an_error(server: ContractServer, lorad: Lorad) -> None:
    """What came is shown, and the exit status tells that it is not the whole."""
    server.break_stream = True

    ran = lorad("chat", "nya", "q")

    assert (ran.code, ran.err) == (1, "lorad: the generator died\n")


def test_an_unknown_model_ends_a_conversation(server: ContractServer, lorad: Lorad) -> None:
    """A model that is not there is said once, and no second question is asked."""
    server.refuse_next = [(404, {"error": {"message": "no model 'woof'", "code": "model_not_found"}})]

    ran = lorad("chat", "woof", stdin="one\ntwo\n")

    assert (ran.code, ran.err) == (1, "lorad: no model 'woof'\n")
    assert len(server.seen) == 1


def test_a_failed_turn_is_forgotten(server: ContractServer, lorad: Lorad) -> None:
    """After a turn that failed the conversation goes on without it."""
    server.refuse_next = [(503, {"error": {"message": "busy", "code": "unavailable"}})]

    ran = lorad("chat", "nya", stdin="one\ntwo\n")

    assert ran.out == "Half of it nya~\n"
    assert [m["content"] for m in server.seen[-1].json["messages"]] == ["two"]
