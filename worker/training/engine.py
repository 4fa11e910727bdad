"""TrainingEngine: the one thread that owns a base model and trains the jobs submitted to it, one after the other."""

import queue
import threading
from collections.abc import Mapping
from concurrent.futures import Future
from pathlib import Path

from shared.specs import Order
from worker.base_model import BaseModel
from worker.lora.manager import AdapterManager
from worker.training.job import Json, TrainingJob, TrainingResult
from worker.training.run import TrainingRun

__all__ = ["TrainingEngine", "TrainingJob", "TrainingResult"]


class TrainingEngine:
    """Trains adapters over one frozen base model, which it leaves after each job as it was before.

    `max_tokens` bounds the tokens of one forward pass; a single longer sample goes alone. It moves the boundary between
    memory and time, and with dropout what is dropped, but never which samples an optimizer step sees.
    """

    def __init__(self, base: BaseModel, *, max_tokens: int) -> None:
        self._base = base
        self._max_tokens = max_tokens
        self._manager = AdapterManager(base.model)
        self._inbox: queue.SimpleQueue[tuple[TrainingJob, Future[TrainingResult]] | None] = queue.SimpleQueue()
        self._stopping = threading.Event()
        self._submitting = threading.Lock()
        self._thread = threading.Thread(target=self._serve, name=f"train-{base.name}", daemon=True)
        self._thread.start()

    def submit(self, job: TrainingJob) -> Future[TrainingResult]:
        """Train `job` after those submitted before it. The future raises what made the job fail.

        InvalidTrainingFile, UnknownTarget: the request's fault. TrainingFailed: diverged, or a checkpoint that is not
        the job's. Anything else came from one of the job's callables or is a bug. No failure touches another job.
        """
        future: Future[TrainingResult] = Future()
        with self._submitting:
            if self._stopping.is_set():
                future.set_result(_NOT_STARTED)
            else:
                self._inbox.put((job, future))
        return future

    def stop_all(self) -> None:
        """Stop for good: a job under way makes its step and saves a checkpoint; all jobs, later ones too, end stopped.

        A job whose last step it was finishes. Returns at once; the futures say when each has ended.
        """
        with self._submitting:
            self._stopping.set()

    def close(self) -> None:
        """`stop_all`, and wait until the thread has let go of the model."""
        self.stop_all()
        self._inbox.put(None)
        self._thread.join()

    def _serve(self) -> None:
        while (submitted := self._inbox.get()) is not None:
            job, future = submitted
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(self._train(job))
            except BaseException as error:  # whatever it was, it ends this job and not the thread
                future.set_exception(error)

    def _train(self, job: TrainingJob) -> TrainingResult:
        try:
            self._raise_if_stopping()
            run = TrainingRun(
                job, self._base, self._manager, max_tokens=self._max_tokens, between_samples=self._raise_if_stopping
            )
        except _StoppedBeforeStart:
            return _NOT_STARTED
        with run.attached():
            return self._drive(run)

    def _drive(self, run: TrainingRun) -> TrainingResult:
        """Step, report, obey; until the job is complete or told to stop."""
        while run.steps_left():
            order = run.job.on_step(run.make_step())
            if order in (Order.CANCEL, Order.LOST):
                return run.result("stopped", order)
            run.evaluate_if_due(self._stopping.is_set)
            run.report_metrics()
            if not run.steps_left():
                break
            is_leaving = order is Order.PAUSE or self._stopping.is_set()
            if is_leaving or run.is_checkpoint_due():
                run.save_checkpoint()
            if is_leaving:
                return run.result("stopped", order if order is Order.PAUSE else None)
        return run.result("finished")

    def _raise_if_stopping(self) -> None:
        if self._stopping.is_set():
            raise _StoppedBeforeStart


class _StoppedBeforeStart(Exception):
    """The engine is stopping and the job has not made a step."""


def _write_nothing(directory: Path) -> None:
    raise AssertionError(f"nothing was trained that could be written to {directory}")


_NO_METRICS: Mapping[str, Json] = {}
_NOT_STARTED = TrainingResult(
    outcome="stopped", order=None, metrics=_NO_METRICS, steps=0, trained_tokens=0, write_adapter=_write_nothing
)
