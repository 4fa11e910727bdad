"""What training would see and need, asked for before it starts."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from api.learning_rate import REFERENCE_LEARNING_RATE
from api.schemas.job_views import ResolvedHyperparameters, ResolvedTraining
from api.schemas.wire import ModelName, Out, Query, whole_number
from shared import limits
from shared.jobs import NewJob
from shared.specs import Foreseen, LoraSpec


class ReportQuery(Query):
    """With `model` the report has `tokens`: what training on that base model would see. `max_seq_len` and `train_on`
    are those of a job."""

    model: ModelName | None = None
    max_seq_len: Annotated[int, Field(ge=8, le=limits.MAX_SEQ_LEN), BeforeValidator(whole_number)] | None = None
    train_on: Literal["completion", "all"] = "completion"


class TokenReport(Out):
    """A data set as one base model sees it. `data` counts samples, tokens and labels, and shows one sample decoded."""

    model: str
    max_seq_len: int
    train_on: Literal["completion", "all"]
    data: dict[str, Any]


class EstimateData(Out):
    """What is trained on and what is held out of it, or a validation file."""

    training: dict[str, Any]
    validation: dict[str, Any] | None


class JobEstimate(Out):
    """What a job would be: the answer to `dry_run`. Every value is resolved as that of a job is.

    `num_tokens` are seen and `num_label_tokens` of them learnt in all `total_steps`. `memory_bytes` estimates what a
    trainer with this job alone needs at most. `seconds` come from the speed of recent jobs on this base model
    here, and are null before there are any.
    """

    object: Literal["fine_tuning.job.estimate"] = "fine_tuning.job.estimate"
    model: str
    training_file: str
    validation_file: str | None
    seed: int
    hyperparameters: ResolvedHyperparameters
    lora: LoraSpec
    training: ResolvedTraining
    steps_per_epoch: int
    total_steps: int
    num_tokens: int
    num_label_tokens: int
    trainable_parameters: int
    memory_bytes: int
    tokens_per_second: float | None
    seconds: float | None
    data: EstimateData

    @classmethod
    def of(cls, job: NewJob, found: Foreseen, *, base: str, tokens_per_second: float | None) -> "JobEstimate":
        spec = job.spec
        return cls(
            model=base,
            training_file=job.training_file_id,
            validation_file=job.validation_file_id,
            seed=spec.seed,
            hyperparameters=ResolvedHyperparameters(
                n_epochs=spec.n_epochs,
                batch_size=spec.batch_size,
                learning_rate_multiplier=float(f"{spec.learning_rate / REFERENCE_LEARNING_RATE:.12g}"),
            ),
            lora=spec.lora,
            training=ResolvedTraining.model_validate(spec.model_dump(include=set(ResolvedTraining.model_fields))),
            steps_per_epoch=found.steps_per_epoch,
            total_steps=found.total_steps,
            num_tokens=found.num_tokens,
            num_label_tokens=found.num_label_tokens,
            trainable_parameters=found.trainable_parameters,
            memory_bytes=found.memory_bytes,
            tokens_per_second=tokens_per_second,
            seconds=found.num_tokens / tokens_per_second if tokens_per_second else None,
            data=EstimateData(training=found.training, validation=found.validation),
        )
