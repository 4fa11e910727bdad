"""What a spec may ask of a training beyond steps and rates: evaluation, early stopping, the best adapter, a time
budget, a held-out split, and where to start from."""

import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from shared.errors import IncompatibleAdapter, InvalidTrainingFile
from shared.specs import Order
from tests.worker.training.conftest import PAIRS, Recorder
from worker.base_model import BaseModel
from worker.lora.format import read_adapter
from worker.training.engine import TrainingEngine
from worker.training.job import TrainingResult

Engines = Callable[..., TrainingEngine]
Recorders = Callable[..., Recorder]
Lines = Callable[..., Path]

UNLIKE = [{"prompt": p["prompt"], "completion": p["completion"][::-1]} for p in PAIRS]
"""The training questions with their answers backwards: the better the training, the worse they are foretold."""


def written(result: TrainingResult, into: Path) -> dict[str, torch.Tensor]:
    result.write_adapter(into)
    return {path: torch.cat([a_RI.flatten(), b_OR.flatten()])
            for path, (a_RI, b_OR) in read_adapter(into).tensors.items()}  # fmt: skip


def evaluated(seen: Recorder) -> list[tuple[int, float]]:
    return [(data["step"], data["valid_loss"]) for data in seen.metrics() if "valid_loss" in data]


def test_eval_every(llama_base: BaseModel, recorder: Recorders, train_file: Path, engine_for: Engines) -> None:
    """Evaluations come every so many steps, whatever the epochs, and after the last step."""
    seen = recorder(eval_every=4, max_steps=10)
    engine_for(llama_base).submit(seen.job(train_file, valid_path=train_file)).result()

    assert [step for step, _ in evaluated(seen)] == [4, 8, 10]


def test_early_stopping_stops(
    llama_base: BaseModel, recorder: Recorders, train_file: Path, engine_for: Engines, write_lines: Lines
) -> None:
    """After two evaluations in a row without a lower loss the job finishes; without patience it makes all its steps."""
    valid = write_lines(UNLIKE, "valid.jsonl")
    limits = {"max_steps": 60, "batch_size": 8, "learning_rate": 0.05, "eval_every": 2, "lr_schedule": "constant"}
    patient, stubborn = recorder(**limits, early_stopping_patience=2), recorder(**limits)
    engine = engine_for(llama_base, max_tokens=4096)
    results = [engine.submit(seen.job(train_file, valid_path=valid)).result() for seen in (patient, stubborn)]
    losses = [loss for _, loss in evaluated(patient)]

    assert [result.outcome for result in results] == ["finished", "finished"]
    assert results[0].steps < results[1].steps == 60
    assert min(losses) == losses[-3]
    assert any("no lower validation loss in 2 evaluations" in message for *_, message, _ in patient.events)


def test_early_stopping_goes_on_while_it_helps(
    llama_base: BaseModel, recorder: Recorders, train_file: Path, engine_for: Engines
) -> None:
    """A validation loss that keeps falling stops nothing."""
    seen = recorder(max_steps=6, batch_size=8, learning_rate=1e-3, eval_every=1, early_stopping_patience=1)

    assert engine_for(llama_base).submit(seen.job(train_file, valid_path=train_file)).result().steps == 6


@pytest.mark.parametrize("is_resumed", [False, True])
def test_the_best_adapter_is_published_when_asked(
    is_resumed: bool,
    llama_base: BaseModel,
    recorder: Recorders,
    train_file: Path,
    engine_for: Engines,
    write_lines: Lines,
    tmp_path: Path,
) -> None:
    """'best' publishes the adapter of the evaluation with the lowest loss, even of before a resume; 'last' the last."""
    valid = write_lines(UNLIKE, "valid.jsonl")
    limits = {"max_steps": 45, "batch_size": 8, "learning_rate": 0.04, "eval_every": 3, "lr_schedule": "constant"}
    best, last = recorder(**limits, publish="best"), recorder(**limits)
    engine = engine_for(llama_base, max_tokens=4096)
    last_tensors = written(engine.submit(last.job(train_file, valid_path=valid)).result(), tmp_path / "last")
    losses = dict(evaluated(last))
    best_step = min(losses, key=losses.__getitem__)
    short = recorder(**limits)
    short.orders = {best_step: Order.CANCEL}
    resumed: list[Path] = []
    if is_resumed:
        first = recorder(**limits, publish="best")
        first.orders = {best_step + 1: Order.PAUSE}
        engine.submit(first.job(train_file, valid_path=valid)).result()
        resumed = [first.checkpoints[best_step + 1]]
    result = engine.submit(best.job(train_file, valid_path=valid, resume_from=resumed)).result()
    expected = written(engine.submit(short.job(train_file)).result(), tmp_path / "short")
    best_tensors = written(result, tmp_path / "best")

    assert 3 <= best_step < 40
    assert result.steps == 45
    assert all(torch.equal(best_tensors[path], expected[path]) for path in expected)
    assert not any(torch.equal(best_tensors[path], last_tensors[path]) for path in expected)


def test_an_evaluation_that_was_cut_off_is_made_up_for(
    llama_base: BaseModel, recorder: Recorders, train_file: Path, engine_for: Engines
) -> None:
    """A shutdown in the middle of an evaluation: the resumed job evaluates that step, and tells its metrics once."""
    whole, first, second = (recorder(max_steps=4, batch_size=8, eval_every=2) for _ in range(3))
    engine = engine_for(llama_base, max_tokens=40)
    engine.submit(whole.job(train_file, valid_path=train_file)).result()
    first.after_step = lambda step: engine.stop_all() if step == 2 else None
    stopped = engine.submit(first.job(train_file, valid_path=train_file)).result()
    resumed = second.job(train_file, valid_path=train_file, resume_from=[first.checkpoints[2]])
    engine_for(llama_base, max_tokens=40).submit(resumed).result()

    assert (stopped.outcome, stopped.steps) == ("stopped", 2)
    assert evaluated(first) == []
    assert evaluated(second) == evaluated(whole)
    assert [data["step"] for data in first.metrics() + second.metrics()] == [1, 2, 3, 4]


def test_cancel_is_obeyed_in_an_evaluation(
    llama_base: BaseModel, recorder: Recorders, train_file: Path, engine_for: Engines
) -> None:
    """A long evaluation does not keep a cancelled job alive."""
    seen = recorder(max_steps=4, batch_size=8, eval_every=1)
    seen.orders = {1: Order.CANCEL}
    result = engine_for(llama_base, max_tokens=20).submit(seen.job(train_file, valid_path=train_file)).result()

    assert (result.outcome, result.steps) == ("stopped", 1)
    assert evaluated(seen) == []


def test_max_seconds_ends_cleanly(
    llama_base: BaseModel, recorder: Recorders, train_file: Path, engine_for: Engines, tmp_path: Path
) -> None:
    """When the time is over the job finishes with an evaluation and an adapter, long before its last step."""
    seen = recorder(max_steps=100_000, max_seconds=1)
    began_s = time.monotonic()
    result = engine_for(llama_base).submit(seen.job(train_file, valid_path=train_file)).result()

    assert 1 <= time.monotonic() - began_s < 30
    assert result.outcome == "finished"
    assert result.steps == seen.reports[-1].step < 100_000
    assert evaluated(seen)[-1][0] == result.steps
    assert written(result, tmp_path / "adapter")


def test_max_seconds_counts_what_earlier_attempts_took(
    llama_base: BaseModel, recorder: Recorders, train_file: Path, engine_for: Engines
) -> None:
    """A resumed job has only what is left of its time."""
    first, second = (recorder(max_steps=100_000, max_seconds=2) for _ in range(2))
    first.after_step = lambda step: time.sleep(2.5) if step == 1 else None
    first.orders = {1: Order.PAUSE}
    engine = engine_for(llama_base)
    engine.submit(first.job(train_file)).result()
    result = engine.submit(second.job(train_file, resume_from=[first.checkpoints[1]])).result()

    assert (result.outcome, result.steps) == ("finished", 2)


def test_validation_split_holds_samples_out(
    llama_base: BaseModel, recorder: Recorders, train_file: Path, engine_for: Engines
) -> None:
    """A quarter of eight samples is evaluated and never trained on."""
    seen, whole = recorder(validation_split=0.25, batch_size=1, n_epochs=1), recorder(batch_size=1, n_epochs=1)
    engine = engine_for(llama_base)
    engine.submit(seen.job(train_file)).result()
    engine.submit(whole.job(train_file)).result()

    assert [step for step, _ in evaluated(seen)] == [6]
    assert len(whole.reports) == 8
    assert sum(r.num_tokens for r in seen.reports) < sum(r.num_tokens for r in whole.reports)


def test_a_split_of_one_sample_is_refused(
    llama_base: BaseModel, recorder: Recorders, engine_for: Engines, write_lines: Lines
) -> None:
    """There is nothing to hold out of a single sample."""
    with pytest.raises(InvalidTrainingFile):
        engine_for(llama_base).submit(recorder(validation_split=0.5).job(write_lines(PAIRS[:1]))).result()


def test_init_from_starts_there(
    llama_base: BaseModel, recorder: Recorders, train_file: Path, engine_for: Engines, tmp_path: Path
) -> None:
    """A job that starts from an adapter starts at its loss; a fresh one starts at the base's."""
    lesson = {"max_steps": 30, "batch_size": 8, "lr_schedule": "constant"}
    first, second, fresh = recorder(**lesson), recorder(**lesson), recorder(**lesson)
    engine = engine_for(llama_base, max_tokens=4096)
    engine.submit(first.job(train_file, valid_path=train_file)).result().write_adapter(tmp_path / "first")
    engine.submit(second.job(train_file, init_from=tmp_path / "first")).result()
    engine.submit(fresh.job(train_file)).result()

    assert second.reports[0].train_loss == pytest.approx(evaluated(first)[-1][1], rel=1e-5)
    assert fresh.reports[0].train_loss == first.reports[0].train_loss
    assert second.reports[0].train_loss < 0.9 * fresh.reports[0].train_loss
    assert second.reports[-1].train_loss < second.reports[0].train_loss


def test_init_from_another_shape_is_refused(
    llama_base: BaseModel, recorder: Recorders, train_file: Path, engine_for: Engines, tmp_path: Path
) -> None:
    """An adapter of another rank is not what the spec asks for."""
    engine = engine_for(llama_base)
    engine.submit(recorder(lora={"r": 2}).job(train_file)).result().write_adapter(tmp_path / "first")

    with pytest.raises(IncompatibleAdapter):
        engine.submit(recorder().job(train_file, init_from=tmp_path / "first")).result()


def test_patterns_train(
    llama_base: BaseModel, recorder: Recorders, train_file: Path, engine_for: Engines, tmp_path: Path
) -> None:
    """Modules named in the patterns get their own rank, and all of them learn."""
    seen = recorder(lora={"rank_pattern": {"layers.0.self_attn.q_proj": 2}, "alpha_pattern": {"v_proj": 3.0}})
    engine_for(llama_base).submit(seen.job(train_file)).result().write_adapter(tmp_path / "adapter")
    adapter = read_adapter(tmp_path / "adapter")

    ranks = {path: a_RI.shape[0] for path, (a_RI, _) in adapter.tensors.items()}
    assert {path for path, rank in ranks.items() if rank == 2} == {"model.layers.0.self_attn.q_proj"}
    assert set(ranks.values()) == {2, 4}
    assert all(b_OR.abs().max() > 0 for _, b_OR in adapter.tensors.values())
