"""The database: engine, read and write transactions, and its clock.

Every write is one `BEGIN IMMEDIATE` on SQLite: a transaction that reads first and then writes would fail with
'database is locked' at once, whatever the busy timeout (SQLite documentation, isolation, and our own measurement).
"""

import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from sqlalchemy import BigInteger, ColumnElement, Engine, create_engine, event, literal_column
from sqlalchemy.orm import Session

Tx = Session
"""An open transaction. Functions that take one commit nothing."""


def open_engine(url: str) -> Engine:
    """An engine for a sqlite:/// or postgresql+psycopg:// URL (postgresql:// and postgres:// mean psycopg 3 too)."""
    for prefix in ("postgresql://", "postgres://"):
        if url.startswith(prefix):
            url = "postgresql+psycopg://" + url.removeprefix(prefix)
    if not url.startswith("sqlite"):
        return create_engine(url, pool_pre_ping=True, connect_args={"connect_timeout": 5})
    engine = create_engine(url, connect_args={"timeout": 10.0, "check_same_thread": False})
    event.listen(engine, "connect", _prepare_sqlite)
    event.listen(engine, "begin", _begin_sqlite)
    return engine


def _prepare_sqlite(connection: sqlite3.Connection, _record: Any) -> None:
    connection.isolation_level = None  # we say BEGIN ourselves
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON", "busy_timeout=10000"):
        connection.execute(f"PRAGMA {pragma}")


def _begin_sqlite(connection: Any) -> None:
    writes = connection.get_execution_options().get("lorad_write", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


@contextmanager
def write(engine: Engine) -> Iterator[Tx]:
    """One write transaction: committed at the end of the block, rolled back if the block raises."""
    with Session(engine.execution_options(lorad_write=True), expire_on_commit=False) as tx, tx.begin():
        yield tx


@contextmanager
def read(engine: Engine) -> Iterator[Tx]:
    """One consistent view for reading; rows stay usable after the block."""
    with Session(engine, expire_on_commit=False, autoflush=False) as tx:
        yield tx


def now_ms(tx: Tx) -> ColumnElement[int]:
    """The database's clock as an SQL expression, in milliseconds since 1970."""
    if tx.get_bind().dialect.name == "sqlite":
        # julianday, since unixepoch('subsec') needs SQLite 3.42 and Python 3.11 may come with 3.40.
        return literal_column("CAST((julianday('now') - 2440587.5) * 86400000.0 AS INTEGER)", BigInteger)
    return literal_column("CAST(EXTRACT(EPOCH FROM clock_timestamp()) * 1000 AS BIGINT)", BigInteger)


T_co = TypeVar("T_co", covariant=True)


@dataclass(frozen=True)
class Page(Generic[T_co]):
    """One page of a list, and whether another follows."""

    items: Sequence[T_co]
    has_more: bool


def migrate(url: str) -> None:
    """Bring the database at `url` to this code's schema; SchemaTooNew if it is beyond it."""
    raise NotImplementedError


def check_schema(engine: Engine) -> None:
    """Raise SchemaTooNew if a newer lorad wrote the database, StartupError if `lorad migrate` has not been run."""
    raise NotImplementedError
