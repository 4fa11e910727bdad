"""Schema and transactions, on both databases."""

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import Engine, select, text
from sqlalchemy.exc import DBAPIError

from shared import db
from shared.db import alembic_config, check_schema, migrate, now_ms, open_engine, read, write
from shared.errors import SchemaTooNew, StartupError
from shared.tables import Table


@pytest.fixture(params=["sqlite", "postgres"])
def empty_engine(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Engine]:
    """An engine on a database that has no tables."""
    if request.param == "sqlite":
        engine = open_engine(f"sqlite:///{tmp_path / 'empty.db'}")
        yield engine
        engine.dispose()
        return
    server = request.getfixturevalue("postgres_server")
    server.execute("CREATE DATABASE empty_one")
    engine = open_engine(server.url("empty_one"))
    yield engine
    engine.dispose()
    server.execute("DROP DATABASE empty_one WITH (FORCE)")


def url_of(engine: Engine) -> str:
    return engine.url.render_as_string(hide_password=False)


def test_migrated_schema_is_the_metadata(engine: Engine) -> None:
    """The migrations and shared/tables.py say the same."""
    with engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})

        assert compare_metadata(context, Table.metadata) == []


def test_comparison_sees_a_missing_table(engine: Engine) -> None:
    """The comparison above can fail."""
    with engine.connect() as connection, connection.begin() as transaction:
        connection.execute(text("DROP TABLE idempotency_keys"))
        changes = compare_metadata(MigrationContext.configure(connection), Table.metadata)
        transaction.rollback()

    assert [change[0] for change in changes] == ["add_table"]


def test_up_down_up(empty_engine: Engine) -> None:
    """Going down removes everything, so that going up again works."""
    migrate(url_of(empty_engine))
    with empty_engine.execution_options(lorad_write=True).begin() as connection:
        command.downgrade(alembic_config(connection), "base")
    migrate(url_of(empty_engine))

    check_schema(empty_engine)


def test_migrating_twice_is_once(engine: Engine) -> None:
    """A second migrate finds nothing to do."""
    migrate(url_of(engine))

    check_schema(engine)


def test_concurrent_migrations_wait(empty_engine: Engine) -> None:
    """Eight services that start together all end up with the schema."""
    barrier, errors = threading.Barrier(8), []

    def run() -> None:
        barrier.wait()
        try:
            migrate(url_of(empty_engine))
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=run) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert errors == []
    check_schema(empty_engine)


def test_failed_migration_leaves_nothing(empty_engine: Engine) -> None:
    """A migration that stops half way leaves the database as it was."""
    with empty_engine.begin() as connection:
        connection.execute(text("CREATE TABLE jobs (id INTEGER)"))
    with pytest.raises((StartupError, DBAPIError), match="jobs"):
        migrate(url_of(empty_engine))

    with empty_engine.connect() as connection:
        assert MigrationContext.configure(connection).get_current_heads() == ()


def test_newer_schema_is_refused(engine: Engine) -> None:
    """A database that a newer lorad wrote is neither used nor touched."""
    with engine.begin() as connection:
        ours = connection.execute(text("SELECT version_num FROM alembic_version")).scalar_one()
        connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))

    for attempt in (lambda: check_schema(engine), lambda: migrate(url_of(engine))):
        with pytest.raises(SchemaTooNew, match="9999"):
            attempt()
    with engine.begin() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = :ours"), {"ours": ours})


def test_missing_schema_is_refused(empty_engine: Engine) -> None:
    """A database that nobody migrated is not used, and the message says what to do."""
    with pytest.raises(StartupError, match="lorad migrate"):
        check_schema(empty_engine)


def test_unreachable_database_hides_the_password() -> None:
    """The one line about a database that is away does not show its password."""
    engine = open_engine("postgresql://u:hunter2@127.0.0.1:1/x")

    with pytest.raises(StartupError) as caught:
        check_schema(engine)
    assert "hunter2" not in caught.value.message


def test_write_rolls_back(engine: Engine) -> None:
    """A block that raises has written nothing."""
    statement = "INSERT INTO idempotency_keys (tenant, key, request_sha256, created_at) VALUES ('a', 'b', 'c', 1)"

    def write_and_raise() -> None:
        with write(engine) as tx:
            tx.execute(text(statement))
            raise KeyError

    with pytest.raises(KeyError):
        write_and_raise()

    with read(engine) as tx:
        assert tx.execute(text("SELECT count(*) FROM idempotency_keys")).scalar_one() == 0


def test_database_clock_moves_on(engine: Engine) -> None:
    """The clock is read anew by each statement, in milliseconds, also within one transaction."""
    with read(engine) as tx:
        first = tx.execute(select(now_ms(tx))).scalar_one()
        while (later := tx.execute(select(now_ms(tx))).scalar_one()) == first:
            pass

    assert 0 < later - first < 60_000


def test_the_clock_is_the_hosts_within_a_minute(engine: Engine) -> None:
    """Milliseconds since 1970, not since another day."""
    with read(engine) as tx:
        assert abs(tx.execute(select(now_ms(tx))).scalar_one() - time.time() * 1000) < 60_000


def test_a_program_that_stops_in_a_transaction_does_not_keep_its_rows(
    fresh_postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Postgres ends a transaction whose program says nothing for too long: another gets the row, and the first is told
    that the database gave it up, which it may try again."""
    monkeypatch.setattr(db, "IDLE_S", 1)
    stopped, other = open_engine(fresh_postgres_url), open_engine(fresh_postgres_url)
    insert = "INSERT INTO idempotency_keys (tenant, key, request_sha256, created_at) VALUES ('a', 'b', 'c', 1)"
    lock = "SELECT * FROM idempotency_keys FOR UPDATE"
    with write(other) as tx:
        tx.execute(text(insert))

    def say_nothing() -> None:
        with write(stopped) as tx:
            tx.execute(text(lock))
            with write(other) as second:
                second.execute(text("SET LOCAL lock_timeout = '30s'"))
                assert len(second.execute(text(lock)).all()) == 1
            tx.execute(text(lock))

    with pytest.raises(db.AWAY):
        say_nothing()

    with write(stopped) as tx:
        assert len(tx.execute(text(lock)).all()) == 1
    stopped.dispose()
    other.dispose()
