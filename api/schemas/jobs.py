"""Bodies of /v1/fine_tuning/jobs: what is asked."""

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from api.schemas.wire import Flag, In, Metadata, ModelName, PageQuery, PageSize, Query, whole_number
from shared import limits
from shared.specs import LoraSpec, LrSchedule

Auto = Literal["auto"]
Epochs = Annotated[int, Field(ge=1, le=limits.MAX_EPOCHS)]
BatchSize = Annotated[int, Field(ge=1, le=limits.MAX_BATCH_SIZE)]
Multiplier = Annotated[float, Field(gt=0)]
Steps = Annotated[int, Field(ge=1, le=limits.MAX_STEPS)]


class Hyperparameters(In):
    """OpenAI's three knobs. `auto`: batch_size is one sixteenth of the samples, from 1 to 8; n_epochs is enough for
    100 optimizer steps, from 3 to 25. learning_rate_multiplier scales 2e-4, always; `auto` leaves the rate to
    `training.learning_rate`, and what came of it is in the answer."""

    n_epochs: Auto | Epochs = "auto"
    batch_size: Auto | BatchSize = "auto"
    learning_rate_multiplier: Auto | Multiplier = "auto"


class Supervised(In):
    hyperparameters: Hyperparameters | None = None


class Method(In):
    type: Literal["supervised"]
    supervised: Supervised | None = None


class Training(In):
    """Knobs beyond OpenAI's.

    `learning_rate` excludes learning_rate_multiplier. Its `auto` is 5e-4 (1e9 / N)^(1/4) for a base model of N
    parameters, half as much again in runs of fewer than 100 steps; N counts as 1e8 at least. LoRA wants about 10 times
    the rate of full fine-tuning, about 15 times in short runs, nearly whatever its rank ("LoRA Without Regret",
    Thinking Machines 2025). B learns at `lora_plus_ratio` times the rate of A (LoRA+).

    `max_steps` wins over n_epochs. `max_seconds` ends the training after so much time, with an adapter; an operator may
    limit all jobs (LORAD_MAX_JOB_S), and a job that meets that ends without one.
    `max_seq_len` defaults to 1024 or the model's context, whichever is less. `train_on` says whether prompts are
    learnt too.

    `validation_split` holds out this share of the training file; it excludes `validation_file`. One of the two is
    needed for what follows. `eval_every` counts steps; without it, each epoch ends with an evaluation. Training
    stops after `early_stopping_patience` evaluations in a row without a lower validation loss. `publish` is the
    adapter of the last step or of the best evaluation; `auto` is the best if there is validation and
    early stopping or max_seconds is asked for, else the last.

    `init_from` is an adapter version of the same base model, name@3 or name@alias, whose weights are the start. `lora`
    is then taken from it, all but the dropout, and may be left out; the answer holds the version's id."""

    learning_rate: Auto | Annotated[float, Field(gt=0, le=limits.MAX_LEARNING_RATE)] = "auto"
    lr_schedule: LrSchedule = "linear"
    lora_plus_ratio: Annotated[float, Field(ge=1, le=limits.MAX_LORA_PLUS_RATIO)] = 1.0
    warmup_steps: Annotated[int, Field(ge=0, le=limits.MAX_STEPS)] = 0
    weight_decay: Annotated[float, Field(ge=0, le=1)] = 0.0
    max_grad_norm: Annotated[float, Field(gt=0, le=1000)] = 1.0
    max_steps: Steps | None = None
    max_seconds: Annotated[int, Field(ge=1, le=limits.MAX_SECONDS)] | None = None
    max_seq_len: Annotated[int, Field(ge=8, le=limits.MAX_SEQ_LEN)] | None = None
    train_on: Literal["completion", "all"] = "completion"
    checkpoint_every: Steps | None = None
    validation_split: Annotated[float, Field(gt=0, le=0.5)] | None = None
    eval_every: Steps | None = None
    early_stopping_patience: Steps | None = None
    publish: Literal["auto", "last", "best"] = "auto"
    init_from: ModelName | None = None


class JobRequest(In):
    """One training job. Everything but `model` and `training_file` may be left out.

    `suffix` names the adapter; without it a name like lora-0123456789ab is made up. A missing `seed` is drawn and kept.
    `lora.target_modules` defaults to q_proj and v_proj where the model has them, else to 'attention'. The keys of
    `lora.rank_pattern` and `lora.alpha_pattern` must match modules that are adapted. `dry_run` answers with an
    estimate and creates nothing.
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
    dry_run: bool = False


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
