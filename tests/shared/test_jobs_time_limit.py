"""The longest that a job may run, over all its attempts: who is stopped, who is not, and what the user sees."""

import pytest
from sqlalchemy import text

from shared import jobs
from shared.db import read, write
from shared.errors import CancelRequested
from shared.jobs import Claim
from shared.specs import Order
from shared.tables import JobAttempt, JobState
from tests.shared.conftest import LEASE_S, World
from tests.shared.test_jobs_claim import at_once

LIMIT_S = 3600.0
HOUR_MS = 3_600_000


def has_run(world: World, claim: Claim, ms: int) -> None:
    """Let the claim's attempt have begun that long ago."""
    with write(world.engine) as tx:
        moved = text("UPDATE job_attempts SET started_at = started_at - :ms WHERE job_id = :id AND fence = :fence")
        tx.execute(moved, {"ms": ms, "id": claim.job_id, "fence": claim.fence})


def beat(world: World, claim: Claim) -> Order:
    with write(world.engine) as tx:
        return jobs.heartbeat(tx, claim, lease_s=LEASE_S)


def claimed_again(world: World, claim: Claim) -> Claim:
    world.edit(claim.job_id, "not_before = 0")
    again = world.claim("t2")
    assert again is not None
    assert again.job_id == claim.job_id
    return again


def test_a_job_that_ran_too_long_is_cancelled_with_the_reason(world: World) -> None:
    """Its trainer is told to cancel, and the ended job shows the error with both numbers."""
    claim = world.running()
    has_run(world, claim, HOUR_MS + 5000)
    swept = world.sweep(max_job_s=LIMIT_S)
    order = beat(world, claim)
    with write(world.engine) as tx:
        jobs.stop_cancelled(tx, claim)
    job = world.job(claim.job_id)

    assert (swept.overdue, order, job.state) == (1, Order.CANCEL, JobState.CANCELLED)
    assert job.error is not None
    assert job.error["code"] == "time_limit"
    assert "3605 s" in job.error["message"]
    assert "3600 s" in job.error["message"]


@pytest.mark.parametrize("limit_s", [LIMIT_S, None])
def test_a_job_within_the_limit_runs_on(world: World, limit_s: float | None) -> None:
    """A second below the limit, or a day without one, and nothing is asked."""
    claim = world.running()
    has_run(world, claim, HOUR_MS - 30_000 if limit_s else 24 * HOUR_MS)

    assert world.sweep(max_job_s=limit_s).overdue == 0
    assert beat(world, claim) is Order.GO_ON
    assert world.job(claim.job_id).error is None


def test_all_attempts_count_together(world: World) -> None:
    """40 minutes before a clean restart and 25 after it are too many; the 40 alone were not."""
    claim = world.running()
    has_run(world, claim, HOUR_MS * 40 // 60)
    before = world.sweep(max_job_s=LIMIT_S).overdue
    with write(world.engine) as tx:
        jobs.give_back(tx, claim, charge=False, reason="shutdown")
    again = claimed_again(world, claim)
    has_run(world, again, HOUR_MS * 25 // 60)

    assert before == 0
    assert world.sweep(max_job_s=LIMIT_S).overdue == 1


def test_waiting_does_not_count(world: World) -> None:
    """A job that was queued and paused for days has run only as long as its attempts."""
    claim = world.running()
    with write(world.engine) as tx:
        jobs.request_pause(tx, "acme", claim.job_id)
        jobs.stop_paused(tx, claim)
        jobs.resume(tx, "acme", claim.job_id)
    day = 24 * HOUR_MS
    world.edit(claim.job_id, f"created_at = created_at - {2 * day}, started_at = started_at - {day}")
    with write(world.engine) as tx:
        moved = f"UPDATE job_attempts SET started_at = started_at - {day}, ended_at = ended_at - {day}"
        tx.execute(text(moved))
    again = claimed_again(world, claim)

    assert world.sweep(max_job_s=LIMIT_S).overdue == 0
    assert beat(world, again) is Order.GO_ON


def test_time_without_a_trainer_does_not_count(world: World) -> None:
    """A lost trainer's attempt ends with its lease, however late a sweeper sees it: the machine may have been off."""
    claim = world.running()
    day = 24 * HOUR_MS
    has_run(world, claim, day)
    world.edit(claim.job_id, f"lease_expires_at = lease_expires_at - {day}")
    running_still = world.sweep(may_expire=False, max_job_s=LIMIT_S).overdue
    world.sweep(max_job_s=LIMIT_S)
    with read(world.engine) as tx:
        attempt = tx.get_one(JobAttempt, (claim.job_id, claim.fence))

    assert running_still == 0
    assert attempt.ended_at is not None
    assert 0 <= LEASE_S * 1000 - (attempt.ended_at - attempt.started_at) < 1000  # the clock goes on within a claim
    assert (world.state(claim.job_id), world.sweep(max_job_s=LIMIT_S).overdue) == (JobState.QUEUED, 0)


def test_a_queued_job_over_the_limit_ends_at_once(world: World) -> None:
    """It would be stopped as soon as a trainer had it."""
    claim = world.running()
    has_run(world, claim, 2 * HOUR_MS)
    with write(world.engine) as tx:
        jobs.give_back(tx, claim, charge=False, reason="shutdown")
    world.sweep(max_job_s=LIMIT_S)
    job = world.job(claim.job_id)

    assert job.state == JobState.CANCELLED
    assert job.error is not None
    assert job.error["code"] == "time_limit"


def test_a_lost_job_over_the_limit_ends_cancelled(world: World) -> None:
    """What was asked before the trainer died is done by the sweeper, and the reason is kept."""
    claim = world.running()
    has_run(world, claim, 2 * HOUR_MS)
    world.sweep(max_job_s=LIMIT_S)
    world.lose(claim)
    swept = world.sweep(max_job_s=LIMIT_S)
    job = world.job(claim.job_id)

    assert (swept.cancelled, job.state, (job.error or {}).get("code")) == (1, JobState.CANCELLED, "time_limit")


def test_a_cancel_by_the_user_keeps_its_own_reason(world: World) -> None:
    """A job that its user had asked to cancel before does not end with an error."""
    claim = world.running()
    has_run(world, claim, 2 * HOUR_MS)
    with write(world.engine) as tx:
        jobs.request_cancel(tx, "acme", claim.job_id)

    assert world.sweep(max_job_s=LIMIT_S).overdue == 0
    assert world.job(claim.job_id).error is None


def test_an_ended_job_is_left_alone(world: World) -> None:
    """A job that has published keeps its state, and gets no error."""
    claim = world.running()
    has_run(world, claim, 2 * HOUR_MS)
    world.publish(claim)

    assert world.sweep(max_job_s=LIMIT_S).overdue == 0
    assert (world.state(claim.job_id), world.job(claim.job_id).error) == (JobState.SUCCEEDED, None)


def test_limit_and_publish_race_has_one_winner(world: World) -> None:
    """Either the job has its adapter and no error, or it is asked to stop and nothing is published."""
    for _ in range(5):
        claim = world.running()
        has_run(world, claim, 2 * HOUR_MS)

        swept, published = at_once(lambda: world.sweep(max_job_s=LIMIT_S), lambda c=claim: world.publish(c))

        assert isinstance(swept, jobs.Swept)
        job = world.job(claim.job_id)
        with read(world.engine) as tx:
            version = jobs.published_version(tx, claim.job_id)
        if isinstance(published, CancelRequested):
            assert (swept.overdue, job.state, version) == (1, JobState.RUNNING, None)
            with write(world.engine) as tx:
                jobs.stop_cancelled(tx, claim)
        else:
            assert published is None
            assert (swept.overdue, job.state, job.error) == (0, JobState.SUCCEEDED, None)
            assert version is not None


def test_several_sweepers_ask_once(world: World) -> None:
    """One sweeper asks, the others find it asked; the user reads it once."""
    claim = world.running()
    has_run(world, claim, 2 * HOUR_MS)

    results = at_once(*[lambda: world.sweep(max_job_s=LIMIT_S)] * 4)

    assert sum(result.overdue for result in results if isinstance(result, jobs.Swept)) == 1
    assert [result for result in results if isinstance(result, Exception)] == []
    assert sum("Cancellation was requested" in message for message in world.messages(claim.job_id)) == 1


@pytest.mark.timeout(60)
def test_a_row_that_somebody_holds_does_not_hold_up_the_sweep(world: World) -> None:
    """On Postgres the job of a trainer that was stopped in a transaction is left for the next sweep, others are asked;
    SQLite has one writer at a time."""
    held, free = world.running(), world.running()
    for claim in (held, free):
        has_run(world, claim, HOUR_MS + 5000)
    if world.engine.dialect.name == "sqlite":
        assert world.sweep(max_job_s=LIMIT_S).overdue == 2
        return
    with write(world.engine) as tx:
        tx.execute(text("SELECT id FROM jobs WHERE id = :id FOR UPDATE"), {"id": held.job_id})
        first = world.sweep(max_job_s=LIMIT_S).overdue
    second = world.sweep(max_job_s=LIMIT_S).overdue

    assert (first, second) == (1, 1)
    assert [beat(world, claim) for claim in (held, free)] == [Order.CANCEL, Order.CANCEL]
