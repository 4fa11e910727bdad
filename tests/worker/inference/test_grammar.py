"""JSON answers: random tokens held to a grammar, judged by a JSON parser and by checks written down here."""

import json
import math
import re
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from shared import limits
from shared.errors import InvalidRequest, Unavailable
from shared.specs import GenerationRequest, ResponseFormat
from tests.worker.conftest import byte_tokenizer
from tests.worker.inference.test_answer import answer_to, ask, generate, text_of
from tests.worker.inference.test_tokens import byte_fallback_tokenizer
from worker.base_model import BaseModel
from worker.inference.cuts import Cuts
from worker.inference.grammar import GrammarCompiler
from worker.inference.prompt import PromptReader
from worker.inference.sampling import Sampler
from worker.inference.tokens import TokenTable

EOS = 2
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["new", "old"]}, "maxItems": 3},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}


def is_person(value: Any) -> bool:
    """What PERSON says, in Python."""
    return (
        isinstance(value, dict)
        and {"name", "age"} <= set(value) <= {"name", "age", "tags"}
        and isinstance(value["name"], str)
        and len(value["name"]) <= 6
        and isinstance(value["age"], int)
        and 0 <= value["age"] <= 150
        and len(value.get("tags", [])) <= 3
        and set(value.get("tags", [])) <= {"new", "old"}
    )


def compiler(eos: frozenset[int] = frozenset({EOS})) -> GrammarCompiler:
    tokenizer = byte_tokenizer()
    return GrammarCompiler(TokenTable.of(tokenizer), vocabulary_size=len(tokenizer), eos_token_ids=eos)


def schema(given: dict[str, Any]) -> ResponseFormat:
    return ResponseFormat(type="json_schema", json_schema=given)


def babble(base: BaseModel, seed: int, **given: Any) -> tuple[str, str | None]:
    """An answer of random tokens, closing brackets and quotes likelier so that it ends; and why it ended."""
    answer = answer_to(base, ask(prompt="x", max_tokens=250, temperature=1.0, seed=seed, ignore_eos=False, **given))
    draws = np.random.default_rng(seed)
    closing = [base.tokenizer.convert_tokens_to_ids(character) for character in '"}]']
    choice = answer.choices[0]
    while not choice.has_ended:
        logits = draws.normal(size=259).astype(np.float32)
        logits[closing] += 3
        choice.take(choice.sampler.choose(logits, int(logits.argmax())))
    chunks = list(answer.stream)
    return text_of(chunks), chunks[-1].finish_reason


@pytest.mark.parametrize("seed", range(20))
def test_any_json_is_an_object(tiny_base: BaseModel, seed: int) -> None:
    """Random tokens under `json_object` parse as one, and end there by themselves."""
    text, reason = babble(tiny_base, seed, response_format=ResponseFormat(type="json_object"))

    assert reason == "stop"
    assert isinstance(json.loads(text), dict)


@pytest.mark.parametrize("seed", range(20))
def test_a_schema_holds_whatever_the_model_likes(tiny_base: BaseModel, seed: int) -> None:
    """Random tokens under a schema make what the schema says."""
    text, reason = babble(tiny_base, seed, response_format=schema(PERSON))

    assert reason == "stop"
    assert is_person(json.loads(text))


def test_without_a_format_random_tokens_are_no_json(tiny_base: BaseModel) -> None:
    """The format does it, not the tokens."""
    text, _ = babble(tiny_base, 0)

    with pytest.raises(ValueError, match="Expecting value"):
        json.loads(text)


def test_the_tiny_model_answers_in_json(tiny_base: BaseModel) -> None:
    """Every choice of a sampled request, through the whole of a request's path."""
    request = ask(n=2, temperature=1.5, seed=0, max_tokens=200, ignore_eos=False, response_format=schema(PERSON))

    _, chunks = generate(tiny_base, request)

    assert all(is_person(json.loads(text_of(chunks, index))) for index in range(2))


def test_json_cut_off_by_max_tokens_ends_for_its_length(tiny_base: BaseModel) -> None:
    """Whoever reads it knows that it is not whole."""
    request = ask(max_tokens=5, ignore_eos=False, response_format=schema({"type": "string", "minLength": 20}))

    _, chunks = generate(tiny_base, request)

    assert chunks[-1].finish_reason == "length"


def test_eos_comes_only_where_the_document_is_whole() -> None:
    """Every token of EOS: not inside a number's sign, but after a digit, where more digits may come too."""
    both = frozenset({EOS, 1})
    state = compiler(both).compile(schema({"type": "integer", "minimum": -50, "maximum": -10})).start()
    table = TokenTable.of(byte_tokenizer())
    token_of = {table.text(i): i for i in range(3, 259)}

    def allowed() -> set[int]:
        logits = np.zeros(259, np.float32)
        state.mask(logits)
        return {int(i) for i in np.flatnonzero(logits == 0)}

    before = allowed()
    for text in (b"-", b"2", b"3"):
        state.add(token_of[text])

    assert not both & before
    assert both <= allowed()


def test_rows_of_the_model_that_are_no_tokens_never_come() -> None:
    """A model may have more rows than its tokenizer has tokens, and its logits more than the vocabulary."""
    grammar = GrammarCompiler(TokenTable.of(byte_tokenizer()), vocabulary_size=270, eos_token_ids=frozenset({EOS}))
    state = grammar.compile(schema({"type": "string"})).start()
    logits = np.zeros(300, np.float32)

    state.mask(logits)

    assert np.isneginf(logits[259:]).all()
    assert (logits == 0).sum() > 0


def test_sequences_of_one_grammar_are_apart() -> None:
    """One goes on, another still stands at the start."""
    grammar = compiler().compile(ResponseFormat(type="json_object"))
    first, second = grammar.start(), grammar.start()
    chosen = Sampler(Cuts(temperature=0.0), constraint=first).choose(np.zeros(259, np.float32), 0)

    first.add(chosen.token_id)
    at_start, further = np.zeros(259, np.float32), np.zeros(259, np.float32)
    second.mask(at_start)
    first.mask(further)

    assert not np.array_equal(at_start, further)


def test_sentencepiece_tokens_make_json_too() -> None:
    """A vocabulary of words with their spaces and of bytes in hexadecimal."""
    tokenizer = byte_fallback_tokenizer()
    table = TokenTable.of(tokenizer)
    grammar = GrammarCompiler(table, vocabulary_size=len(tokenizer), eos_token_ids=frozenset({1}))
    state = grammar.compile(
        schema({"type": "object", "properties": {"Once": {"const": "é"}}, "required": ["Once"]})
    ).start()
    sampler = Sampler(Cuts(), seed=0, constraint=state)
    token_ids: list[int] = []
    while not sampler.is_complete:
        token_ids.append(sampler.choose(np.zeros(len(tokenizer), np.float32), 0).token_id)
        sampler.add(token_ids[-1])

    assert json.loads(b"".join(map(table.text, token_ids))) == {"Once": "é"}


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"not": {"type": "string"}}, "not"),
        ({"type": "strin"}, "strin"),
        ({"type": "array", "uniqueItems": True}, "uniqueItems"),
        ({"type": "string", "format": "phone"}, "phone"),
        ({"type": "string", "pattern": "^(?=a)b"}, "look-around"),
        ({"$ref": "http://example.com/schema.json"}, "http://example.com/schema.json"),
        ({"type": "string", "minLength": 5, "maxLength": 2}, "minLength"),
        ({"oneOf": [{"type": "string"}, {"maxLength": 3}]}, "anyOf"),
        ({"$ref": "#"}, "cannot be followed"),
        ({"x-guidance": {"lenient": True}, "not": {}}, "x-guidance"),
    ],
)
def test_a_schema_that_cannot_be_followed_is_refused_with_the_reason(given: dict[str, Any], reason: str) -> None:
    """By name of what is at fault, before anything is generated."""
    with pytest.raises(InvalidRequest) as caught:
        compiler().compile(schema(given))

    assert caught.value.param == "response_format"
    assert reason in caught.value.message


@pytest.mark.parametrize(
    "make",
    [
        lambda: {"type": "integer", "multipleOf": 99_999_989},
        lambda: {"type": "string", "allOf": [{"pattern": f"a.{{{i}}}b"} for i in range(5, 30)]},
        lambda: {"enum": ["x" * 64 for _ in range(2_000)]},
        lambda: json.loads('{"items":' * 40 + "{}" + "}" * 40),
    ],
    ids=["multiple", "patterns", "long", "deep"],
)
def test_a_hostile_schema_is_refused_in_bounded_time(make: Callable[[], dict[str, Any]]) -> None:
    """Some of these take minutes and gigabytes when they are let; the limit is 2 s of processor time."""
    started_s = time.process_time()

    with pytest.raises(InvalidRequest):
        compiler().compile(schema(make()))

    assert time.process_time() - started_s < 5


def test_a_schema_up_to_the_limit_is_taken() -> None:
    """What is long without being too long compiles."""
    names = [f"value-{i:06}" for i in range(3_000)]
    assert len(json.dumps({"enum": names})) < limits.MAX_SCHEMA_CHARS

    compiler().compile(schema({"enum": names}))


def test_compiled_grammars_are_kept() -> None:
    """The same schema again costs no second compilation; one in another order of keys is another."""
    grammars = compiler()
    first = grammars.compile(schema(PERSON))

    assert grammars.compile(schema(PERSON)) is first
    turned = PERSON | {"properties": dict(reversed(PERSON["properties"].items()))}  # type: ignore[union-attr,attr-defined]
    assert grammars.compile(schema(turned)) is not first


def test_a_refusal_is_kept_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """A schema that costs all the time allowed costs it once; each request is told the reason anew."""
    grammars = compiler()
    bad = schema({"not": {}})
    with pytest.raises(InvalidRequest) as first:
        grammars.compile(bad)
    monkeypatch.setattr("worker.inference.grammar.problem_of", lambda source: pytest.fail("compiled again"))

    with pytest.raises(InvalidRequest) as second:
        grammars.compile(bad)

    assert first.value is not second.value
    assert first.value.message == second.value.message


def test_a_schema_that_is_not_tried_in_time_is_no_fault_of_the_request(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that is too busy says so, and the same schema is taken later."""
    grammars = compiler()
    with monkeypatch.context() as busy:
        busy.setattr("worker.inference.grammar_trial._TIMEOUT_S", 0.001)
        with pytest.raises(Unavailable, match="busy"):
            grammars.compile(schema(PERSON))

    grammars.compile(schema(PERSON))


def test_only_the_last_grammars_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Schemas that nobody asks for any more give their memory back."""
    monkeypatch.setattr("worker.inference.grammar._KEPT", 2)
    grammars = compiler()
    first = grammars.compile(schema({"const": 1}))
    second = grammars.compile(schema({"const": 2}))
    assert grammars.compile(schema({"const": 1})) is first

    grammars.compile(schema({"const": 3}))

    assert grammars.compile(schema({"const": 1})) is first
    assert grammars.compile(schema({"const": 2})) is not second


def test_a_schema_too_complex_to_follow_fails_that_request_alone() -> None:
    """It compiles, but a step through it would take too long: the row gets an error with the reason, not a token."""
    wide = {"type": "object", "properties": {f"p{i}": {} for i in range(3_500)}}
    sampler = Sampler(Cuts(temperature=0.0), constraint=compiler().compile(schema(wide)).start())

    def follow() -> None:
        for _ in range(20):
            sampler.add(sampler.choose(np.zeros(259, np.float32), 0).token_id)

    with pytest.raises(InvalidRequest, match="too complex") as caught:
        follow()
    assert caught.value.param == "response_format"


def test_ignore_eos_and_a_format_exclude_each_other(tiny_base: BaseModel) -> None:
    """JSON that is complete cannot go on."""
    wanted: dict[str, Any] = {"response_format": ResponseFormat(type="json_object")}
    reader = PromptReader(tiny_base)

    with pytest.raises(InvalidRequest, match="exclude each other") as caught:
        reader.read(ask(ignore_eos=True, **wanted))
    assert caught.value.param == "ignore_eos"
    assert reader.read(ask(ignore_eos=False, **wanted)).grammar is not None


def test_penalties_and_logprobs_go_along_with_a_format(tiny_base: BaseModel) -> None:
    """Log-probabilities are still the model's own: a token that the grammar forced may be unlikely."""
    request: GenerationRequest = ask(
        ignore_eos=False, max_tokens=60, logprobs=1, presence_penalty=1.0, response_format=schema({"const": "yes"})
    )

    answer, chunks = generate(tiny_base, request)

    told = [token for chunk in chunks for token in chunk.logprobs or []]
    assert text_of(chunks) == '"yes"'
    assert len(told) == len(answer.choices[0].token_ids)
    assert all(token.logprob <= token.top[0].logprob for token in told)
    assert any(token.logprob < token.top[0].logprob - 0.1 for token in told)
    assert math.isfinite(sum(token.logprob for token in told))


def test_many_answers_to_one_schema_do_not_wear_it_out() -> None:
    """The automaton that they share grows to its limit, which takes 10 answers here, and is begun anew unnoticed."""
    grammar = compiler().compile(schema({"type": "string", "pattern": "^([ab]*a[ab]{16}c)*$"}))
    table = TokenTable.of(byte_tokenizer())
    [quote] = [i for i in range(3, 259) if table.text(i) == b'"']
    for seed in range(20):
        draws = np.random.default_rng(seed)
        sampler = Sampler(Cuts(temperature=0.0), constraint=grammar.start())
        text = b""
        for _ in range(2_000):
            logits = draws.normal(size=259).astype(np.float32)
            logits[quote] = 0 if not text else -np.inf
            token_id = sampler.choose(logits, int(logits.argmax())).token_id
            sampler.add(token_id)
            text += table.text(token_id)
        assert re.fullmatch(rb'"([ab]*a[ab]{16}c)*[ab]*', text) is not None


def test_a_token_that_is_not_allowed_is_an_error() -> None:
    """Nothing but what the mask allowed may be added."""
    state = compiler().compile(ResponseFormat(type="json_object")).start()

    with pytest.raises(InvalidRequest, match="doesn't satisfy the grammar"):
        state.add(200)
