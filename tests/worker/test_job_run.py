"""One claim from its files to its end, with a real ledger, store and engine around a tiny model."""

import csv
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy.exc import DataError, OperationalError

from shared import jobs
from shared.db import Tx, read, write
from shared.jobs import Claim
from shared.store import adapters
from shared.tables import JobState
from tests.shared.conftest import World
from tests.worker.job_runs import at_step, run, settings_of, spec_of, world_on
from tests.worker.training.test_failures import spoil_forwards
from worker.base_model import BaseModel
from worker.job_run import JobRun, TrainerStops
from worker.training.engine import TrainingEngine

TIMEOUT_S = 60


@pytest.fixture
def engine(learner: TrainingEngine) -> TrainingEngine:
    return learner


def test_a_claim_is_trained_and_published(world: World, engine: TrainingEngine) -> None:
    """The job succeeds, its version exists, and its table has a row for each step."""
    claim = world.running(spec=spec_of())
    run(world, engine, claim)
    job = world.job(claim.job_id)

    assert job.state == JobState.SUCCEEDED
    with read(world.engine) as tx:
        assert jobs.published_version(tx, claim.job_id) is not None
    assert [row["step"] for row in table_of(world, claim.job_id)] == ["1", "2", "3", "4"]


def table_of(world: World, job_id: str) -> list[dict[str, str]]:
    (file_id,) = world.job(job_id).result_file_ids
    return list(csv.DictReader(world.layout.files(file_id).read_text().splitlines()))


def test_the_table_holds_all_attempts(world: World, base: BaseModel, engine: TrainingEngine) -> None:
    """A job that was paused after its second step has the rows of both its attempts."""
    claim = world.running(spec=spec_of(max_steps=5))
    paused = threading.Event()

    def pause() -> None:
        with write(world.engine) as tx:
            jobs.request_pause(tx, "acme", claim.job_id)
        paused.wait(1.5)  # until the pulse has brought the order

    at_step(world, base, 3, pause)
    run(world, engine, claim)
    stopped = world.state(claim.job_id)
    with write(world.engine) as tx:
        jobs.resume(tx, "acme", claim.job_id)
    run(world, engine, world.claim())

    assert (stopped, world.state(claim.job_id)) == (JobState.PAUSED, JobState.SUCCEEDED)
    assert [row["step"] for row in table_of(world, claim.job_id)] == ["1", "2", "3", "4", "5"]


def test_a_failing_job_keeps_its_last_events(world: World, base: BaseModel, engine: TrainingEngine) -> None:
    """What was reported in its last second is written with its end, before it."""
    spoil_forwards(base, lambda n: True)
    claim = world.running(spec=spec_of(max_steps=40))
    run(world, engine, claim, heartbeat_s=1000.0)
    messages = world.messages(claim.job_id)

    assert world.state(claim.job_id) == JobState.FAILED
    assert [message for message in messages if message.startswith("Step 1 was skipped")]
    assert "The job failed: training diverged" in messages[-1]


def test_an_adapter_that_learnt_nothing_is_not_published(world: World, base: BaseModel, engine: TrainingEngine) -> None:
    """Two steps, neither of them finite: the job fails, and there is no version."""
    spoil_forwards(base, lambda n: True)
    claim = world.running(spec=spec_of(max_steps=2))
    run(world, engine, claim)

    with read(world.engine) as tx:
        assert jobs.published_version(tx, claim.job_id) is None
    assert world.state(claim.job_id) == JobState.FAILED


def test_jobs_that_wait_for_room_succeed(world: World, base: BaseModel) -> None:
    """Three jobs of which only one fits into a turn, with checkpoints that are due while two of them wait."""
    engine = TrainingEngine(base, max_tokens=30)
    spec = spec_of(max_steps=6, batch_size=1, checkpoint_every=2)
    claims = [world.running(spec=spec) for _ in range(3)]
    threads = [threading.Thread(target=run, args=(world, engine, claim)) for claim in claims]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(TIMEOUT_S)
    engine.close()

    assert [world.state(claim.job_id) for claim in claims] == [JobState.SUCCEEDED] * 3


def test_an_event_that_cannot_be_written_stops_nothing(
    world: World, base: BaseModel, engine: TrainingEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lease is renewed on, the other events are written, and the job succeeds."""
    add_events = jobs.add_events

    def refuse(tx: Tx, claim: Claim, events: Sequence[jobs.NewEvent]) -> None:
        if any(event.message.startswith("Step 2/") for event in events):
            raise DataError("INSERT", {}, ValueError("Token NaN is invalid"))
        add_events(tx, claim, events)

    monkeypatch.setattr(jobs, "add_events", refuse)
    claim = world.running(spec=spec_of())
    beaten: list[int | None] = []

    def wait() -> None:
        threading.Event().wait(1.2)
        beaten.append(world.job(claim.job_id).heartbeat_at)

    at_step(world, base, 3, wait)
    before = world.job(claim.job_id).heartbeat_at
    run(world, engine, claim)

    assert beaten[0] is not None
    assert before is not None
    assert beaten[0] > before
    assert world.state(claim.job_id) == JobState.SUCCEEDED
    assert [row["step"] for row in table_of(world, claim.job_id)] == ["1", "3", "4"]


def test_an_event_that_postgres_refuses_is_left_out(fresh_postgres_url: str, data_dir: Path) -> None:
    """Its JSON has no NaN; the refusal takes neither the events before nor those after with it."""
    world = world_on(fresh_postgres_url, data_dir)
    claim = world.running(spec=spec_of())
    run = JobRun(claim, settings=settings_of(world), database=world.engine, layout=world.layout)
    for message, number in (("before", 1.0), ("refused", float("nan")), ("after", 2.0)):
        run._add_event("info", "message", message, {"number": number})
    run._flush()
    messages = world.messages(claim.job_id)
    world.engine.dispose()

    assert messages[-2:] == ["before", "after"]


@pytest.mark.parametrize(("error", "tries"), [(OperationalError, 2), (DataError, 1)])
def test_only_a_database_that_is_away_is_asked_again(
    error: type[OperationalError | DataError],
    tries: int,
    world: World,
    engine: TrainingEngine,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A write that the database refuses will be refused again: the job goes back at once, charged."""
    succeed, asked = jobs.succeed, []

    def refuse(*arguments: Any, **named: Any) -> object:
        asked.append(error)
        if len(asked) == 1:
            raise error("UPDATE", {}, ValueError("no"))
        return succeed(*arguments, **named)

    monkeypatch.setattr(jobs, "succeed", refuse)
    claim = world.running(spec=spec_of())
    run(world, engine, claim)

    assert len(asked) == tries
    assert world.state(claim.job_id) == (JobState.SUCCEEDED if tries == 2 else JobState.QUEUED)


def test_the_pulse_outlives_an_error_of_its_own(
    world: World, base: BaseModel, engine: TrainingEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A heartbeat that fails once, whatever with, is followed by the next."""
    heartbeat, beats = jobs.heartbeat, []

    def fail_first(*arguments: Any, **named: Any) -> object:
        beats.append(len(beats))
        if len(beats) == 1:
            raise ValueError("a bug")
        return heartbeat(*arguments, **named)

    monkeypatch.setattr(jobs, "heartbeat", fail_first)
    claim = world.running(spec=spec_of())
    at_step(world, base, 2, lambda: threading.Event().wait(0.5))
    run(world, engine, claim)

    assert len(beats) > 1
    assert world.state(claim.job_id) == JobState.SUCCEEDED


def test_a_trainer_that_stops_before_loading_gives_the_job_back(world: World, engine: TrainingEngine) -> None:
    """Claimed and then told to shut down: the attempt is not charged."""
    claim = world.running(spec=spec_of())

    def stop(base_model_id: str) -> TrainingEngine:
        raise TrainerStops

    JobRun(claim, settings=settings_of(world), database=world.engine, layout=world.layout).run(stop)
    job = world.job(claim.job_id)

    assert (job.state, job.attempt) == (JobState.QUEUED, 0)


def test_a_resumed_job_needs_its_start_no_more(
    world: World, base: BaseModel, engine: TrainingEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The adapter that `init_from` names is looked for only if no checkpoint is there."""
    spec = spec_of(checkpoint_every=1)
    start = world.running(spec=spec)
    run(world, engine, start)
    with read(world.engine) as tx:
        version = jobs.published_version(tx, start.job_id)
    assert version is not None
    claim = world.running(spec=spec_of(max_steps=5, init_from=version.id))
    stopping = TrainingEngine(base, max_tokens=4096)
    at_step(world, base, 3, stopping.stop_all)
    run(world, stopping, claim)
    stopping.close()
    monkeypatch.setattr(adapters, "verify", lambda *_: pytest.fail("the start was looked for"))
    run(world, engine, world.claim())

    assert world.state(claim.job_id) == JobState.SUCCEEDED
