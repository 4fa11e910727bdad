"""@endpoint: one declaration gives a handler its route, its scope, its checked input, its JSON and its OpenAPI entry.

    @endpoint("GET /v1/files/<file_id>", scope="files:read")
    def retrieve(call: Call, file_id: str) -> FileObject:
        \"\"\"One file's metadata.\"\"\"

A parameter `body` is the JSON body as the pydantic model of its annotation, `query` the query parameters, `request`
Flask's request for what is neither, `attempt` what makes a POST that creates do it once; the others come from the
path. The docstring is the documentation.
"""

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar, get_args, get_type_hints

from flask import Flask, Response, current_app, g, request
from pydantic import BaseModel

from api import strict_json
from api.auth import NOBODY, Gate, Scope, require
from api.call import Call, Intent, Services
from api.idempotency import Attempt
from api.refusals import Refusals
from api.schemas.wire import In, Query
from api.validate import read_query, validated
from shared import limits
from shared.errors import InvalidRequest, LoradError, NotFound, PayloadTooLarge, UnsupportedMediaType

EXTENSION = "lorad"
M = TypeVar("M", bound=BaseModel)


@dataclass(frozen=True)
class Endpoint:
    """A route and everything known about it. Flask calls it as the view function."""

    method: str
    path: str
    scope: Scope
    handler: Callable[..., BaseModel | Response]
    body: type[BaseModel] | None
    query: type[BaseModel]
    answers: tuple[type[BaseModel], ...]
    """The JSON answers; none if only `media` are answered."""
    media: Mapping[str, str] = field(default_factory=dict)
    """Other content types that may be answered, each with what it holds."""
    form: Mapping[str, str] = field(default_factory=dict)
    """The parts of a multipart/form-data body that the handler reads itself."""
    body_bytes: int = limits.JSON_BODY_BYTES
    statuses: tuple[int, ...] = (200,)

    @property
    def resource(self) -> str:
        return self.handler.__module__.removeprefix("api.")

    @property
    def name(self) -> str:
        return f"{self.resource}_{self.handler.__name__.rstrip('_')}"

    @property
    def summary(self) -> str:
        return " ".join((self.handler.__doc__ or "").split())

    @property
    def creates_once(self) -> bool:
        """True if the handler takes an `attempt`."""
        return "attempt" in self._wanted

    @property
    def changes(self) -> bool:
        """True if it may change what is stored; a generation does not."""
        return self.method not in ("GET", "HEAD") and self.scope != "generate"

    def __call__(self, **path: str) -> Response:
        gate, services, refusals = current_app.extensions[EXTENSION]
        intent = Intent(self.name, next(iter(path.values()), None), g.request_id, request.remote_addr)
        caller = NOBODY
        try:
            caller = gate.admit(request, self.scope)
            require(caller, self.scope)
            return self._answer(Call(caller, services, intent), path)
        except LoradError as error:
            refusals.note(error, caller, intent, is_change=self.changes)
            raise

    def _answer(self, call: Call, path: Mapping[str, str]) -> Response:
        if any("\0" in value for value in path.values()):  # PostgreSQL cannot even be asked for it
            raise NotFound
        inputs: dict[str, object] = dict(path)
        query = read_query(self.query, request.args)
        if "query" in self._wanted:
            inputs["query"] = query
        if self.creates_once:
            inputs["attempt"] = Attempt.of(request, f"{self.method} {self.path}")
        if "request" in self._wanted:
            inputs["request"] = request
        elif request.method not in ("GET", "HEAD", "DELETE"):
            body = read_body(self.body or _Nothing, optional=self.body is None, max_bytes=self.body_bytes)
            inputs |= {"body": body} if self.body else {}
        result = self.handler(call, **inputs)
        return result if isinstance(result, Response) else json_response(result)

    @property
    def _wanted(self) -> Mapping[str, inspect.Parameter]:
        return inspect.signature(self.handler).parameters


class _Nothing(In):
    """For actions: no body, or an empty object."""


def endpoint(
    route: str,
    *,
    scope: Scope,
    media: Mapping[str, str] | None = None,
    form: Mapping[str, str] | None = None,
    body_bytes: int = limits.JSON_BODY_BYTES,
    statuses: tuple[int, ...] = (200,),
) -> Callable[[Callable[..., BaseModel | Response]], Endpoint]:
    """Make a handler an Endpoint; `route` is a method, a blank, and a path in Werkzeug's syntax."""
    method, path = route.split(" ")

    def declare(handler: Callable[..., BaseModel | Response]) -> Endpoint:
        hints = get_type_hints(handler)
        return Endpoint(
            method, path, scope, handler,
            body=hints.get("body"), query=hints.get("query", Query), answers=_models_of(hints["return"]),
            media=media or {}, form=form or {}, body_bytes=body_bytes, statuses=statuses,
        )  # fmt: skip

    return declare


def install(app: Flask, endpoints: Iterable[Endpoint], gate: Gate, services: Services, refusals: Refusals) -> None:
    """Give the application its routes and what they answer from."""
    app.extensions[EXTENSION] = (gate, services, refusals)
    for one in endpoints:
        app.add_url_rule(one.path, one.name, one, methods=[one.method], provide_automatic_options=False)


def read_body(model: type[M], *, optional: bool, max_bytes: int) -> M:
    """The request's JSON body as a `model`; an empty one counts as {} if `optional`."""
    request.max_content_length = max_bytes + 1  # a chunked body is cut there in silence, so look one byte further
    raw = request.get_data(cache=False)
    if len(raw) > max_bytes:
        raise PayloadTooLarge(f"The body may have {max_bytes} bytes.")
    if not raw and optional:
        return validated(model, {})
    if not raw:
        raise InvalidRequest("A JSON body is needed.", code="invalid_json")
    if request.mimetype != "application/json":
        raise UnsupportedMediaType(f"Content-Type must be application/json, not {request.mimetype or 'missing'!r}.")
    return validated(model, strict_json.parse(raw))


def json_response(body: BaseModel) -> Response:
    return Response(body.model_dump_json(), mimetype="application/json")


def _models_of(hint: object) -> tuple[type[BaseModel], ...]:
    """The models of an annotation, which may be a union with Response."""
    return tuple(one for one in get_args(hint) or (hint,) if isinstance(one, type) and issubclass(one, BaseModel))
