"""A database whose clock a test moves, forwards and backwards, to the millisecond.

The clock itself is replaced and the SQL of `shared.db.now_ms` stays what it is in production. Editing rows instead
could not move those of jobs that have ended, which never change; replacing `now_ms` in every module that imports it
would pass over one that is added later.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final

from sqlalchemy import Engine, event, text

from shared.db import open_engine

START_MS: Final = 1_800_000_000_000
"""What the clock shows at first, in milliseconds since 1970."""

SetClock = Callable[[int], None]

_POSTGRES_CLOCK = """
DROP SCHEMA IF EXISTS test_clock CASCADE;
CREATE SCHEMA test_clock;
CREATE TABLE test_clock.shown (ms bigint NOT NULL);
INSERT INTO test_clock.shown VALUES (0);
CREATE FUNCTION test_clock.clock_timestamp() RETURNS timestamptz LANGUAGE sql VOLATILE
    AS 'SELECT to_timestamp(ms / 1000.0) FROM test_clock.shown'
"""


@contextmanager
def clocked_engine(url: str) -> Iterator[tuple[Engine, SetClock]]:
    """An engine on the migrated database at `url`, and what sets the clock that all its connections read."""
    if url.startswith("sqlite"):
        engine, set_clock = _clocked_sqlite(url)
        yield engine, set_clock
        engine.dispose()
        return
    # Our schema is searched before Postgres' own, where the real clock_timestamp() is.
    outside = open_engine(url).execution_options(isolation_level="AUTOCOMMIT")
    engine = open_engine(f"{url}?options=-csearch_path%3Dtest_clock,pg_catalog,public")
    with outside.connect() as connection:

        def set_clock(ms: int) -> None:
            connection.execute(text("UPDATE test_clock.shown SET ms = :ms"), {"ms": ms})

        for statement in _POSTGRES_CLOCK.split(";"):
            connection.execute(text(statement))
        set_clock(START_MS)
        yield engine, set_clock
        engine.dispose()
        connection.execute(text("DROP SCHEMA test_clock CASCADE"))
    outside.dispose()


def _clocked_sqlite(url: str) -> tuple[Engine, SetClock]:
    shown_ms = [START_MS]

    def julianday(_when: str) -> float:
        # Half a millisecond more, since the double of a Julian day is exact to 0.04 ms only and the SQL cuts off.
        return (shown_ms[0] + 0.5) / 86_400_000 + 2_440_587.5

    def prepare(connection: Any, _record: Any) -> None:
        connection.create_function("julianday", 1, julianday)
        connection.execute("PRAGMA synchronous=OFF")  # no power is cut here, and fsync is most of a small transaction

    engine = open_engine(url)
    event.listen(engine, "connect", prepare)
    return engine, lambda ms: shown_ms.__setitem__(0, ms)
