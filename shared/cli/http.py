"""The HTTP half of the client commands: one service, answers as JSON, every failure one clear line."""

import json
import time
import uuid
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import httpx2

from shared.errors import LoradError

Json = dict[str, Any]
Query = Mapping[str, str | int]

_FIRST_PAUSE_S = 0.2
_LONGEST_PAUSE_S = 5.0
_TRANSIENT_STATUSES = frozenset({409, 429, 502, 503, 504})
_TIMEOUT = httpx2.Timeout(60.0, connect=5.0)
_GENERATION_TIMEOUT = httpx2.Timeout(180.0, connect=5.0)


class ServiceError(LoradError):
    """The service answered with an error, or not at all."""

    def __init__(
        self, message: str, *, status: int | None = None, param: str | None = None, code: str = "error"
    ) -> None:
        """`status` is None when no answer came."""
        super().__init__(message, param=param, code=code)
        self.status = status

    def to_json(self) -> Json:
        body = {"message": self.message, "status": self.status, "param": self.param, "code": self.error_code}
        return {"error": body}


class Service:
    """A connection to one lorad API.

    What may be sent twice is: a GET, and a POST that carries an Idempotency-Key. Those are tried again after a refused
    or broken connection and after 429, 502, 503 and 504, with growing pauses, for `patience_s` seconds in all. Any
    other request is sent once, because its first sending may have taken effect. Close it, or use it in `with`.
    """

    def __init__(self, base_url: str, api_key: str | None = None, *, patience_s: float = 3.0) -> None:
        self.base_url = base_url.rstrip("/")
        self.patience_s = patience_s
        headers = {"Accept-Encoding": "identity"} | ({"Authorization": f"Bearer {api_key}"} if api_key else {})
        try:
            # A proxy of the environment is for the outside world, never for this machine.
            self._http = httpx2.Client(headers=headers, timeout=_TIMEOUT, trust_env=not _is_loopback(self.base_url))
        except ValueError as error:
            raise ServiceError(f"an API key or URL cannot be sent as it is: {error}") from None

    def __enter__(self) -> "Service":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        self._http.close()

    def get(self, path: str, query: Query | None = None) -> Json:
        return self._json("GET", path, repeatable=True, params=query)

    def post(self, path: str, body: Json | None = None, *, idempotency_key: str | None = None) -> Json:
        """POST `body`, or nothing. Only with an `idempotency_key` is it tried again when it gets lost."""
        headers = {"Idempotency-Key": idempotency_key} if idempotency_key else {}
        return self._json("POST", path, repeatable=idempotency_key is not None, json=body, headers=headers)

    def upload(self, file: Path, *, purpose: str = "fine-tune") -> Json:
        """Send a file, unchanged, under its own name; the FileObject that came back."""
        headers = {"Idempotency-Key": new_idempotency_key()}
        with file.open("rb") as stream:

            def send() -> httpx2.Response:
                stream.seek(0)
                content = {"file": (file.name, stream, "application/octet-stream")}
                return self._http.post(
                    self._url("/files"), data={"purpose": purpose}, files=content, headers=headers, timeout=600.0
                )

            return _body(self._persist(send, repeatable=True))

    def every(self, path: str, query: Query | None = None, *, at_most: int | None = None) -> Iterator[Json]:
        """The items of a list, page after page, in the service's order."""
        left = at_most
        cursor: dict[str, str] = {}
        while left is None or left > 0:
            page = self.get(path, {**(query or {}), **cursor})
            items: list[Json] = page["data"][:left]
            yield from items
            if not page.get("has_more") or not items:
                return
            left = None if left is None else left - len(items)
            cursor = {"after": items[-1]["id"]}

    @contextmanager
    def bytes_from(self, path: str, headers: Mapping[str, str]) -> Iterator[httpx2.Response]:
        """An open GET whose body the caller reads; 200, 206 and 416 come through, other errors are raised."""
        with self._translated(), self._http.stream("GET", self._url(path), headers=dict(headers)) as response:
            if response.status_code not in (200, 206, 416):
                response.read()
                _raise_for_error(response)
            yield response

    def stream(self, path: str, body: Json) -> Generator[Json]:
        """The events of a server-sent stream as JSON. Closing the iterator hangs up; an error event is raised."""
        url = self._url(path)
        with self._translated(), self._http.stream("POST", url, json=body, timeout=_GENERATION_TIMEOUT) as response:
            if response.is_error:
                response.read()
                _raise_for_error(response)
            for line in response.iter_lines():
                if not line.startswith("data:"):
                    continue
                data = line.removeprefix("data:").strip()
                if data == "[DONE]":
                    return
                event: Json = json.loads(data)
                if event.get("error"):
                    raise _from_error_object(event["error"], status=response.status_code)
                yield event
        raise ServiceError("the answer broke off: the service closed the stream early")

    def _url(self, path: str) -> str:
        return self.base_url + path

    def _json(self, method: str, path: str, *, repeatable: bool, **request: Any) -> Json:
        return _body(
            self._persist(lambda: self._http.request(method, self._url(path), **request), repeatable=repeatable)
        )

    def _persist(self, send: Callable[[], httpx2.Response], *, repeatable: bool) -> httpx2.Response:
        """Send; if `repeatable`, again and again while failures are transient and patience lasts."""
        give_up_at = time.monotonic() + self.patience_s
        pause_s = _FIRST_PAUSE_S
        while True:
            failure: ServiceError | None = None
            try:
                with self._translated():
                    response = send()
            except ServiceError as error:
                failure = error
            else:
                if not _is_transient(response):
                    return response
                pause_s = max(pause_s, _retry_after_s(response))
            if not repeatable or time.monotonic() + pause_s > give_up_at:
                if failure is not None:
                    raise failure
                return response
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)

    @contextmanager
    def _translated(self) -> Iterator[None]:
        """Turns the transport's exceptions into one line that says what to do."""
        try:
            yield
        except httpx2.ConnectError:
            raise ServiceError(
                f"no service answers at {self.base_url}; start one with `lorad up`, or set LORAD_BASE_URL",
                code="unreachable",
            ) from None
        except httpx2.TimeoutException:
            raise ServiceError(f"{self.base_url} did not answer in time", code="timeout") from None
        except (httpx2.TransportError, httpx2.InvalidURL) as error:
            raise ServiceError(f"talking to {self.base_url} failed: {error}", code="connection_failed") from None


def new_idempotency_key() -> str:
    return uuid.uuid4().hex


def path_of(*segments: str) -> str:
    """A URL path of names that users typed, so that none can reach outside its segment; ServiceError if one must."""
    if wrong := [segment for segment in segments if segment in ("", ".", "..")]:
        raise ServiceError(f"{wrong[0]!r} is not a name", code="invalid_value")
    return "".join(f"/{quote(segment, safe='@')}" for segment in segments)


def _is_loopback(url: str) -> bool:
    return urlsplit(url).hostname in ("127.0.0.1", "localhost", "::1")


def _is_transient(response: httpx2.Response) -> bool:
    """True if the same request may well be answered soon; a 409 that may is a request still in flight."""
    return response.status_code in _TRANSIENT_STATUSES and response.headers.get("x-should-retry") != "false"


def _retry_after_s(response: httpx2.Response) -> float:
    text = response.headers.get("retry-after", "")
    return float(text) if text.isdecimal() and len(text) < 6 else 0.0


def _body(response: httpx2.Response) -> Json:
    if response.is_error:
        _raise_for_error(response)
    try:
        body = response.json()
    except ValueError:
        body = None
    if not isinstance(body, dict):
        raise ServiceError(f"{response.url} did not answer as lorad does; is LORAD_BASE_URL right?", code="not_lorad")
    return body


def _raise_for_error(response: httpx2.Response) -> None:
    try:
        error = response.json()["error"]
    except (ValueError, TypeError, KeyError):
        error = {"message": f"{response.url} answered {response.status_code} {response.reason_phrase}"}
    raise _from_error_object(error, status=response.status_code)


def _from_error_object(error: Json, *, status: int) -> ServiceError:
    message = str(error.get("message") or f"status {status}")
    if status == 401:
        message += " (the key is read from LORAD_API_KEY)"
    return ServiceError(message, status=status, param=error.get("param"), code=str(error.get("code") or "error"))
