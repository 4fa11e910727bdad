"""Server-sent events, as the WHATWG HTML standard frames them (section 9.2)."""

from collections.abc import Callable, Iterable

from flask import Response

CONTENT_TYPE = "text/event-stream"
PING = ": ping\n\n"


def event(data: str, *, event_id: str | None = None) -> str:
    """One event. `data` is one line. OpenAI's clients must get no `event_id`: it breaks their parser."""
    return f"id: {event_id}\ndata: {data}\n\n" if event_id else f"data: {data}\n\n"


def stream(events: Iterable[str], *, on_close: Callable[[], object]) -> Response:
    """A response that sends `events` as they come; `on_close` runs when they end or the client has gone."""
    response = Response(events, mimetype=CONTENT_TYPE, headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
    response.call_on_close(on_close)
    return response
