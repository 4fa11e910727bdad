"""What a user asks of a job: submit, cancel, pause, resume."""

from typing import Final

from sqlalchemy import func, select, update

from shared import ids, limits
from shared.db import Tx, bound_waiting, now_ms
from shared.errors import QueueFull, StateConflict
from shared.jobs.arcs import ARCS, append_event, follow
from shared.jobs.queries import NewJob, get
from shared.tables import Job, JobState

SUBMIT_LOCK: Final = 0x737562
"""With a tenant; any number that nobody else locks."""
CANCELLED = "The job was cancelled."
PAUSED = "The job was paused."
_ASKED = {"cancel_requested_at": "Cancellation was requested.", "pause_requested_at": "A pause was requested."}


def submit(tx: Tx, new: NewJob, *, max_queued: int) -> Job:
    """A new queued job; raises QueueFull. Ring the doorbell after the commit, never before."""
    _one_at_a_time(tx, new.tenant)
    queued = select(func.count()).where(Job.tenant == new.tenant, Job.state == JobState.QUEUED)
    if tx.scalar(queued.select_from(Job)) >= max_queued:  # type: ignore[operator]  # a count is never None
        raise QueueFull(f"{max_queued} jobs are queued already, which is the limit; try again later")
    job = Job(
        id=ids.new_id(ids.JOB),
        tenant=new.tenant,
        state=ARCS["submit"].target.value,
        max_attempts=limits.MAX_ATTEMPTS,
        priority=new.priority,
        base_model_id=new.base_model_id,
        training_file_id=new.training_file_id,
        validation_file_id=new.validation_file_id,
        adapter_name=new.adapter_name,
        suffix=new.suffix,
        spec=new.spec.model_dump(mode="json"),
        tags=dict(new.tags),
        total_steps=new.total_steps,
        result_file_ids=[],
        created_at=now_ms(tx),
    )
    tx.add(job)
    tx.flush()
    tx.refresh(job)
    append_event(tx, job.id, level="info", type="message", message="The job was created and queued.", data=None)
    return job


def request_cancel(tx: Tx, tenant: str, job_id: str) -> Job:
    """The job, cancelled if nobody trains it, else asked to stop; StateConflict if it has ended. Twice is once."""
    _lock(tx, tenant, job_id)
    for arc in ("cancel_queued", "cancel_paused"):
        if job := follow(tx, arc, job_id, values={"cancel_requested_at": now_ms(tx)}, message=CANCELLED):
            return job
    return _ask_running(tx, tenant, job_id, "cancel_requested_at", "cancelled")


def request_pause(tx: Tx, tenant: str, job_id: str) -> Job:
    """The job, paused if nobody trains it, else asked to pause; StateConflict if it has ended. Twice is once."""
    if (job := _lock(tx, tenant, job_id)).state == JobState.PAUSED:
        return job
    now = now_ms(tx)
    if paused := follow(tx, "pause_queued", job_id, values={"pause_requested_at": now}, message=PAUSED):
        return paused
    return _ask_running(tx, tenant, job_id, "pause_requested_at", "paused")


def resume(tx: Tx, tenant: str, job_id: str) -> Job:
    """The paused job, queued again; StateConflict if it is not paused. Ring the doorbell after the commit."""
    _lock(tx, tenant, job_id)
    values = {"pause_requested_at": None, "not_before": 0}
    if job := follow(tx, "resume", job_id, values=values, message="The job was resumed and queued."):
        return job
    raise StateConflict(f"job {job_id} is {get(tx, tenant, job_id).state}, only a paused job can be resumed")


def _one_at_a_time(tx: Tx, tenant: str) -> None:
    """A tenant's submissions count what is queued: they go one at a time, as SQLite's write transactions do anyway."""
    if tx.get_bind().dialect.name == "postgresql":
        bound_waiting(tx)
        tx.execute(select(func.pg_advisory_xact_lock(SUBMIT_LOCK, func.hashtext(tenant))))


def _lock(tx: Tx, tenant: str, job_id: str) -> Job:
    """The tenant's job, locked until the transaction ends; NotFound.

    Several arcs are tried in turn, and a trainer must not move the job from one that was tried to one that is to come.
    """
    get(tx, tenant, job_id)
    bound_waiting(tx)
    query = select(Job).where(Job.id == job_id).with_for_update()
    return tx.scalars(query, execution_options={"populate_existing": True}).one()


def _ask_running(tx: Tx, tenant: str, job_id: str, column: str, participle: str) -> Job:
    """The running job with `column` set; the first request counts."""
    field = getattr(Job, column)
    asked = tx.scalars(
        update(Job)
        .where(Job.id == job_id, Job.state == JobState.RUNNING, field.is_(None))
        .values({column: now_ms(tx)})
        .returning(Job),
        execution_options={"synchronize_session": False, "populate_existing": True},
    ).one_or_none()
    if asked is not None:
        append_event(tx, job_id, level="info", type="message", message=_ASKED[column], data=None)
        return asked
    job = get(tx, tenant, job_id)
    if job.state != JobState.RUNNING:
        raise StateConflict(f"job {job_id} is {job.state} and cannot be {participle}")
    return job
