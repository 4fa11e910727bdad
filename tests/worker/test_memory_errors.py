"""Memory that runs out in Python, anywhere: one job ends its attempt, the process goes on to the next."""

import os
import threading
from pathlib import Path
from typing import Any

import pytest
from celery.contrib.testing.worker import start_worker

from shared import jobs
from shared.db import Tx, open_engine
from shared.jobs import Claim
from shared.queue import TRAIN_QUEUE, TRAIN_TASK, Queue, celery_app
from shared.store import adapters
from shared.store.layout import Layout
from shared.tables import JobState
from tests.servers import Broker
from tests.shared.conftest import World, make_world
from tests.worker.job_runs import run, settings_of, spec_of
from worker import trainer as trainer_module
from worker.base_model import BaseModel
from worker.trainer import Trainer
from worker.training.engine import TrainingEngine

TIMEOUT_S = 30


def test_memory_that_runs_out_in_training_fails_that_job_only(
    world: World, base: BaseModel, learner: TrainingEngine
) -> None:
    """The job ends as out_of_memory; the engine trains the next one."""

    is_short = True

    def run_out(_: object, arguments: object) -> None:
        if is_short:
            raise MemoryError

    base.model.get_input_embeddings().register_forward_pre_hook(run_out)  # type: ignore[operator]  # a module's own
    poison, healthy = (world.running(spec=spec_of(max_steps=2)) for _ in range(2))
    run(world, learner, poison)
    is_short = False
    run(world, learner, healthy)
    error = world.job(poison.job_id).error

    assert world.state(poison.job_id) == JobState.FAILED
    assert error is not None
    assert error["code"] == "out_of_memory"
    assert world.state(healthy.job_id) == JobState.SUCCEEDED


def test_memory_that_runs_out_beside_training_costs_an_attempt(
    world: World, learner: TrainingEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the adapter is prepared, say: the job goes back to the queue, charged, and succeeds the next time."""
    prepare = adapters.prepare

    def run_out(*_: object, **__: object) -> object:
        monkeypatch.setattr(adapters, "prepare", prepare)
        raise MemoryError

    monkeypatch.setattr(adapters, "prepare", run_out)
    claim = world.running(spec=spec_of(max_steps=1))
    run(world, learner, claim)
    after = world.job(claim.job_id)
    world.edit(claim.job_id, "not_before = 0")
    run(world, learner, world.claim())

    assert (after.state, after.attempt) == (JobState.QUEUED, 1)
    assert world.state(claim.job_id) == JobState.SUCCEEDED


@pytest.mark.filterwarnings("ignore::celery.exceptions.SecurityWarning")  # the tests may run as root
def test_memory_that_runs_out_in_a_task_leaves_the_worker_alive(
    fresh_sqlite_url: str, tmp_path: Path, broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A real Celery worker with one slot: its first task raises MemoryError, its second trains, in the same process."""
    database, layout = open_engine(fresh_sqlite_url), Layout(tmp_path / "data")
    layout.prepare()
    world = make_world(database, layout)
    claim_next, failed, ended = jobs.claim_next, threading.Event(), threading.Event()
    where: list[int] = []

    def run_out_first(tx: Tx, **named: Any) -> Claim | None:
        if not failed.is_set():
            failed.set()
            raise MemoryError
        return claim_next(tx, **named)

    class Ended:
        """A run of a job that succeeds at once."""

        def __init__(self, claim: Claim, **_: object) -> None:
            self._claim = claim

        def run(self, engine_for: object) -> None:
            world.publish(self._claim)
            where.append(os.getpid())
            ended.set()

    monkeypatch.setattr(jobs, "claim_next", run_out_first)
    monkeypatch.setattr(trainer_module, "JobRun", Ended)
    broker.client.delete("lorad:train")
    app, queue = celery_app(broker.url), Queue(broker.url)
    trainer = Trainer(settings_of(world), database, layout, ring=lambda: None)
    app.task(name=TRAIN_TASK)(trainer.answer_doorbell)
    job = world.submit()
    with start_worker(app, pool="threads", concurrency=1, perform_ping_check=False, queues=[TRAIN_QUEUE]):
        queue.ring_trainers()
        assert failed.wait(TIMEOUT_S)
        queue.ring_trainers()
        assert ended.wait(TIMEOUT_S)
    queue.close()
    app.close()
    state = world.state(job.id)
    database.dispose()

    assert (state, where) == (JobState.SUCCEEDED, [os.getpid()])
