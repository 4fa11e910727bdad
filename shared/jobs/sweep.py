"""Rules that mend the ledger. All are idempotent and compare-and-swap; several sweepers may run."""

from dataclasses import dataclass
from typing import Final

from sqlalchemy import Select, func, or_, select, update

from shared.db import Tx, now_ms
from shared.jobs.arcs import follow
from shared.jobs.claim import backoff_s
from shared.tables import Job, JobState

RING_AGAIN_MS: Final = 30_000
_LOST = "The trainer was lost"


@dataclass(frozen=True, kw_only=True)
class Swept:
    """What one sweep found. `ring`: jobs wait and no doorbell rang for them lately; the others are numbers of jobs."""

    ring: bool
    waiting: int
    requeued: int
    failed: int
    cancelled: int
    paused: int


def sweep(tx: Tx, *, may_expire: bool, lease_s: float = 60.0) -> Swept:
    """Carry out what is due. `may_expire` False leaves expired leases alone.

    A job that lost its trainer waits half a lease, twice that the next time, and runs alone: whatever killed the
    trainer must not take other jobs with it again.
    """
    ends = [_end_unclaimed(tx, job) for job in tx.scalars(_locked(_asked_while_queued()))]
    if may_expire:
        expired = select(Job).where(Job.state == JobState.RUNNING, Job.lease_expires_at < now_ms(tx))
        ends += [_end_lost(tx, job, lease_s) for job in tx.scalars(_locked(expired))]
    now = now_ms(tx)
    ready = select(func.count()).select_from(Job).where(Job.state == JobState.QUEUED, Job.not_before <= now)
    waiting = tx.scalar(ready) or 0
    unheard = ready.where(or_(Job.rung_at.is_(None), Job.rung_at < now - RING_AGAIN_MS))
    return Swept(
        ring=bool(tx.scalar(unheard)),
        waiting=waiting,
        requeued=ends.count(JobState.QUEUED),
        failed=ends.count(JobState.FAILED),
        cancelled=ends.count(JobState.CANCELLED),
        paused=ends.count(JobState.PAUSED),
    )


def mark_rung(tx: Tx) -> None:
    """Note that the doorbell rang for everything that waits now."""
    now = now_ms(tx)
    waiting = update(Job).where(Job.state == JobState.QUEUED, Job.not_before <= now)
    tx.execute(waiting.values(rung_at=now), execution_options={"synchronize_session": False})


def _asked_while_queued() -> Select[Job]:
    """Jobs that came back to the queue with a request open."""
    asked = or_(Job.cancel_requested_at.is_not(None), Job.pause_requested_at.is_not(None))
    return select(Job).where(Job.state == JobState.QUEUED, asked)


def _locked(query: Select[Job]) -> Select[Job]:
    """The jobs that no other transaction is at work on; those are left to it."""
    return query.with_for_update(skip_locked=True).execution_options(populate_existing=True)


def _end_unclaimed(tx: Tx, job: Job) -> JobState:
    if job.cancel_requested_at is not None:
        return _state(follow(tx, "cancel_queued", job.id, message="The job was cancelled."))
    return _state(follow(tx, "pause_queued", job.id, message="The job was paused."))


def _end_lost(tx: Tx, job: Job, lease_s: float) -> JobState:
    """Close the attempt of a job whose lease ran out."""
    fence, unrenewed = job.fence, (Job.lease_expires_at < now_ms(tx),)
    if job.cancel_requested_at is not None:
        message = f"{_LOST}; the job was cancelled, as asked."
        return _state(follow(tx, "cancel", job.id, fence=fence, guards=unrenewed, message=message))
    if job.attempt >= job.max_attempts:
        text = f"the trainer was lost in each of {job.max_attempts} attempts"
        failure = {"error": {"code": "attempts_exhausted", "message": text, "param": None}}
        message = f"The job failed: {text}"
        return _state(
            follow(tx, "give_up", job.id, fence=fence, guards=unrenewed, values=failure, level="error", message=message)
        )
    if job.pause_requested_at is not None:
        message = f"{_LOST}; the job was paused, as asked."
        alone = {"runs_alone": True}
        return _state(follow(tx, "pause", job.id, fence=fence, guards=unrenewed, values=alone, message=message))
    wait_s = backoff_s(job.attempt, lease_s)
    values = {"runs_alone": True, "not_before": now_ms(tx) + int(wait_s * 1000)}
    message = f"{_LOST} in attempt {job.attempt} of {job.max_attempts}; the job waits {wait_s:g} s in the queue."
    return _state(
        follow(tx, "lose", job.id, fence=fence, guards=unrenewed, values=values, level="warn", message=message)
    )


def _state(job: Job | None) -> JobState:
    """The state that an arc led to; nothing else can have moved a job that we hold locked."""
    if job is None:
        raise AssertionError
    return JobState(job.state)
