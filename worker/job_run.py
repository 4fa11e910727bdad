"""One claimed job, from its files to its published version: the wiring between ledger, store and engine.

Two threads work for a job here. The caller's waits for the engine; the pulse renews the lease, writes what the engine
has reported since, and brings back what the ledger orders. The engine's own thread never waits for the database.
"""

import csv
import io
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from sqlalchemy import Engine
from sqlalchemy.exc import DBAPIError, StatementError

from shared import db, failpoints, jobs
from shared.config import Settings
from shared.errors import AdapterCorrupt, CancelRequested, InvalidRequest, NotFound, OwnershipLost, TrainingFailed
from shared.jobs import Claim
from shared.specs import Order, StepReport
from shared.store import adapters, base_models, checkpoints, files
from shared.store.durable import staging, storage_failure
from shared.store.layout import Layout
from worker.lora.format import read_adapter
from worker.training.engine import TrainingEngine
from worker.training.job import TrainingJob, TrainingResult

log = logging.getLogger("lorad.trainer")

FLUSH_S = 1.0
PUBLISH_RETRY_S = 900.0
"""How long a trained job keeps trying to commit while the database is away; its fence guards it all the while."""

EngineFor = Callable[[str], TrainingEngine]
Level = Literal["info", "warn", "error"]


class TrainerStops(Exception):
    """The trainer is shutting down, and loads no base model for a job that it will not train."""


class JobRun:
    """Runs one claim to one of its ends. Once ownership is lost it writes nothing more."""

    def __init__(self, claim: Claim, *, settings: Settings, database: Engine, layout: Layout) -> None:
        self._claim = claim
        self._settings = settings
        self._database = database
        self._layout = layout
        self._order = Order.GO_ON
        self._lock = threading.Lock()
        self._flushing = threading.Lock()
        self._events: list[jobs.NewEvent] = []
        self._report: StepReport | None = None
        self._checkpointed_at = time.monotonic()

    def run(self, engine_for: EngineFor) -> None:
        """Train and end the job as the ledger's table of arcs allows; returns normally whatever the job did.

        `engine_for(base model id)` loads the base if need be, or raises TrainerStops. A trainer that is shutting down
        gives the job back.
        """
        try:
            with self._pulse():
                result = self._train(engine_for)
                prepared = self._prepare_version(result) if result.outcome == "finished" else None
            if prepared is not None:
                self._publish(prepared, result)
            else:
                self._stop_as_ordered(result.order)
        except OwnershipLost:
            log.warning("%s: ownership lost, nothing published", self._claim.job_id)
        except TrainerStops:
            self._stop_as_ordered(None)
        except (InvalidRequest, TrainingFailed) as error:
            code, message = error.error_code, error.message
            self._end(lambda tx: jobs.fail(tx, self._claim, code=code, message=message))
        except Exception as error:
            log.exception("%s: attempt %d failed", self._claim.job_id, self._claim.attempt)
            self._give_back(error)

    # -- training

    def _train(self, engine_for: EngineFor) -> TrainingResult:
        claim = self._claim

        def plan(tx: db.Tx) -> TrainingJob:
            valid_id = claim.validation_file_id
            resume_from = checkpoints.intact(self._layout, jobs.newest_checkpoints(tx, claim.job_id))
            # A job that goes on from its own checkpoint needs its start no more.
            init_from = self._start_of(tx, claim.spec.init_from) if claim.spec.init_from and not resume_from else None
            return TrainingJob(
                job_id=claim.job_id,
                spec=claim.spec,
                train_path=self._file_path(tx, claim.training_file_id),
                valid_path=self._file_path(tx, valid_id) if valid_id else None,
                init_from=init_from,
                resume_from=resume_from,
                checkpoint_due=lambda: time.monotonic() - self._checkpointed_at >= self._settings.checkpoint_s,
                save_checkpoint=self._save_checkpoint,
                on_event=self._add_event,
                on_step=self._on_step,
                order=lambda: self._order,
            )

        job = self._read(plan)
        return engine_for(claim.base_model_id).submit(job).result()

    def _read(self, look: Callable[[db.Tx], db.Found]) -> db.Found:
        return db.read_patiently(self._database, look, at_most_s=PUBLISH_RETRY_S)

    def _file_path(self, tx: db.Tx, file_id: str) -> Path:
        return self._layout.files(files.get(tx, self._claim.tenant, file_id).id)

    def _start_of(self, tx: db.Tx, version_id: str) -> Path:
        """The files of the adapter version that the job starts from; raises InvalidRequest if they are not there."""
        try:
            return adapters.verify(self._layout, adapters.get_version(tx, version_id))
        except (NotFound, AdapterCorrupt) as error:
            message = f"'training.init_from': the adapter to start from cannot be used any more: {error.message}"
            raise InvalidRequest(message, param="training.init_from", code=error.error_code) from error

    def _on_step(self, report: StepReport) -> None:
        self._report = report
        failpoints.hit("train.step")

    def _add_event(
        self, level: Level, type: Literal["message", "metrics"], message: str, data: dict[str, Any] | None = None
    ) -> None:
        with self._lock:
            self._events.append(jobs.NewEvent(level, type, message, data))

    def _save_checkpoint(self, step: int, metrics: Mapping[str, Any], write: Callable[[Path], None]) -> None:
        claim = self._claim
        self._checkpointed_at = time.monotonic()
        try:
            prepared = checkpoints.prepare(self._layout, write, job_id=claim.job_id, step=step, fence=claim.fence)
        except OSError as error:
            if storage_failure(error) is None:
                raise
            # Nothing is left of it, the checkpoint before it is still there, and the next may find room.
            log.warning("%s: checkpoint of step %d is not saved: %s", claim.job_id, step, error)
            message = f"The checkpoint of step {step} could not be saved: {error.strerror}"
            return self._add_event("warn", "message", message, {"step": step})
        try:
            # With the events before it in one transaction: a resumed job does not make those steps again.
            with self._flushing:
                with db.write(self._database) as tx:
                    written = self._write_events(tx)
                    jobs.record_checkpoint(
                        tx,
                        claim,
                        checkpoint_id=prepared.checkpoint_id,
                        step=step,
                        manifest=prepared.manifest,
                        metrics=metrics,
                    )
                    forgotten = checkpoints.forget_old(tx, claim.job_id)
                self._forget(written)
        except DBAPIError as error:
            # The steps since the last checkpoint are at risk until the next, which is better than ending them now.
            log.warning(
                "%s: checkpoint of step %d is not recorded, the database is away: %s", claim.job_id, step, error
            )
        else:
            checkpoints.remove(self._layout, forgotten)

    # -- the pulse

    @contextmanager
    def _pulse(self) -> Iterator[None]:
        """Beat while the block runs."""
        ended = threading.Event()
        thread = threading.Thread(target=self._beat_until, args=(ended,), name=f"pulse-{self._claim.job_id}")
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()

    def _beat_until(self, ended: threading.Event) -> None:
        beaten_at = -self._settings.heartbeat_s
        while not ended.wait(min(FLUSH_S, self._settings.heartbeat_s)):
            self._outlived(self._flush)
            if time.monotonic() - beaten_at >= self._settings.heartbeat_s and self._outlived(self._beat):
                beaten_at = time.monotonic()

    def _outlived(self, write: Callable[[], None]) -> bool:
        """Do one of the pulse's writes; whatever it raises, the next will be tried. False if it raised."""
        try:
            write()
        except OwnershipLost:
            self._order = Order.LOST
        except db.AWAY as error:
            # Cut off from the database we train on: nothing can be published without it, and most cuts are short.
            log.warning("%s: the database does not answer: %s", self._claim.job_id, error)
        except Exception:
            log.exception("%s: a write of the pulse failed", self._claim.job_id)
        else:
            return True
        return False

    def _beat(self) -> None:
        with db.write(self._database) as tx:
            order = jobs.heartbeat(tx, self._claim, lease_s=self._settings.lease_s, report=self._report)
        with self._lock:
            self._order = order

    def _flush(self) -> None:
        """Write the events reported since the last flush, in order, in one transaction."""
        with self._flushing:
            if not self._events:
                return
            with db.write(self._database) as tx:
                written = self._write_events(tx)
            self._forget(written)

    def _write_events(self, tx: db.Tx) -> int:
        """Write the waiting events; the caller holds `_flushing`, commits, and forgets that many.

        An event that the database refuses is logged and left out: those after it must not wait for it for ever.
        """
        with self._lock:
            events = list(self._events)
        if events and not self._write(tx, events):
            for event in events:
                if not self._write(tx, [event]):
                    log.error("%s: this event cannot be written: %s", self._claim.job_id, event)
        return len(events)

    def _write(self, tx: db.Tx, events: Sequence[jobs.NewEvent]) -> bool:
        """False, and nothing written, if the database refuses them."""
        try:
            with tx.begin_nested():
                jobs.add_events(tx, self._claim, events)
        except db.AWAY:
            raise
        except StatementError as error:
            log.warning("%s: events are refused: %s", self._claim.job_id, error)
            return False
        return True

    def _forget(self, written: int) -> None:
        with self._lock:
            del self._events[:written]

    # -- the ends

    def _prepare_version(self, result: TrainingResult) -> adapters.PreparedVersion:
        claim = self._claim
        base = self._read(lambda tx: base_models.get(tx, claim.base_model_id))
        data = self._read(lambda tx: files.get(tx, claim.tenant, claim.training_file_id))
        with staging(self._layout) as staged:
            result.write_adapter(staged)
            return adapters.prepare(
                self._layout,
                staged,
                validate=read_adapter,
                base_model_id=base.id,
                base_digest=base.digest,
                spec=claim.spec,
                job_id=claim.job_id,
                name=claim.adapter_name,
                training_sha256=data.sha256,
            )

    def _publish(self, prepared: adapters.PreparedVersion, result: TrainingResult) -> None:
        """Commit version and success together. A lost answer is read back before anything is tried again."""
        claim = self._claim

        def commit(tx: db.Tx) -> None:
            published = jobs.published_version(tx, claim.job_id)
            if published is not None and published.id == prepared.version_id:
                return
            table = files.add_bytes(
                tx, self._layout, _metrics_csv(jobs.step_metrics(tx, claim.job_id)), tenant=claim.tenant,
                purpose="fine-tune-results", filename="step_metrics.csv",
            )  # fmt: skip
            jobs.succeed(tx, claim, prepared, result_file_ids=[table.id], trained_tokens=result.trained_tokens)
            failpoints.hit("publish.in_transaction")

        self._end(lambda tx: None)  # the events, so that no answer but the commit's can be lost below
        failpoints.hit("publish.before_commit")
        try:
            self._end(commit)
        except CancelRequested:
            self._end(lambda tx: jobs.stop_cancelled(tx, claim))
        else:
            failpoints.hit("publish.after_commit")

    def _stop_as_ordered(self, order: Order | None) -> None:
        if order is Order.CANCEL:
            self._end(lambda tx: jobs.stop_cancelled(tx, self._claim))
        elif order is Order.PAUSE:
            self._end(lambda tx: jobs.stop_paused(tx, self._claim))
        elif order is Order.LOST:
            raise OwnershipLost
        else:
            reason = "the trainer is shutting down"
            self._end(lambda tx: jobs.give_back(tx, self._claim, charge=False, reason=reason))

    def _give_back(self, error: Exception) -> None:
        """Let another attempt write everything anew. One that the disk has ended was not the job's fault."""
        claim, lease_s = self._claim, self._settings.lease_s
        if isinstance(error, OSError) and (code := storage_failure(error)):
            why = str(error.strerror)
            self._end(lambda tx: jobs.give_back_for_storage(tx, claim, code=code, reason=why, lease_s=lease_s))
        else:
            why = f"{type(error).__name__}: {error}"
            self._end(lambda tx: jobs.give_back(tx, claim, charge=True, reason=why, lease_s=lease_s))

    def _end(self, write: Callable[[db.Tx], object]) -> None:
        """Perform a last write after the events that still wait, waiting for a database that is away: what was trained
        is not thrown away for that.

        The pulse has ended, so the lease may run out meanwhile; the fence then keeps the write from happening.
        """
        until = time.monotonic() + PUBLISH_RETRY_S
        while True:
            try:
                with self._flushing:
                    with db.write(self._database) as tx:
                        written = self._write_events(tx)
                        write(tx)
                    self._forget(written)
                return
            except OwnershipLost:
                log.warning("%s: ownership lost, nothing published", self._claim.job_id)
                return
            except db.AWAY:
                if time.monotonic() > until:
                    raise
                time.sleep(1.0)


def _metrics_csv(metrics: list[dict[str, Any]]) -> bytes:
    """The metrics of a job as a table, one row per step."""
    columns = sorted({key for row in metrics for key in row}, key=lambda key: (key != "step", key))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns)
    writer.writeheader()
    writer.writerows(metrics)
    return text.getvalue().encode()
