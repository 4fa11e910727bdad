"""Fixtures for every test: real databases and a real broker, started when a test first asks for them."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import settings
from sqlalchemy import Engine

from shared import failpoints
from shared.db import migrate, open_engine
from shared.tables import Table
from tests.servers import Broker, Postgres, run_broker, run_postgres

# `--hypothesis-profile=campaign`: as `make chaos` runs what `make test` runs a short part of.
settings.register_profile("campaign", max_examples=100, deadline=None, print_blob=True)


@pytest.fixture(scope="session")
def broker() -> Iterator[Broker]:
    """One Valkey over TCP for the whole session; use fresh ids, or start your own with `run_broker`."""
    with run_broker() as running:
        yield running


@pytest.fixture(scope="session")
def broker_url(broker: Broker) -> str:
    """Where that Valkey is."""
    return broker.url


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[Postgres]:
    """One Postgres for the whole session, holding a migrated database 'fresh'."""
    with run_postgres() as running:
        running.execute("CREATE DATABASE fresh")
        migrate(running.url("fresh"))
        yield running


@pytest.fixture(scope="session")
def sqlite_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A migrated SQLite file to copy."""
    path = tmp_path_factory.mktemp("template") / "lorad.db"
    migrate(f"sqlite:///{path}")
    return path


@pytest.fixture(scope="session")
def postgres_url(postgres_server: Postgres) -> str:
    """An empty Postgres database for the whole session, for tests of running services."""
    postgres_server.execute("CREATE DATABASE lorad")
    return postgres_server.url("lorad")


@pytest.fixture
def fresh_sqlite_url(sqlite_template: Path, tmp_path: Path) -> str:
    """A fresh migrated SQLite database."""
    path = tmp_path / "lorad.db"
    shutil.copyfile(sqlite_template, path)
    return f"sqlite:///{path}"


@pytest.fixture
def fresh_postgres_url(postgres_server: Postgres) -> str:
    """A migrated Postgres database without rows: emptied, since making one takes Postgres a second under load."""
    postgres_server.execute(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = 'fresh' AND pid <> pg_backend_pid()",
        database="fresh",
    )
    tables = reversed(Table.metadata.sorted_tables)
    postgres_server.execute("; ".join(f"DELETE FROM {table.name}" for table in tables), database="fresh")
    return postgres_server.url("fresh")


@pytest.fixture(params=["sqlite", "postgres"])
def database_url(request: pytest.FixtureRequest) -> str:
    """A fresh migrated database, once of each kind."""
    return str(request.getfixturevalue(f"fresh_{request.param}_url"))


@pytest.fixture
def engine(database_url: str) -> Iterator[Engine]:
    """An engine on a fresh migrated database, once of each kind."""
    engine = open_engine(database_url)
    yield engine
    engine.dispose()


@pytest.fixture
def failpoint() -> Iterator[Callable[[str], None]]:
    """Arm failpoints for one test."""
    yield failpoints.arm
    failpoints.arm("")
