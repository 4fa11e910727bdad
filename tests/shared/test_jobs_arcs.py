"""Every arc of a job's life, and every arc that must not exist."""

from collections.abc import Callable
from typing import Any

import pytest
from sqlalchemy.exc import DBAPIError

from shared import jobs
from shared.db import read, write
from shared.errors import LoradError, NotFound, OwnershipLost, StateConflict
from shared.jobs import ARCS, Claim
from shared.specs import Order
from shared.tables import TERMINAL, JobState
from tests.shared.conftest import LEASE_S, World

STATES = list(JobState)


def job_in(world: World, state: JobState) -> tuple[str, Claim]:
    """A job that came to this state by arcs alone, and the last claim on it."""
    claim = world.running()
    with write(world.engine) as tx:
        match state:
            case JobState.QUEUED:
                jobs.give_back(tx, claim, charge=False, reason="shutdown")
            case JobState.PAUSED:
                jobs.request_pause(tx, "acme", claim.job_id)
                jobs.stop_paused(tx, claim)
            case JobState.FAILED:
                jobs.fail(tx, claim, code="training_failed", message="no")
            case JobState.CANCELLED:
                jobs.request_cancel(tx, "acme", claim.job_id)
                jobs.stop_cancelled(tx, claim)
    if state is JobState.SUCCEEDED:
        world.publish(claim)
    assert world.state(claim.job_id) == state
    return claim.job_id, claim


@pytest.mark.parametrize("state", STATES)
def test_every_state_can_be_reached(world: World, state: JobState) -> None:
    """Each state has a way to it, and the row's constraints hold there."""
    job_in(world, state)


OWNERS: dict[str, Callable[[World, Any, Claim], object]] = {
    "fail": lambda w, tx, c: jobs.fail(tx, c, code="training_failed", message="no"),
    "give_back": lambda w, tx, c: jobs.give_back(tx, c, charge=True, reason="shutdown"),
    "stop_cancelled": lambda w, tx, c: jobs.stop_cancelled(tx, c),
    "stop_paused": lambda w, tx, c: jobs.stop_paused(tx, c),
    "add_event": lambda w, tx, c: jobs.add_event(tx, c, message="hello"),
    "record_checkpoint": lambda w, tx, c: jobs.record_checkpoint(
        tx, c, checkpoint_id="ftckpt-" + "0" * 32, step=1, manifest={}
    ),
    "succeed": lambda w, tx, c: jobs.succeed(tx, c, w.prepare(job_id=c.job_id)),
}


@pytest.mark.parametrize("action", OWNERS)
@pytest.mark.parametrize("state", [state for state in STATES if state is not JobState.RUNNING])
def test_a_trainer_changes_only_running_jobs(world: World, state: JobState, action: str) -> None:
    """Whatever a trainer does to a job that no longer runs is refused and leaves no trace."""
    job_id, claim = job_in(world, state)
    before, events = world.job(job_id), world.messages(job_id)

    with pytest.raises(OwnershipLost), write(world.engine) as tx:
        OWNERS[action](world, tx, claim)

    after = world.job(job_id)
    assert (after.state, after.fence, after.attempt) == (before.state, before.fence, before.attempt)
    assert world.messages(job_id) == events


@pytest.mark.parametrize("action", OWNERS)
def test_a_stale_fence_changes_nothing(world: World, action: str) -> None:
    """A trainer whose job was taken over can do nothing to it, although the job runs."""
    stale = world.running()
    world.lose(stale)
    world.sweep()
    world.edit(stale.job_id, "not_before = 0")
    fresh = world.claim("t2")
    assert fresh is not None

    with pytest.raises(OwnershipLost), write(world.engine) as tx:
        OWNERS[action](world, tx, stale)

    assert world.job(stale.job_id).fence == fresh.fence == stale.fence + 1
    assert world.state(stale.job_id) == JobState.RUNNING


def test_a_stale_heartbeat_is_lost(world: World) -> None:
    """The old owner is told so, and does not lengthen the new owner's lease."""
    stale = world.running()
    world.lose(stale)
    world.sweep()
    world.edit(stale.job_id, "not_before = 0")
    world.claim("t2")
    before = world.job(stale.job_id).lease_expires_at

    with write(world.engine) as tx:
        assert jobs.heartbeat(tx, stale, lease_s=999) is Order.LOST
    assert world.job(stale.job_id).lease_expires_at == before


@pytest.mark.parametrize("state", STATES)
def test_only_queued_jobs_are_claimed(world: World, state: JobState) -> None:
    """A claim finds the job in the queue and in no other state."""
    job_id, _ = job_in(world, state)

    claim = world.claim("t2")

    assert (claim is not None) == (state is JobState.QUEUED)
    assert claim is None or claim.job_id == job_id


CANCELS = {JobState.QUEUED: "cancelled", JobState.PAUSED: "cancelled", JobState.RUNNING: "running"}
PAUSES = {JobState.QUEUED: "paused", JobState.PAUSED: "paused", JobState.RUNNING: "running"}
RESUMES = {JobState.PAUSED: "queued"}


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize(
    ("ask", "leads"),
    [(jobs.request_cancel, CANCELS), (jobs.request_pause, PAUSES), (jobs.resume, RESUMES)],
    ids=["cancel", "pause", "resume"],
)
def test_what_a_user_may_ask(world: World, state: JobState, ask: Callable[..., Any], leads: dict[str, str]) -> None:
    """A request leads where the table says, or is a conflict that changes nothing."""
    job_id, _ = job_in(world, state)

    with write(world.engine) as tx:
        if state in leads:
            assert ask(tx, "acme", job_id).state == leads[state]
        else:
            with pytest.raises(StateConflict):
                ask(tx, "acme", job_id)

    assert world.state(job_id) == leads.get(state, state)


@pytest.mark.parametrize("ask", [jobs.request_cancel, jobs.request_pause, jobs.resume, jobs.get])
def test_foreign_jobs_are_not_found(world: World, ask: Callable[..., Any]) -> None:
    """Another tenant's job answers as one that does not exist."""
    job = world.submit("acme")

    with write(world.engine) as tx:
        with pytest.raises(NotFound) as foreign:
            ask(tx, "rival", job.id)
        missing = "ftjob-" + "0" * 32
        with pytest.raises(NotFound) as absent:
            ask(tx, "rival", missing)
    assert foreign.value.message.replace(job.id, missing) == absent.value.message


@pytest.mark.parametrize("ask", [jobs.request_cancel, jobs.request_pause])
def test_asking_a_running_job_twice_is_once(world: World, ask: Callable[..., Any]) -> None:
    """The second request changes nothing and writes no second event."""
    claim = world.running()
    with write(world.engine) as tx:
        ask(tx, "acme", claim.job_id)
    before, row = world.messages(claim.job_id), world.job(claim.job_id)
    with write(world.engine) as tx:
        ask(tx, "acme", claim.job_id)

    after = world.job(claim.job_id)
    assert world.messages(claim.job_id) == before
    assert (after.cancel_requested_at, after.pause_requested_at) == (row.cancel_requested_at, row.pause_requested_at)


@pytest.mark.parametrize(
    ("asks", "order"),
    [
        ([], Order.GO_ON),
        ([jobs.request_pause], Order.PAUSE),
        ([jobs.request_cancel], Order.CANCEL),
        ([jobs.request_pause, jobs.request_cancel], Order.CANCEL),
    ],
)
def test_heartbeat_brings_back_what_was_asked(world: World, asks: list[Callable[..., Any]], order: Order) -> None:
    """The trainer learns of a request with its next heartbeat; cancel wins over pause."""
    claim = world.running()
    with write(world.engine) as tx:
        for ask in asks:
            ask(tx, "acme", claim.job_id)
        assert jobs.heartbeat(tx, claim, lease_s=LEASE_S) is order


@pytest.mark.parametrize("end", sorted(TERMINAL))
def test_database_keeps_terminal_states(world: World, end: JobState) -> None:
    """Not even wrong SQL brings a job back that has ended; other columns may still change."""
    job_id, _ = job_in(world, end)
    world.edit(job_id, "priority = 3")

    with pytest.raises(DBAPIError, match="has ended"):
        world.edit(job_id, "state = 'queued', finished_at = NULL")
    assert world.state(job_id) == end


def test_database_keeps_fences_growing(world: World) -> None:
    """Not even wrong SQL lowers a fence; raising it is allowed."""
    claim = world.running()
    world.edit(claim.job_id, "fence = fence + 5")

    with pytest.raises(DBAPIError, match="never falls"):
        world.edit(claim.job_id, "fence = fence - 1")
    assert world.job(claim.job_id).fence == claim.fence + 5


@pytest.mark.parametrize(
    "assignments",
    [
        "state = 'lost'",
        "lease_owner = NULL",
        "lease_expires_at = NULL",
        "state = 'failed'",
        "attempt = max_attempts + 1",
    ],
)
def test_database_refuses_impossible_rows(world: World, assignments: str) -> None:
    """A running job has owner and lease, an ended one has an end, attempts are bounded."""
    claim = world.running()

    with pytest.raises(DBAPIError):
        world.edit(claim.job_id, assignments)


def test_events_count_up_without_gaps(world: World) -> None:
    """Events of a job are numbered from 1, whoever writes them."""
    claim = world.running()
    with write(world.engine) as tx:
        jobs.add_event(tx, claim, message="a", type="metrics", data={"step": 1})
        jobs.request_cancel(tx, "acme", claim.job_id)
        jobs.stop_cancelled(tx, claim)

    with read(world.engine) as tx:
        page = jobs.events_page(tx, "acme", claim.job_id, limit=50, newest_first=False)
    assert [event.seq for event in page.items] == [1, 2, 3, 4, 5]
    assert page.items[2].data == {"step": 1}


def test_edited_spec_fails_the_job(world: World) -> None:
    """A row whose spec was changed by hand is failed at the claim, and the next job is served."""
    bad, good = world.submit(), world.submit()
    world.edit(bad.id, 'spec = \'{"lora": {"r": 1000000}}\'')

    claim = world.claim()

    assert claim is not None
    assert claim.job_id == good.id
    assert world.job(bad.id).error is not None
    assert world.job(bad.id).error["code"] == "bad_spec"  # type: ignore[index]  # not None, see above


def test_diagram_shows_every_arc() -> None:
    """The generated diagram has one line per arc, and marks the ends."""
    lines = jobs.diagram().splitlines()

    assert sum("-->" in line for line in lines) == len(ARCS) + len(TERMINAL)
    assert "    queued --> running: claimed by a trainer: fence + 1, attempt + 1, lease set" in lines


def test_stopping_what_nobody_asked_is_our_mistake(world: World) -> None:
    """A trainer may not cancel or pause on its own account."""
    claim = world.running()
    for stop in (jobs.stop_cancelled, jobs.stop_paused):
        with pytest.raises(AssertionError), write(world.engine) as tx:
            stop(tx, claim)

    assert world.state(claim.job_id) == JobState.RUNNING
    assert not issubclass(AssertionError, LoradError)
