"""A job's files as tokens, before it may take a place in the engine: what is wrong with them costs no training time."""

import copy
from collections.abc import Callable
from dataclasses import dataclass

from shared.errors import InvalidTrainingFile
from shared.specs import TrainSpec
from worker.base_model import BaseModel
from worker.training.dataset import TokenisedDataset, Tokeniser, split
from worker.training.job import Level, TrainingJob


@dataclass(frozen=True)
class Prepared:
    """A job and its data. `valid` is the validation file, or what `spec.validation_split` holds out, or None."""

    job: TrainingJob
    train: TokenisedDataset
    valid: TokenisedDataset | None


def prepare(job: TrainingJob, base: BaseModel, *, between_samples: Callable[[], None]) -> Prepared:
    """Read and tokenise the job's files, and report on them as events.

    Raises InvalidTrainingFile: a bad line, or nothing to learn. `between_samples` is called again and again and may
    raise to end the reading. Safe on any thread: a tokenizer must not be used by two, so this takes a copy.
    """
    tokenizer = copy.deepcopy(base.tokenizer)
    tokeniser = Tokeniser(tokenizer, base.eos_token_ids, job.spec, longest=base.context_length)
    valid_path = job.valid_path
    train, valid = train_and_valid(
        lambda: tokeniser.read(job.train_path, between_samples=between_samples),
        None if valid_path is None else lambda: tokeniser.read(valid_path, between_samples=between_samples),
        job.spec,
    )
    _report(job, "Training", train)
    if valid is not None:
        _report(job, "Validation", valid)
    return Prepared(job, train, valid)


def train_and_valid(
    read_train: Callable[[], TokenisedDataset], read_valid: Callable[[], TokenisedDataset] | None, spec: TrainSpec
) -> tuple[TokenisedDataset, TokenisedDataset | None]:
    """What is trained on, and what it is evaluated on: the validation file, a split of the training file, or None."""
    train = read_train()
    if read_valid is None:
        share = spec.validation_split
        return (train, None) if share is None else split(train, share=share, seed=spec.seed)
    try:
        return train, read_valid()
    except InvalidTrainingFile as error:
        raise InvalidTrainingFile(f"validation file: {error.message}", param="validation_file") from error


def _report(job: TrainingJob, which: str, data: TokenisedDataset) -> None:
    report = data.report
    message = (
        f"{which} data: {report.num_used} samples, {report.num_tokens} tokens, {report.num_label_tokens} of them labels"
    )
    if report.num_truncated:
        message += f"; {report.num_truncated} of {report.num_samples} samples were cut at the longest length"
    if report.num_dropped:
        message += f"; {report.num_dropped} without any label were dropped"
    level: Level = "warn" if report.num_truncated or report.num_dropped else "info"
    job.on_event(level, "message", message, report.to_json())
