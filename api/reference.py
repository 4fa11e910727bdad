"""The API reference as headings, paragraphs, tables and code, from the declarations that answer requests."""

import inspect
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from api import errors
from api.endpoint import Endpoint
from api.idempotency import KEY_HEADERS, REPLAYED, RETRY_HEADER
from api.openapi import path_parameters
from api.schema_words import fields
from shared import keys, limits


@dataclass(frozen=True)
class Heading:
    level: int
    text: str


@dataclass(frozen=True)
class Paragraph:
    text: str


@dataclass(frozen=True)
class Code:
    text: str


@dataclass(frozen=True)
class Table:
    head: tuple[str, ...]
    rows: list[tuple[str, ...]]


Block = Heading | Paragraph | Code | Table

_EXAMPLE = """\
from openai import OpenAI

client = OpenAI(base_url="http://127.0.0.1:8321/v1", api_key="any text until a key exists")
data = client.files.create(file=open("data.jsonl", "rb"), purpose="fine-tune")
job = client.fine_tuning.jobs.create(
    model="smollm2-135m", training_file=data.id, suffix="math", extra_body={"lora": {"r": 16}}
)
answer = client.chat.completions.create(model="math", messages=[{"role": "user", "content": "2 + 2?"}])"""

_RULES = (
    "Where OpenAI has a contract this API keeps it, so OpenAI's SDKs work by changing `base_url`. What is ours is extra"
    " keys and extra routes. Unknown keys, unknown query parameters, duplicate keys, NaN and Infinity are errors that"
    " name what they are about. Times are whole seconds since 1970.",
    "Every response carries `x-request-id`; one that you send is kept if it is at most 64 letters, digits, `.`, `_` or"
    " `-`.",
    "Lists answer `data`, `has_more`, `first_id` and `last_id`; the next page is the same request with `after` set to"
    " `last_id`.",
)
_KEYS = (
    "Until the first API key is made, only this machine is served, as tenant `default`, and the headers Host and Origin"
    " must name it. From then on every route but `/healthz` and `/readyz` needs `Authorization: Bearer lorad_...`, and"
    " a change to the keys counts within 5 seconds. An object of another tenant does not exist for you: 404."
)
_RATES = (
    "Wrong keys are answered 401, and 429 `rate_limit_exceeded` once more than `LORAD_FAILED_LOGINS_PER_MINUTE` (10;"
    " 0 is any number) came from an address within a minute, an IPv6 address being its /64; right keys from there go"
    " on working. With `LORAD_REQUESTS_PER_MINUTE` (0, which is any number) a key, or without keys an address, has so"
    " many requests at once and so many in each minute; more are 429 with `Retry-After` and `retry-after-ms`. Every"
    " answer then says how things stand: `x-ratelimit-limit-requests`, `x-ratelimit-remaining-requests`,"
    " `x-ratelimit-reset-requests`."
)
_ERRORS = (
    'Every failure answers `{"error": {"message", "type", "param", "code"}}`. A bad parameter is 400 and `param` is its'
    " dotted path. 404 is for what the URL, or the `model` of a generation, names; a file or base model that a job's"
    " body names in vain is a bad parameter. Where clients must not try again, the answer says"
    " `x-should-retry: false`. An answer that fails in the middle of a stream ends with a `data:` line that holds such"
    " an error."
)
_REPEATS = (
    f"A POST that creates may carry `{KEY_HEADERS[0]}` (or `{KEY_HEADERS[1]}`): 1 to {limits.MAX_IDEMPOTENCY_KEY}"
    f" visible ASCII characters of your choice, your tenant's own for {limits.IDEMPOTENCY_KEY_S // 3600} hours. The"
    " same request with the same key is answered as the first was, byte for byte, with the header"
    f" `{REPLAYED[0]}: {REPLAYED[1]}`, and creates nothing; the order of JSON keys and the boundary of a form make no"
    " difference. Another request with that key is 422 `idempotency_mismatch`. While the first is still being written"
    " the answer may be 409 `idempotency_in_flight`, which is to be tried again. Errors are not kept, since they"
    " changed nothing, nor is the answer to a dry run: the key stays free.",
    f"OpenAI's SDKs send no key, but count their retries in `{RETRY_HEADER}`. A retry is answered as the newest earlier"
    f" try of the same request with the same API key within {limits.SDK_RETRY_S // 60} minutes was; count 0 is always a"
    " request of its own. Two equal requests whose retries cross can be taken for one: send a key where that matters.",
)


def blocks(endpoints: Iterable[Endpoint]) -> Iterator[Block]:
    """The whole reference, in reading order."""
    endpoints = list(endpoints)
    yield Heading(1, "HTTP API")
    yield from map(Paragraph, _RULES)
    yield Code(_EXAMPLE)
    yield Heading(2, "Keys")
    yield Paragraph(_KEYS)
    yield Paragraph(
        f"Scopes: {', '.join(f'`{scope}`' for scope in keys.SCOPES)}; a key has all but `admin` by default."
    )
    yield Paragraph(_RATES)
    yield Heading(2, "Errors")
    yield Paragraph(_ERRORS)
    yield Table(("status", "type", "code", "meaning", "headers"), list(_error_rows()))
    yield Heading(2, "Repeated requests")
    yield from map(Paragraph, _REPEATS)
    for resource in dict.fromkeys(one.resource for one in endpoints):
        yield from _resource([one for one in endpoints if one.resource == resource])
    yield Heading(2, "Bodies")
    for model in _bodies(endpoints):
        yield from _body(model)
    yield Heading(2, "Limits")
    yield Table(("limit", "value"), [(f"`{name}`", f"{value:,}") for name, value in _limits()])


def _error_rows() -> Iterator[tuple[str, ...]]:
    for kind, answer in errors.TABLE.items():
        headers = ", ".join(f"`{name}: {value}`" for name, value in answer.headers)
        yield str(answer.status), f"`{answer.type}`", f"`{kind.code}`", _text(kind), headers


def _resource(endpoints: list[Endpoint]) -> Iterator[Block]:
    yield Heading(2, endpoints[0].resource.capitalize())
    yield Paragraph(_text(inspect.getmodule(endpoints[0].handler)))
    for one in endpoints:
        yield Heading(3, f"`{one.method} {one.path}`")
        yield Paragraph(f"{one.summary} Scope: `{one.scope}`.")
        if inputs := list(_inputs(one)):
            yield Table(("parameter", "in", "type", "default"), inputs)
        if talk := " ".join(_talk(one)):
            yield Paragraph(talk)


def _inputs(one: Endpoint) -> Iterator[tuple[str, ...]]:
    for name in path_parameters(one):
        yield f"`{name}`", "path", "string", "required"
    for name, kind, default in fields(one.query):
        yield f"`{name}`", "query", kind, default
    for name, text in one.form.items():
        yield f"`{name}`", "form", text, "required"


def _talk(one: Endpoint) -> Iterator[str]:
    if text := _text(one.query) if one.query.model_fields else "":
        yield text
    if one.body is not None:
        yield f"Body: {one.body.__name__}."
    if one.creates_once:
        yield f"May carry `{KEY_HEADERS[0]}`."
    if one.answers:
        yield f"Answers {' or '.join(map(_shown, one.answers))}."
    for kind, text in one.media.items():
        yield f"Answers `{kind}`: {text}."


def _bodies(endpoints: list[Endpoint]) -> list[type[BaseModel]]:
    """All models of bodies and answers, each before those that it is made of."""
    found: dict[type[BaseModel], None] = {}
    todo = [model for one in endpoints for model in (one.body, *one.answers) if model is not None]
    while todo:
        model = todo.pop(0)
        if model not in found:
            found[model] = None
            todo += [inner for field in model.model_fields.values() for inner in _models_in(field.annotation)]
    return [model for model in found if not model.__name__.startswith("Listed[")]


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in getattr(annotation, "__args__", ()):
        yield from _models_in(inner)


def _body(model: type[BaseModel]) -> Iterator[Block]:
    yield Heading(3, model.__name__)
    if text := _text(model):
        yield Paragraph(text)
    yield Table(("key", "type", "default"), [(f"`{name}`", kind, default) for name, kind, default in fields(model)])


def _shown(model: type[BaseModel]) -> str:
    name = model.__name__
    return f"a list of {name[len('Listed[') : -1]}" if name.startswith("Listed[") else name


def _limits() -> Iterator[tuple[str, int | float]]:
    for name, value in vars(limits).items():
        if name.isupper() and isinstance(value, int | float):
            yield name.lower(), value


def _text(documented: object) -> str:
    """A docstring of its own as one paragraph."""
    return " ".join((vars(documented).get("__doc__") or "").split())
