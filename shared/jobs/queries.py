"""Reading jobs, their events and checkpoints: always one tenant's, always in pages."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from shared.db import Page, Tx
from shared.specs import TrainSpec
from shared.tables import Checkpoint, Job, JobEvent


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
    """The tenant's job; NotFound if it is missing or someone else's."""
    raise NotImplementedError


def list_page(
    tx: Tx, tenant: str, *, limit: int, after: str | None = None, metadata: Mapping[str, str] | None = None
) -> Page[Job]:
    """Jobs, newest first, that carry all of `metadata`; an empty mapping means jobs without any, None means all."""
    raise NotImplementedError


def events_page(
    tx: Tx, tenant: str, job_id: str, *, limit: int, after: str | None = None, newest_first: bool = True
) -> Page[JobEvent]:
    """Events of one job after the event `after` in the chosen order."""
    raise NotImplementedError


def checkpoints_page(tx: Tx, tenant: str, job_id: str, *, limit: int, after: str | None = None) -> Page[Checkpoint]:
    """Checkpoints of one job that still exist, newest first."""
    raise NotImplementedError


def newest_checkpoints(tx: Tx, job_id: str) -> list[Checkpoint]:
    """Checkpoints that still exist, newest first, to resume from the first whose files are intact."""
    raise NotImplementedError


def queue_position(tx: Tx, job: Job) -> int | None:
    """1 for the next in line by priority and age (fair share may change it), None if the job is not queued."""
    raise NotImplementedError
