"""Reading from a database that is away for a while."""

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import Engine, text
from sqlalchemy.exc import OperationalError

from shared.db import Tx, open_engine, read_patiently


@pytest.fixture
def away(tmp_path: Path) -> Iterator[Engine]:
    """A database whose directory is not there yet."""
    engine = open_engine(f"sqlite:///{tmp_path / 'later' / 'lorad.db'}")
    yield engine
    engine.dispose()


def answer(tx: Tx) -> int:
    return int(tx.scalar(text("SELECT 42")) or 0)


def test_a_database_that_comes_back_is_read(away: Engine, tmp_path: Path) -> None:
    """The reader waits, and gets its answer once the database is there."""
    asked = threading.Event()
    found: list[int] = []

    def look(tx: Tx) -> int:
        asked.set()
        return answer(tx)

    reader = threading.Thread(target=lambda: found.append(read_patiently(away, look, at_most_s=30.0)))
    reader.start()
    assert asked.wait(10)
    (tmp_path / "later").mkdir()
    reader.join(30)

    assert found == [42]


def test_patience_ends(away: Engine) -> None:
    """After its time the error of the database is raised."""
    with pytest.raises(OperationalError):
        read_patiently(away, answer, at_most_s=0.0)


def test_a_database_that_answers_is_read_at_once(engine: Engine) -> None:
    """On either database, without any wait."""
    assert read_patiently(engine, answer, at_most_s=0.0) == 42
