"""From what a job asks for to a TrainSpec in which nothing is 'auto' any more."""

import secrets
from dataclasses import dataclass
from typing import Any

from api.schemas.job_views import REFERENCE_LEARNING_RATE
from api.schemas.jobs import Hyperparameters, JobRequest
from shared import limits
from shared.errors import InvalidRequest, UnknownTarget
from shared.specs import LoraSpec, TrainSpec
from shared.tables import BaseModelRow

_DEFAULT_SEQ_LEN = 1024
_AIMED_STEPS = 100


@dataclass(frozen=True)
class Plan:
    """What will be trained. `total_steps` is an estimate: samples without a label are dropped later."""

    spec: TrainSpec
    total_steps: int


def plan(request: JobRequest, base: BaseModelRow, num_samples: int) -> Plan:
    """Resolve `request` over a data set of `num_samples`; raises InvalidRequest that names the field."""
    chosen, where = _hyperparameters(request)
    batch_size = _auto_batch_size(num_samples) if chosen.batch_size == "auto" else chosen.batch_size
    steps_per_epoch = -(-num_samples // batch_size)
    n_epochs = _auto_epochs(steps_per_epoch) if chosen.n_epochs == "auto" else chosen.n_epochs
    training = request.training
    spec = TrainSpec(
        lora=_lora(request.lora, base.config),
        seed=secrets.randbelow(limits.MAX_SEED + 1) if request.seed is None else request.seed,
        n_epochs=n_epochs,
        batch_size=batch_size,
        max_steps=training.max_steps,
        learning_rate=_learning_rate(request, chosen, where),
        lr_schedule=training.lr_schedule,
        warmup_steps=training.warmup_steps,
        weight_decay=training.weight_decay,
        max_grad_norm=training.max_grad_norm,
        max_seq_len=_max_seq_len(training.max_seq_len, base),
        train_on=training.train_on,
        checkpoint_every=training.checkpoint_every,
    )
    return Plan(spec, training.max_steps or min(n_epochs * steps_per_epoch, limits.MAX_STEPS))


def _hyperparameters(request: JobRequest) -> tuple[Hyperparameters, str]:
    """OpenAI's three, from their new place or their old one, and that place's path."""
    supervised = request.method.supervised if request.method else None
    new = supervised.hyperparameters if supervised else None
    if new is not None and request.hyperparameters is not None:
        raise InvalidRequest(
            "Give hyperparameters in 'method.supervised' or in 'hyperparameters', not in both.", param="hyperparameters"
        )
    if request.hyperparameters is not None:
        return request.hyperparameters, "hyperparameters"
    return new or Hyperparameters(), "method.supervised.hyperparameters"


def _auto_batch_size(num_samples: int) -> int:
    return min(max(num_samples // 16, 1), 8)


def _auto_epochs(steps_per_epoch: int) -> int:
    return min(max(-(-_AIMED_STEPS // max(steps_per_epoch, 1)), 3), 25)


def _learning_rate(request: JobRequest, chosen: Hyperparameters, where: str) -> float:
    multiplier, given = chosen.learning_rate_multiplier, request.training.learning_rate
    param = f"{where}.learning_rate_multiplier"
    if multiplier == "auto":
        return REFERENCE_LEARNING_RATE if given is None else given
    if given is not None:
        raise InvalidRequest(f"Give 'training.learning_rate' or '{param}', not both.", param="training.learning_rate")
    rate = REFERENCE_LEARNING_RATE * multiplier
    if not rate <= limits.MAX_LEARNING_RATE:
        raise InvalidRequest(
            f"'{param}' may be at most {limits.MAX_LEARNING_RATE / REFERENCE_LEARNING_RATE:g} (given: {multiplier:g}).",
            param=param,
        )
    return rate


def _max_seq_len(given: int | None, base: BaseModelRow) -> int:
    context: int = base.config["context_length"]
    if given is None:
        return min(_DEFAULT_SEQ_LEN, context, limits.MAX_SEQ_LEN)
    if given > context:
        raise InvalidRequest(
            f"'training.max_seq_len' may be at most {context}, the context of {base.name!r} (given: {given}).",
            param="training.max_seq_len",
        )
    return given


def _lora(asked: LoraSpec, config: dict[str, Any]) -> LoraSpec:
    """The adapter's shape with targets that the base model has; a dotted name is judged by its last part here."""
    there: set[str] = set(config["linear_modules"])
    presets: dict[str, list[str]] = config["presets"]
    targets = asked.target_modules
    if "target_modules" not in asked.model_fields_set and not there.issuperset(targets):
        return asked.model_copy(update={"target_modules": "attention"})
    missing: list[str]
    if isinstance(targets, str):
        missing = [] if presets.get(targets) else [targets]
    else:
        missing = [name for name in targets if name.rpartition(".")[2] not in there]
    if missing:
        raise UnknownTarget(
            f"'lora.target_modules': the model has no {', '.join(map(repr, missing))};"
            f" it has {', '.join(sorted(there))}, and the presets {', '.join(sorted(presets))}.",
            param="lora.target_modules",
        )
    return asked
