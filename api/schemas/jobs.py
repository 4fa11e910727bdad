"""Bodies of /v1/fine_tuning/jobs: what is asked."""

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from api.schemas.wire import Flag, In, Metadata, ModelName, PageQuery, PageSize, Query, whole_number
from shared import limits
from shared.specs import LoraSpec

Auto = Literal["auto"]
Epochs = Annotated[int, Field(ge=1, le=limits.MAX_EPOCHS)]
BatchSize = Annotated[int, Field(ge=1, le=limits.MAX_BATCH_SIZE)]
Multiplier = Annotated[float, Field(gt=0)]
Steps = Annotated[int, Field(ge=1, le=limits.MAX_STEPS)]


class Hyperparameters(In):
    """OpenAI's three knobs. `auto`: batch_size is one sixteenth of the samples, from 1 to 8; n_epochs is enough for
    100 optimizer steps, from 3 to 25; learning_rate_multiplier is 1, which means a learning rate of 2e-4."""

    n_epochs: Auto | Epochs = "auto"
    batch_size: Auto | BatchSize = "auto"
    learning_rate_multiplier: Auto | Multiplier = "auto"


class Supervised(In):
    hyperparameters: Hyperparameters | None = None


class Method(In):
    type: Literal["supervised"]
    supervised: Supervised | None = None


class Training(In):
    """Knobs beyond OpenAI's. `max_steps` wins over n_epochs; `learning_rate` excludes learning_rate_multiplier;
    `max_seq_len` defaults to 1024 or the model's context, whichever is less."""

    learning_rate: Annotated[float, Field(gt=0, le=limits.MAX_LEARNING_RATE)] | None = None
    lr_schedule: Literal["linear", "constant"] = "linear"
    warmup_steps: Annotated[int, Field(ge=0, le=limits.MAX_STEPS)] = 0
    weight_decay: Annotated[float, Field(ge=0, le=1)] = 0.0
    max_grad_norm: Annotated[float, Field(gt=0, le=1000)] = 1.0
    max_steps: Steps | None = None
    max_seq_len: Annotated[int, Field(ge=8, le=limits.MAX_SEQ_LEN)] | None = None
    train_on: Literal["completion", "all"] = "completion"
    checkpoint_every: Steps | None = None


class JobRequest(In):
    """One training job. Everything but `model` and `training_file` may be left out.

    `suffix` names the adapter; without it a name like lora-0123456789ab is made up. A missing `seed` is drawn and kept.
    `lora.target_modules` defaults to q_proj and v_proj where the model has them, else to 'attention'.
    """

    model: ModelName
    training_file: str
    validation_file: str | None = None
    suffix: Annotated[str, Field(min_length=1, max_length=64)] | None = None
    seed: Annotated[int, Field(ge=0, le=limits.MAX_SEED)] | None = None
    metadata: Metadata | None = None
    method: Method | None = None
    hyperparameters: Hyperparameters | None = None
    """Deprecated by OpenAI in favour of `method`."""
    integrations: Annotated[list[object], Field(max_length=0)] | None = None
    lora: LoraSpec = LoraSpec()
    training: Training = Training()
    priority: Annotated[int, Field(ge=-limits.MAX_PRIORITY, le=limits.MAX_PRIORITY)] = 0


MAX_WAIT_S = 30


class WaitQuery(Query):
    """Hold the answer until the job's status changes or it has ended, for at most `wait` seconds."""

    wait: Annotated[int, Field(ge=0, le=MAX_WAIT_S), BeforeValidator(whole_number)] = 0


def _null_is_none(value: object) -> object:
    return {} if value == "null" else value


class JobListQuery(PageQuery):
    """`metadata[key]=value` lists only jobs that carry it; `metadata=null` only jobs without metadata."""

    metadata: Annotated[dict[str, str], BeforeValidator(_null_is_none)] | None = None


class EventQuery(PageQuery):
    """`stream=true`, or `Accept: text/event-stream`, follows the job from its first event to its end instead."""

    stream: Flag = False


class CheckpointQuery(PageQuery):
    limit: PageSize = 10
