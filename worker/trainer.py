"""The training process: a Celery worker that claims jobs from the ledger and feeds the TrainingEngine. Wiring only.

A doorbell message carries nothing; `jobs.claim_next` decides what is trained. One process and Celery's threads pool:
the engine's thread owns the model, and a task that fails can neither take the worker with it nor block its slot.
"""

import logging
import os
import secrets
import socket
import threading
from collections.abc import Callable
from typing import Final

from celery.signals import worker_shutting_down
from sqlalchemy import Engine

from shared import db, failpoints, jobs, logs
from shared.config import Settings
from shared.jobs import Claim
from shared.queue import INSPECT_QUEUE, INSPECT_TASK, TRAIN_QUEUE, TRAIN_TASK, Queue, celery_app
from shared.store import base_models
from shared.store.layout import Layout
from worker.base_model import load_base_model
from worker.celery_program import exit_with_one_line, run_worker
from worker.inspector import Inspector
from worker.job_run import JobRun, TrainerStops
from worker.kernels.memory import keep_freed_memory
from worker.room import Room
from worker.training.engine import TrainingEngine
from worker.watchdog import give_up, watch

log = logging.getLogger("lorad.trainer")

CLAIM_AGAIN_S: Final = 1.0


class Trainer:
    """Claims jobs, up to `train_slots` at once, and runs them side by side over one loaded base model."""

    def __init__(self, settings: Settings, database: Engine, layout: Layout, *, ring: Callable[[], object]) -> None:
        """`ring` rings the doorbell of all trainers."""
        self._settings = settings
        self._database = database
        self._layout = layout
        self._ring = ring
        # A process in a container has the same host name and id again after a restart.
        self._name = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"
        self._stopping = threading.Event()
        self._claiming = threading.Lock()
        self._slots = threading.BoundedSemaphore(settings.train_slots)
        self._bench = _Bench(settings, database, layout)
        self._room = Room(layout.root, min_free_bytes=settings.min_free_bytes)
        self._held: dict[str, int] = {}
        """Jobs that this trainer has claimed and not ended, and their fences."""
        self._is_unsure = False
        """Whether a claim was sent to the database and its answer was lost."""

    def answer_doorbell(self) -> None:
        """Train queued jobs, one after the other, until none is left that this trainer may take.

        Returns at once if all slots are taken: whoever has one looks again when its job has ended. With each job
        claimed the doorbell rings for the slots still free: their threads have left if they could take nothing before.
        """
        if not self._slots.acquire(blocking=False):
            return
        try:
            while not self._stopping.is_set() and (claim := self._claim()) is not None:
                failpoints.hit("job.claimed")
                log.info("claimed %s, attempt %d", claim.job_id, claim.attempt)
                if self._has_free_slot():
                    self._ring()
                run = JobRun(claim, settings=self._settings, database=self._database, layout=self._layout)
                try:
                    run.run(self._bench.engine_for)
                finally:
                    if self._held.get(claim.job_id) == claim.fence:  # else it was lost, and claimed here again
                        del self._held[claim.job_id]
        finally:
            self._slots.release()

    def stop(self) -> None:
        """Checkpoint what runs, so that its lease is given back, and claim nothing more."""
        self._stopping.set()
        self._bench.stop_jobs()

    def overdue_s(self) -> float | None:
        """How long the turn of the engine at work has taken, if that is too long."""
        return self._bench.overdue_s()

    def _has_free_slot(self) -> bool:
        if not self._slots.acquire(blocking=False):
            return False
        self._slots.release()
        return True

    def _claim(self) -> Claim | None:
        """The next job, if the disk has room for one. One at a time: what the bench will hold must be known before the
        next claim.

        A database that is away is asked a second time, after a pause; then the next doorbell has to.
        """
        with self._claiming:
            if not self._room.is_there():
                return None
            try:
                return self._try_to_claim()
            except db.AWAY as error:
                log.warning("the database does not answer a claim: %s", error)
                self._is_unsure = True
            if self._stopping.wait(CLAIM_AGAIN_S):
                return None
            return self._try_to_claim()

    def _try_to_claim(self) -> Claim | None:
        with db.write(self._database) as tx:
            if self._is_unsure and (unheld := jobs.take_back(tx, trainer=self._name, held=list(self._held))):
                log.warning("%d jobs were claimed here without our knowing, and are given back", unheld)
            claim = jobs.claim_next(
                tx,
                trainer=self._name,
                lease_s=self._settings.lease_s,
                holds_base=self._bench.base_model_id,
                max_running=self._settings.max_running_jobs,
            )
        self._is_unsure = False
        if claim is not None:
            self._bench.base_model_id = claim.base_model_id
            self._held[claim.job_id] = claim.fence
        return claim


class _Bench:
    """The one engine of this process. Another base model takes its place, once no job is on it any more."""

    def __init__(self, settings: Settings, database: Engine, layout: Layout) -> None:
        self._settings = settings
        self._database = database
        self._layout = layout
        self._lock = threading.Lock()
        self._engine: TrainingEngine | None = None
        self._loaded: str | None = None
        self._stopped = threading.Event()
        self.base_model_id: str | None = None
        """What the last claimed job needs, loaded or about to be."""

    def engine_for(self, base_model_id: str) -> TrainingEngine:
        """The engine over this base model, loaded first if another is here; raises TrainerStops once it is too late."""
        with self._lock:
            if self._stopped.is_set():
                raise TrainerStops
            if self._engine is None or self._engine.is_dead or self._loaded != base_model_id:
                if self._engine is not None:
                    self._engine.close()
                    self._engine = None  # its model is let go before the next one is loaded
                self._engine, self._loaded = self._load(base_model_id), base_model_id
                if self._stopped.is_set():
                    self._engine.stop_all()
            return self._engine

    def _load(self, base_model_id: str) -> TrainingEngine:
        with db.read(self._database) as tx:
            row = base_models.get(tx, base_model_id)
        base = load_base_model(
            self._layout.model(row.id),
            name=row.name,
            digest=row.digest,
            device=self._settings.device,
            dtype=self._settings.dtype,
        )
        log.info("loaded %s (%s on %s)", row.name, base.dtype, base.device)
        return TrainingEngine(base, max_tokens=self._settings.train_tokens, on_broken=_give_up_device)

    def overdue_s(self) -> float | None:
        engine = self._engine
        return None if engine is None else engine.pulse.overdue_s(floor_s=self._settings.hung_s)

    def stop_jobs(self) -> None:
        self._stopped.set()
        if (engine := self._engine) is not None:
            engine.stop_all()


# Whoever gives up leaves the jobs their checkpoints: the sweeper finds them once the leases run out.
def _give_up_hung(seconds: float) -> None:
    give_up("trainer", f"no training step for {seconds:.0f} s")


def _give_up_device(error: BaseException) -> None:
    give_up("trainer", f"the device fails: {error}")


def main() -> None:
    """Run a trainer until SIGTERM or SIGINT."""
    keep_freed_memory()
    settings = Settings.from_env()
    logs.set_up(secrets=settings.secrets)
    app = celery_app(settings.resolved_broker_url)
    database, layout = db.open_engine(settings.database_url), Layout(settings.data_dir)
    trainer = Trainer(settings, database, layout, ring=Queue(settings.resolved_broker_url).ring_trainers)
    app.task(name=TRAIN_TASK)(trainer.answer_doorbell)
    inspector = Inspector(settings, database, layout)
    app.task(name=INSPECT_TASK)(inspector.answer)
    worker_shutting_down.connect(lambda **_: trainer.stop(), weak=False)
    worker_shutting_down.connect(lambda **_: inspector.stop(), weak=False)
    watch(trainer.overdue_s, floor_s=settings.hung_s, on_hung=_give_up_hung)
    # One thread more than slots, so that questions about data are answered while jobs train.
    run_worker(app, queues=[TRAIN_QUEUE, INSPECT_QUEUE], threads=settings.train_slots + 1)


if __name__ == "__main__":
    exit_with_one_line(main)
