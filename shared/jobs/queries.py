"""Reading jobs, their events and checkpoints: always one tenant's, always in pages."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from statistics import median
from typing import Any, Final

from sqlalchemy import ColumnElement, String, and_, bindparam, cast, func, or_, select, tuple_

from shared import ids
from shared.db import Page, Tx, cursor, keyset_page
from shared.errors import NotFound
from shared.specs import TrainSpec
from shared.tables import Checkpoint, Job, JobEvent, JobState


@dataclass(frozen=True, kw_only=True)
class NewJob:
    """What a user submits; names and files are checked by the caller."""

    tenant: str
    base_model_id: str
    training_file_id: str
    adapter_name: str
    spec: TrainSpec
    validation_file_id: str | None = None
    suffix: str | None = None
    tags: dict[str, str] = field(default_factory=dict)
    priority: int = 0
    total_steps: int | None = None


def get(tx: Tx, tenant: str, job_id: str) -> Job:
    """The tenant's job as it is now; NotFound if it is missing or someone else's."""
    query = select(Job).where(Job.id == job_id, Job.tenant == tenant)
    job = tx.scalars(query, execution_options={"populate_existing": True}).one_or_none() if _is_job(job_id) else None
    if job is None:
        raise NotFound(f"there is no fine-tuning job {job_id!r}")
    return job


def list_page(
    tx: Tx, tenant: str, *, limit: int, after: str | None = None, metadata: Mapping[str, str] | None = None
) -> Page[Job]:
    """Jobs, newest first, that carry all of `metadata`; an empty mapping means jobs without any, None means all."""
    query = select(Job).where(Job.tenant == tenant)
    if metadata is not None and not metadata:
        query = query.where(cast(Job.tags, String) == "{}")
    for key, value in (metadata or {}).items():
        query = query.where(_has_tag(tx, key, value))
    last = None if after is None else cursor(tx, select(Job).where(Job.tenant == tenant, Job.id == after), after)
    return keyset_page(tx, query, keys=(Job.created_at, Job.id), after=last, limit=limit, newest_first=True)


def events_page(
    tx: Tx, tenant: str, job_id: str, *, limit: int, after: str | None = None, newest_first: bool = True
) -> Page[JobEvent]:
    """Events of one job after the event `after` in the chosen order."""
    get(tx, tenant, job_id)
    query = select(JobEvent).where(JobEvent.job_id == job_id)
    last = None if after is None else cursor(tx, query.where(JobEvent.id == after), after)
    return keyset_page(tx, query, keys=(JobEvent.seq,), after=last, limit=limit, newest_first=newest_first)


def checkpoints_page(tx: Tx, tenant: str, job_id: str, *, limit: int, after: str | None = None) -> Page[Checkpoint]:
    """Checkpoints of one job that still exist, newest first."""
    get(tx, tenant, job_id)
    query = select(Checkpoint).where(Checkpoint.job_id == job_id)
    last = None if after is None else cursor(tx, query.where(Checkpoint.id == after), after)
    live = query.where(Checkpoint.deleted_at.is_(None))
    return keyset_page(tx, live, keys=_CHECKPOINT_ORDER, after=last, limit=limit, newest_first=True)


def newest_checkpoints(tx: Tx, job_id: str) -> list[Checkpoint]:
    """Checkpoints that still exist, newest first, to resume from the first whose files are intact."""
    live = select(Checkpoint).where(Checkpoint.job_id == job_id, Checkpoint.deleted_at.is_(None))
    return list(tx.scalars(live.order_by(*(key.desc() for key in _CHECKPOINT_ORDER))))


def step_metrics(tx: Tx, job_id: str) -> list[dict[str, Any]]:
    """Data of the metrics events of all attempts, by step; of a step that was told twice, the last."""
    query = select(JobEvent.data).where(JobEvent.job_id == job_id, JobEvent.type == "metrics").order_by(JobEvent.seq)
    rows = {data["step"]: data for data in tx.scalars(query) if data}
    return [rows[step] for step in sorted(rows)]


def queue_position(tx: Tx, job: Job) -> int | None:
    """1 for the next in line by priority and age (fair share may change it), None if the job is not queued."""
    if job.state != JobState.QUEUED:
        return None
    sooner = or_(
        Job.priority > job.priority,
        and_(Job.priority == job.priority, tuple_(Job.created_at, Job.id) < tuple_(job.created_at, job.id)),
    )
    ahead = select(func.count()).select_from(Job).where(Job.state == JobState.QUEUED, sooner)
    return (tx.scalar(ahead) or 0) + 1


def recent_tokens_per_second(tx: Tx, base_model_id: str) -> float | None:
    """The median speed, in tokens/s, of the last steps of recent jobs on this base model; None before any succeeded.

    Over all tenants: it tells nothing of a job, only what the trainers here can do.
    """
    done = select(Job.id).where(Job.base_model_id == base_model_id, Job.state == JobState.SUCCEEDED)
    speeds: list[float] = []
    for job_id in tx.scalars(done.order_by(Job.finished_at.desc()).limit(_RECENT_JOBS)).all():
        metrics = select(JobEvent.data).where(JobEvent.job_id == job_id, JobEvent.type == "metrics")
        for data in tx.scalars(metrics.order_by(JobEvent.seq.desc()).limit(_RECENT_STEPS)):
            if data and isinstance(speed := data.get("tokens_per_second"), int | float) and speed > 0:
                speeds.append(float(speed))
    return median(speeds) if speeds else None


_RECENT_JOBS: Final = 5
_RECENT_STEPS: Final = 50
_CHECKPOINT_ORDER: Final = (Checkpoint.fence, Checkpoint.step)
"""By claim first: a job may have had to go back to an earlier step."""


def _is_job(text: str) -> bool:
    return ids.is_id(text, ids.JOB)


def _has_tag(tx: Tx, key: str, value: str) -> ColumnElement[bool]:
    """True for jobs whose tag `key` is `value`. The key is a bound value, never a JSON path: it is a user's text."""
    if tx.get_bind().dialect.name == "sqlite":
        pair = func.json_each(Job.tags).table_valued("key", "value")
        return select(1).select_from(pair).where(pair.c.key == key, pair.c.value == value).exists()
    return Job.tags.op("->>", return_type=String())(bindparam(None, key, String())) == value
