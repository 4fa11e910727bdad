"""TrainingEngine: the one thread that owns a base model and trains all jobs submitted to it, side by side."""

import queue
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from pathlib import Path

import torch

from shared.specs import Order
from worker.base_model import BaseModel
from worker.lora.manager import AdapterManager
from worker.training.job import Json, TrainingJob, TrainingResult
from worker.training.memory_error import is_out_of_memory
from worker.training.preparation import Prepared, prepare
from worker.training.pulse import Pulse
from worker.training.run import TrainingRun
from worker.training.stream import Gained, Part, Stream

__all__ = ["TrainingEngine", "TrainingJob", "TrainingResult"]

Submitted = tuple[Prepared, "Future[TrainingResult]"]


class TrainingEngine:
    """Trains adapters over one frozen base model, which is as it was before whenever no job is there.

    Each turn takes one part of every job's optimizer step, together at most `max_tokens` tokens, as one stream; a
    single longer sample goes alone. That moves the boundary between memory and time, but never which samples a step
    sees: a job gets the adapter that it would get alone, within the rounding of sums. Jobs come and go between turns.
    """

    def __init__(self, base: BaseModel, *, max_tokens: int) -> None:
        self.pulse = Pulse()
        self._base = base
        self._max_tokens = max_tokens
        self._manager = AdapterManager(base.model)
        self._stream = Stream(base, self._manager)
        self._runs: dict[TrainingRun, Future[TrainingResult]] = {}
        self._inbox: queue.SimpleQueue[Submitted | None] = queue.SimpleQueue()
        self._closed = False
        self._stopping = threading.Event()
        self._submitting = threading.Lock()
        self._thread = threading.Thread(target=self._serve, name=f"train-{base.name}", daemon=True)
        self._thread.start()

    def submit(self, job: TrainingJob) -> "Future[TrainingResult]":
        """Tokenise the job's files here and now, on the caller's thread, and train it beside the others.

        The future raises what made the job fail. InvalidTrainingFile, UnknownTarget, IncompatibleAdapter: the request's
        fault. TrainingFailed: diverged or out of memory. Anything else came from one of the job's callables or is a
        bug. No failure touches another job.
        """
        future: Future[TrainingResult] = Future()
        future.set_running_or_notify_cancel()
        try:
            prepared = prepare(job, self._base, between_samples=lambda: self._raise_if_over(job))
        except _OverBeforeStart as over:
            future.set_result(over.result)
            return future
        except BaseException as error:  # whatever it was, it ends this job and not the caller
            future.set_exception(error)
            return future
        with self._submitting:
            if self._stopping.is_set():
                future.set_result(_not_started(None))
            else:
                self._inbox.put((prepared, future))
        return future

    def stop_all(self) -> None:
        """Stop for good: the jobs under way make their step and save a checkpoint; all jobs, later ones too, end
        stopped. A job whose last step it was finishes. Returns at once; the futures say when each has ended.
        """
        with self._submitting:
            self._stopping.set()

    def close(self) -> None:
        """`stop_all`, and wait until the thread has let go of the model."""
        self.stop_all()
        self._inbox.put(None)
        self._thread.join()

    # -- the thread

    def _serve(self) -> None:
        while self._admit():
            with self.pulse.turn():
                self._train()
                self._evaluate()
            for run in list(self._runs):
                self._guarded(run, self._settle)

    def _admit(self) -> bool:
        """Let the submitted jobs in, waiting for one if none is here; False once the engine is closed and empty."""
        while not self._closed or not self._inbox.empty():
            try:
                submitted = self._inbox.get(block=not self._runs)
            except queue.Empty:
                break
            if submitted is None:
                self._closed = True
            elif self._stopping.is_set():
                submitted[1].set_result(_not_started(None))
            else:
                self._start(*submitted)
            if self._runs and self._inbox.empty():
                break
        return bool(self._runs)

    def _start(self, prepared: Prepared, future: "Future[TrainingResult]") -> None:
        try:
            self._runs[TrainingRun(prepared, self._base, self._manager)] = future
        except BaseException as error:  # whatever it was, it ends this job and not the thread
            future.set_exception(error)

    def _train(self) -> None:
        """One part of every job that is in a step."""
        learners = [run for run in self._runs if not run.is_evaluating() and run.steps_left()]
        parts: dict[TrainingRun, Part] = {}
        room = self._max_tokens
        for i, run in enumerate(learners):
            if parts and room <= 0:
                break
            parts[run] = part = run.next_train_part(room // (len(learners) - i))
            if len(parts) > 1 and part.num_tokens > room:
                del parts[run]
                break
            room -= part.num_tokens
        for run in parts:  # whoever found no room is first next time
            self._runs[run] = self._runs.pop(run)
        self._learn(parts)

    def _learn(self, parts: Mapping[TrainingRun, Part]) -> None:
        """Train on the parts, at once if memory allows, else one after the other."""
        if not parts:
            return
        began_s = time.perf_counter()
        try:
            gained = self._stream.learn(list(parts.values()))
        except Exception as error:
            failure: Exception = error
        else:
            seconds = time.perf_counter() - began_s
            for (run, part), own in zip(parts.items(), gained, strict=True):
                self._guarded(run, _absorbing(part, own, seconds))
            return
        if len(parts) == 1:
            ((run, part),) = parts.items()
            self._guarded(run, lambda run: self._shrink(run, part, failure))
            return
        if is_out_of_memory(failure):
            self._max_tokens = max(self._max_tokens // 2, 1)
        failure.__traceback__ = None  # its frames hold the tensors of the forward pass
        self._release_memory()
        for run, part in parts.items():
            self._learn({run: part})

    def _evaluate(self) -> None:
        """One part of every job that is being evaluated."""
        for run in [run for run in self._runs if run.is_evaluating() and not self._stopping.is_set()]:
            self._guarded(run, self._judge)

    def _judge(self, run: TrainingRun) -> None:
        part = run.next_valid_part(self._max_tokens)
        try:
            found = self._stream.judge(part)
        except Exception as error:
            self._shrink(run, part, error)
        else:
            run.judge(part, found)

    def _shrink(self, run: TrainingRun, part: Part, error: Exception) -> None:
        """Make smaller parts after one ran out of memory; any other error ends the job."""
        if not is_out_of_memory(error):
            raise error
        error.__traceback__ = None
        self._release_memory()
        run.halve_parts(part)

    def _release_memory(self) -> None:
        if self._base.device.type == "cuda":
            torch.cuda.empty_cache()

    def _settle(self, run: TrainingRun) -> None:
        """After a turn: end a whole step, obey, save, end."""
        if not run.is_evaluating() and run.is_step_whole():
            report = run.end_step()
            if report is not None:
                run.job.on_step(report)
        order = run.job.order()
        if order in (Order.CANCEL, Order.LOST):
            self._end(run, run.result("stopped", order))
        elif run.is_between_steps() or (run.is_evaluating() and self._stopping.is_set()):
            self._settle_between_steps(run, order)

    def _settle_between_steps(self, run: TrainingRun, order: Order) -> None:
        if not run.steps_left() and not run.is_evaluating():
            self._end(run, run.result("finished"))
            return
        is_leaving = order is Order.PAUSE or self._stopping.is_set()
        if is_leaving or run.is_checkpoint_due():
            run.save_checkpoint()
        if is_leaving:
            self._end(run, run.result("stopped", order if order is Order.PAUSE else None))

    def _end(self, run: TrainingRun, result: TrainingResult) -> None:
        future = self._runs.pop(run)
        run.detach()
        future.set_result(result)

    def _guarded(self, run: TrainingRun, act: Callable[[TrainingRun], None]) -> None:
        """Do something for one job; whatever it raises ends that job and not the thread."""
        try:
            act(run)
        except BaseException as error:
            future = self._runs.pop(run)
            run.detach()
            future.set_exception(error)

    def _raise_if_over(self, job: TrainingJob) -> None:
        order = job.order()
        if order in (Order.CANCEL, Order.LOST):
            raise _OverBeforeStart(_not_started(order))
        if self._stopping.is_set():
            raise _OverBeforeStart(_not_started(None))


class _OverBeforeStart(Exception):
    """The job is to end, or the engine stops, while the job's files are read."""

    def __init__(self, result: TrainingResult) -> None:
        super().__init__()
        self.result = result


def _absorbing(part: Part, gained: Gained, seconds: float) -> Callable[[TrainingRun], None]:
    return lambda run: run.absorb(part, gained, seconds)


def _write_nothing(directory: Path) -> None:
    raise AssertionError(f"nothing was trained that could be written to {directory}")


_NO_METRICS: Mapping[str, Json] = {}


def _not_started(order: Order | None) -> TrainingResult:
    return TrainingResult(
        outcome="stopped", order=order, metrics=_NO_METRICS, steps=0, trained_tokens=0, write_adapter=_write_nothing
    )
