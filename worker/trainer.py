"""The training process: a Celery worker that claims jobs from the ledger and feeds the TrainingEngine. Wiring only.

A doorbell message carries nothing; `jobs.claim_next` decides what is trained. One process and Celery's threads pool:
the engine's thread owns the model, and a task that fails can neither take the worker with it nor block its slot.
"""

import logging
import os
import socket
import threading

from celery.signals import worker_shutting_down
from sqlalchemy import Engine

from shared import db, jobs
from shared.config import Settings
from shared.queue import TRAIN_QUEUE, TRAIN_TASK, celery_app
from shared.store import base_models
from shared.store.layout import Layout
from worker.base_model import load_base_model
from worker.celery_program import exit_with_one_line, run_worker
from worker.job_run import JobRun
from worker.training.engine import TrainingEngine

log = logging.getLogger("lorad.trainer")


class Trainer:
    """Claims jobs and runs them over one loaded base model."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._database = db.open_engine(settings.database_url)
        self._layout = Layout(settings.data_dir)
        self._name = f"{socket.gethostname()}-{os.getpid()}"
        self._stopping = threading.Event()
        self._bench = _Bench(settings, self._database, self._layout)

    def answer_doorbell(self) -> None:
        """Train queued jobs, one after the other, until none is left that this trainer may take."""
        while not self._stopping.is_set():
            with db.write(self._database) as tx:
                claim = jobs.claim_next(
                    tx, trainer=self._name, lease_s=self._settings.lease_s, holds_base=self._bench.base_model_id
                )
            if claim is None:
                return
            log.info("claimed %s, attempt %d", claim.job_id, claim.attempt)
            run = JobRun(claim, settings=self._settings, database=self._database, layout=self._layout)
            run.run(self._bench.engine_for)

    def stop(self) -> None:
        """Checkpoint what runs, so that its lease is given back, and claim nothing more."""
        self._stopping.set()
        self._bench.stop_jobs()


class _Bench:
    """The one engine of this process. Another base model takes its place: jobs still on it, which there are only with
    more than one slot, are checkpointed and given back."""

    def __init__(self, settings: Settings, database: Engine, layout: Layout) -> None:
        self._settings = settings
        self._database = database
        self._layout = layout
        self._lock = threading.Lock()
        self._engine: TrainingEngine | None = None
        self._stopped = False
        self.base_model_id: str | None = None

    def engine_for(self, base_model_id: str) -> TrainingEngine:
        """The engine over this base model, loaded first if another is here."""
        with self._lock:
            if self._engine is None or self.base_model_id != base_model_id:
                if self._engine is not None:
                    self._engine.close()
                self.base_model_id, self._engine = base_model_id, self._load(base_model_id)
                if self._stopped:
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
        return TrainingEngine(base, max_tokens=self._settings.train_tokens)

    def stop_jobs(self) -> None:
        self._stopped = True
        if self._engine is not None:
            self._engine.stop_all()


def main() -> None:
    """Run a trainer until SIGTERM or SIGINT."""
    settings = Settings.from_env()
    app = celery_app(settings.resolved_broker_url)
    trainer = Trainer(settings)
    app.task(name=TRAIN_TASK)(trainer.answer_doorbell)
    worker_shutting_down.connect(lambda **_: trainer.stop(), weak=False)
    run_worker(app, queues=[TRAIN_QUEUE], threads=settings.train_slots)


if __name__ == "__main__":
    exit_with_one_line(main)
