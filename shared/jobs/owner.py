"""What a trainer does with a job that it owns. Every function is a compare-and-swap on the claim's fence."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from sqlalchemy import ColumnElement, func, insert, select, update

from shared import ids
from shared.db import Tx, now_ms
from shared.errors import CancelRequested, OwnershipLost
from shared.jobs.arcs import EventType, Level, append_event, follow
from shared.jobs.claim import Claim, backoff_s
from shared.specs import Order, StepReport
from shared.store.adapters import PreparedVersion, insert_version
from shared.tables import AdapterVersion, Checkpoint, Job, JobEvent, JobState

MAX_STORAGE_FAILURES: Final = 3
STORAGE_WAIT_LEASES: Final = 10
"""Ten minutes at the default lease: somebody has to make room, or the disk to come back."""


@dataclass(frozen=True)
class NewEvent:
    """What is to be told of a job; `data` is JSON."""

    level: Level
    type: EventType
    message: str
    data: dict[str, Any] | None


def heartbeat(
    tx: Tx, claim: Claim, *, lease_s: float, report: StepReport | None = None, trained_tokens: int | None = None
) -> Order:
    """Renew the lease, note progress, and bring back what was asked; LOST if another owner has the job.

    A lease that ran out is renewed all the same as long as nobody else has taken the job.
    """
    now = now_ms(tx)
    values: dict[str, Any] = {"heartbeat_at": now, "lease_expires_at": now + int(lease_s * 1000)}
    if report is not None:
        values |= {"step": report.step, "total_steps": report.total_steps}
        values |= {"estimated_finish_at": now + int(report.eta_seconds * 1000)}
    if trained_tokens is not None:
        values |= {"trained_tokens": trained_tokens}
    row = tx.execute(
        update(Job).where(*_owned(claim)).values(**values).returning(Job.cancel_requested_at, Job.pause_requested_at),
        execution_options={"synchronize_session": False},
    ).one_or_none()
    if row is None:
        return Order.LOST
    cancel, pause = row
    return Order.CANCEL if cancel is not None else Order.PAUSE if pause is not None else Order.GO_ON


def add_event(
    tx: Tx,
    claim: Claim,
    *,
    level: Level = "info",
    type: EventType = "message",
    message: str,
    data: Mapping[str, Any] | None = None,
) -> None:
    """Append an event; raises OwnershipLost."""
    _lock(tx, claim)
    append_event(tx, claim.job_id, level=level, type=type, message=message, data=data)


def add_events(tx: Tx, claim: Claim, events: Sequence[NewEvent]) -> None:
    """Append events in their order, in a few round trips however many they are; raises OwnershipLost."""
    _lock(tx, claim)
    last = select(func.coalesce(func.max(JobEvent.seq), 0), now_ms(tx)).where(JobEvent.job_id == claim.job_id)
    seq, now = tx.execute(last).one()
    rows = [
        {"id": ids.new_id(ids.EVENT), "job_id": claim.job_id, "seq": seq + number, "created_at": now, **vars(event)}
        for number, event in enumerate(events, 1)
    ]
    if rows:
        tx.execute(insert(JobEvent), rows)


def record_checkpoint(
    tx: Tx,
    claim: Claim,
    *,
    checkpoint_id: str,
    step: int,
    manifest: Mapping[str, Any],
    metrics: Mapping[str, Any] | None = None,
) -> None:
    """Make a published checkpoint directory known; raises OwnershipLost."""
    _lock(tx, claim)
    tx.execute(
        insert(Checkpoint).values(
            id=checkpoint_id,
            job_id=claim.job_id,
            step=step,
            fence=claim.fence,
            manifest=dict(manifest),
            metrics=dict(metrics or {}),
            created_at=now_ms(tx),
        )
    )
    message = f"Checkpoint saved at step {step}."
    append_event(tx, claim.job_id, level="info", type="message", message=message, data={"step": step})


def succeed(
    tx: Tx,
    claim: Claim,
    prepared: PreparedVersion,
    *,
    result_file_ids: Sequence[str] = (),
    trained_tokens: int | None = None,
) -> AdapterVersion:
    """The new adapter version: the job succeeds and its version exists, or neither.

    Raises OwnershipLost, or CancelRequested if a cancel came first: then call `stop_cancelled` in a new transaction.
    A pause that was asked is moot.
    """
    values: dict[str, Any] = {"result_file_ids": list(result_file_ids), "pause_requested_at": None}
    if trained_tokens is not None:
        values |= {"trained_tokens": trained_tokens}
    job = follow(
        tx,
        "publish",
        claim.job_id,
        fence=claim.fence,
        guards=(Job.cancel_requested_at.is_(None),),
        values=values,
        message="The job has succeeded.",
    )
    if job is None:
        _lock(tx, claim)
        raise CancelRequested
    version = insert_version(tx, claim.tenant, claim.adapter_name, prepared, claim.job_id)
    name = f"{claim.adapter_name}@{version.version}"
    append_event(tx, job.id, level="info", type="message", message=f"Adapter {name} is ready.", data={"model": name})
    return version


def published_version(tx: Tx, job_id: str) -> AdapterVersion | None:
    """The version that a job has published, to read back a COMMIT whose answer was lost."""
    return tx.scalars(select(AdapterVersion).where(AdapterVersion.job_id == job_id)).one_or_none()


def fail(tx: Tx, claim: Claim, *, code: str, message: str, param: str | None = None) -> None:
    """End the job as failed (as cancelled if that was asked); raises OwnershipLost."""
    _lock(tx, claim)  # so that no cancel is accepted between the two
    if _follow_cancel(tx, claim):
        return
    _need(_fail(tx, claim, code=code, message=message, param=param))


def give_back(tx: Tx, claim: Claim, *, charge: bool, reason: str, lease_s: float = 60.0) -> None:
    """Put the job back in the queue; raises OwnershipLost. `reason` is shown to the user.

    With `charge` the attempt counts: the job fails if none is left, else waits as after a lost trainer. A cancel or
    pause that was asked is carried out instead.
    """
    job = _lock(tx, claim)
    if _follow_cancel(tx, claim) or _follow_pause(tx, claim):
        return
    if charge and job.attempt >= job.max_attempts:
        message = f"The last of {job.max_attempts} attempts ended: {reason}"
        _need(_fail(tx, claim, code="attempts_exhausted", message=message, param=None))
        return
    values: dict[str, Any] = {"attempt": job.attempt - 1}
    if charge:
        values = {"not_before": now_ms(tx) + int(backoff_s(job.attempt, lease_s) * 1000)}
    message = f"The job was put back in the queue: {reason}"
    _need(follow(tx, "give_back", claim.job_id, fence=claim.fence, values=values, message=message))


def give_back_for_storage(tx: Tx, claim: Claim, *, code: str, reason: str, lease_s: float = 60.0) -> None:
    """Put the job back in the queue because the disk was full or did not work; raises OwnershipLost.

    The attempt is not charged. After MAX_STORAGE_FAILURES such attempts the next fails the job with `code`. A cancel or
    pause that was asked is carried out instead. `reason` is shown to the user.
    """
    job = _lock(tx, claim)
    if _follow_cancel(tx, claim) or _follow_pause(tx, claim):
        return
    if job.storage_failures >= MAX_STORAGE_FAILURES:
        message = f"the disk was full or did not work in {job.storage_failures + 1} attempts: {reason}"
        _need(_fail(tx, claim, code=code, message=message, param=None))
        return
    wait_s = STORAGE_WAIT_LEASES * lease_s
    values = {
        "attempt": job.attempt - 1,
        "storage_failures": job.storage_failures + 1,
        "not_before": now_ms(tx) + int(wait_s * 1000),
    }
    message = f"The job was put back in the queue for {wait_s:g} s, until the disk can take its files: {reason}"
    _need(follow(tx, "give_back", claim.job_id, fence=claim.fence, values=values, level="warn", message=message))


def stop_cancelled(tx: Tx, claim: Claim) -> None:
    """End the job as cancelled, as was asked; raises OwnershipLost."""
    _lock(tx, claim)
    if not _follow_cancel(tx, claim):
        raise AssertionError(f"nobody asked to cancel {claim.job_id}")


def stop_paused(tx: Tx, claim: Claim) -> None:
    """Pause the job, as was asked (cancel wins); raises OwnershipLost. The attempt is not charged."""
    _lock(tx, claim)
    if not (_follow_cancel(tx, claim) or _follow_pause(tx, claim)):
        raise AssertionError(f"nobody asked to pause {claim.job_id}")


def _owned(claim: Claim) -> tuple[ColumnElement[bool], ...]:
    return Job.id == claim.job_id, Job.state == JobState.RUNNING, Job.fence == claim.fence


def _lock(tx: Tx, claim: Claim) -> Job:
    """The claimed job, locked until the transaction ends (SQLite: by the transaction itself); raises OwnershipLost."""
    query = select(Job).where(*_owned(claim)).with_for_update()
    return _need(tx.scalars(query, execution_options={"populate_existing": True}).one_or_none())


def _need(job: Job | None) -> Job:
    if job is None:
        raise OwnershipLost
    return job


def _fail(tx: Tx, claim: Claim, *, code: str, message: str, param: str | None) -> Job | None:
    values = {"error": {"code": code, "message": message, "param": param}}
    return follow(
        tx, "fail", claim.job_id, fence=claim.fence, values=values, level="error", message=f"The job failed: {message}"
    )


def _follow_cancel(tx: Tx, claim: Claim) -> Job | None:
    asked = (Job.cancel_requested_at.is_not(None),)
    return follow(tx, "cancel", claim.job_id, fence=claim.fence, guards=asked, message="The job was cancelled.")


def _follow_pause(tx: Tx, claim: Claim) -> Job | None:
    asked = (Job.pause_requested_at.is_not(None),)
    values = {"attempt": Job.attempt - 1}
    message = "The job was paused."
    return follow(tx, "pause", claim.job_id, fence=claim.fence, guards=asked, values=values, message=message)
