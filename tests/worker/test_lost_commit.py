"""A COMMIT that Postgres has done, or never got, whose answer was lost on the way: at publication and at a claim."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import pytest
from sqlalchemy import select
from sqlalchemy.exc import OperationalError

from shared.db import open_engine, read
from shared.store import adapters
from shared.tables import AdapterVersion, JobAttempt, JobState
from tests.chaos.proxy import Proxy
from tests.servers import Postgres
from tests.shared.conftest import World
from tests.worker.job_runs import run, settings_of, spec_of, world_on
from worker import trainer as trainer_module
from worker.trainer import Trainer
from worker.training.engine import TrainingEngine

Lost = Literal["answer", "request"]
PUBLISHING = b"INSERT INTO adapter_versions"
CLAIMING = b"INSERT INTO job_attempts"


@pytest.fixture
def proxy(postgres_server: Postgres) -> Iterator[Proxy]:
    with Proxy(postgres_server.port) as proxy:
        yield proxy


@pytest.fixture
def world(fresh_postgres_url: str, data_dir: Path) -> Iterator[World]:
    """On Postgres, connected without a detour."""
    world = world_on(fresh_postgres_url, data_dir)
    yield world
    world.engine.dispose()


@pytest.fixture
def detour(world: World, proxy: Proxy, postgres_server: Postgres) -> Iterator[World]:
    """The same world, its database reached through the proxy."""
    url = world.engine.url.set(port=proxy.port).render_as_string(hide_password=False)
    engine = open_engine(url)
    yield dataclasses.replace(world, engine=engine)
    engine.dispose()


def versions(world: World) -> list[AdapterVersion]:
    with read(world.engine) as tx:
        return list(tx.scalars(select(AdapterVersion)))


def outcomes(world: World, job_id: str) -> list[str | None]:
    """How each attempt ended, oldest first; None for one that runs."""
    with read(world.engine) as tx:
        query = select(JobAttempt.outcome).where(JobAttempt.job_id == job_id)
        return list(tx.scalars(query.order_by(JobAttempt.fence)))


@pytest.mark.parametrize("lost", ["answer", "request"])
def test_a_lost_commit_publishes_once(
    world: World, detour: World, proxy: Proxy, learner: TrainingEngine, lost: Lost
) -> None:
    """Whether the commit happened or not, the job succeeds in its first attempt with one version and whole files."""
    claim = world.running(spec=spec_of())
    proxy.lose(lost, of=b"COMMIT", after=PUBLISHING)
    run(detour, learner, claim)
    (version,) = versions(world)
    job = world.job(claim.job_id)

    assert proxy.sprung.is_set()
    assert (job.state, job.attempt, len(job.result_file_ids)) == (JobState.SUCCEEDED, 1, 1)
    assert adapters.verify(world.layout, version) == world.layout.adapter(version.id)
    assert world.messages(claim.job_id).count("Adapter math@1 is ready.") == 1


@pytest.mark.parametrize(("lost", "ends"), [("answer", ["given back", None]), ("request", [None])])
def test_a_claim_whose_answer_was_lost_is_made_again(
    world: World,
    detour: World,
    proxy: Proxy,
    lost: Lost,
    ends: list[str | None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The trainer gives back what it may have claimed unheard, uncharged, and holds the job in the end."""
    monkeypatch.setattr(trainer_module, "CLAIM_AGAIN_S", 0.01)
    job = world.submit()
    trainer = Trainer(settings_of(world), detour.engine, world.layout, ring=lambda: None)
    proxy.lose(lost, of=b"COMMIT", after=CLAIMING)
    claim = trainer._claim()

    assert proxy.sprung.is_set()
    assert claim is not None
    assert (claim.job_id, claim.attempt, claim.fence) == (job.id, 1, len(ends))
    assert outcomes(world, job.id) == ends
    assert world.state(job.id) == JobState.RUNNING


def test_a_claim_that_stays_unheard_is_given_back_later(
    world: World, detour: World, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the database away the doorbell's task fails; the next doorbell puts things right. No lease is waited for."""
    monkeypatch.setattr(trainer_module, "CLAIM_AGAIN_S", 0.01)
    job = world.submit()
    trainer = Trainer(settings_of(world), detour.engine, world.layout, ring=lambda: None)
    proxy.lose("answer", of=b"COMMIT", after=CLAIMING)
    monkeypatch.setattr(trainer._stopping, "wait", lambda _: proxy.cut())
    with pytest.raises(OperationalError):
        trainer._claim()
    unheard = world.state(job.id)
    proxy.heal()
    claim = trainer._claim()

    assert unheard == JobState.RUNNING
    assert claim is not None
    assert (claim.job_id, claim.attempt, claim.fence) == (job.id, 1, 2)
