"""One service for one fault: a fresh database, store and broker, and programs that are started and broken at will."""

import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from sqlalchemy import select
from sqlalchemy.exc import DBAPIError

from shared import db, ids, jobs
from shared.queue import Queue
from shared.specs import LoraSpec, TrainSpec
from shared.store import adapters, durable, files
from shared.store.layout import Layout
from shared.tables import AdapterVersion, BaseModelRow, Job, JobAttempt, JobState
from tests.chaos.client import Client
from tests.chaos.invariants import violations
from tests.chaos.programs import Nursery, Process, wait_until
from tests.chaos.recorder import Recorder
from tests.servers import Broker, free_port, run_broker

TENANT: Final = "default"
BASE: Final = "tiny"
SAMPLES: Final = b"".join(b'{"prompt": "%d and 1 is", "completion": " %d"}\n' % (n, n + 1) for n in range(40))
PATIENCE_S: Final = 60.0
"""Within this everything that waits must run, whatever was broken."""


class Lab:
    """Everything of one fault. Programs end with the block."""

    def __init__(
        self, nursery: Nursery, place: Path, *, data_dir: Path, database_url: str, settings: Mapping[str, str]
    ) -> None:
        self.layout = Layout(data_dir)
        self.layout.prepare()
        self.database_url = database_url
        self.engine = db.open_engine(database_url)
        self.place = place
        self._nursery = nursery
        self._settings = settings
        self._stack = ExitStack()
        self._programs: list[Process] = []

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            stack.callback(self.engine.dispose)
            self._broker_port = free_port()
            self.broker = stack.enter_context(run_broker(port=self._broker_port))
            self.queue = Queue(self.broker.url)
            stack.callback(self.queue.close)
            self.recorder = stack.enter_context(Recorder(self.engine, self.layout))
            stack.callback(self._kill_all)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, trace)

    def check(self, *, all_ended: bool) -> None:
        """All invariants, now and at all times before; AssertionError that names every violation."""
        self._kill_all()
        self.recorder.stop()
        self.recorder.look()
        spared = self.recorder.spared
        found = self.recorder.violations + violations(self.engine, self.layout, all_ended=all_ended, spared=spared)
        assert not found, "; ".join(found)

    # -- programs

    def start(
        self,
        program: str,
        *,
        failpoint: str = "",
        database_url: str = "",
        broker_url: str = "",
        slots: int = 1,
        port: int | None = None,
        **order: Any,
    ) -> Process:
        """One of the service's programs in a process of its own."""  # fmt: skip
        settings = {
            "LORAD_DATA_DIR": str(self.layout.root), "LORAD_DATABASE_URL": database_url or self.database_url,
            "LORAD_BROKER_URL": broker_url or self.broker.url, "LORAD_TRAIN_SLOTS": str(slots),
            "LORAD_DEVICE": "cpu", "LORAD_DTYPE": "float32", "LORAD_SWEEP_S": "1", "LORAD_CHECKPOINT_S": "1",
            "LORAD_MIN_FREE_BYTES": "0", **self._settings,
        }  # fmt: skip
        if failpoint:
            settings["LORAD_FAILPOINT"] = failpoint
        if port is not None:
            settings["LORAD_PORT"] = str(port)
        name = f"{program}{len(self._programs)}"
        order |= {"program": program} if "call" not in order else {}
        process = self._nursery.start(name, log=self.place / f"{name}.log", env=settings, **order)
        self._programs.append(process)
        return process

    def trainer(self, **options: Any) -> Process:
        return self.start("trainer", **options)

    def sweeper(self, **options: Any) -> Process:
        return self.start("sweeper", **options)

    def api(self, **options: Any) -> Client:
        """An API that answers, and a client of it."""
        port = free_port()
        process = self.start("api", port=port, **options)
        client = Client(process, f"http://127.0.0.1:{port}")
        self._stack.callback(client.close)
        wait_until("the API", client.is_ready, at_most_s=PATIENCE_S)
        return client

    @contextmanager
    def kept_alive(self, count: int, start: Callable[[], Process]) -> Iterator[list[Process]]:
        """So many programs, the dead replaced as by a supervisor; the list always holds those that live."""
        alive = [start() for _ in range(count)]
        stopping = threading.Event()

        def replace() -> None:
            while not stopping.wait(0.2):
                alive[:] = [process if process.is_alive else start() for process in alive]

        thread = threading.Thread(target=replace, name="supervisor", daemon=True)
        thread.start()
        try:
            yield alive
        finally:
            stopping.set()
            thread.join(30)

    def _kill_all(self) -> None:
        for program in self._programs:
            if program.is_alive:
                os.killpg(program.pid, signal.SIGKILL)
        for program in self._programs:
            program.wait_dead(10)

    # -- the broker

    def kill_broker(self) -> None:
        """kill -9; nothing that it held is kept."""
        os.kill(self.broker.pid, signal.SIGKILL)

    def start_broker(self) -> Broker:
        """An empty broker where the killed one was."""
        self.broker = self._stack.enter_context(run_broker(port=self._broker_port))
        self.queue.close()
        return self.broker

    # -- jobs

    def add_base(self, source: Path, digest: str, config: Mapping[str, Any]) -> None:
        """Register the tiny base model and a data set."""
        self.base_id = ids.new_id(ids.BASE_MODEL)
        shutil.copytree(source, self.layout.model(self.base_id))
        with db.write(self.engine) as tx:
            now = db.now_ms(tx)
            tx.add(BaseModelRow(id=self.base_id, name=BASE, digest=digest, config=dict(config), created_at=now))
            self.file_id = files.add_bytes(
                tx, self.layout, SAMPLES, tenant=TENANT, purpose="fine-tune", filename="samples.jsonl"
            ).id
        self.base_digest = digest

    def submit(
        self,
        count: int = 1,
        *,
        steps: int = 20,
        seconds: int | None = None,
        every: int | None = None,
        name: str = "job",
        tenant: str = TENANT,
        ring: bool = True,
    ) -> list[str]:
        """The ids of new jobs, queued as the API queues them. They take `steps` optimizer steps, or so many seconds,
        and save a checkpoint `every` so many steps, and after each second."""  # fmt: skip
        spec = TrainSpec(
            lora=LoraSpec(r=4), batch_size=2, max_steps=100_000 if seconds else steps, max_seconds=seconds,
            checkpoint_every=every,
        )  # fmt: skip
        made = []
        for number in range(count):
            new = jobs.NewJob(
                tenant=tenant, base_model_id=self.base_id, training_file_id=self.file_id,
                adapter_name=name if count == 1 else f"{name}-{number}", spec=spec,
            )  # fmt: skip
            with db.write(self.engine) as tx:
                made.append(jobs.submit(tx, new, max_queued=10_000).id)
            if ring:
                self.queue.ring_trainers()
        return made

    def publish(self, name: str, weights: bytes) -> AdapterVersion:
        """An adapter version as a trainer publishes it, of a job that this process claims; the weights are any."""
        [job_id] = self.submit(name=name, ring=False)
        with db.write(self.engine) as tx:
            claim = jobs.claim_next(tx, trainer="the lab", lease_s=60.0)
        assert claim is not None
        assert claim.job_id == job_id
        with durable.staging(self.layout) as staged:
            (staged / "adapter_model.safetensors").write_bytes(weights)
            (staged / "adapter_config.json").write_text("{}")
            prepared = adapters.prepare(
                self.layout, staged, validate=lambda _: None, base_model_id=self.base_id,
                base_digest=self.base_digest, spec=claim.spec, job_id=job_id, name=name, training_sha256=None,
            )  # fmt: skip
        with db.write(self.engine) as tx:
            return jobs.succeed(tx, claim, prepared)

    def rows(self) -> list[Job]:
        """All jobs, oldest first."""
        with db.read(self.engine) as tx:
            return list(tx.scalars(select(Job).order_by(Job.created_at, Job.id)))

    def row(self, job_id: str) -> Job:
        with db.read(self.engine) as tx:
            return tx.get_one(Job, job_id)

    def outcomes(self, job_id: str) -> list[str | None]:
        """How each of the job's attempts ended, in order."""
        with db.read(self.engine) as tx:
            query = select(JobAttempt.outcome).where(JobAttempt.job_id == job_id).order_by(JobAttempt.fence)
            return list(tx.scalars(query))

    def steps(self, job_id: str) -> list[int]:
        """The steps that the job has told of, in that order."""
        with db.read(self.engine) as tx:
            page = jobs.events_page(tx, self.row(job_id).tenant, job_id, limit=100_000, newest_first=False)
            return [int((event.data or {})["step"]) for event in page.items if event.type == "metrics"]

    def messages(self, job_id: str) -> list[str]:
        """What the job's events say, metrics left out, oldest first."""
        with db.read(self.engine) as tx:
            page = jobs.events_page(tx, self.row(job_id).tenant, job_id, limit=100_000, newest_first=False)
            return [event.message for event in page.items if event.type == "message"]

    def states(self, job_ids: Sequence[str]) -> list[JobState]:
        states = {row.id: JobState(row.state) for row in self.rows()}
        return [states[job_id] for job_id in job_ids]

    def wait_for_step(self, job_id: str, step: int, *, at_most_s: float = PATIENCE_S) -> None:
        """Until the job runs and has told of this step."""
        wait_until(f"step {step} of {job_id}", lambda: self.row(job_id).step >= step, at_most_s=at_most_s)

    def wait_ended(self, job_ids: Sequence[str], *, at_most_s: float = PATIENCE_S) -> None:
        """Until all these jobs have ended; a database that is away is waited for."""

        def ended() -> bool:
            try:
                return all(state.is_terminal for state in self.states(job_ids))
            except DBAPIError:
                return False

        until = time.monotonic() + at_most_s
        while not ended():
            if time.monotonic() > until:
                states = {row.id: f"{row.state} step {row.step} attempt {row.attempt}" for row in self.rows()}
                raise AssertionError(f"after {at_most_s:g} s: {[states[job_id] for job_id in job_ids]}")
            time.sleep(0.1)

    def wait_succeeded(self, job_ids: Sequence[str], *, at_most_s: float = PATIENCE_S) -> None:
        """Until all these jobs have ended, and all of them well."""
        self.wait_ended(job_ids, at_most_s=at_most_s)
        bad = {row.id: row.error for row in self.rows() if row.id in job_ids and row.state != JobState.SUCCEEDED}
        assert not bad, f"not succeeded: {bad}"
