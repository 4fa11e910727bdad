"""When a job is saved and when it ends: once for a step, at once when told to, and in the order that is promised."""

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from shared.specs import Order
from tests.worker.training.conftest import PAIRS, Recorder
from worker.base_model import BaseModel
from worker.training.engine import TrainingEngine
from worker.training.stream import Gained, Part

Engines = Callable[..., TrainingEngine]
Recorders = Callable[..., Recorder]
Lines = Callable[..., Path]

TIMEOUT_S = 60
LONG = [{"prompt": "x" * 40, "completion": "y" * 20}] * 8


def before_turn(engine: TrainingEngine, act: Callable[[int], object]) -> list[int]:
    """Call act(n) before forward number n (from 1); the list returned holds the numbers so far."""
    learn, turns = engine._stream.learn, []

    def counted(parts: Sequence[Part]) -> Sequence[Gained]:
        turns.append(len(turns) + 1)
        act(len(turns))
        return learn(parts)

    engine._stream.learn = counted  # type: ignore[assignment, method-assign]  # a fake around the real one
    return turns


def test_a_job_that_waits_for_room_is_saved_once(
    llama_base: BaseModel, recorder: Recorders, write_lines: Lines, engine_for: Engines
) -> None:
    """Two jobs that do not fit into one turn: while one waits between steps, its due checkpoint is not saved again."""
    path = write_lines(LONG)
    jobs = [recorder(batch_size=1, max_steps=6, checkpoint_every=2) for _ in range(2)]
    together = threading.Event()
    jobs[0].after_step = lambda step: together.wait(TIMEOUT_S)
    engine = engine_for(llama_base, max_tokens=100)
    futures = [engine.submit(seen.job(path)) for seen in jobs]
    together.set()

    assert [future.result(TIMEOUT_S).outcome for future in futures] == ["finished"] * 2
    assert [[*seen.checkpoints] for seen in jobs] == [[2, 4]] * 2


@pytest.mark.parametrize("order", [Order.PAUSE, Order.GO_ON])
def test_leaving_right_after_a_checkpoint_saves_no_second(
    order: Order, llama_base: BaseModel, recorder: Recorders, write_lines: Lines, engine_for: Engines
) -> None:
    """A pause or a shutdown in the first turn after a checkpoint ends the job with that checkpoint."""
    seen = recorder(batch_size=4, max_steps=6, checkpoint_every=2)
    engine = engine_for(llama_base, max_tokens=64)  # a step takes four turns
    leaving = threading.Event()

    def leave(turn: int) -> None:
        if turn == 9:
            leaving.set()
            if order is Order.GO_ON:
                engine.stop_all()

    turns = before_turn(engine, leave)
    job = replace(seen.job(write_lines(LONG)), order=lambda: order if leaving.is_set() else Order.GO_ON)
    result = engine.submit(job).result(TIMEOUT_S)

    assert (result.outcome, result.steps, len(turns)) == ("stopped", 2, 9)
    assert [*seen.checkpoints] == [2]


def test_leaving_in_mid_step_drops_its_parts(
    llama_base: BaseModel, recorder: Recorders, write_lines: Lines, engine_for: Engines, tmp_path: Path
) -> None:
    """Stopped in the third of a step's four turns, a job ends with that turn; resumed, it is the unbroken job."""
    path = write_lines(LONG)
    whole, first, second = (recorder(batch_size=4, max_steps=3, lora={"dropout": 0.2}) for _ in range(3))
    engine_for(llama_base).submit(whole.job(path)).result(TIMEOUT_S).write_adapter(tmp_path / "whole")
    engine = engine_for(llama_base)
    turns = before_turn(engine, lambda turn: engine.stop_all() if turn == 7 else None)
    stopped = engine.submit(first.job(path)).result(TIMEOUT_S)
    resumed = second.job(path, resume_from=[first.checkpoints[1]])
    engine_for(llama_base).submit(resumed).result(TIMEOUT_S).write_adapter(tmp_path / "second")

    assert (stopped.outcome, stopped.steps, len(turns)) == ("stopped", 1, 7)
    name = "adapter_model.safetensors"
    assert (tmp_path / "second" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_nothing_is_saved_before_the_first_step(
    llama_base: BaseModel, recorder: Recorders, write_lines: Lines, engine_for: Engines
) -> None:
    """A job stopped in its first step has nothing that a checkpoint could spare it."""
    seen = recorder(batch_size=4, checkpoint_every=1)
    engine = engine_for(llama_base)
    before_turn(engine, lambda turn: engine.stop_all())
    result = engine.submit(seen.job(write_lines(LONG))).result(TIMEOUT_S)

    assert (result.outcome, result.steps, seen.checkpoints) == ("stopped", 0, {})


def test_an_early_end_is_kept_over_a_resume(
    llama_base: BaseModel, recorder: Recorders, write_lines: Lines, engine_for: Engines
) -> None:
    """Stopped in the evaluation after an early end, the resumed job makes that evaluation and no further step."""
    path = write_lines(PAIRS)
    limits = {"batch_size": 8, "max_steps": 50, "eval_every": 1, "max_seconds": 1}
    first, second = recorder(**limits), recorder(**limits)
    engine = engine_for(llama_base, max_tokens=30)
    first.after_step = lambda step: engine.stop_all()
    before_turn(engine, lambda turn: time.sleep(0.6))
    stopped = engine.submit(first.job(path, valid_path=path)).result(TIMEOUT_S)
    resumed = second.job(path, valid_path=path, resume_from=[first.checkpoints[1]])
    result = engine_for(llama_base).submit(resumed).result(TIMEOUT_S)

    assert (stopped.outcome, stopped.steps) == ("stopped", 1)
    assert (result.outcome, result.steps, second.reports) == ("finished", 1, [])
    assert [data["step"] for data in second.metrics()] == [1]


def test_a_step_is_reported_before_its_event(
    llama_base: BaseModel, recorder: Recorders, train_file: Path, engine_for: Engines
) -> None:
    """Whoever reads a step's metrics event finds the step in the job's progress already."""
    told: list[str] = []
    job = replace(
        recorder(max_steps=1).job(train_file),
        on_step=lambda report: told.append("step"),
        on_event=lambda level, type, message, data: told.append(type),
    )
    engine_for(llama_base).submit(job).result(TIMEOUT_S)

    assert told == ["message", "message", "step", "metrics"]


def test_a_hanging_save_is_seen(
    llama_base: BaseModel, recorder: Recorders, train_file: Path, engine_for: Engines
) -> None:
    """The turn goes on while a checkpoint is saved, so that a save that hangs is overdue like a forward that does."""
    seen = recorder(checkpoint_every=1, max_steps=2)
    engine = engine_for(llama_base, max_tokens=4096)
    overdue_s: list[float | None] = []
    job = replace(seen.job(train_file), save_checkpoint=lambda *_: overdue_s.append(engine.pulse.overdue_s(floor_s=0)))
    engine.submit(job).result(TIMEOUT_S)

    assert overdue_s[0] is not None
