"""The database: engine, read and write transactions, and its clock.

Every write is one `BEGIN IMMEDIATE` on SQLite: a transaction that reads first and then writes would fail with
'database is locked' at once, whatever the busy timeout (SQLite documentation, isolation, and our own measurement).
"""

import sqlite3
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Final, Generic, TypeVar

from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import (
    BigInteger,
    ColumnElement,
    Connection,
    Engine,
    Select,
    create_engine,
    event,
    func,
    literal_column,
    select,
    tuple_,
)
from sqlalchemy.exc import InterfaceError, InternalError, OperationalError
from sqlalchemy.orm import InstrumentedAttribute, Session

from shared.errors import InvalidRequest, SchemaTooNew, StartupError
from shared.tables import Table

MIGRATION_LOCK: Final = 0x6C6F7261  # any number that nobody else locks
SQLITE_WAIT_S: Final = 10
"""How long a transaction waits for another program's."""

IDLE_S: Final = 300
"""How long a transaction on Postgres may wait for its program's next statement. A program that is stopped or cut off
then loses its connection, and the rows that it has locked are free."""

CUT_OFF: Final = {"keepalives_idle": 30, "keepalives_interval": 10, "keepalives_count": 3, "tcp_user_timeout": 60_000}
"""How libpq notices that the way to the server is cut: after a minute at most."""

AWAY: Final = (OperationalError, InterfaceError, InternalError)
"""What a database raises that does not answer, has given this transaction up, or could not serialise it with others:
try again."""

Tx = Session
"""An open transaction. Functions that take one commit nothing."""

Found = TypeVar("Found")


def open_engine(url: str) -> Engine:
    """An engine for a sqlite:/// or postgresql+psycopg:// URL (postgresql:// and postgres:// mean psycopg 3 too).

    Its errors do not show the values of a statement: they are what users wrote.
    """
    for prefix in ("postgresql://", "postgres://"):
        if url.startswith(prefix):
            url = "postgresql+psycopg://" + url.removeprefix(prefix)
    if not url.startswith("sqlite"):
        reach = {"connect_timeout": 5, **CUT_OFF}
        engine = create_engine(url, pool_pre_ping=True, connect_args=reach, hide_parameters=True)
        event.listen(engine, "connect", _bound_idling)
        return engine
    options = {"timeout": float(SQLITE_WAIT_S), "check_same_thread": False}
    engine = create_engine(url, connect_args=options, hide_parameters=True)
    event.listen(engine, "connect", _prepare_sqlite)
    event.listen(engine, "begin", _begin_sqlite)
    return engine


def _bound_idling(connection: Any, _record: Any) -> None:
    with connection.cursor() as cursor:
        cursor.execute(f"SET idle_in_transaction_session_timeout = '{IDLE_S}s'")
    connection.commit()


def _prepare_sqlite(connection: sqlite3.Connection, _record: Any) -> None:
    connection.isolation_level = None  # we say BEGIN ourselves
    for pragma in (f"busy_timeout={SQLITE_WAIT_S * 1000}", "synchronous=FULL", "foreign_keys=ON"):
        connection.execute(f"PRAGMA {pragma}")
    _use_wal(connection)


def _use_wal(connection: sqlite3.Connection) -> None:
    """Switch to the write-ahead log. The first switch needs the file alone, and SQLite refuses it at once while another
    program makes it, whatever the busy timeout; so we wait."""
    until_s = time.monotonic() + SQLITE_WAIT_S
    while True:
        try:
            connection.execute("PRAGMA journal_mode=WAL")
            return
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode != sqlite3.SQLITE_BUSY or time.monotonic() > until_s:
                raise
            time.sleep(0.01)


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


def read_patiently(engine: Engine, look: Callable[[Tx], Found], *, at_most_s: float) -> Found:
    """What `look` finds, once the database answers: one that is away is asked again each second, for so long."""
    until_s = time.monotonic() + at_most_s
    while True:
        try:
            with read(engine) as tx:
                return look(tx)
        except AWAY:
            if time.monotonic() > until_s:
                raise
            time.sleep(1.0)


def bound_waiting(tx: Tx) -> None:
    """From now on this transaction waits for a row that another has locked as long as SQLite's would, then raises
    OperationalError: a trainer that is stopped while it has its job's row must not hold the API's connections too."""
    if tx.get_bind().dialect.name == "postgresql":
        tx.execute(select(func.set_config("lock_timeout", f"{SQLITE_WAIT_S}s", True)))


def now_ms(tx: Tx) -> ColumnElement[int]:
    """The database's clock as an SQL expression, in milliseconds since 1970."""
    if tx.get_bind().dialect.name == "sqlite":
        # julianday, since unixepoch('subsec') needs SQLite 3.42 and Python 3.11 may come with 3.40.
        return literal_column("CAST((julianday('now') - 2440587.5) * 86400000.0 AS INTEGER)", BigInteger)
    return literal_column("CAST(EXTRACT(EPOCH FROM clock_timestamp()) * 1000 AS BIGINT)", BigInteger)


def alembic_config(connection: Connection | None = None) -> Config:
    """Alembic over the installed `migrations` package; with a connection, commands run in its transaction."""
    package = find_spec("migrations")
    if package is None or not package.submodule_search_locations:
        raise StartupError("the package 'migrations' is not installed")
    config = Config()
    config.set_main_option("script_location", next(iter(package.submodule_search_locations)).replace("%", "%%"))
    config.attributes["connection"] = connection
    return config


def migrate(url: str) -> None:
    """Bring the database at `url` to this code's schema, whole or not at all; several callers wait for each other.

    SchemaTooNew if a newer lorad wrote it, StartupError if it cannot be opened.
    """
    engine = open_engine(url)
    try:
        with _reachable(engine), engine.execution_options(lorad_write=True).begin() as connection:
            if connection.dialect.name == "postgresql":
                connection.execute(select(func.pg_advisory_xact_lock(MIGRATION_LOCK)))
            _refuse_unknown(_revisions(connection))
            command.upgrade(alembic_config(connection), "head")
    finally:
        engine.dispose()


def downgrade(url: str, revision: str) -> None:
    """Take the database at `url` back to the schema `revision`, for the older lorad that knows it, whole or not at all.

    What only newer schemas know is lost. StartupError if `revision` is none of this code's, or is not below.
    """
    engine = open_engine(url)
    try:
        with _reachable(engine), engine.execution_options(lorad_write=True).begin() as connection:
            if connection.dialect.name == "postgresql":
                connection.execute(select(func.pg_advisory_xact_lock(MIGRATION_LOCK)))
            found = _revisions(connection)
            _refuse_unknown(found)
            scripts = ScriptDirectory.from_config(alembic_config())
            below = {one.revision for head in found for one in scripts.iterate_revisions(head, "base")} - found
            if revision not in below:
                raise StartupError(
                    f"the database has schema {', '.join(sorted(found)) or 'none'}; below it are "
                    f"{', '.join(sorted(below)) or 'none'}, and not {revision!r}"
                )
            command.downgrade(alembic_config(connection), revision)
    finally:
        engine.dispose()


def check_schema(engine: Engine) -> None:
    """Raise SchemaTooNew if a newer lorad wrote the database, StartupError if `lorad migrate` has yet to run."""
    with _reachable(engine), engine.connect() as connection:
        found = _revisions(connection)
    _refuse_unknown(found)
    if found != set(ScriptDirectory.from_config(alembic_config()).get_heads()):
        raise StartupError("the database schema is behind this lorad: run 'lorad migrate'")


@contextmanager
def _reachable(engine: Engine) -> Iterator[None]:
    try:
        yield
    except OperationalError as error:
        place = engine.url.render_as_string(hide_password=True)
        raise StartupError(f"cannot use the database {place}: {str(error.orig).strip()}") from error


def _revisions(connection: Connection) -> set[str]:
    return set(MigrationContext.configure(connection).get_current_heads())


def _refuse_unknown(found: set[str]) -> None:
    scripts = ScriptDirectory.from_config(alembic_config())
    unknown = found - {script.revision for script in scripts.walk_revisions()}
    if unknown:
        raise SchemaTooNew(
            f"the database has schema {', '.join(sorted(unknown))}, which this lorad does not know: install a newer one"
        )


T = TypeVar("T", covariant=True)


@dataclass(frozen=True)
class Page(Generic[T]):
    """One page of a list, and whether another follows."""

    items: Sequence[T]
    has_more: bool


Row = TypeVar("Row", bound=Table)


def cursor(tx: Tx, query: Select[Row], after: str) -> Row:
    """The row that a client's `after` names; InvalidRequest if `query` finds none."""
    if (row := tx.scalars(query).one_or_none()) is None:
        raise InvalidRequest(f"after={after!r} is not the id of an object in this list", param="after")
    return row


def keyset_page(
    tx: Tx,
    query: Select[Row],
    *,
    keys: Sequence[InstrumentedAttribute[Any]],
    after: Row | None,
    limit: int,
    newest_first: bool,
) -> Page[Row]:
    """The `limit` rows of `query` that follow `after` in the order of `keys`, which must be unique together."""
    if after is not None:
        here, last = tuple_(*keys), tuple_(*(getattr(after, key.key) for key in keys))
        query = query.where(here < last if newest_first else here > last)
    query = query.order_by(*(key.desc() if newest_first else key.asc() for key in keys)).limit(limit + 1)
    rows = tx.scalars(query).all()
    return Page(items=rows[:limit], has_more=len(rows) > limit)
