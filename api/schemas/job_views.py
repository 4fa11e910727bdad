"""Bodies of /v1/fine_tuning/jobs: what is answered."""

from typing import Any, Literal

from pydantic import TypeAdapter

from api.learning_rate import REFERENCE_LEARNING_RATE
from api.schemas.wire import Out
from shared.specs import LoraSpec, LrSchedule, TrainSpec
from shared.tables import Checkpoint, Job, JobEvent

Status = Literal["queued", "running", "paused", "succeeded", "failed", "cancelled"]
_STATUS: TypeAdapter[Status] = TypeAdapter(Status)


class JobError(Out):
    code: str
    message: str
    param: str | None = None


class ResolvedHyperparameters(Out):
    n_epochs: int
    batch_size: int
    learning_rate_multiplier: float


class ResolvedSupervised(Out):
    hyperparameters: ResolvedHyperparameters


class ResolvedMethod(Out):
    type: Literal["supervised"] = "supervised"
    supervised: ResolvedSupervised


class ResolvedTraining(Out):
    """What is trained in the end. `init_from` is the id of an adapter version."""

    learning_rate: float
    lr_schedule: LrSchedule
    lora_plus_ratio: float
    warmup_steps: int
    weight_decay: float
    max_grad_norm: float
    max_steps: int | None
    max_seconds: int | None
    max_seq_len: int
    train_on: Literal["completion", "all"]
    checkpoint_every: int | None
    validation_split: float | None
    eval_every: int | None
    early_stopping_patience: int | None
    publish: Literal["last", "best"]
    init_from: str | None


class FineTuningJob(Out):
    """A job, with every value resolved. `paused` is a status that OpenAI's enum lacks.

    `fine_tuned_model` is the adapter version that a succeeded job has made, as generation names it.
    """

    id: str
    object: Literal["fine_tuning.job"] = "fine_tuning.job"
    created_at: int
    started_at: int | None
    finished_at: int | None
    estimated_finish: int | None
    model: str
    fine_tuned_model: str | None
    organization_id: str
    status: Status
    error: JobError | None
    training_file: str
    validation_file: str | None
    result_files: list[str]
    trained_tokens: int | None
    seed: int
    suffix: str | None
    hyperparameters: ResolvedHyperparameters
    method: ResolvedMethod
    metadata: dict[str, str] | None
    adapter: str
    lora: LoraSpec
    training: ResolvedTraining
    priority: int
    queue_position: int | None
    """1 for the next in line; null unless queued, and in lists."""
    attempt: int
    step: int
    total_steps: int | None

    @classmethod
    def of(cls, row: Job, *, base: str, fine_tuned_model: str | None, queue_position: int | None) -> "FineTuningJob":
        spec = TrainSpec.model_validate(row.spec)
        hyperparameters = ResolvedHyperparameters(
            n_epochs=spec.n_epochs,
            batch_size=spec.batch_size,
            learning_rate_multiplier=float(f"{spec.learning_rate / REFERENCE_LEARNING_RATE:.12g}"),
        )
        return cls(
            id=row.id,
            created_at=row.created_at // 1000,
            started_at=_seconds(row.started_at),
            finished_at=_seconds(row.finished_at),
            estimated_finish=_seconds(row.estimated_finish_at),
            model=base,
            fine_tuned_model=fine_tuned_model,
            organization_id=row.tenant,
            status=_STATUS.validate_python(row.state),
            error=JobError.model_validate(row.error) if row.error else None,
            training_file=row.training_file_id,
            validation_file=row.validation_file_id,
            result_files=row.result_file_ids,
            trained_tokens=row.trained_tokens,
            seed=spec.seed,
            suffix=row.suffix,
            hyperparameters=hyperparameters,
            method=ResolvedMethod(supervised=ResolvedSupervised(hyperparameters=hyperparameters)),
            metadata={key: str(value) for key, value in row.tags.items()} or None,
            adapter=row.adapter_name,
            lora=spec.lora,
            training=ResolvedTraining.model_validate(spec.model_dump(include=set(ResolvedTraining.model_fields))),
            priority=row.priority,
            queue_position=queue_position,
            attempt=row.attempt,
            step=row.step,
            total_steps=row.total_steps,
        )


class JobEventObject(Out):
    """Something that happened to a job. A metrics event's `data` holds step, total_steps, train_loss and others."""

    id: str
    object: Literal["fine_tuning.job.event"] = "fine_tuning.job.event"
    created_at: int
    level: Literal["info", "warn", "error"]
    message: str
    type: Literal["message", "metrics"]
    data: dict[str, Any] | None

    @classmethod
    def of(cls, row: JobEvent) -> "JobEventObject":
        return cls.model_validate(
            {
                "id": row.id,
                "created_at": row.created_at // 1000,
                "level": row.level,
                "message": row.message,
                "type": row.type,
                "data": row.data,
            }
        )


class CheckpointObject(Out):
    """A point from which the job can go on."""

    id: str
    object: Literal["fine_tuning.job.checkpoint"] = "fine_tuning.job.checkpoint"
    created_at: int
    fine_tuning_job_id: str
    fine_tuned_model_checkpoint: str
    step_number: int
    metrics: dict[str, Any]

    @classmethod
    def of(cls, row: Checkpoint, adapter_name: str) -> "CheckpointObject":
        return cls(
            id=row.id,
            created_at=row.created_at // 1000,
            fine_tuning_job_id=row.job_id,
            fine_tuned_model_checkpoint=f"{adapter_name}:ckpt-step-{row.step}",
            step_number=row.step,
            metrics=row.metrics,
        )


def _seconds(unix_ms: int | None) -> int | None:
    return None if unix_ms is None else unix_ms // 1000
