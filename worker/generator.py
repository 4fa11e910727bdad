"""The inference process: a Celery worker whose desk has one InferenceEngine per base model answer requests.

Wiring only. A base that is registered while the process runs gets its queues within `NEW_BASES_S`, and its engine with
its first request. A task holds its thread until its answer is sent, so that no more is taken than can be answered soon.
"""

import logging
import threading
import time
from collections.abc import Callable
from typing import Any, Final

from celery.signals import worker_shutting_down
from sqlalchemy.exc import DBAPIError

from shared import db, logs
from shared.config import Settings
from shared.queue import GENERATE_TASK, Queue, celery_app, listen
from shared.store import adapters, base_models
from shared.store.layout import Layout
from worker.base_model import load_base_model
from worker.celery_program import exit_with_one_line, run_worker
from worker.desk import Desk
from worker.inference.engine import InferenceEngine
from worker.kernels.memory import keep_freed_memory
from worker.lora.format import StoredAdapter
from worker.watchdog import give_up, watch

log = logging.getLogger("lorad.generator")

NEW_BASES_S: Final = 2.0
LEAVE_S: Final = 6.0
"""How long answers under way may go on after SIGTERM. The supervisor kills after ten seconds."""
LAST_WORDS_S: Final = 2.0


class Models:
    """Loads engines over the registered base models."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._database = db.open_engine(settings.database_url)
        self._layout = Layout(settings.data_dir)

    def load(self, base_model_id: str) -> InferenceEngine:
        """An engine over this base model; NotFound."""
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
            kv_cache_bytes=settings.kv_cache_bytes,
            compiles=settings.kernels == "auto",
        )

    def _locate(self, version_id: str) -> StoredAdapter:
        """Where the files of an adapter version are, and their checksums; NotFound, AdapterCorrupt."""
        with db.read(self._database) as tx:
            version = adapters.get_version(tx, version_id)
        recorded = {filename: str(file["sha256"]) for filename, file in version.manifest["files"].items()}
        return StoredAdapter(self._layout.adapter(version.id), recorded)

    def base_model_ids(self) -> list[str]:
        with db.read(self._database) as tx:
            return [row.id for row in base_models.list_all(tx)]

    def follow(self, known: set[str], serve: Callable[[str], object]) -> None:
        """Call `serve` with every base model registered from now on; never returns."""
        while True:
            time.sleep(NEW_BASES_S)
            try:
                new = set(self.base_model_ids()) - known
            except DBAPIError as error:
                log.warning("the database does not answer: %s", error)
                continue
            for base_model_id in new:
                serve(base_model_id)
                known.add(base_model_id)
                log.info("serving base model %s", base_model_id)


def end_if_stuck(desk: Desk, *, hung_s: float) -> None:
    """From now on, end this process once a turn of an engine takes longer; open answers end with an error first."""

    def give_up_hung(seconds: float) -> None:
        desk.end_all("The generator got stuck; try again.", timeout_s=LAST_WORDS_S)
        give_up("generator", f"a turn of the engine has taken {seconds:.0f} s")

    watch(lambda: desk.overdue_s(floor_s=hung_s), floor_s=hung_s, on_hung=give_up_hung)


def main() -> None:
    """Run a generator until SIGTERM or SIGINT."""
    settings = Settings.from_env()
    logs.set_up(secrets=settings.secrets)
    keep_freed_memory()
    app = celery_app(settings.resolved_broker_url)
    models = Models(settings)
    seats = settings.generate_slots + settings.generate_waiting
    desk = Desk(Queue(settings.resolved_broker_url), seats=seats, load=models.load)
    app.task(name=GENERATE_TASK)(desk.answer)
    known = set(models.base_model_ids())

    def follow(worker: Any) -> None:
        def serve(base_model_id: str) -> None:
            for queue in listen(app, base_model_id, desk.generator_id):
                worker.consumer.call_soon(worker.consumer.add_task_queue, queue)

        threading.Thread(target=models.follow, args=(known, serve), daemon=True, name="bases").start()

    def leave(**_: object) -> None:
        threading.Thread(target=desk.leave, kwargs={"after_s": LEAVE_S}, daemon=True, name="leave").start()

    worker_shutting_down.connect(leave, weak=False)
    end_if_stuck(desk, hung_s=settings.generate_hung_s)
    desk.start_publishing()
    # The bare name "generate" keeps the consumer alive before the first base model is registered.
    queues = ["generate", *(name for one in known for name in listen(app, one, desk.generator_id))]
    try:
        run_worker(app, queues=queues, threads=seats, while_running=follow)
    finally:
        desk.close()


if __name__ == "__main__":
    exit_with_one_line(main)
