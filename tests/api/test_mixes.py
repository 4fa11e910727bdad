"""Weighted mixes of adapters: who is asked, what the answer calls itself, and what cannot be mixed."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from shared.db import write
from shared.specs import AdapterShare
from shared.store import adapters
from tests.api.conftest import Api

Parts = list[dict[str, Any]]
MATH, POETRY = {"model": "math", "weight": 0.7}, {"model": "poetry", "weight": -1}


@pytest.fixture
def versions(api: Api) -> dict[str, str]:
    """The ids of math@1, math@2 and poetry@1, which belong to the base model `tiny`."""
    return {name: api.publish(name.partition("@")[0]).id for name in ("math@1", "math@2", "poetry@1")}


@pytest.fixture
def no_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """A key that is made counts at once."""
    monkeypatch.setattr("api.auth._FRESH_S", 0.0)


@pytest.fixture
def far(api: Api) -> str:
    """The name of an adapter of another base model."""
    replace(api, base=api.add_base("other")).publish("far")
    return "far"


def test_a_mix_reaches_the_generator(api: Api, versions: dict[str, str]) -> None:
    """Names become versions, with their weights, in the order that was given; the answer says all of it."""
    answer = api.chat(model="tiny", lora_mix=[MATH, POETRY, {"model": "math@1"}])
    (request,) = api.generator.requests

    assert request.base_model_id == api.base.id
    assert request.adapters == [
        AdapterShare(version_id=versions["math@2"], weight=0.7),
        AdapterShare(version_id=versions["poetry@1"], weight=-1.0),
        AdapterShare(version_id=versions["math@1"], weight=1.0),
    ]
    assert answer.json()["model"] == "tiny+math@2*0.7+poetry@1*-1+math@1*1"


@pytest.mark.usefixtures("versions")
def test_a_raw_and_a_streamed_answer_name_the_mix(api: Api) -> None:
    """Every form of an answer says what made it."""
    raw = api.complete(lora_mix=[MATH, POETRY]).json()["model"]
    streamed = api.chat(lora_mix=[MATH, POETRY], stream=True).text

    assert raw == "tiny+math@2*0.7+poetry@1*-1"
    assert f'"model":"{raw}"' in streamed


@pytest.mark.usefixtures("versions")
@pytest.mark.parametrize("model", ["tiny", "math", "math@2"])
def test_the_model_is_the_base_or_the_first(api: Api, model: str) -> None:
    """A client that must name a model can name either; the answer is the same."""
    answer = api.chat(model=model, lora_mix=[MATH, POETRY])

    assert answer.json()["model"] == "tiny+math@2*0.7+poetry@1*-1"


@pytest.mark.usefixtures("versions")
def test_without_a_mix_one_adapter_speaks(api: Api) -> None:
    """Null is no mix: `model` alone decides, at full weight."""
    answer = api.chat(model="math", lora_mix=None)

    assert answer.json()["model"] == "math@2"
    assert [share.weight for share in api.generator.requests[-1].adapters] == [1.0]


@pytest.mark.usefixtures("versions", "far")
@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"lora_mix": []}, "lora_mix", ["2"]),
        ({"lora_mix": [MATH]}, "lora_mix", ["2"]),
        ({"lora_mix": [MATH] * 9}, "lora_mix", ["8"]),
        ({"lora_mix": MATH}, "lora_mix", ["list"]),
        ({"lora_mix": [MATH, {"model": "poetry", "weight": 4.1}]}, "lora_mix.1.weight", ["4"]),
        ({"lora_mix": [MATH, {"model": "poetry", "weight": -4.1}]}, "lora_mix.1.weight", ["-4"]),
        ({"lora_mix": [MATH, {"model": "poetry", "weight": "1"}]}, "lora_mix.1.weight", ["number"]),
        ({"lora_mix": [MATH, {"model": "poetry", "scale": 1}]}, "lora_mix.1.scale", ["not a parameter"]),
        ({"lora_mix": [MATH, {"weight": 1}]}, "lora_mix.1.model", ["required"]),
        ({"lora_mix": [MATH, POETRY, MATH]}, "lora_mix.2.model", ["math@2", "lora_mix.0"]),
        ({"lora_mix": [MATH, {"model": "math@2"}]}, "lora_mix.1.model", ["math@2", "lora_mix.0"]),
        ({"lora_mix": [MATH, {"model": "tiny"}]}, "lora_mix.1.model", ["base model", "tiny"]),
        ({"lora_mix": [MATH, {"model": "far"}]}, "lora_mix.1.model", ["far@1", "'other'", "'tiny'"]),
        ({"model": "other", "lora_mix": [MATH, POETRY]}, "lora_mix.0.model", ["math@2", "poetry@1", "'other'"]),
        ({"model": "poetry", "lora_mix": [MATH, POETRY]}, "model", ["tiny", "math@2", "poetry@1"]),
        ({"model": "math@1", "lora_mix": [MATH, POETRY]}, "model", ["tiny", "math@2", "math@1"]),
    ],
)
def test_what_cannot_be_mixed_is_400_and_named(api: Api, fields: dict[str, Any], param: str, words: list[str]) -> None:
    """What was given and what is allowed are said, all problems together, and nothing is asked."""
    answer = api.chat(**fields)
    error = answer.json()["error"]

    assert (answer.status_code, error["param"]) == (400, param)
    assert [word for word in words if word not in error["message"]] == []
    assert api.generator.requests == []


def _unknown(_: Api, version: str) -> str:
    return "nobody"


def _unknown_version(_: Api, version: str) -> str:
    return "poetry@9"


def _deleted(api: Api, version: str) -> str:
    api.http.delete("/v1/adapters/poetry").raise_for_status()
    return "poetry"


@pytest.mark.parametrize("name", [_unknown, _unknown_version, _deleted])
def test_an_unknown_part_is_404(api: Api, versions: dict[str, str], name: Callable[[Api, str], str]) -> None:
    """As for a model that is not there, with the place in the mix."""
    answer = api.chat(lora_mix=[MATH, {"model": name(api, versions["poetry@1"])}])
    error = answer.json()["error"]

    assert (answer.status_code, error["code"], error["param"]) == (404, "model_not_found", "lora_mix.1.model")


@pytest.mark.usefixtures("no_cache", "versions")
def test_another_tenant_s_adapter_is_404(api: Api) -> None:
    """A mix reaches no further than its tenant; to its own tenant the same request is allowed."""
    headers = {name: {"Authorization": f"Bearer {api.key(name)}"} for name in ("default", "stranger")}
    body = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "lora_mix": [MATH, POETRY]}
    answers = {who: api.http.post("/v1/chat/completions", json=body, headers=headers[who]) for who in headers}

    assert {who: answer.status_code for who, answer in answers.items()} == {"default": 200, "stranger": 404}
    assert answers["stranger"].json()["error"]["param"] == "lora_mix.0.model"


def test_a_corrupt_part_is_a_conflict(api: Api, versions: dict[str, str]) -> None:
    """A mix with weights that are not what was trained does not answer without them."""
    with write(api.engine) as tx:
        adapters.mark_corrupt(tx, versions["poetry@1"])
    error = api.chat(lora_mix=[MATH, POETRY]).json()["error"]

    assert (error["code"], error["param"]) == ("adapter_corrupt", "lora_mix.1.model")
