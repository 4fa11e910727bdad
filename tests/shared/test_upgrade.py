"""From the first schema, with data, to today's: nothing is lost, everything works, and there is a way back."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from alembic import command
from sqlalchemy import Engine, text
from sqlalchemy.exc import IntegrityError

from shared import idempotency, jobs, keys
from shared.cli.servers import CODE_DIR
from shared.db import alembic_config, check_schema, downgrade, migrate, open_engine, read, write
from shared.errors import StartupError
from shared.jobs import Claim
from shared.specs import Order, TrainSpec
from shared.store import adapters, backup, base_models, files
from shared.store.layout import Layout
from shared.tables import Checkpoint, Job
from tests.servers import Postgres
from tests.shared import first_schema as first
from tests.shared.conftest import LEASE_S, World


@pytest.fixture(params=["sqlite", "postgres"])
def old(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[SimpleNamespace]:
    """`engine`, on a database that the first release wrote at `now`, and its `url`; nobody has migrated it yet."""
    if request.param == "sqlite":
        url = f"sqlite:///{tmp_path / 'old.db'}"
    else:
        server: Postgres = request.getfixturevalue("postgres_server")
        server.execute("CREATE DATABASE old_one")
        url = server.url("old_one")
    engine, now = open_engine(url), first.now_ms()
    with engine.execution_options(lorad_write=True).begin() as connection:
        command.upgrade(alembic_config(connection), first.REVISION)
        for table, row in first.ROWS:
            first.insert(connection, table, row, now)
    yield SimpleNamespace(engine=engine, url=url, now=now)
    engine.dispose()
    if request.param == "postgres":
        server.execute("DROP DATABASE old_one WITH (FORCE)")


@pytest.fixture
def migrated(old: SimpleNamespace) -> SimpleNamespace:
    """The same, migrated to today's schema."""
    migrate(old.url)
    return old


@pytest.fixture
def world(migrated: SimpleNamespace, layout: Layout) -> World:
    """Today's code over the old data."""
    with read(migrated.engine) as tx:
        base = base_models.get(tx, first.BASE)
    return World(migrated.engine, layout, first.FILE, base, base)


def surviving(engine: Engine) -> list[tuple[str, list[dict[str, object]]]]:
    with engine.connect() as connection:
        return [(table, first.stored(connection, table, row)) for table, row in first.ROWS]


def written(old: SimpleNamespace) -> list[tuple[str, list[dict[str, object]]]]:
    return [(table, [first.expected(row, old.now)]) for table, row in first.ROWS]


def test_the_old_database_is_old(old: SimpleNamespace) -> None:
    """Without this the tests below could pass on a database that was never behind: it has the rows, and today's code
    refuses it until it is migrated."""
    assert surviving(old.engine) == written(old)
    with pytest.raises(StartupError, match="lorad migrate"):
        check_schema(old.engine)


def test_today_s_backup_reads_the_old_schema(old: SimpleNamespace) -> None:
    """Whoever installs the new version first can still back up before migrating: every object is found."""
    with read(old.engine) as tx:
        found = {stored.path for stored in backup.named(tx)}

    checkpoint = f"checkpoints/{first.RUNNING}/10-2"
    kept = {f"files/{first.FILE}", f"files/{first.RESULT}", f"adapters/{first.VERSION}", f"models/{first.BASE}"}
    assert found == kept | {checkpoint}


def test_every_row_survives(migrated: SimpleNamespace) -> None:
    """Each column of each row that the first release wrote holds what it held."""
    check_schema(migrated.engine)

    assert surviving(migrated.engine) == written(migrated)


def test_the_way_back_keeps_what_the_old_schema_knew(migrated: SimpleNamespace) -> None:
    """Down to the first schema and up again, old rows are as they were."""
    downgrade(migrated.url, first.REVISION)
    below = surviving(migrated.engine)
    migrate(migrated.url)

    assert below == surviving(migrated.engine) == written(migrated)


@pytest.mark.parametrize("revision", ["0000", "", "head", "base"])
def test_the_way_back_leads_to_a_schema_that_there_was(migrated: SimpleNamespace, revision: str) -> None:
    """Anything but an older schema's number is refused with those there are, and nothing is changed."""
    with pytest.raises(StartupError, match=first.REVISION):
        downgrade(migrated.url, revision)

    check_schema(migrated.engine)


def test_old_jobs_are_listed(world: World) -> None:
    """All six states, newest first, with their events and metrics."""
    with read(world.engine) as tx:
        states = [job.state for job in jobs.list_page(tx, "acme", limit=10).items]
        events = jobs.events_page(tx, "acme", first.SUCCEEDED, limit=10, newest_first=False).items
        metrics = jobs.step_metrics(tx, first.SUCCEEDED)

    assert states == ["queued", "running", "paused", "succeeded", "failed", "cancelled"]
    assert [event.message for event in events] == ["Training started.", "Step 1/30"]
    assert metrics == [{"step": 1, "train_loss": 2.5, "tokens_per_second": 100.0}]


def test_an_old_queued_job_is_claimed_and_published(world: World) -> None:
    """Its spec is still valid, and its adapter is the next version of its name."""
    claim = world.claim()
    assert claim is not None
    world.publish(claim)

    assert (claim.job_id, claim.spec) == (first.QUEUED, TrainSpec.model_validate(first.SPEC))
    with read(world.engine) as tx:
        assert adapters.resolve(tx, "acme", "math")[1].version == 4


def test_an_old_running_job_goes_on(world: World) -> None:
    """Its trainer, which ran through the migration, renews its lease and brings back what was asked meanwhile."""
    with write(world.engine) as tx:
        jobs.request_pause(tx, "acme", first.RUNNING)
        order = jobs.heartbeat(tx, claim_of(world.job(first.RUNNING)), lease_s=LEASE_S)

    assert order is Order.PAUSE


def test_an_old_running_job_that_lost_its_trainer_is_requeued(world: World) -> None:
    """The sweeper finds its expired lease, and its checkpoint is still known."""
    swept = world.sweep()

    assert (swept.requeued, world.state(first.RUNNING)) == (1, "queued")
    with read(world.engine) as tx:
        assert [row.id for row in jobs.newest_checkpoints(tx, first.RUNNING)] == [first.CHECKPOINT]
        assert tx.get_one(Checkpoint, first.CHECKPOINT).manifest == first.MANIFEST


def test_an_old_paused_job_is_resumed(world: World) -> None:
    """It waits in the queue again."""
    with write(world.engine) as tx:
        jobs.resume(tx, "acme", first.PAUSED)

    assert world.state(first.PAUSED) == "queued"


def test_an_old_ended_job_stays_as_it_ended(world: World) -> None:
    """The rule that terminal rows never change holds for old rows too."""
    with pytest.raises(IntegrityError, match="a job that has ended"):
        world.edit(first.CANCELLED, "state = 'queued', finished_at = NULL")


def test_old_adapters_files_and_keys_are_found(world: World) -> None:
    """An alias names its version, a file is its tenant's, and a key opens what it opened."""
    with read(world.engine) as tx:
        assert adapters.resolve(tx, "acme", "math@prod")[1].id == first.VERSION
        assert files.get(tx, "acme", first.RESULT).filename == "step_metrics.csv"
        key = keys.authenticate(tx, first.KEY)
        assert (key.tenant, key.scopes) == ("acme", ["jobs:read", "generate"])


def test_an_old_answer_is_replayed(world: World) -> None:
    """A request that came before the migration, and comes again after it, makes nothing new."""
    with write(world.engine) as tx:
        kept = idempotency.take(tx, idempotency.Request(tenant="acme", key="k", request_sha256="x"))

    assert kept == idempotency.Kept(200, first.ANSWER["body"])


def test_the_old_program_goes_on_in_the_new_schema(world: World) -> None:
    """While programs are replaced one by one, those of the release before write the rows that they know; today's code
    takes such a job over."""
    now = first.now_ms()
    with write(world.engine) as tx:
        first.insert(tx.connection(), "jobs", first.NEW_JOB, now)
        for statement in first.UPDATES:
            parameters = {"id": first.NEW_JOB["id"], "now": now}
            done = tx.connection().execute(
                text(statement), {k: v for k, v in parameters.items() if f":{k}" in statement}
            )
            assert done.rowcount == 1, statement
    world.edit(first.QUEUED, "not_before = 9000000000000")

    claim = world.claim()

    assert claim is not None
    assert (claim.job_id, claim.fence, claim.attempt) == (first.NEW_JOB["id"], 2, 1)


@pytest.mark.parametrize("program", [["migrate"], ["migrate", "--down-to", first.REVISION], ["sweeper"]])
def test_a_newer_database_is_refused_in_one_line(migrated: SimpleNamespace, tmp_path: Path, program: list[str]) -> None:
    """Exit status 2 and one line that says what to do; the database is left as it is."""
    with migrated.engine.begin() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    env = {k: v for k, v in os.environ.items() if not k.startswith("LORAD_")} | {
        "LORAD_DATA_DIR": str(tmp_path / "data"), "LORAD_DATABASE_URL": migrated.url, "PYTHONPATH": str(CODE_DIR),
    }  # fmt: skip

    ended = subprocess.run(
        [sys.executable, "-m", "shared.cli", *program], env=env, capture_output=True, text=True, timeout=60
    )

    assert (ended.returncode, ended.stdout, ended.stderr.count("\n")) == (2, "", 1), ended.stderr
    assert "9999" in ended.stderr
    assert "newer" in ended.stderr
    assert surviving(migrated.engine) == written(migrated)


def claim_of(job: Job) -> Claim:
    """What the trainer that runs this job holds."""
    return Claim(
        job_id=job.id, tenant=job.tenant, fence=job.fence, attempt=job.attempt, trainer=job.lease_owner or "",
        base_model_id=job.base_model_id, training_file_id=job.training_file_id,
        validation_file_id=job.validation_file_id, adapter_name=job.adapter_name,
        spec=TrainSpec.model_validate(job.spec), runs_alone=job.runs_alone,
    )  # fmt: skip
