"""What the ledger makes of a disk that is full or fails, and of a claim whose trainer never heard that it has it."""

import pytest

from shared import jobs
from shared.db import write
from shared.jobs import Claim
from shared.tables import JobState
from tests.shared.conftest import LEASE_S, World


def fail_storage(world: World, claim: Claim, code: str = "storage_full") -> None:
    with write(world.engine) as tx:
        jobs.give_back_for_storage(tx, claim, code=code, reason="No space left on device", lease_s=LEASE_S)


def next_attempt(world: World, job_id: str) -> Claim:
    world.edit(job_id, "not_before = 0")
    claim = world.claim()
    assert claim is not None
    return claim


def test_a_full_disk_costs_no_attempt(world: World) -> None:
    """The job waits ten minutes, is claimable again after them, and has all its attempts left."""
    claim = world.running()
    fail_storage(world, claim)
    job = world.job(claim.job_id)
    too_early = world.claim("t2")

    assert (job.state, job.attempt, job.storage_failures) == (JobState.QUEUED, 0, 1)
    assert 0 <= job.not_before - (job.started_at or 0) - 600_000 < 60_000
    assert too_early is None
    assert next_attempt(world, claim.job_id).attempt == 1


@pytest.mark.parametrize("code", ["storage_full", "storage_failed"])
def test_the_fourth_time_fails_the_job(world: World, code: str) -> None:
    """Three attempts are not charged; the next that the disk ends is the last, and the error names the cause."""
    claim = world.running()
    states = []
    for _ in range(4):
        fail_storage(world, claim, code)
        states.append(world.state(claim.job_id))
        if states[-1] == JobState.QUEUED:
            claim = next_attempt(world, claim.job_id)
    error = world.job(claim.job_id).error

    assert states == [JobState.QUEUED] * 3 + [JobState.FAILED]
    assert error is not None
    assert error["code"] == code
    assert "No space left" in error["message"]


def test_other_failures_are_charged_all_the_same(world: World) -> None:
    """What the disk did does not add to the attempts, nor take from them."""
    claim = world.running()
    fail_storage(world, claim)
    claim = next_attempt(world, claim.job_id)
    with write(world.engine) as tx:
        jobs.give_back(tx, claim, charge=True, reason="x", lease_s=LEASE_S)
    job = world.job(claim.job_id)

    assert (job.attempt, job.storage_failures) == (1, 1)


@pytest.mark.parametrize(("ask", "end"), [(jobs.request_cancel, "cancelled"), (jobs.request_pause, "paused")])
def test_what_was_asked_comes_before_the_disk(world: World, ask: object, end: str) -> None:
    """A job that was asked to stop does so, whatever ended its attempt."""
    claim = world.running()
    with write(world.engine) as tx:
        assert callable(ask)
        ask(tx, "acme", claim.job_id)
    fail_storage(world, claim)

    assert (world.state(claim.job_id), world.job(claim.job_id).storage_failures) == (end, 0)


def test_a_claim_that_its_trainer_never_heard_of_is_taken_back(world: World) -> None:
    """Under this trainer's name and not held: queued again, uncharged. What it holds, and another's, stay."""
    world.submit(), world.submit(), world.submit()
    held, unheard, other = (world.claim(name, holds_base=world.base.id) for name in ("t1", "t1", "t2"))
    assert held is not None
    assert unheard is not None
    assert other is not None
    with write(world.engine) as tx:
        taken = jobs.take_back(tx, trainer="t1", held={held.job_id})
    job = world.job(unheard.job_id)

    assert taken == 1
    assert (job.state, job.attempt, job.fence) == (JobState.QUEUED, 0, 1)
    assert [world.state(claim.job_id) for claim in (held, other)] == [JobState.RUNNING] * 2


def test_an_unheard_claim_of_a_dead_trainer_ends_with_its_lease(world: World) -> None:
    """If nobody takes it back, the sweeper does once the lease is over, and another trainer finishes the job."""
    world.submit()
    unheard = world.claim("t1")
    assert unheard is not None
    within = world.sweep().requeued
    world.lose(unheard)
    after = world.sweep().requeued
    claim = next_attempt(world, unheard.job_id)
    world.publish(claim)

    assert (within, after) == (0, 1)
    assert (claim.attempt, claim.fence) == (2, 2)
    assert world.state(claim.job_id) == JobState.SUCCEEDED
