"""From what a job asks for to a TrainSpec in which nothing is 'auto' any more."""

import secrets
from dataclasses import dataclass
from typing import Literal

from api.learning_rate import REFERENCE_LEARNING_RATE, auto_learning_rate
from api.lora_shape import Start, continued_shape, resolve_shape
from api.problems import Problems
from api.schemas.jobs import Hyperparameters, JobRequest, Training
from shared import limits
from shared.specs import LoraSpec, TrainSpec
from shared.tables import BaseModelRow

_DEFAULT_SEQ_LEN = 1024
_AIMED_STEPS = 100


@dataclass(frozen=True)
class Plan:
    """What will be trained. `total_steps` is an estimate: samples without a label are dropped later."""

    spec: TrainSpec
    total_steps: int


def plan(request: JobRequest, base: BaseModelRow, num_samples: int, *, start: Start | None = None) -> Plan:
    """Resolve `request` over a data set of `num_samples`; raises one InvalidRequest for all that does not go together.

    `start` is what `training.init_from` names.
    """
    problems = Problems()
    training = request.training
    has_validation = request.validation_file is not None or training.validation_split is not None
    num_trained = num_samples - _num_held_out(request, num_samples, problems)
    chosen, where = _hyperparameters(request, problems)
    batch_size = _auto_batch_size(num_trained) if chosen.batch_size == "auto" else chosen.batch_size
    steps_per_epoch = -(-num_trained // batch_size)
    n_epochs = _auto_epochs(steps_per_epoch) if chosen.n_epochs == "auto" else chosen.n_epochs
    total_steps = training.max_steps or min(n_epochs * steps_per_epoch, limits.MAX_STEPS)
    rate = _learning_rate(request, chosen, where, problems) or auto_learning_rate(
        base.config["num_parameters"], total_steps
    )
    max_seq_len = _max_seq_len(training.max_seq_len, base, problems)
    lora = _lora(request.lora, base, start, problems)
    _check_validation(training, has_validation, problems)
    _check_warmup(training.warmup_steps, total_steps, problems)
    problems.raise_if_any()
    spec = TrainSpec(
        lora=lora,
        seed=secrets.randbelow(limits.MAX_SEED + 1) if request.seed is None else request.seed,
        n_epochs=n_epochs,
        batch_size=batch_size,
        learning_rate=rate,
        max_seq_len=max_seq_len,
        publish=_publish(training, has_validation),
        init_from=start.version_id if start else None,
        **training.model_dump(exclude={"learning_rate", "max_seq_len", "publish", "init_from"}),
    )
    return Plan(spec, total_steps)


def _hyperparameters(request: JobRequest, problems: Problems) -> tuple[Hyperparameters, str]:
    """OpenAI's three, from their new place or their old one, and that place's path."""
    supervised = request.method.supervised if request.method else None
    new = supervised.hyperparameters if supervised else None
    if new is not None and request.hyperparameters is not None:
        problems.add(
            "hyperparameters",
            "Give hyperparameters in 'method.supervised' or in 'hyperparameters', not in both.",
        )
    if request.hyperparameters is not None:
        return request.hyperparameters, "hyperparameters"
    return new or Hyperparameters(), "method.supervised.hyperparameters"


def _auto_batch_size(num_samples: int) -> int:
    return min(max(num_samples // 16, 1), 8)


def _auto_epochs(steps_per_epoch: int) -> int:
    return min(max(-(-_AIMED_STEPS // max(steps_per_epoch, 1)), 3), 25)


def _learning_rate(request: JobRequest, chosen: Hyperparameters, where: str, problems: Problems) -> float | None:
    """The rate that is asked for, in either way; None where both are left to us."""
    multiplier, given = chosen.learning_rate_multiplier, request.training.learning_rate
    param = f"{where}.learning_rate_multiplier"
    if multiplier == "auto":
        return None if given == "auto" else given
    if given != "auto":
        problems.add("training.learning_rate", f"Give 'training.learning_rate' or '{param}', not both.")
        return given
    rate = REFERENCE_LEARNING_RATE * multiplier
    if not 0 < rate <= limits.MAX_LEARNING_RATE:
        most = limits.MAX_LEARNING_RATE / REFERENCE_LEARNING_RATE
        problems.add(
            param,
            f"'{param}' must leave a learning rate above 0 and at most {limits.MAX_LEARNING_RATE:g}, so it may be at"
            f" most {most:g} (given: {multiplier:g}).",
        )
    return rate


def _max_seq_len(given: int | None, base: BaseModelRow, problems: Problems) -> int:
    context: int = base.config["context_length"]
    if given is None:
        return min(_DEFAULT_SEQ_LEN, context, limits.MAX_SEQ_LEN)
    if given > context:
        problems.add(
            "training.max_seq_len",
            f"'training.max_seq_len' may be at most {context}, the context of {base.name!r} (given: {given}).",
        )
    return given


def _lora(asked: LoraSpec, base: BaseModelRow, start: Start | None, problems: Problems) -> LoraSpec:
    if start is not None:
        return continued_shape(asked, start, base.config, problems)
    return resolve_shape(asked, base.config, problems)


def _num_held_out(request: JobRequest, num_samples: int, problems: Problems) -> int:
    """How many samples of the training file are kept for validation: at least one, and at least one is left."""
    split = request.training.validation_split
    if split is None:
        return 0
    if request.validation_file is not None:
        problems.add("training.validation_split", "Give 'validation_file' or 'training.validation_split', not both.")
        return 0
    if num_samples < 2:
        problems.add(
            "training.validation_split",
            f"'training.validation_split' needs at least 2 samples; 'training_file' has {num_samples}.",
        )
        return 0
    return max(1, round(num_samples * split))


def _check_validation(training: Training, has_validation: bool, problems: Problems) -> None:
    """What looks at the validation loss needs data to compute it on."""
    asked = {
        "eval_every": training.eval_every is not None,
        "early_stopping_patience": training.early_stopping_patience is not None,
        "publish": training.publish == "best",
    }
    for field in [name for name, is_asked in asked.items() if is_asked and not has_validation]:
        problems.add(
            f"training.{field}",
            f"'training.{field}' (given: {getattr(training, field)!r}) needs validation data: give 'validation_file'"
            " or 'training.validation_split'.",
        )


def _check_warmup(warmup_steps: int, total_steps: int, problems: Problems) -> None:
    if warmup_steps > total_steps:
        problems.add(
            "training.warmup_steps",
            f"'training.warmup_steps' may be at most {total_steps}, the steps of this job (given: {warmup_steps}).",
        )


def _publish(training: Training, has_validation: bool) -> Literal["last", "best"]:
    """'auto' is the best where the end is not of the user's choosing and there is a loss to judge by."""
    if training.publish != "auto":
        return training.publish
    ends_early = training.early_stopping_patience is not None or training.max_seconds is not None
    return "best" if has_validation and ends_early else "last"
