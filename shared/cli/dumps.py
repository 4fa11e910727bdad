"""Copies of the database as it was at one moment, taken while programs write, and the way back."""

import os
import shutil
import sqlite3
import subprocess
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Final

from sqlalchemy import URL, Engine, create_engine, func, inspect, select
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

from shared import db
from shared.errors import LoradError
from shared.store.backup import Stored, named

SQLITE_NAME: Final = "lorad.db"
POSTGRES_NAME: Final = "database.dump"


def sqlite_path(engine: Engine) -> Path | None:
    """The file of a SQLite database; None for Postgres."""
    return Path(engine.url.database or "") if engine.dialect.name == "sqlite" else None


def copy_database(engine: Engine, target: Path) -> list[Stored]:
    """Copy the database into the directory `target`, over an earlier copy; returns what that very copy names.

    LoradError if it cannot be read, or on Postgres if there is no pg_dump.
    """
    with readable(engine):
        if (path := sqlite_path(engine)) is not None:
            return _copy_sqlite(path, target / SQLITE_NAME)
        return _dump_postgres(engine, target / POSTGRES_NAME)


def named_now(engine: Engine) -> list[Stored]:
    """What the database names now; LoradError if it cannot be read."""
    with readable(engine), db.read(engine) as tx:
        return named(tx)


def has_tables(engine: Engine) -> bool:
    """True if anything was ever written there; LoradError if it cannot be read."""
    with readable(engine):
        return bool(inspect(engine).get_table_names())


@contextmanager
def readable(engine: Engine) -> Iterator[None]:
    """A database that cannot be read is one line, and a SQLite file that is not there is not made by looking."""
    if (path := sqlite_path(engine)) is not None and not path.is_file():
        raise LoradError(f"there is no database {path}")
    try:
        yield
    except (DBAPIError, sqlite3.Error) as error:
        place = engine.url.render_as_string(hide_password=True)
        raise LoradError(f"cannot read the database {place}: {str(getattr(error, 'orig', error)).strip()}") from error


def _copy_sqlite(source: Path, target: Path) -> list[Stored]:
    target.unlink(missing_ok=True)
    with (
        closing(sqlite3.connect(f"{source.as_uri()}?mode=rw", uri=True, timeout=db.SQLITE_WAIT_S)) as reading,
        closing(sqlite3.connect(target)) as writing,
    ):
        reading.backup(writing)  # all pages in one step, so of one moment; writers need not wait in WAL mode
        writing.execute("PRAGMA journal_mode=DELETE")  # one file, with nothing beside it
        (found,) = writing.execute("PRAGMA integrity_check").fetchone()
    if found != "ok":
        raise LoradError(f"the database {source} is damaged: {found}")
    engine = create_engine(URL.create("sqlite", database=str(target)))
    try:
        with db.read(engine) as tx:
            return named(tx)
    finally:
        engine.dispose()


def _dump_postgres(engine: Engine, target: Path) -> list[Stored]:
    with engine.connect().execution_options(isolation_level="REPEATABLE READ") as connection:
        # Idle for as long as pg_dump takes, which sees the same moment.
        connection.execute(select(func.set_config("idle_in_transaction_session_timeout", "0", True)))
        snapshot = connection.scalar(select(func.pg_export_snapshot()))
        _run("pg_dump", engine, "--format=custom", f"--snapshot={snapshot}", f"--file={target}")
        with Session(connection) as tx:
            return named(tx)


def restore_postgres(engine: Engine, dump: Path) -> None:
    """Fill an empty database from a dump, whole or not at all; LoradError if it is not empty."""
    if has_tables(engine):
        raise LoradError("the database is not empty; restore into an empty one")
    _run("pg_restore", engine, "--single-transaction", "--exit-on-error", "--no-owner", str(dump))


def _run(program: str, engine: Engine, *arguments: str) -> None:
    """Run one of Postgres' own programs on the database; the password is not on its command line, where all users of
    this machine could read it."""
    path = shutil.which(program)
    if path is None:
        raise LoradError(f"this needs {program}, which is not on PATH: install Postgres' client programs, "
                         "or use its own tools and --files-only")  # fmt: skip
    url = engine.url.set(drivername="postgresql", password=None).render_as_string(hide_password=False)
    password = {} if engine.url.password is None else {"PGPASSWORD": str(engine.url.password)}
    done = subprocess.run(
        [path, f"--dbname={url}", *arguments], env={**os.environ, **password}, capture_output=True, text=True
    )
    if done.returncode != 0:
        raise LoradError(f"{program} failed: {done.stderr.strip() or done.returncode}")
