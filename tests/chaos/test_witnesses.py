"""What watches over the campaign sees what it is there to see."""

import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import Engine, text

from shared import db, jobs
from shared.store.layout import Layout
from shared.tables import JobEvent
from tests.chaos.faults import Fault, attempt
from tests.chaos.invariants import of_steps, violations
from tests.chaos.proxy import Proxy
from tests.chaos.recorder import Recorder
from tests.shared.conftest import World, flip, make_world


@pytest.fixture
def world(fresh_sqlite_url: str, tmp_path: Path) -> Iterator[World]:
    """A ledger and a store with nothing wrong in them."""
    engine, layout = db.open_engine(fresh_sqlite_url), Layout(tmp_path / "data")
    layout.prepare()
    yield make_world(engine, layout)
    engine.dispose()


def found(world: World) -> str:
    return "; ".join(violations(world.engine, world.layout))


def edit(engine: Engine, statement: str) -> None:
    """Change rows behind the back of the triggers that forbid it."""
    with db.write(engine) as tx:
        for name in tx.scalars(text("SELECT name FROM sqlite_master WHERE type = 'trigger'")).all():
            tx.execute(text(f"DROP TRIGGER {name}"))
        tx.execute(text(statement))


def test_a_good_ledger_has_no_violation(world: World) -> None:
    """A job that succeeded and one that was cancelled are as they should be."""
    world.publish(world.running())
    job = world.submit()
    with db.write(world.engine) as tx:
        jobs.request_cancel(tx, "acme", job.id)

    assert found(world) == ""


def test_a_job_that_waits_is_stuck(world: World) -> None:
    """Unless jobs may still wait, one that has not ended is a violation."""
    world.submit()

    assert "stuck" in found(world)
    assert violations(world.engine, world.layout, all_ended=False) == []


@pytest.mark.parametrize(
    ("statement", "told"),
    [
        ("UPDATE jobs SET state = 'cancelled'", "cancelled with 1 versions"),
        ("DELETE FROM adapter_versions", "succeeded with 0 versions"),
        ("UPDATE jobs SET fence = 2", "fence 2"),
        ("UPDATE job_attempts SET ended_at = NULL", "open attempts"),
        ("UPDATE adapter_versions SET sha256 = 'x'", "two checksums"),
        ("DELETE FROM job_events WHERE seq = 1", "gaps"),
    ],
)
def test_a_wrong_row_is_found(world: World, statement: str, told: str) -> None:
    """Each invariant of the ledger fails by itself when its row is changed."""
    world.publish(world.running())
    edit(world.engine, statement)

    assert told in found(world)


def test_a_damaged_file_is_found(world: World) -> None:
    """A ready version whose bytes changed is a violation, and so is a directory that is not whole."""
    world.publish(world.running())
    [directory] = (world.layout.root / "adapters").iterdir()
    flip(directory / "adapter_model.safetensors")

    assert "not what its row says" in found(world)
    assert "does not match its manifest" in found(world)


def test_a_terminal_row_that_changes_is_recorded(world: World) -> None:
    """The recorder compares with what it saw before."""
    world.publish(world.running())
    recorder = Recorder(world.engine, world.layout)
    recorder.look()
    assert recorder.violations == []
    edit(world.engine, "UPDATE jobs SET step = 7")

    recorder.look()

    assert "changed after its end" in "; ".join(recorder.violations)


def story(*told: str | int) -> list[JobEvent]:
    """Events: a number is a step's metrics, 'r5' a resume from step 5, 's5' a checkpoint of it, '+' a new attempt."""
    events = []
    for one in told:
        message = {"r": "Resuming from step", "s": "Checkpoint saved at step"}.get(str(one)[0], "Training continues")
        number = int(str(one).lstrip("rs+") or 0)
        kind = "metrics" if isinstance(one, int) else "message"
        events.append(JobEvent(type=kind, message="Step" if isinstance(one, int) else message, data={"step": number}))
    return events


@pytest.mark.parametrize(
    "told", [(1, 2, 3), (1, 2, "s2", 3, "+", "r2", 3, 4), (1, 2, "+", 1, 2, 3)], ids=["plain", "resumed", "anew"]
)
def test_honest_steps_are_no_violation(told: tuple[str | int, ...]) -> None:
    """Steps after the last checkpoint may be made again by the next attempt."""
    assert list(of_steps(story(*told))) == []


@pytest.mark.parametrize(
    "told", [(1, 3), (1, 1), (1, 2, "s2", "+", 1), (1, 2, "s2", "+", "r2", 4)], ids=["gap", "twice", "back", "ahead"]
)
def test_wrong_steps_are_a_violation(told: tuple[str | int, ...]) -> None:
    """A step left out, told twice, or made again although it was saved."""
    assert list(of_steps(story(*told)))


@pytest.fixture
def echo() -> Iterator[int]:
    """The port of a server that sends back what it gets."""
    listener = socket.create_server(("127.0.0.1", 0))

    def answer(connection: socket.socket) -> None:
        with connection:
            while data := connection.recv(1024):
                connection.sendall(data.upper())

    def serve() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=answer, args=(connection,), daemon=True).start()

    threading.Thread(target=serve, daemon=True).start()
    yield int(listener.getsockname()[1])
    listener.shutdown(socket.SHUT_RDWR)
    listener.close()


def is_broken(connection: socket.socket, message: bytes = b"hello") -> bool:
    """True if no answer comes to the message, because the connection ends."""
    try:
        connection.sendall(message)
        return connection.recv(16) == b""
    except ConnectionError:
        return True


def is_refused(port: int) -> bool:
    """True if a new connection ends without an answer, perhaps before it is made."""
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=5) as connection:
            return is_broken(connection)
    except ConnectionError:
        return True


def test_a_proxy_passes_on_until_it_is_cut(echo: int) -> None:
    """Bytes go through both ways; after a cut neither the old connection nor a new one answers."""
    with Proxy(echo) as proxy, socket.create_connection(("127.0.0.1", proxy.port), timeout=5) as connection:
        connection.sendall(b"hello")
        assert connection.recv(16) == b"HELLO"
        assert not is_refused(proxy.port)
        proxy.cut()

        assert is_broken(connection)
        assert is_refused(proxy.port)


def test_a_proxy_loses_one_answer(echo: int) -> None:
    """Only the message after the mark is lost, and only once."""
    with Proxy(echo) as proxy:
        proxy.lose("answer", of=b"commit", after=b"insert")
        with socket.create_connection(("127.0.0.1", proxy.port), timeout=5) as connection:
            for message in (b"commit", b"insert"):
                connection.sendall(message)
                assert connection.recv(16) == message.upper()
            assert not proxy.sprung.is_set()
            assert is_broken(connection, b"commit")
        assert proxy.sprung.is_set()
        with socket.create_connection(("127.0.0.1", proxy.port), timeout=5) as connection:
            connection.sendall(b"insert commit")
            assert connection.recv(16) == b"INSERT COMMIT"


def test_a_fault_that_takes_too_long_is_lost() -> None:
    """Nobody waits for ever: the bound ends the attempt, and the outcome says so."""
    endless = Fault("F0", "endless", lambda bench: threading.Event().wait(60) and None, bound_s=1, is_fast=False)

    outcome = attempt(endless, None)  # type: ignore[arg-type]  # it uses no bench

    assert outcome.why is not None
    assert "not over after 1 s" in outcome.why
