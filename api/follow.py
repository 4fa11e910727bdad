"""Waiting for news of a job: long poll and event stream. News is looked up; the database is the only source."""

import time
from collections.abc import Iterator

from flask import Response

from api import sse
from api.call import Call
from api.schemas.job_views import JobEventObject
from shared import jobs
from shared.errors import Unavailable
from shared.tables import JobState

POLL_S = 0.25
_PING_S = 15.0
_PAGE = 100


def wait_for_change(call: Call, job_id: str, wait_s: float) -> None:
    """Return when the job's state is another than now, or it has ended, or `wait_s` is over."""
    until = time.monotonic() + wait_s
    before = _state(call, job_id)
    if wait_s <= 0 or before.is_terminal:
        return
    with call.services.waiters.taken() as seated:
        if not seated:
            raise Unavailable("Too many clients wait for news; ask again without waiting.")
        while time.monotonic() < until and _state(call, job_id) == before:
            time.sleep(POLL_S)


def event_stream(call: Call, job_id: str, after: str | None) -> Response:
    """The job's events, oldest first, from the one after `after` until the job ends."""
    with call.read() as tx:  # what is wrong with the request is said before the stream begins
        jobs.events_page(tx, call.tenant, job_id, limit=1, after=after, newest_first=False)
    waiters = call.services.waiters
    if not waiters.take():
        raise Unavailable("Too many clients wait for news; list the events instead.")
    return sse.stream(_events(call, job_id, after), on_close=waiters.give_back)


def _events(call: Call, job_id: str, after: str | None) -> Iterator[str]:
    spoke_at = time.monotonic()
    while True:
        with call.read() as tx:  # the state first: an ended job gets no further events
            ended = JobState(jobs.get(tx, call.tenant, job_id).state).is_terminal
            page = jobs.events_page(tx, call.tenant, job_id, limit=_PAGE, after=after, newest_first=False)
        for row in page.items:
            yield sse.event(JobEventObject.of(row).model_dump_json(), event_id=row.id)
            after, spoke_at = row.id, time.monotonic()
        if page.has_more:
            continue
        if ended:
            return
        if time.monotonic() - spoke_at > _PING_S:  # also how a client that has gone is noticed
            yield sse.PING
            spoke_at = time.monotonic()
        time.sleep(POLL_S)


def _state(call: Call, job_id: str) -> JobState:
    with call.read() as tx:
        return JobState(jobs.get(tx, call.tenant, job_id).state)
