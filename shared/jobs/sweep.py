"""Rules that mend the ledger. All are idempotent and compare-and-swap; several sweepers may run."""

from dataclasses import dataclass
from functools import partial
from typing import Any, Final

from sqlalchemy import Select, case, func, or_, select, update

from shared.db import Tx, now_ms
from shared.jobs.arcs import append_event, follow
from shared.jobs.claim import backoff_s, claimable, lock_claims
from shared.tables import Job, JobAttempt, JobEvent, JobState

RING_AGAIN_MS: Final = 30_000
UNHEEDED_MS: Final = 60_000
"""A running job that was asked to cancel this long ago should have stopped: its trainer asks every few seconds."""
UNCLAIMED_MS: Final = 300_000
UNCLAIMED: Final = "unclaimed"
_LOST = "The trainer was lost"


@dataclass(frozen=True, kw_only=True)
class Swept:
    """What one sweep found. `ring`: jobs wait and no doorbell rang for them lately; the others are numbers of jobs.

    `unheeded` are ids of jobs whose trainers are alive and have not stopped though cancel was asked a minute ago.
    """

    ring: bool
    waiting: int
    requeued: int
    failed: int
    cancelled: int
    paused: int
    overdue: int = 0
    unheeded: tuple[str, ...] = ()


def sweep(
    tx: Tx, *, may_expire: bool, lease_s: float = 60.0, max_job_s: float | None = None, max_running: int = 0
) -> Swept:
    """Carry out what is due. `may_expire` False leaves expired leases alone.

    A job that lost its trainer waits half a lease, twice that the next time, and runs alone: whatever killed the
    trainer must not take other jobs with it again. A job that has run longer than `max_job_s` is asked to cancel.
    `max_running` is the cap that claims hold to.
    """
    overdue = 0 if max_job_s is None else _stop_overdue(tx, max_job_s)
    ends = [_end_unclaimed(tx, job) for job in tx.scalars(_locked(_asked_while_queued()))]
    if may_expire:
        expired = select(Job).where(Job.state == JobState.RUNNING, Job.lease_expires_at < now_ms(tx))
        ends += [_end_lost(tx, job, lease_s) for job in tx.scalars(_locked(expired))]
    _tell_unclaimed(tx, max_running)
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
        overdue=overdue,
        unheeded=tuple(tx.scalars(_unheeded(tx))),
    )


def mark_rung(tx: Tx) -> None:
    """Note that the doorbell rang for everything that waits now."""
    lock_claims(tx)  # who answers the ring at once must not pass over a job because its row is being written here
    now = now_ms(tx)
    waiting = update(Job).where(Job.state == JobState.QUEUED, Job.not_before <= now)
    tx.execute(waiting.values(rung_at=now), execution_options={"synchronize_session": False})


def _stop_overdue(tx: Tx, max_job_s: float) -> int:
    """Ask jobs to cancel that have run too long, all attempts together; the error says why. Returns how many.

    Time in the queue or paused does not count, nor what passed after the lease of a lost trainer. Those queued are
    asked too: they would be stopped as soon as they are claimed.
    """
    now = now_ms(tx)
    unasked = Job.state.in_((JobState.RUNNING, JobState.QUEUED)), Job.cancel_requested_at.is_(None)
    until = case(
        (JobAttempt.ended_at.is_not(None), JobAttempt.ended_at),
        (Job.lease_expires_at < now, Job.lease_expires_at),
        else_=now,
    )
    ran_ms = select(func.sum(until - JobAttempt.started_at)).where(JobAttempt.job_id == Job.id).scalar_subquery()
    over = select(Job.id, ran_ms).where(*unasked, Job.fence > 0, ran_ms > int(max_job_s * 1000)).order_by(Job.id)
    over = over.with_for_update(of=Job, skip_locked=True)  # whoever holds a row must not hold up the sweep
    stopped = 0
    for job_id, ms in tx.execute(over).all():
        text = f"the job has run for {int(ms) // 1000} s in all its attempts, and {max_job_s:g} s are allowed here"
        error = {"code": "time_limit", "message": text, "param": None}
        asking = update(Job).where(Job.id == job_id, *unasked).values(cancel_requested_at=now, error=error)
        if tx.execute(asking.returning(Job.id), execution_options={"synchronize_session": False}).first() is None:
            continue  # it has ended meanwhile, or somebody else asked
        append_event(tx, job_id, level="warn", type="message", message=f"Cancellation was requested: {text}", data=None)
        stopped += 1
    return stopped


def _tell_unclaimed(tx: Tx, max_running: int) -> None:
    """Note in the events of the next in line, once, that no trainer takes it.

    Not while any job runs: then trainers are there, and may be busy. Since when it waits is the time of its last event.
    """
    now = now_ms(tx)
    tended = select(Job.id).where(Job.state == JobState.RUNNING, Job.lease_expires_at >= now)
    old = select(Job.id).where(Job.state == JobState.QUEUED, Job.created_at < now - UNCLAIMED_MS)
    if tx.scalar(tended.limit(1)) is not None or tx.scalar(old.limit(1)) is None:
        return
    found = tx.execute(claimable(now, max_running=max_running).limit(1)).first()
    if found is None or found.waited_ms <= UNCLAIMED_MS:
        return
    # Locked only now: a claim that finds a job locked passes it over.
    job = tx.scalars(_locked(select(Job).where(Job.id == found[0].id, Job.state == JobState.QUEUED))).one_or_none()
    if job is None:
        return
    events = select(now - JobEvent.created_at, JobEvent.data).where(JobEvent.job_id == job.id)
    last = tx.execute(events.order_by(JobEvent.seq.desc()).limit(1)).first()
    age_ms, data = (found.waited_ms, None) if last is None else last
    if age_ms > UNCLAIMED_MS and (data or {}).get("code") != UNCLAIMED:
        message = (
            f"No trainer has taken this job for {UNCLAIMED_MS // 60_000} minutes, though it is the next in line: check "
            "that a trainer runs, that it reaches the database and the broker, and that its disk has room"
        )
        append_event(tx, job.id, level="warn", type="message", message=message, data={"code": UNCLAIMED})


def _unheeded(tx: Tx) -> Select[str]:
    now = now_ms(tx)
    alive = Job.state == JobState.RUNNING, Job.lease_expires_at >= now
    return select(Job.id).where(*alive, Job.cancel_requested_at < now - UNHEEDED_MS).order_by(Job.id)


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
    """Close the attempt of a job whose lease ran out, as of then."""
    unrenewed = (Job.lease_expires_at < now_ms(tx),)
    end = partial(follow, tx, job_id=job.id, fence=job.fence, guards=unrenewed, ended_at=job.lease_expires_at)
    if job.cancel_requested_at is not None:
        return _state(end(name="cancel", message=f"{_LOST}; the job was cancelled, as asked."))
    if job.attempt >= job.max_attempts:
        text = f"the trainer was lost in each of {job.max_attempts} attempts"
        failure = {"error": {"code": "attempts_exhausted", "message": text, "param": None}}
        return _state(end(name="give_up", values=failure, level="error", message=f"The job failed: {text}"))
    alone: dict[str, Any] = {"runs_alone": True}
    if job.pause_requested_at is not None:
        return _state(end(name="pause", values=alone, message=f"{_LOST}; the job was paused, as asked."))
    wait_s = backoff_s(job.attempt, lease_s)
    values = alone | {"not_before": now_ms(tx) + int(wait_s * 1000)}
    message = f"{_LOST} in attempt {job.attempt} of {job.max_attempts}; the job waits {wait_s:g} s in the queue."
    return _state(end(name="lose", values=values, level="warn", message=message))


def _state(job: Job | None) -> JobState:
    """The state that an arc led to; nothing else can have moved a job that we hold locked."""
    if job is None:
        raise AssertionError
    return JobState(job.state)
