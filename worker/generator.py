"""The inference process: a Celery worker that feeds requests to the InferenceEngine and streams tokens back.

Wiring only. There is one queue and one engine per base model; a base that is registered while the process runs gets
its queue within `NEW_BASES_S`, and its engine with its first request.
"""

import logging
import threading
import time
from pathlib import Path
from typing import Any

from sqlalchemy.exc import DBAPIError

from shared import db
from shared.config import Settings
from shared.errors import InvalidRequest, LoradError
from shared.queue import GENERATE_TASK, Queue, celery_app, generate_queue, received_request
from shared.specs import Chunk, ChunkError
from shared.store import adapters, base_models
from shared.store.layout import Layout
from worker.base_model import load_base_model
from worker.celery_program import exit_with_one_line, run_worker
from worker.inference.engine import InferenceEngine

log = logging.getLogger("lorad.generator")

NEW_BASES_S = 2.0


class Generator:
    """Answers generation requests over every registered base model."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._database = db.open_engine(settings.database_url)
        self._layout = Layout(settings.data_dir)
        self._queue = Queue(settings.resolved_broker_url)
        self._lock = threading.Lock()
        self._engines: dict[str, InferenceEngine] = {}

    def answer(self, payload: dict[str, Any]) -> None:
        """Generate for one request and write its chunks where the API reads them; never raises for a bad request."""
        try:
            request = received_request(payload)
        except InvalidRequest as error:
            log.warning("discarded a message: %s", error.message)
            return
        if request.deadline_unix_s < time.time():
            return
        writer = self._queue.writer(request.request_id)
        try:
            stream = self._engine(request.base_model_id).submit(request)
            try:
                for chunk in stream:
                    writer.write(chunk)
                    if not chunk.is_last and writer.is_cancelled():
                        break
            finally:
                stream.cancel()  # nobody reads on: frees the row; after the last chunk it does nothing
        except LoradError as error:
            failure = ChunkError(code=error.error_code, message=error.message, param=error.param)
            writer.write(Chunk(error=failure))
        except Exception:
            log.exception("request %s failed", request.request_id)
            writer.write(
                Chunk(error=ChunkError(code="internal_error", message="The generator failed on this request."))
            )

    def _engine(self, base_model_id: str) -> InferenceEngine:
        with self._lock:
            if base_model_id not in self._engines:
                self._engines[base_model_id] = self._load(base_model_id)
            return self._engines[base_model_id]

    def _load(self, base_model_id: str) -> InferenceEngine:
        with db.read(self._database) as tx:
            row = base_models.get(tx, base_model_id)
        settings = self._settings
        base = load_base_model(
            self._layout.model(row.id), name=row.name, digest=row.digest, device=settings.device, dtype=settings.dtype
        )
        log.info("loaded %s (%s on %s)", row.name, base.dtype, base.device)
        return InferenceEngine(
            base,
            locate=self._locate,
            adapter_cache_bytes=settings.adapter_cache_bytes,
            max_rows=settings.generate_slots,
        )

    def _locate(self, version_id: str) -> Path:
        """The directory of an adapter version whose files match their checksums; AdapterCorrupt, NotFound."""
        with db.read(self._database) as tx:
            version = adapters.get_version(tx, version_id)
        return adapters.verify(self._layout, version)

    def base_model_ids(self) -> list[str]:
        with db.read(self._database) as tx:
            return [row.id for row in base_models.list_all(tx)]

    def follow_new_bases(self, worker: Any, known: set[str]) -> None:
        """Consume the queue of every base model registered from now on."""
        while True:
            time.sleep(NEW_BASES_S)
            try:
                new = set(self.base_model_ids()) - known
            except DBAPIError as error:
                log.warning("the database does not answer: %s", error)
                continue
            for base_model_id in new:
                worker.consumer.call_soon(worker.consumer.add_task_queue, generate_queue(base_model_id))
                known.add(base_model_id)
                log.info("serving base model %s", base_model_id)


def main() -> None:
    """Run a generator until SIGTERM or SIGINT."""
    settings = Settings.from_env()
    app = celery_app(settings.resolved_broker_url)
    generator = Generator(settings)
    app.task(name=GENERATE_TASK)(generator.answer)
    known = set(generator.base_model_ids())

    def follow(worker: Any) -> None:
        threading.Thread(target=generator.follow_new_bases, args=(worker, known), daemon=True, name="bases").start()

    # The bare name "generate" keeps the consumer alive before the first base model is registered.
    queues = ["generate", *(generate_queue(base_model_id) for base_model_id in known)]
    run_worker(app, queues=queues, threads=settings.generate_slots, while_running=follow)


if __name__ == "__main__":
    exit_with_one_line(main)
