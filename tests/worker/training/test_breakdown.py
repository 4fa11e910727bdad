"""What goes wrong beyond one step: the engine's thread, its device, memory outside the forward, a job come twice."""

import gc
import threading
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from shared.errors import TrainingFailed
from shared.specs import Order
from tests.worker.training.conftest import Recorder
from tests.worker.training.test_failures import spoil_forwards
from worker.base_model import BaseModel
from worker.training import engine as engine_module
from worker.training.engine import TrainingEngine
from worker.training.failure import is_device_broken, is_out_of_memory
from worker.training.optimizer import AdapterOptimizer
from worker.training.run import TrainingRun
from worker.training.stream import Gained, Part

Engines = Callable[..., TrainingEngine]
Recorders = Callable[..., Recorder]

TIMEOUT_S = 60


def together(engine: TrainingEngine, seen: Sequence[Recorder], path: Path) -> list[object]:
    """How each job ended, its result or its error; all are there before the first one's second step."""
    all_here = threading.Event()
    seen[0].after_step = lambda step: all_here.wait(TIMEOUT_S)
    futures = [engine.submit(recorder.job(path)) for recorder in seen]
    all_here.set()
    return [future.exception(TIMEOUT_S) or future.result() for future in futures]


def test_an_engine_that_dies_ends_its_jobs(
    llama_base: BaseModel, recorder: Recorders, train_file: Path, engine_for: Engines, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error that is no job's own reaches every job, those that come later end, and the engine says it is dead."""
    engine = engine_for(llama_base)

    def fail(_: TrainingEngine) -> None:
        raise RuntimeError("the thread fails")

    monkeypatch.setattr(TrainingEngine, "_evaluate", fail)
    ended = engine.submit(recorder().job(train_file)).exception(TIMEOUT_S)
    engine._thread.join(TIMEOUT_S)

    assert str(ended) == "the thread fails"
    assert engine.is_dead
    assert engine.submit(recorder().job(train_file)).result(TIMEOUT_S).outcome == "stopped"


def test_an_engine_at_work_is_not_dead(llama_base: BaseModel, engine_for: Engines) -> None:
    """The opposite; a closed one is."""
    engine = engine_for(llama_base)
    before = engine.is_dead
    engine.close()

    assert (before, engine.is_dead) == (False, True)


@pytest.mark.parametrize(("error", "is_called"), [(torch.AcceleratorError, True), (torch.OutOfMemoryError, False)])
def test_a_broken_device_is_told(
    error: type[Exception], is_called: bool, llama_base: BaseModel, recorder: Recorders, train_file: Path
) -> None:
    """Errors of CUDA that stay are handed to whoever can end the process; running out of memory is none."""
    told: list[BaseException] = []
    engine = TrainingEngine(llama_base, max_tokens=64, on_broken=told.append)

    def fail(_: object, arguments: object) -> None:
        raise error("CUDA error: an illegal memory access was encountered")

    llama_base.model.get_input_embeddings().register_forward_pre_hook(fail)  # type: ignore[operator]  # a module's own
    ended = engine.submit(recorder(batch_size=1).job(train_file)).exception(TIMEOUT_S)
    engine.close()

    assert ended is not None
    assert [type(one) for one in told] == [error] * is_called


def test_a_job_claimed_again_ends_its_old_run(
    llama_base: BaseModel, recorder: Recorders, train_file: Path, engine_for: Engines
) -> None:
    """The run that was there ends as lost, and the new one trains to its end."""
    old, new = recorder(max_steps=40), recorder(max_steps=5)
    new.job_id = old.job_id
    first, second = together(engine_for(llama_base), [old, new], train_file)

    assert (first.outcome, first.order) == ("stopped", Order.LOST)  # type: ignore[attr-defined]  # a result
    assert (second.outcome, second.steps) == ("finished", 5)  # type: ignore[attr-defined]  # a result


@pytest.mark.parametrize("where", ["step", "standing", "set_gradients"])
def test_out_of_memory_outside_the_forward_fails_with_advice(
    where: str,
    llama_base: BaseModel,
    recorder: Recorders,
    train_file: Path,
    engine_for: Engines,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Another try would end likewise; the adapter is off the base, whether it had begun to train or not."""

    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(AdapterOptimizer, where, fail)
    engine = engine_for(llama_base)
    future = engine.submit(recorder().job(train_file))

    with pytest.raises(TrainingFailed, match="use a lower rank") as failure:
        future.result(TIMEOUT_S)
    assert failure.value.error_code == "out_of_memory"
    assert engine._manager.list() == []


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), "memory"),
        (torch.AcceleratorError("CUDA error: out of memory"), "memory"),
        (torch.AcceleratorError("CUDA error: device-side assert triggered"), "device"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED"), "neither"),
    ],
)
def test_what_an_error_means(error: Exception, kind: str) -> None:
    """Memory that ran out and a device that is of no more use are told apart, by class or by what CUDA says."""
    assert (is_out_of_memory(error), is_device_broken(error)) == (kind == "memory", kind == "device")


def hungry(engine: TrainingEngine, too_much: Callable[[Sequence[Part]], bool]) -> None:
    """Let the engine run out of memory with such parts."""
    learn = engine._stream.learn

    def limited(parts: Sequence[Part]) -> Sequence[Gained]:
        if too_much(parts):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return learn(parts)

    engine._stream.learn = limited  # type: ignore[assignment, method-assign]  # a fake around the real one


def test_a_job_too_large_by_itself_costs_others_no_room(
    llama_base: BaseModel, recorder: Recorders, train_file: Path, engine_for: Engines
) -> None:
    """One job that fits nowhere fails; what the other may use at once stays what it was."""
    small, large = recorder(batch_size=1, max_steps=20), recorder(batch_size=1)
    engine = engine_for(llama_base, max_tokens=2048)
    hungry(engine, lambda parts: any(part.adapter == large.job_id for part in parts))
    rooms: list[int] = []
    hungry(engine, lambda parts: bool(rooms.append(engine._room)))  # type: ignore[func-returns-value]  # None is False
    finished, failed = together(engine, [small, large], train_file)

    assert finished.outcome == "finished"  # type: ignore[attr-defined]  # a result
    assert isinstance(failed, TrainingFailed)
    assert set(rooms) == {2048}


def test_room_is_halved_together_and_given_back(
    llama_base: BaseModel, recorder: Recorders, train_file: Path, engine_for: Engines
) -> None:
    """Jobs that fit only one by one share less from then on; once they have gone the setting holds again."""
    engine = engine_for(llama_base, max_tokens=2048)
    rooms: list[int] = []
    hungry(engine, lambda parts: len(parts) > 1 and sum(part.num_tokens for part in parts) > 100)
    hungry(engine, lambda parts: bool(rooms.append(engine._room)))  # type: ignore[func-returns-value]  # None is False
    ended = together(engine, [recorder(batch_size=4, max_steps=4) for _ in range(2)], train_file)
    shared = min(rooms)
    rooms.clear()
    engine.submit(recorder(max_steps=1).job(train_file)).result(TIMEOUT_S)

    assert [one.outcome for one in ended] == ["finished"] * 2  # type: ignore[attr-defined]  # results
    assert shared < 2048
    assert set(rooms) == {2048}


@pytest.mark.parametrize("how", ["diverged", "out of memory"])
def test_a_failed_run_is_let_go(
    how: str,
    llama_base: BaseModel,
    recorder: Recorders,
    train_file: Path,
    engine_for: Engines,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its tensors are free at once, though the error is kept: no cycle waits for the garbage collector."""
    runs: list[weakref.ref[TrainingRun]] = []

    def remembered(*arguments: object) -> TrainingRun:
        run = TrainingRun(*arguments)  # type: ignore[arg-type]  # passed on as they came
        runs.append(weakref.ref(run))
        return run

    monkeypatch.setattr(engine_module, "TrainingRun", remembered)
    engine = engine_for(llama_base)
    if how == "diverged":
        spoil_forwards(llama_base, lambda n: True)
    else:
        hungry(engine, lambda parts: True)
    gc.collect()
    gc.disable()
    try:
        error = engine.submit(recorder(max_steps=30).job(train_file)).exception(TIMEOUT_S)
        engine.submit(recorder(lora={"target_modules": ["nowhere"]}).job(train_file)).exception(TIMEOUT_S)
        alive = runs[0]()
    finally:
        gc.enable()

    assert isinstance(error, TrainingFailed)
    assert alive is None
