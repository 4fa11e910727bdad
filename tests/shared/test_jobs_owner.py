"""What a trainer's calls do to the job that it owns: lease, progress, success, and the ways to stop."""

from collections.abc import Callable

import pytest
from sqlalchemy.exc import IntegrityError

from shared import jobs
from shared.db import Tx, read, write
from shared.errors import CancelRequested, QueueFull, StateConflict
from shared.jobs import Claim
from shared.specs import Order, StepReport, TrainSpec
from shared.store import adapters
from shared.tables import AdapterVersion, JobAttempt, JobState
from tests.shared.conftest import LEASE_S, World


def test_heartbeat_notes_progress(world: World) -> None:
    """Step, total and finishing time come from the report, the latter by the database's clock."""
    claim = world.running()
    report = StepReport(
        step=3, total_steps=9, train_loss=1.0, learning_rate=0.1, grad_norm=1.0, epoch=0.5, num_tokens=10,
        num_label_tokens=5, tokens_per_second=1.0, eta_seconds=30.0,
    )  # fmt: skip
    with write(world.engine) as tx:
        jobs.heartbeat(tx, claim, lease_s=LEASE_S, report=report, trained_tokens=77)

    job = world.job(claim.job_id)
    assert (job.step, job.total_steps, job.trained_tokens) == (3, 9, 77)
    assert job.estimated_finish_at is not None
    assert job.heartbeat_at is not None
    assert job.estimated_finish_at - job.heartbeat_at == 30_000


def test_heartbeat_renews_an_expired_lease(world: World) -> None:
    """An owner that was cut off keeps its job as long as nobody has taken it."""
    claim = world.running()
    world.lose(claim)
    with write(world.engine) as tx:
        assert jobs.heartbeat(tx, claim, lease_s=LEASE_S) is Order.GO_ON

    assert world.sweep().requeued == 0
    assert world.state(claim.job_id) == JobState.RUNNING


def test_lease_is_set_by_the_database_clock(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """A trainer whose own clock is a day fast neither shortens nor lengthens its lease."""
    claim = world.running()
    monkeypatch.setattr("time.time", lambda: 9e9)
    with write(world.engine) as tx:
        jobs.heartbeat(tx, claim, lease_s=LEASE_S)

    job = world.job(claim.job_id)
    assert job.lease_expires_at is not None
    assert job.lease_expires_at - job.heartbeat_at == LEASE_S * 1000
    assert job.heartbeat_at < 8e12
    assert world.sweep().requeued == 0


def test_success_brings_its_version(world: World) -> None:
    """State, version, files and tokens come with one commit; the attempt is closed."""
    claim = world.running()
    prepared = world.prepare(job_id=claim.job_id)
    with write(world.engine) as tx:
        version = jobs.succeed(tx, claim, prepared, result_file_ids=["file-1"], trained_tokens=12)

    job = world.job(claim.job_id)
    assert (job.state, job.result_file_ids, job.trained_tokens) == ("succeeded", ["file-1"], 12)
    assert (version.id, version.version, version.job_id) == (prepared.version_id, 1, claim.job_id)
    with read(world.engine) as tx:
        assert jobs.published_version(tx, claim.job_id) is not None
        attempt = tx.get_one(JobAttempt, (claim.job_id, claim.fence))
        assert attempt.outcome == "succeeded"
        assert attempt.ended_at is not None


def test_success_that_cannot_commit_leaves_the_job_running(world: World) -> None:
    """If the version cannot be written, the job has not succeeded either."""
    claim, other = world.running(), world.running()
    world.publish(other)
    prepared = world.prepare(job_id=other.job_id)
    with write(world.engine) as tx:
        taken = tx.query(AdapterVersion).one().id
    clash = type(prepared)(**{**prepared.__dict__, "version_id": taken})
    with pytest.raises(IntegrityError), write(world.engine) as tx:
        jobs.succeed(tx, claim, clash)

    assert world.state(claim.job_id) == JobState.RUNNING
    with read(world.engine) as tx:
        assert jobs.published_version(tx, claim.job_id) is None


def test_two_versions_of_one_job_are_refused(world: World) -> None:
    """The unique job_id holds even if the compare-and-swap were broken."""
    claim = world.running()
    world.publish(claim)
    prepared = world.prepare(job_id=claim.job_id)

    with pytest.raises(IntegrityError), write(world.engine) as tx:
        adapters.insert_version(tx, "acme", "math", prepared, claim.job_id)


def test_cancel_before_publish_wins(world: World) -> None:
    """Once a cancel was accepted no adapter appears, and the job ends as cancelled."""
    claim = world.running()
    prepared = world.prepare(job_id=claim.job_id)
    with write(world.engine) as tx:
        jobs.request_cancel(tx, "acme", claim.job_id)
    with pytest.raises(CancelRequested), write(world.engine) as tx:
        jobs.succeed(tx, claim, prepared)
    with write(world.engine) as tx:
        jobs.stop_cancelled(tx, claim)

    assert world.state(claim.job_id) == JobState.CANCELLED
    with read(world.engine) as tx:
        assert jobs.published_version(tx, claim.job_id) is None


def test_cancel_after_publish_is_a_conflict(world: World) -> None:
    """A job that has published stays succeeded."""
    claim = world.running()
    world.publish(claim)
    with write(world.engine) as tx, pytest.raises(StateConflict, match="succeeded"):
        jobs.request_cancel(tx, "acme", claim.job_id)

    assert world.state(claim.job_id) == JobState.SUCCEEDED


def test_success_makes_a_pause_moot(world: World) -> None:
    """A job that was finished before it could pause has succeeded."""
    claim = world.running()
    with write(world.engine) as tx:
        jobs.request_pause(tx, "acme", claim.job_id)
    world.publish(claim)

    assert world.state(claim.job_id) == JobState.SUCCEEDED


@pytest.mark.parametrize("charge", [True, False])
def test_giving_back_charges_if_told(world: World, charge: bool) -> None:
    """A clean shutdown costs no attempt, an error does."""
    claim = world.running()
    with write(world.engine) as tx:
        jobs.give_back(tx, claim, charge=charge, reason="x")

    job = world.job(claim.job_id)
    assert (job.state, job.attempt, job.fence) == ("queued", int(charge), 1)
    world.edit(claim.job_id, "not_before = 0")
    again = world.claim("t2")
    assert again is not None
    assert (again.attempt, again.fence) == (1 + charge, 2)


def test_a_job_given_back_for_an_error_waits(world: World) -> None:
    """Half a lease, as after a lost trainer, so that it does not use up its attempts at once."""
    claim = world.running()
    with write(world.engine) as tx:
        jobs.give_back(tx, claim, charge=True, reason="x", lease_s=LEASE_S)
    too_early = world.claim("t2")
    world.edit(claim.job_id, f"not_before = not_before - {int(LEASE_S / 2 * 1000)}")

    assert too_early is None
    assert world.claim("t2") is not None


def test_giving_back_the_last_attempt_fails(world: World) -> None:
    """Three charged attempts are all there are."""
    world.submit()
    for _ in range(3):
        claim = world.claim()
        assert claim is not None
        with write(world.engine) as tx:
            jobs.give_back(tx, claim, charge=True, reason="out of memory", lease_s=0)

    job = world.job(claim.job_id)
    assert job.state == JobState.FAILED
    assert job.error is not None
    assert job.error["code"] == "attempts_exhausted"
    assert "out of memory" in job.error["message"]


ENDS: dict[str, Callable[[Tx, Claim], None]] = {
    "fail": lambda tx, claim: jobs.fail(tx, claim, code="training_failed", message="no"),
    "give_back": lambda tx, claim: jobs.give_back(tx, claim, charge=True, reason="shutdown"),
    "stop_paused": jobs.stop_paused,
}


@pytest.mark.parametrize("end", ENDS)
def test_an_accepted_cancel_ends_as_cancelled(world: World, end: str) -> None:
    """However the trainer stops, a cancel that was accepted is what the job ends as."""
    claim = world.running()
    with write(world.engine) as tx:
        jobs.request_cancel(tx, "acme", claim.job_id)
        ENDS[end](tx, claim)

    assert world.state(claim.job_id) == JobState.CANCELLED


def test_a_paused_job_keeps_its_attempts(world: World) -> None:
    """Pausing and resuming any number of times never uses up the attempts."""
    world.submit()
    for _ in range(5):
        claim = world.claim()
        assert claim is not None
        with write(world.engine) as tx:
            jobs.request_pause(tx, "acme", claim.job_id)
            jobs.stop_paused(tx, claim)
            jobs.resume(tx, "acme", claim.job_id)

    job = world.job(claim.job_id)
    assert (job.state, job.attempt, job.fence, job.pause_requested_at) == ("queued", 0, 5, None)


def test_failure_keeps_the_reason(world: World) -> None:
    """The error is what the user sees on the job."""
    claim = world.running()
    with write(world.engine) as tx:
        jobs.fail(tx, claim, code="invalid_training_file", message="line 3", param="training_file")

    error = {"code": "invalid_training_file", "message": "line 3", "param": "training_file"}
    assert world.job(claim.job_id).error == error


def test_queue_is_bounded_per_tenant(world: World) -> None:
    """One tenant's full queue is that tenant's only."""

    def submit(tenant: str) -> None:
        new = jobs.NewJob(
            tenant=tenant,
            base_model_id=world.base.id,
            training_file_id=world.file_id,
            adapter_name="a",
            spec=TrainSpec(),
        )
        with write(world.engine) as tx:
            jobs.submit(tx, new, max_queued=2)

    submit("acme")
    submit("acme")
    with pytest.raises(QueueFull):
        submit("acme")
    submit("rival")
