"""TrainingEngine: the one thread that owns a base model and trains all jobs submitted to it, side by side."""

import queue
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from pathlib import Path

from shared.specs import Order
from worker.base_model import BaseModel
from worker.kernels import accelerate
from worker.lora.manager import AdapterManager
from worker.training.failure import as_told, is_device_broken, is_out_of_memory, without_frames
from worker.training.job import Json, TrainingJob, TrainingResult
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

    def __init__(
        self, base: BaseModel, *, max_tokens: int, on_broken: Callable[[BaseException], object] = lambda error: None
    ) -> None:
        """`on_broken` is called, on the engine's thread, with an error after which the device is of no use to this
        process any more."""
        self.pulse = Pulse()
        self._base = base
        self._max_tokens = self._room = max_tokens
        """The setting, and what running out of memory has left of it while jobs are here."""
        self._on_broken = on_broken
        self._restore_base = accelerate(base.model)
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
        """Stop for good: after the turn under way the jobs save a checkpoint of their last whole step; all jobs, later
        ones too, end stopped. A job that has made its last step finishes. Returns at once; the futures say when each
        has ended.
        """
        with self._submitting:
            self._stopping.set()

    @property
    def is_dead(self) -> bool:
        """Whether the thread has ended, be it by `close` or by an error that was no single job's."""
        return not self._thread.is_alive()

    def close(self) -> None:
        """`stop_all`, and wait until the thread has let go of the model."""
        self.stop_all()
        self._inbox.put(None)
        self._thread.join()
        self._restore_base()

    # -- the thread

    def _serve(self) -> None:
        try:
            while self._admit():
                with self.pulse.turn():
                    self._train()
                    self._evaluate()
                    self._settle_all()
        except BaseException as error:  # not to be mended here, but nobody may wait for ever for a job's end
            self._break_down(without_frames(error))

    def _admit(self) -> bool:
        """Let the submitted jobs in, waiting for one if none is here; False once the engine is closed and empty."""
        while not self._closed or not self._inbox.empty():
            if not self._runs:
                self._room = self._max_tokens
                self._stream.release_memory()  # others may use the GPU while nothing is trained
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
            del submitted  # a frame that waits keeps nothing alive
            if self._runs and self._inbox.empty():
                break
        return bool(self._runs)

    def _start(self, prepared: Prepared, future: "Future[TrainingResult]") -> None:
        for run in [run for run in self._runs if run.job.job_id == prepared.job.job_id]:
            # Claimed again, so whoever submitted it before has lost it and not noticed yet.
            self._guarded(run, lambda run: self._end(run, run.result("stopped", Order.LOST)))
        try:
            self._runs[TrainingRun(prepared, self._base, self._manager)] = future
        except BaseException as error:  # whatever it was, it ends this job and not the thread
            self._fail(future, without_frames(error))

    def _train(self) -> None:
        """One part of every job that is in a step."""
        learners = [run for run in self._runs if not run.is_evaluating() and run.steps_left()]
        parts: dict[TrainingRun, Part] = {}
        room = self._room
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

    def _learn(self, parts: Mapping[TrainingRun, Part]) -> bool:
        """Train on the parts, at once if memory allows, else one after the other; whether each was trained on whole."""
        if not parts:
            return True
        began_s = time.perf_counter()
        try:
            gained = self._stream.learn(list(parts.values()))
        except Exception as error:
            failure = without_frames(error)  # they hold the tensors of the forward pass
        else:
            seconds = time.perf_counter() - began_s
            for (run, part), own in zip(parts.items(), gained, strict=True):
                self._guarded(run, _absorbing(part, own, seconds))
            return True
        if len(parts) == 1:
            ((run, part),) = parts.items()
            self._guarded(run, lambda run: self._shrink(run, part, failure))
            return False
        self._stream.release_memory()
        fit = [self._learn({run: part}) for run, part in parts.items()]
        if is_out_of_memory(failure) and all(fit):  # else one of the jobs was too large by itself
            self._room = max(self._room // 2, 1)
        return False

    def _evaluate(self) -> None:
        """One part of every job that is being evaluated."""
        for run in [run for run in self._runs if run.is_evaluating() and not self._stopping.is_set()]:
            self._guarded(run, self._judge)

    def _judge(self, run: TrainingRun) -> None:
        part = run.next_valid_part(self._room)
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
        without_frames(error)
        self._stream.release_memory()
        run.halve_parts(part)

    def _settle_all(self) -> None:
        for run in list(self._runs):
            self._guarded(run, self._settle)

    def _settle(self, run: TrainingRun) -> None:
        """After a turn: end a whole step, obey, end, save."""
        if not run.is_evaluating() and run.is_step_whole():
            run.end_step()
        order = run.job.order()
        if order in (Order.CANCEL, Order.LOST):
            self._end(run, run.result("stopped", order))
        elif not run.steps_left() and not run.is_evaluating():
            run.check_trained()
            self._end(run, run.result("finished"))
        elif order is Order.PAUSE or self._stopping.is_set():
            run.save_checkpoint()
            self._end(run, run.result("stopped", order if order is Order.PAUSE else None))
        elif run.is_between_steps() and run.is_checkpoint_due():
            run.save_checkpoint()

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
            self._fail(future, without_frames(error))

    def _fail(self, future: "Future[TrainingResult]", error: BaseException) -> None:
        if is_device_broken(error):
            self._on_broken(error)
        future.set_exception(as_told(error))

    def _break_down(self, error: BaseException) -> None:
        """End all jobs, those that wait too, with what ended the thread."""
        with self._submitting:
            self._stopping.set()
        futures = list(self._runs.values())
        self._runs.clear()
        while not self._inbox.empty():
            submitted = self._inbox.get()
            futures += [] if submitted is None else [submitted[1]]
        for future in futures:
            self._fail(future, error)

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
