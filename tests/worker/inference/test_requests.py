"""What requests ask for, through the engine: everything at once, side by side."""

import json

import pytest
import torch

from shared.specs import Chunk, GenerationRequest, ResponseFormat
from tests.worker.inference.conftest import AdapterShelf, StartEngine, answer, ask, read
from worker.base_model import BaseModel
from worker.inference.engine import InferenceEngine


def choice(chunks: list[Chunk], index: int) -> str:
    return "".join(chunk.text for chunk in chunks if chunk.index == index)


def one_of_each_kind(adapter: str) -> list[GenerationRequest]:
    """Requests that have nothing in common."""
    json_object = ResponseFormat(type="json_object")
    return [
        ask("greedy"),
        ask("sampled", temperature=1.0, seed=1, top_p=0.9),
        ask("several", adapter, temperature=1.0, seed=2, n=3, top_k=20),
        ask("penalised", presence_penalty=1.5, frequency_penalty=0.5, repetition_penalty=1.2),
        ask("told", adapter, logprobs=4, temperature=0.8, seed=3, min_p=0.1),
        ask("formatted", temperature=1.0, seed=4, response_format=json_object, max_tokens=40),
        ask("echoed", echo=True, ignore_eos=True),
    ]


def what_came(chunks: list[Chunk]) -> object:
    """All but the borders of the chunks."""
    told = [token for chunk in chunks for token in chunk.logprobs or []]
    ends = sorted((chunk.index, chunk.finish_reason or "") for chunk in chunks if chunk.finish_reason)
    return [choice(chunks, index) for index in range(3)], [token.token for token in told], ends, chunks[-1].usage


def test_requests_of_all_kinds_get_together_what_they_get_alone(
    base: BaseModel, shelf: AdapterShelf, start: StartEngine
) -> None:
    """No wish of one request reaches another, however their rows stand beside each other."""
    adapter = shelf.make("a", r=4)
    engine = start()

    alone = [what_came(answer(engine, request).chunks) for request in one_of_each_kind(adapter)]
    together = [what_came(read(stream).chunks) for stream in map(engine.submit, one_of_each_kind(adapter))]

    assert together == alone
    assert len({str(came) for came in alone}) == len(alone)


def test_choices_take_rows_and_count_their_prompt_once(start: StartEngine) -> None:
    """Four choices on two rows; usage has the prompt once and the tokens of all choices, in the last chunk alone."""
    chunks = answer(start(max_rows=2), ask("hello", n=4, temperature=1.0, seed=0, max_tokens=5, ignore_eos=True)).chunks

    assert [chunk.usage is not None for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
    assert chunks[-1].usage is not None
    assert (chunks[-1].usage.prompt_tokens, chunks[-1].usage.completion_tokens) == (5, 20)
    assert len({choice(chunks, index) for index in range(4)}) == 4


def test_logprobs_are_those_of_a_plain_forward(base: BaseModel, start: StartEngine) -> None:
    """Of the engine's own steps over its cache, against one forward of the whole sequence beside it."""
    prompt = base.tokenizer("once upon a time", add_special_tokens=False)["input_ids"]

    chunks = answer(start(), ask("once upon a time", logprobs=0, ignore_eos=True)).chunks

    told = [token for chunk in chunks for token in chunk.logprobs or []]
    ids = [base.tokenizer.convert_tokens_to_ids(token.token) for token in told]
    with torch.no_grad():
        logits = base.model(torch.tensor([[*prompt, *ids]])).logits[0, len(prompt) - 1 : -1].double()
    expected = logits.log_softmax(dim=-1)[torch.arange(12), ids]
    assert [token.logprob for token in told] == pytest.approx(expected.tolist(), abs=1e-4)


def test_json_comes_out_of_an_adapter_too(shelf: AdapterShelf, start: StartEngine) -> None:
    """Whatever its weights like, the answer is what the schema says."""
    adapter = shelf.make("a", r=4, size=1.0)
    wanted = ResponseFormat(type="json_schema", json_schema={"type": "array", "items": {"enum": [1, 2]}, "maxItems": 3})

    answered = answer(start(), ask("x", adapter, temperature=1.0, seed=0, max_tokens=200, response_format=wanted))

    value = json.loads(answered.text)
    assert isinstance(value, list)
    assert len(value) <= 3
    assert set(value) <= {1, 2}


def test_a_schema_that_cannot_be_followed_is_the_answers_error(start: StartEngine) -> None:
    """Told by the stream with the reason, as every other mistake in a request; the engine serves on."""
    engine: InferenceEngine = start()
    bad = ResponseFormat(type="json_schema", json_schema={"not": {"type": "string"}})

    refused = answer(engine, ask("x", response_format=bad))

    assert refused.error is not None
    assert (refused.error.param, refused.error.code) == ("response_format", "invalid_value")
    assert "not" in refused.error.message
    assert answer(engine, ask("x")).error is None
