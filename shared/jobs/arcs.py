"""The arcs of a job's life, and the one function that performs them.

`docs/architecture.md` shows `diagram()`; a test compares the two.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

from sqlalchemy import ColumnElement, func, insert, select, update

from shared import ids
from shared.db import Tx, now_ms
from shared.tables import Job, JobAttempt, JobEvent, JobState

Level = Literal["info", "warn", "error"]
EventType = Literal["message", "metrics"]


@dataclass(frozen=True)
class Arc:
    """One way from a state to another; `outcome` is how the attempt that it ends is remembered."""

    source: JobState | None
    target: JobState
    sentence: str
    outcome: str | None = None


_Q, _R, _P = JobState.QUEUED, JobState.RUNNING, JobState.PAUSED

ARCS: Final[Mapping[str, Arc]] = {
    "submit": Arc(None, _Q, "submitted; the row is committed, then the doorbell rings"),
    "claim": Arc(_Q, _R, "claimed by a trainer: fence + 1, attempt + 1, lease set"),
    "publish": Arc(_R, JobState.SUCCEEDED, "published by the holder of the fence, no cancel asked", "succeeded"),
    "fail": Arc(_R, JobState.FAILED, "an error that a retry would meet again, or no attempt left", "failed"),
    "give_up": Arc(_R, JobState.FAILED, "lease ran out and no attempt is left", "lost"),
    "lose": Arc(_R, _Q, "lease ran out, attempts left", "lost"),
    "give_back": Arc(_R, _Q, "trainer shut down, could not go on, or the disk failed; attempts left", "given back"),
    "pause": Arc(_R, _P, "pause was asked; checkpoint written", "paused"),
    "pause_queued": Arc(_Q, _P, "pause was asked before a trainer came"),
    "resume": Arc(_P, _Q, "resume was asked"),
    "cancel": Arc(_R, JobState.CANCELLED, "cancel was asked; the trainer stopped or was lost", "cancelled"),
    "cancel_queued": Arc(_Q, JobState.CANCELLED, "cancel was asked before a trainer came"),
    "cancel_paused": Arc(_P, JobState.CANCELLED, "cancel was asked while paused"),
}


def follow(
    tx: Tx,
    name: str,
    job_id: str,
    *,
    fence: int | None = None,
    guards: tuple[ColumnElement[bool], ...] = (),
    values: Mapping[str, Any] | None = None,
    message: str,
    level: Level = "info",
    data: Mapping[str, Any] | None = None,
    ended_at: int | None = None,
) -> Job | None:
    """The job after the arc, its event written and its attempt closed; None, and nothing done, if it was not there.

    'There' means: in the arc's source state, under `fence` if one is given, and meeting all `guards`. `ended_at`, in
    ms since 1970, is when the attempt ended if that was before now.
    """
    arc = ARCS[name]
    now = now_ms(tx)
    changes: dict[str, Any] = {"state": arc.target.value}
    if arc.source is JobState.RUNNING:
        changes |= {"lease_owner": None, "lease_expires_at": None, "estimated_finish_at": None}
    if arc.target is JobState.QUEUED:
        changes |= {"rung_at": None}
    if arc.target.is_terminal:
        changes |= {"finished_at": now}
    conditions = [Job.id == job_id, Job.state == arc.source, *guards]
    if fence is not None:
        conditions.append(Job.fence == fence)
    job = tx.scalars(
        update(Job).where(*conditions).values(**(changes | dict(values or {}))).returning(Job),
        execution_options={"synchronize_session": False, "populate_existing": True},
    ).one_or_none()
    if job is None:
        return None
    if arc.outcome is not None:
        attempt = update(JobAttempt).where(JobAttempt.job_id == job_id, JobAttempt.fence == job.fence)
        closed = attempt.values(ended_at=now if ended_at is None else ended_at, outcome=arc.outcome)
        tx.execute(closed, execution_options={"synchronize_session": False})
    append_event(tx, job_id, level=level, type="message", message=message, data=data)
    return job


def append_event(
    tx: Tx, job_id: str, *, level: Level, type: EventType, message: str, data: Mapping[str, Any] | None
) -> None:
    """Write the job's next event. The caller holds the job's row: it has just written it, or locked it."""
    last = select(func.coalesce(func.max(JobEvent.seq), 0)).where(JobEvent.job_id == job_id).scalar_subquery()
    tx.execute(
        insert(JobEvent).values(
            id=ids.new_id(ids.EVENT),
            job_id=job_id,
            seq=last + 1,
            created_at=now_ms(tx),
            level=level,
            type=type,
            message=message,
            data=None if data is None else dict(data),
        )
    )


def diagram() -> str:
    """The arcs as a Mermaid state diagram."""
    lines = ["stateDiagram-v2"]
    lines += [f"    {_name(arc.source)} --> {arc.target.value}: {arc.sentence}" for arc in ARCS.values()]
    lines += [f"    {state.value} --> [*]" for state in JobState if state.is_terminal]
    return "\n".join(lines) + "\n"


def _name(state: JobState | None) -> str:
    return "[*]" if state is None else state.value
