"""Which job a trainer gets next."""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Final

from pydantic import ValidationError
from sqlalchemy import ColumnElement, Select, case, func, insert, or_, select, true
from sqlalchemy.orm import aliased

from shared.db import Tx, now_ms
from shared.jobs.arcs import follow
from shared.specs import TrainSpec
from shared.tables import Job, JobAttempt, JobState

WAITED_TOO_LONG_MS: Final = 60_000
"""After this a job is no longer passed over for one whose base model is at hand, or that need not run alone."""

MAX_BACKOFF_S: Final = 600.0

CLAIM_LOCK: Final = 0x636C61696D
CLAIM_IDLE_S: Final = 20
"""How long a program that has the lock may let the database wait for its next statement."""


@dataclass(frozen=True, kw_only=True)
class Claim:
    """The right to train one job until the lease ends; `fence` is the proof."""

    job_id: str
    tenant: str
    fence: int
    attempt: int
    trainer: str
    base_model_id: str
    training_file_id: str
    validation_file_id: str | None
    adapter_name: str
    spec: TrainSpec
    runs_alone: bool


def backoff_s(attempt: int, lease_s: float) -> float:
    """How long a job waits in the queue after its attempt number `attempt` (from 1) ended badly: half a lease, twice
    that after the next, at most MAX_BACKOFF_S."""
    return min(lease_s / 2 * 2.0 ** (attempt - 1), MAX_BACKOFF_S)


def claim_next(
    tx: Tx, *, trainer: str, lease_s: float, holds_base: str | None = None, max_running: int = 0
) -> Claim | None:
    """The next job for this trainer, now running under its lease, or None. Call until None: a doorbell says 'look'.

    Order: priority; jobs of the base model `holds_base` before others that have waited less than a minute; the tenant
    with the fewest running jobs, then the one served longest ago; age. Tenants with `max_running` running jobs are
    passed over; 0 is no cap. `trainer` names one process.

    While a trainer has running jobs it gets more of the base that it holds only, and none that runs alone. Once a job
    that it cannot take has waited a minute it gets nothing more, so that it comes free. A job that runs alone keeps its
    trainer to itself.
    """
    lock_claims(tx)
    alone = list(tx.scalars(select(Job.runs_alone).where(Job.state == JobState.RUNNING, Job.lease_owner == trainer)))
    if any(alone):
        return None
    while (job := _next(tx, holds_base=holds_base, is_busy=bool(alone), max_running=max_running)) is not None:
        claimed = _take(tx, job, trainer=trainer, lease_s=lease_s)
        if claimed is not None:
            return claimed
    return None


def take_back(tx: Tx, *, trainer: str, held: Collection[str]) -> int:
    """Put jobs back in the queue that run under this trainer's name though it does not hold them; returns how many.

    That is what is left of a claim whose COMMIT was done and whose answer was lost. The attempt is not charged.
    """
    lock_claims(tx)  # a COMMIT without an answer may still be under way
    mine = select(Job).where(Job.state == JobState.RUNNING, Job.lease_owner == trainer, Job.id.not_in(held))
    unheld = tx.scalars(mine, execution_options={"populate_existing": True}).all()
    message = "The job was put back in the queue: the answer to its trainer's claim was lost"
    for job in unheld:
        follow(tx, "give_back", job.id, fence=job.fence, values={"attempt": Job.attempt - 1}, message=message)
    return len(unheld)


def lock_claims(tx: Tx) -> None:
    """Claims look at what others run, so they go one at a time, as SQLite's write transactions do anyway.

    A program that is stopped or cut off in between loses its connection, and with it the lock: else nobody could claim
    until it is back.
    """
    if tx.get_bind().dialect.name == "postgresql":
        patience = func.set_config("idle_in_transaction_session_timeout", f"{CLAIM_IDLE_S}s", True)
        tx.execute(select(patience, func.pg_advisory_xact_lock(CLAIM_LOCK)))


def _next(tx: Tx, *, holds_base: str | None, is_busy: bool, max_running: int) -> Job | None:
    """The best candidate; None also when it needs an idle trainer and has waited long enough to be kept one."""
    line = claimable(now_ms(tx), holds_base=holds_base, max_running=max_running)
    candidates = line.with_for_update(of=Job, skip_locked=True)
    found = tx.execute(candidates.limit(1)).first()
    if found is None or not is_busy or (found[0].base_model_id == holds_base and not found[0].runs_alone):
        return None if found is None else found[0]
    if found.waited_ms > WAITED_TOO_LONG_MS:
        return None
    joins = (Job.runs_alone.is_(False), Job.base_model_id == holds_base)
    found = tx.execute(candidates.where(*joins).limit(1)).first()
    return None if found is None else found[0]


def claimable(now: ColumnElement[int], *, holds_base: str | None = None, max_running: int = 0) -> Select[Job, int]:
    """Jobs that an idle trainer may claim, the next in line first, and for how many ms each has waited."""
    other = aliased(Job)
    # Counted once for all tenants, and the last start is one look into an index: there may be thousands of jobs here.
    counts = select(other.tenant, func.count().label("running")).where(other.state == JobState.RUNNING)
    counted = counts.group_by(other.tenant).subquery()
    running = func.coalesce(counted.c.running, 0)
    last_served = select(func.coalesce(func.max(other.started_at), 0)).where(other.tenant == Job.tenant)
    ready_at = case((Job.not_before > Job.created_at, Job.not_before), else_=Job.created_at)
    waited_ms = now - ready_at
    is_at_hand = true() if holds_base is None else or_(Job.base_model_id == holds_base, waited_ms > WAITED_TOO_LONG_MS)
    return (
        select(Job, waited_ms.label("waited_ms"))
        .outerjoin(counted, counted.c.tenant == Job.tenant)
        .where(
            Job.state == JobState.QUEUED,
            Job.not_before <= now,
            Job.cancel_requested_at.is_(None),
            Job.pause_requested_at.is_(None),
            Job.attempt < Job.max_attempts,
            running < max_running if max_running else true(),
        )
        .order_by(
            Job.priority.desc(),
            case((is_at_hand, 0), else_=1),
            running,
            last_served.scalar_subquery(),
            Job.created_at,
            Job.id,
        )
        .execution_options(populate_existing=True)
    )


def _take(tx: Tx, job: Job, *, trainer: str, lease_s: float) -> Claim | None:
    """The claim on a queued job; None, and the job failed, if its row holds no valid spec any more."""
    now = now_ms(tx)
    first = job.attempt == 0 and job.started_at is None
    claimed = follow(
        tx,
        "claim",
        job.id,
        fence=job.fence,
        values={
            "fence": Job.fence + 1,
            "attempt": Job.attempt + 1,
            "lease_owner": trainer,
            "lease_expires_at": now + int(lease_s * 1000),
            "heartbeat_at": now,
            "started_at": func.coalesce(Job.started_at, now),
        },
        message="Training started." if first else f"Training continues, attempt {job.attempt + 1}.",
    )
    if claimed is None:
        return None
    attempt = insert(JobAttempt).values(job_id=job.id, fence=claimed.fence, trainer=trainer, started_at=now)
    tx.execute(attempt)
    try:
        spec = TrainSpec.model_validate(claimed.spec)
    except ValidationError as error:
        text = f"the stored training spec is not valid: {error.errors()[0]['msg']}"
        values = {"error": {"code": "bad_spec", "message": text, "param": None}}
        message = f"The job failed: {text}"
        follow(tx, "fail", job.id, fence=claimed.fence, values=values, level="error", message=message)
        return None
    return Claim(
        job_id=claimed.id,
        tenant=claimed.tenant,
        fence=claimed.fence,
        attempt=claimed.attempt,
        trainer=trainer,
        base_model_id=claimed.base_model_id,
        training_file_id=claimed.training_file_id,
        validation_file_id=claimed.validation_file_id,
        adapter_name=claimed.adapter_name,
        spec=spec,
        runs_alone=claimed.runs_alone,
    )
