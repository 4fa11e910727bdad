"""The tables and the constraints that keep their invariants. Times are integer milliseconds since 1970, by the
database's own clock (`shared.db.now_ms`). The migration in migrations/versions adds two triggers that no ORM can
say: a terminal job row never changes, and a fence never falls.
"""

from enum import StrEnum
from typing import Any

from sqlalchemy import JSON, BigInteger, CheckConstraint, ForeignKey, Index, MetaData, UniqueConstraint, text
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column


class JobState(StrEnum):
    QUEUED = "queued"
    RUNNING = "running"
    PAUSED = "paused"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def is_terminal(self) -> bool:
        return self in TERMINAL


TERMINAL = frozenset({JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED})


class Table(DeclarativeBase):
    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(table_name)s_%(column_0_N_name)s",
            "uq": "uq_%(table_name)s_%(column_0_N_name)s",
            "ck": "ck_%(table_name)s_%(constraint_name)s",
            "fk": "fk_%(table_name)s_%(column_0_name)s",
            "pk": "pk_%(table_name)s",
        }
    )
    type_annotation_map = {int: BigInteger, dict[str, Any]: JSON(none_as_null=True), list[str]: JSON(none_as_null=True)}


class ApiKey(Table):
    __tablename__ = "api_keys"
    id: Mapped[str] = mapped_column(primary_key=True)
    tenant: Mapped[str]
    secret_sha256: Mapped[str]
    scopes: Mapped[list[str]]
    label: Mapped[str | None]
    created_at: Mapped[int]
    expires_at: Mapped[int | None]
    revoked_at: Mapped[int | None]


class File(Table):
    """An uploaded data set or a result file; its bytes are files/<id>."""

    __tablename__ = "files"
    __table_args__ = (
        CheckConstraint("status IN ('uploaded', 'processed', 'error')", name="status"),
        Index(None, "tenant", "created_at", "id"),
    )
    id: Mapped[str] = mapped_column(primary_key=True)
    tenant: Mapped[str]
    purpose: Mapped[str]
    filename: Mapped[str]
    size_bytes: Mapped[int]
    sha256: Mapped[str]
    status: Mapped[str]
    status_details: Mapped[str | None]
    report: Mapped[dict[str, Any] | None]
    created_at: Mapped[int]
    deleted_at: Mapped[int | None]


class BaseModelRow(Table):
    """A registered base model; its bytes are models/<id>. `config` holds what the API must know without torch:
    architecture, context_length, num_parameters, linear_modules (leaf names), presets {preset: [leaf names]}."""

    __tablename__ = "base_models"
    __table_args__ = (
        Index("uq_base_models_name_live", "name", unique=True,
              sqlite_where=text("deleted_at IS NULL"), postgresql_where=text("deleted_at IS NULL")),
    )  # fmt: skip
    id: Mapped[str] = mapped_column(primary_key=True)
    name: Mapped[str]
    digest: Mapped[str]
    config: Mapped[dict[str, Any]]
    created_at: Mapped[int]
    deleted_at: Mapped[int | None]


class Job(Table):
    __tablename__ = "jobs"
    __table_args__ = (
        CheckConstraint(
            "state IN ('queued', 'running', 'paused', 'succeeded', 'failed', 'cancelled')", name="state"
        ),
        CheckConstraint("fence >= 0 AND attempt >= 0 AND attempt <= max_attempts", name="counters"),
        CheckConstraint("(state = 'running') = (lease_owner IS NOT NULL)", name="running_has_owner"),
        CheckConstraint("(state = 'running') = (lease_expires_at IS NOT NULL)", name="running_has_lease"),
        CheckConstraint(
            "(state IN ('succeeded', 'failed', 'cancelled')) = (finished_at IS NOT NULL)", name="terminal_is_finished"
        ),
        Index(None, "tenant", "created_at", "id"),
        Index(None, "state", "priority", "created_at"),
        Index(None, "tenant", "started_at"),
    )  # fmt: skip
    id: Mapped[str] = mapped_column(primary_key=True)
    tenant: Mapped[str]
    state: Mapped[str]
    fence: Mapped[int] = mapped_column(default=0)
    attempt: Mapped[int] = mapped_column(default=0)
    max_attempts: Mapped[int]
    priority: Mapped[int] = mapped_column(default=0)
    base_model_id: Mapped[str] = mapped_column(ForeignKey("base_models.id"))
    training_file_id: Mapped[str] = mapped_column(ForeignKey("files.id"))
    validation_file_id: Mapped[str | None] = mapped_column(ForeignKey("files.id"))
    adapter_name: Mapped[str]
    suffix: Mapped[str | None]
    spec: Mapped[dict[str, Any]]
    tags: Mapped[dict[str, Any]]
    step: Mapped[int] = mapped_column(default=0)
    total_steps: Mapped[int | None]
    trained_tokens: Mapped[int | None]
    estimated_finish_at: Mapped[int | None]
    error: Mapped[dict[str, Any] | None]
    result_file_ids: Mapped[list[str]]
    lease_owner: Mapped[str | None]
    lease_expires_at: Mapped[int | None]
    heartbeat_at: Mapped[int | None]
    not_before: Mapped[int] = mapped_column(default=0)
    runs_alone: Mapped[bool] = mapped_column(default=False)
    storage_failures: Mapped[int] = mapped_column(default=0, server_default=text("0"))
    cancel_requested_at: Mapped[int | None]
    pause_requested_at: Mapped[int | None]
    rung_at: Mapped[int | None]
    created_at: Mapped[int]
    started_at: Mapped[int | None]
    finished_at: Mapped[int | None]


class JobAttempt(Table):
    __tablename__ = "job_attempts"
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"), primary_key=True)
    fence: Mapped[int] = mapped_column(primary_key=True)
    trainer: Mapped[str]
    started_at: Mapped[int]
    ended_at: Mapped[int | None]
    outcome: Mapped[str | None]


class JobEvent(Table):
    """Append-only. `seq` counts up from 1 within a job."""

    __tablename__ = "job_events"
    __table_args__ = (
        UniqueConstraint("job_id", "seq"),
        CheckConstraint("level IN ('info', 'warn', 'error')", name="level"),
        CheckConstraint("type IN ('message', 'metrics')", name="type"),
    )
    id: Mapped[str] = mapped_column(primary_key=True)
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"))
    seq: Mapped[int]
    created_at: Mapped[int]
    level: Mapped[str]
    type: Mapped[str]
    message: Mapped[str]
    data: Mapped[dict[str, Any] | None]


class Checkpoint(Table):
    """A whole, fsynced directory checkpoints/<job_id>/<step>-<fence>."""

    __tablename__ = "checkpoints"
    __table_args__ = (UniqueConstraint("job_id", "step", "fence"),)
    id: Mapped[str] = mapped_column(primary_key=True)
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"))
    step: Mapped[int]
    fence: Mapped[int]
    manifest: Mapped[dict[str, Any]]
    metrics: Mapped[dict[str, Any]]
    created_at: Mapped[int]
    deleted_at: Mapped[int | None]


class Adapter(Table):
    """A name of one tenant. The row outlives deletion, so that a version number is never used twice."""

    __tablename__ = "adapters"
    __table_args__ = (UniqueConstraint("tenant", "name"),)
    id: Mapped[str] = mapped_column(primary_key=True)
    tenant: Mapped[str]
    name: Mapped[str]
    description: Mapped[str | None]
    tags: Mapped[dict[str, Any]]
    last_version: Mapped[int] = mapped_column(default=0)
    created_at: Mapped[int]
    updated_at: Mapped[int]
    deleted_at: Mapped[int | None]


class AdapterVersion(Table):
    """Immutable weights in adapters/<id>. The unique job_id is the second lock on publishing once."""

    __tablename__ = "adapter_versions"
    __table_args__ = (
        UniqueConstraint("adapter_id", "version"),
        CheckConstraint("state IN ('ready', 'corrupt', 'deleted')", name="state"),
    )
    id: Mapped[str] = mapped_column(primary_key=True)
    adapter_id: Mapped[str] = mapped_column(ForeignKey("adapters.id"))
    version: Mapped[int]
    state: Mapped[str]
    job_id: Mapped[str | None] = mapped_column(ForeignKey("jobs.id"), unique=True)
    base_model_id: Mapped[str] = mapped_column(ForeignKey("base_models.id"))
    manifest: Mapped[dict[str, Any]]
    size_bytes: Mapped[int]
    sha256: Mapped[str]
    created_at: Mapped[int]
    deleted_at: Mapped[int | None]


class AdapterAlias(Table):
    __tablename__ = "adapter_aliases"
    adapter_id: Mapped[str] = mapped_column(ForeignKey("adapters.id"), primary_key=True)
    alias: Mapped[str] = mapped_column(primary_key=True)
    version_id: Mapped[str] = mapped_column(ForeignKey("adapter_versions.id"))


class IdempotencyKey(Table):
    __tablename__ = "idempotency_keys"
    tenant: Mapped[str] = mapped_column(primary_key=True)
    key: Mapped[str] = mapped_column(primary_key=True)
    request_sha256: Mapped[str]
    status: Mapped[int | None]
    response: Mapped[dict[str, Any] | None]
    created_at: Mapped[int]


class AuditEvent(Table):
    """Who changed what, or was refused. Append-only, and holds no bodies and no secrets.

    `tenant` null: nobody's, such as a refused login or a base model. `actor` is a key's id, 'local' without keys,
    'cli:<user>', or 'unknown'. `status` is the answer's, null for the command line.
    """

    __tablename__ = "audit_events"
    __table_args__ = (Index(None, "created_at", "id"), Index(None, "tenant", "created_at", "id"))
    id: Mapped[str] = mapped_column(primary_key=True)
    created_at: Mapped[int]
    tenant: Mapped[str | None]
    actor: Mapped[str]
    action: Mapped[str]
    object_id: Mapped[str | None]
    status: Mapped[int | None]
    request_id: Mapped[str | None]
    remote_addr: Mapped[str | None]
