"""Seeded random bodies against both dialects of generation: an answer in its shape for each, or the name of a field."""

import random
from typing import Any

import pytest

from shared import limits
from tests.api.conftest import CONTEXT, Api
from tests.api.test_fuzzed_jobs import ODD, Draw, Value, one_of, real, some_of, whole

NUM_BODIES = 120

SAMPLING: dict[str, Value] = {
    "n": whole(1, limits.MAX_CHOICES),
    "max_tokens": whole(1, CONTEXT),
    "temperature": real(2.0),
    "top_p": real(1.0),
    "top_k": one_of(0, 1, 50, 10**6, -1),
    "min_p": real(1.0),
    "repetition_penalty": real(2.0),
    "frequency_penalty": one_of(-2, 0, 0.5, 2, 2.5),
    "presence_penalty": one_of(-2, 0, 0.5, 2, -2.5),
    "seed": one_of(0, -1, 1 << 62, 1 << 63),
    "stop": one_of("a", ["a", "b"], [], [""], ["a"] * 5),
    "ignore_eos": one_of(True, False),
    "response_format": one_of(
        {"type": "text"},
        {"type": "json_object"},
        {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "object"}}},
        {"type": "json_schema", "json_schema": {"name": "a", "schema": True}},
        {"type": "json_schema"},
        {"type": "grammar"},
    ),
    "lora_mix": one_of(
        [{"model": "math"}, {"model": "poetry", "weight": 0.5}],
        [{"model": "math"}, {"model": "math@1"}],
        [{"model": "math"}, {"model": "absent"}],
        [{"model": "math"}],
    ),
    "stream": one_of(True, False),
    "nonsense": lambda draw: 1,
}
CHAT: dict[str, Value] = {
    "messages": one_of(
        [{"role": "user", "content": "hi"}], [{"role": "user", "content": [{"type": "text", "text": ""}]}]
    ),
    "logprobs": one_of(True, False),
    "top_logprobs": whole(0, limits.MAX_TOP_LOGPROBS),
    "max_completion_tokens": whole(1, CONTEXT),
}
RAW: dict[str, Value] = {
    "prompt": one_of("hi", ["hi"], [1, 2], [[1, 2]], ["a", "b"], [99], [100]),
    "logprobs": whole(0, limits.MAX_TOP_LOGPROBS),
    "echo": one_of(True, False),
    "best_of": whole(1, limits.MAX_CHOICES),
}


def body(draw: Draw, dialect: dict[str, Value]) -> dict[str, Any]:
    """Few fields or many; in a third of the bodies one value is of no sense at all."""
    share = draw.choice([0.0, 0.05, 0.1, 0.3])
    needed = next(iter(dialect))
    asked = {"model": "tiny", needed: dialect[needed](draw)}
    asked |= some_of(SAMPLING, draw, share=share) | some_of(dialect, draw, share=share)
    if draw.random() < 1 / 3:
        asked[draw.choice(sorted(asked))] = draw.choice(ODD)
    return asked


@pytest.mark.timeout(120)
@pytest.mark.parametrize("dialect", [CHAT, RAW], ids=["chat", "raw"])
def test_every_body_gets_its_answer_or_the_name_of_a_field(api: Api, dialect: dict[str, Value]) -> None:
    """200 with as many choices as were asked for, or 400 or 404 whose `param` is in the request; nothing else.

    What is refused reaches no generator. Both happen often enough that neither claim is empty.
    """
    for name in ("math", "poetry"):
        api.publish(name)
    ask = api.chat if dialect is CHAT else api.complete
    refused: list[str] = []
    for seed in range(NUM_BODIES):
        asked = body(random.Random(seed), dialect)
        answer = ask(**asked)
        told = f"seed {seed}: {asked} -> {answer.status_code} {answer.text}"
        if answer.status_code == 200:
            if asked.get("stream"):
                assert answer.text.endswith("data: [DONE]\n\n"), told
            else:
                assert len(answer.json()["choices"]) == asked.get("n", 1), told
            continue
        assert answer.status_code in (400, 404), told
        param = str(answer.json()["error"]["param"])
        assert param.partition(".")[0] in asked, told
        refused.append(param)

    assert len(api.generator.requests) == NUM_BODIES - len(refused)
    assert len(refused) in range(NUM_BODIES // 4, 3 * NUM_BODIES // 4)
    assert len(set(refused)) > 10
