"""Losses that are not finite: what is published, evaluated and rolled back to in spite of them."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from shared.errors import TrainingFailed
from tests.worker.training.conftest import Recorder
from tests.worker.training.test_failures import spoil_forwards
from worker.base_model import BaseModel
from worker.training.engine import TrainingEngine

Engines = Callable[..., TrainingEngine]
Recorders = Callable[..., Recorder]

TIMEOUT_S = 60


@pytest.mark.parametrize(("steps", "bad"), [(1, {1}), (2, {1, 2}), (3, {1, 2, 3}), (5, {4, 5})])
def test_an_adapter_that_learnt_nothing_last_is_not_published(
    steps: int, bad: set[int], llama_base: BaseModel, recorder: Recorders, train_file: Path, engine_for: Engines
) -> None:
    """A job without a finite step, and one that ends in a row of bad ones, fails as diverged."""
    spoil_forwards(llama_base, lambda n: n in bad)
    future = engine_for(llama_base, max_tokens=4096).submit(recorder(max_steps=steps, batch_size=4).job(train_file))

    with pytest.raises(TrainingFailed, match="training diverged") as failure:
        future.result(TIMEOUT_S)
    assert failure.value.error_code == "diverged"


def test_one_bad_step_at_the_end_is_skipped_like_any_other(
    llama_base: BaseModel, recorder: Recorders, train_file: Path, engine_for: Engines
) -> None:
    """The job finishes with what the steps before have learnt, and with the evaluation that is due after the last."""
    seen = recorder(batch_size=8, max_steps=3, publish="best", eval_every=100)
    spoil_forwards(llama_base, lambda n: n == 3)
    job = seen.job(train_file, valid_path=train_file)
    result = engine_for(llama_base, max_tokens=4096).submit(job).result(TIMEOUT_S)

    assert (result.outcome, result.steps) == ("finished", 3)
    assert [(data["step"], "valid_loss" in data) for data in seen.metrics()] == [(1, False), (2, False), (2, True)]


def test_a_validation_loss_that_is_not_finite_is_null_and_never_best(
    llama_base: BaseModel, recorder: Recorders, train_file: Path, engine_for: Engines
) -> None:
    """JSON has no NaN, and Postgres refuses it; the next finite loss is the best one, and the patience counts on."""
    seen = recorder(max_steps=4, batch_size=8, eval_every=1, publish="best", early_stopping_patience=2)
    spoil_forwards(llama_base, lambda n: n == 2)  # the first evaluation
    job = seen.job(train_file, valid_path=train_file)
    result = engine_for(llama_base, max_tokens=4096).submit(job).result(TIMEOUT_S)
    losses = [data["valid_loss"] for data in seen.metrics()]

    assert json.dumps([dict(data) for data in seen.metrics()], allow_nan=False)
    assert (result.steps, losses[0]) == (4, None)
    assert min(losses[1:]) == losses[-1]
    assert "The adapter of step 4 is published" in seen.events[-1][2]


def test_validation_losses_that_stay_bad_end_the_job_early(
    llama_base: BaseModel, recorder: Recorders, train_file: Path, engine_for: Engines
) -> None:
    """An evaluation without a finite loss is none that was better."""
    seen = recorder(max_steps=8, batch_size=8, eval_every=1, early_stopping_patience=2)
    spoil_forwards(llama_base, lambda n: n % 2 == 0)
    job = seen.job(train_file, valid_path=train_file)

    assert engine_for(llama_base, max_tokens=4096).submit(job).result(TIMEOUT_S).steps == 2
    assert "none was finite" in seen.events[-1][2]
