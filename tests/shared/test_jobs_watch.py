"""What the sweeper says of a trainer that does not stop, and of a job that nobody takes."""

import logging

import pytest
from sqlalchemy import text

from shared import jobs
from shared.db import write
from shared.queue import Queue
from shared.sweeper import Sweeper
from shared.tables import JobState
from tests.shared.conftest import LEASE_S, World
from tests.shared.test_jobs_claim import at_once

MINUTE_MS = 60_000
NOBODY = "No trainer has taken this job"


def asked_ago(world: World, ms: int) -> str:
    """A running job whose cancel was asked that long ago."""
    claim = world.running()
    with write(world.engine) as tx:
        jobs.request_cancel(tx, "acme", claim.job_id)
    world.edit(claim.job_id, f"cancel_requested_at = cancel_requested_at - {ms}")
    return claim.job_id


def queued_ago(world: World, ms: int) -> str:
    """A job that has been in the queue that long."""
    job = world.submit()
    age(world, job.id, ms)
    return job.id


def age(world: World, job_id: str, ms: int) -> None:
    """Let all that has happened to the job have happened that much earlier."""
    world.edit(job_id, f"created_at = created_at - {ms}")
    with write(world.engine) as tx:
        tx.execute(text(f"UPDATE job_events SET created_at = created_at - {ms} WHERE job_id = :id"), {"id": job_id})


def complaints(world: World, job_id: str) -> int:
    return sum(message.startswith(NOBODY) for message in world.messages(job_id))


def test_a_trainer_that_does_not_cancel_is_named_once(world: World, caplog: pytest.LogCaptureFixture) -> None:
    """One warning for each job in each sweeper's log, however often it sweeps."""
    queue = Queue("redis://127.0.0.1:1/0")
    job_id = asked_ago(world, MINUTE_MS + 1000)
    sweeper = Sweeper(lease_s=LEASE_S, sweep_s=10)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert sweeper.sweep_once(world.engine, queue) is not None
    queue.close()

    assert [job_id in record.getMessage() for record in caplog.records if "cancel" in record.getMessage()] == [True]
    assert world.state(job_id) == JobState.RUNNING


@pytest.mark.parametrize("case", ["just asked", "trainer lost", "not asked"])
def test_a_trainer_that_may_still_stop_is_not_named(world: World, case: str) -> None:
    """Nobody is blamed within the minute, nor for a job whose trainer is gone or was asked nothing."""
    job_id = world.running().job_id if case == "not asked" else asked_ago(world, MINUTE_MS * (case == "trainer lost"))
    if case == "trainer lost":
        world.edit(job_id, "lease_expires_at = heartbeat_at - 1000")

    assert world.sweep(may_expire=False).unheeded == ()


def test_a_job_that_nobody_takes_is_told_once(world: World) -> None:
    """After five minutes at the head of the queue its user reads why, once; the job waits on."""
    job_id = queued_ago(world, 5 * MINUTE_MS + 1000)
    for _ in range(3):
        world.sweep()
        age(world, job_id, 10 * MINUTE_MS)

    assert complaints(world, job_id) == 1
    assert world.state(job_id) == JobState.QUEUED


def test_a_job_is_told_again_after_another_try(world: World) -> None:
    """Back in the queue after an attempt, it waits anew."""
    job_id = queued_ago(world, 6 * MINUTE_MS)
    world.sweep()
    claim = world.claim()
    assert claim is not None
    with write(world.engine) as tx:
        jobs.give_back(tx, claim, charge=False, reason="shutdown")
    world.sweep()
    soon = complaints(world, job_id)
    age(world, job_id, 6 * MINUTE_MS)
    world.sweep()

    assert (soon, complaints(world, job_id)) == (1, 2)


@pytest.mark.parametrize("case", ["young", "in backoff", "others run", "second in line", "tenant at its cap"])
def test_a_job_that_waits_for_good_reason_is_told_nothing(world: World, case: str) -> None:
    """Less than five minutes, not yet due, trainers at work, others first or the tenant at its cap: no complaint."""
    if case in ("others run", "tenant at its cap"):
        running = world.running()
        if case == "tenant at its cap":
            world.lose(running)
    if case == "second in line":
        queued_ago(world, 7 * MINUTE_MS)
    job_id = queued_ago(world, (4 if case == "young" else 6) * MINUTE_MS)
    if case == "in backoff":
        world.edit(job_id, "not_before = created_at + 3600000")
    world.sweep(may_expire=False, max_running=int(case == "tenant at its cap"))

    assert complaints(world, job_id) == 0


def test_several_sweepers_tell_once(world: World) -> None:
    """Four sweepers at the same moment write one complaint."""
    job_id = queued_ago(world, 6 * MINUTE_MS)

    results = at_once(*[world.sweep] * 4)

    assert all(isinstance(result, jobs.Swept) for result in results)
    assert complaints(world, job_id) == 1
