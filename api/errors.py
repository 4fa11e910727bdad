"""The one table from errors to answers, and OpenAI's error body for every kind of failure."""

import contextlib
import logging
import math
import time
from dataclasses import dataclass

from flask import Flask, Request, Response, g, request
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as NoConnection
from werkzeug.exceptions import ClientDisconnected, HTTPException, RequestEntityTooLarge

from api.hangup import ClientGone
from api.patience import ClientTooSlow, is_patient
from api.schemas.wire import ErrorBody, ErrorDetail
from shared import db, errors
from shared.store.durable import storage_failure

log = logging.getLogger("lorad.api")


@dataclass(frozen=True)
class Answer:
    """How one class of errors is answered. `headers` steer the clients' retries."""

    status: int
    type: str
    headers: tuple[tuple[str, str], ...] = ()


_NO_RETRY = (("x-should-retry", "false"),)
_SOON = (("Retry-After", "1"),)
_CLOSE = (("Connection", "close"),)

# The most derived class found here decides. A bad parameter is always 400 with `param`.
TABLE: dict[type[errors.LoradError], Answer] = {
    errors.InvalidRequest: Answer(400, "invalid_request_error"),
    errors.Unauthenticated: Answer(401, "authentication_error", (("WWW-Authenticate", 'Bearer realm="lorad"'),)),
    errors.Forbidden: Answer(403, "permission_error"),
    errors.NotFound: Answer(404, "invalid_request_error"),
    ClientTooSlow: Answer(408, "invalid_request_error", _CLOSE),
    errors.StateConflict: Answer(409, "conflict_error", _NO_RETRY),
    errors.RequestInFlight: Answer(409, "conflict_error", (("x-should-retry", "true"), *_SOON)),
    errors.PayloadTooLarge: Answer(413, "invalid_request_error", _CLOSE),
    errors.UnsupportedMediaType: Answer(415, "invalid_request_error"),
    errors.IdempotencyMismatch: Answer(422, "invalid_request_error", _NO_RETRY),
    errors.QueueFull: Answer(429, "rate_limit_error", _SOON),
    errors.RateLimited: Answer(429, "rate_limit_error", _SOON),
    ClientGone: Answer(499, "client_error"),
    errors.Unavailable: Answer(503, "server_error", _SOON),
    errors.DeadlineExceeded: Answer(504, "server_error", _NO_RETRY),
    errors.StorageFull: Answer(507, "server_error", _NO_RETRY),
    errors.LoradError: Answer(500, "server_error"),
}

_HTTP_CODES = {
    400: "bad_request",
    404: "not_found",
    405: "method_not_allowed",
    412: "precondition_failed",
    413: errors.PayloadTooLarge.code,
    415: errors.UnsupportedMediaType.code,
    416: "range_not_satisfiable",
}


def error_body(message: str, type: str, param: str | None, code: str | None) -> ErrorBody:
    return ErrorBody(error=ErrorDetail(message=message, type=type, param=param, code=code))


def answer_for(error: errors.LoradError) -> Answer:
    return next(TABLE[kind] for kind in type(error).__mro__ if kind in TABLE)


def _headers_for(error: errors.LoradError) -> tuple[tuple[str, str], ...]:
    """What the table says; a full queue and a limit know themselves when to come back."""
    if isinstance(error, errors.RateLimited):
        return (
            ("Retry-After", str(math.ceil(error.retry_after_s))),
            ("retry-after-ms", str(math.ceil(error.retry_after_s * 1000))),
        )
    if isinstance(error, errors.QueueFull):
        return (("Retry-After", str(error.retry_after_s)),)
    return answer_for(error).headers


def body_for(error: errors.LoradError) -> ErrorBody:
    """The body alone, for an error that comes when the status line is already sent."""
    return error_body(error.message, answer_for(error).type, error.param, error.error_code)


def from_code(code: str, message: str, param: str | None) -> errors.LoradError:
    """The domain error with this stable code, as another process reported it; an unknown code is our own failure."""
    for kind in TABLE:
        for candidate in (kind, *kind.__subclasses__()):
            if candidate.code == code:
                return candidate(message, param=param)
    kind = errors.InvalidRequest if param is not None or code in _REQUEST_CODES else errors.LoradError
    return kind(message, param=param, code=code)


# Codes that narrow InvalidRequest in the generator.
_REQUEST_CODES = frozenset({"context_length_exceeded"})


def register(app: Flask) -> None:
    app.register_error_handler(errors.LoradError, _on_domain_error)
    app.register_error_handler(HTTPException, _on_http_error)
    for kind in (*db.AWAY, NoConnection):
        app.register_error_handler(kind, _on_database_away)
    app.register_error_handler(OSError, _on_system_error)
    app.register_error_handler(Exception, _on_surprise)


def _respond(status: int, body: ErrorBody, headers: tuple[tuple[str, str], ...] = ()) -> Response:
    response = Response(body.model_dump_json(), status, mimetype="application/json")
    response.headers.extend(headers)
    if is_patient(request.environ):
        if _is_unread(request):
            response.headers["Connection"] = "close"  # and the server reads off what still comes
    else:
        drain(request)
    return response


def _on_domain_error(error: errors.LoradError) -> Response:
    answer = answer_for(error)
    if answer.status >= 500:
        log.error("%s %s %s: %s", g.request_id, request.method, request.path, error.message)
    return _respond(answer.status, body_for(error), _headers_for(error))


def _on_http_error(error: HTTPException) -> Response:
    status = error.code or 500
    if isinstance(error, RequestEntityTooLarge):
        return _on_domain_error(errors.PayloadTooLarge())
    if isinstance(error, ClientDisconnected):
        return _on_domain_error(_body_error(error))
    kind = "server_error" if status >= 500 else "invalid_request_error"
    body = error_body(error.description or error.name, kind, None, _HTTP_CODES.get(status, "http_error"))
    kept = tuple((k, v) for k, v in error.get_headers(request.environ) if k not in ("Content-Type", "Content-Length"))
    return _respond(status, body, kept)


def _on_database_away(error: DBAPIError | NoConnection) -> Response:
    log.error("%s %s %s: database: %s", g.request_id, request.method, request.path, getattr(error, "orig", error))
    return _on_domain_error(errors.Unavailable("The database cannot be reached right now; try again."))


def _on_system_error(error: OSError) -> Response:
    return _on_domain_error(errors.StorageFull()) if storage_failure(error) == "storage_full" else _on_surprise(error)


def _on_surprise(error: Exception) -> Response:
    log.error("%s %s %s failed", g.request_id, request.method, request.path, exc_info=error)
    return _respond(500, error_body("Something went wrong on our side.", "server_error", None, "internal_error"))


def _body_error(error: ClientDisconnected) -> errors.LoradError:
    """Why a body could not be read to its end: werkzeug says the same of all reasons."""
    if isinstance(error.__context__, ClientTooSlow):
        return ClientTooSlow()
    return errors.InvalidRequest("The request's body breaks off or is not well-formed.", code="incomplete_body")


def _is_unread(request: Request) -> bool:
    """True if there may be bytes of the body on the line that nobody has read."""
    if "stream" not in request.__dict__:  # werkzeug's cached property: reading has not begun
        return bool(request.content_length) or "Transfer-Encoding" in request.headers
    if request.content_length is None:
        return "Transfer-Encoding" in request.headers
    return request.stream.tell() < request.content_length


_DRAIN_BYTES = 64 << 20
_DRAIN_S = 2.0


def drain(request: Request) -> None:
    """Read and forget some of an unread body, under a server that does not do it as ours does: a connection closed
    over unread bytes is reset before the client has read our answer (RFC 9112, section 9.6)."""
    left, source = _DRAIN_BYTES, request.environ["wsgi.input"]
    if not request.environ.get("wsgi.input_terminated"):
        if "stream" in request.__dict__:  # werkzeug's cached property: reading has begun, and it knows the end
            source = request.stream
        else:
            left = min(request.content_length or 0, _DRAIN_BYTES)
    until = time.monotonic() + _DRAIN_S
    with contextlib.suppress(HTTPException, OSError):
        while left > 0 and time.monotonic() < until and (piece := source.read(min(left, 1 << 16))):
            left -= len(piece)
