"""Kept answers: one for each key, written with what they tell of or not at all."""

import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from sqlalchemy import Engine, func, select, text, update

from shared import idempotency
from shared.db import Tx, now_ms, open_engine, read, write
from shared.errors import IdempotencyMismatch, RequestInFlight
from shared.idempotency import Kept, Request
from shared.store.layout import Layout
from shared.sweeper import Sweeper
from shared.tables import ApiKey, IdempotencyKey, Job
from tests.shared.conftest import LEASE_S, World
from tests.shared.test_jobs_claim import at_once

ROOT = Path(__file__).parents[2]
DAY_S = 24 * 3600
ANSWER = Kept(200, '{"lr":1e-05,"name":"é\\u0000","a":null}')

# Argument 1 is the database, 2 says where to die.
_MAKE_AND_DIE = """
import os, signal, sys
from shared import db, idempotency, keys
request = idempotency.Request(tenant="acme", key="k", request_sha256="x")
with db.write(db.open_engine(sys.argv[1])) as tx:
    assert idempotency.take(tx, request) is None
    keys.create(tx, tenant="acme", scopes=keys.DEFAULT_SCOPES)
    idempotency.keep(tx, request, idempotency.Kept(200, "{}"))
    if sys.argv[2] == "before":
        os.kill(os.getpid(), signal.SIGKILL)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture
def postgres(fresh_postgres_url: str) -> Iterator[Engine]:
    """An engine where two writers can be at work at once."""
    engine = open_engine(fresh_postgres_url)
    yield engine
    engine.dispose()


def keyed(key: str = "k", sha256: str = "x", tenant: str = "acme") -> Request:
    return Request(tenant=tenant, key=key, request_sha256=sha256)


def tried(retry_count: int) -> Request:
    """A request whose client counts its tries."""
    return Request(tenant="acme", key="retry of x", request_sha256="x", kept_s=900, retry_count=retry_count)


def answered(engine: Engine, request: Request, answer: Kept = ANSWER) -> Kept | None:
    """What is kept for the request; if nothing is, `answer` is from now on."""
    with write(engine) as tx:
        if (kept := idempotency.take(tx, request)) is None:
            idempotency.keep(tx, request, answer)
        return kept


def age(engine: Engine, seconds: int) -> None:
    """Let every kept answer be that much older."""
    with write(engine) as tx:
        tx.execute(update(IdempotencyKey).values(created_at=IdempotencyKey.created_at - seconds * 1000))


@contextmanager
def held(engine: Engine, request: Request) -> Iterator[Tx]:
    """The open transaction of a request that has taken its key."""
    with write(engine) as tx:
        assert idempotency.take(tx, request) is None
        yield tx


def test_the_answer_comes_back_as_it_was(engine: Engine) -> None:
    """Status and body are those of the first time, byte for byte, however often."""
    assert answered(engine, keyed()) is None

    assert [answered(engine, keyed(), Kept(500, "other")) for _ in range(2)] == [ANSWER, ANSWER]


def test_another_request_with_the_key_is_refused(engine: Engine) -> None:
    """A key belongs to one request; the kept answer stays."""
    answered(engine, keyed(sha256="x"))

    with pytest.raises(IdempotencyMismatch):
        answered(engine, keyed(sha256="y"))
    assert answered(engine, keyed(sha256="x")) == ANSWER


def test_keys_are_per_tenant(engine: Engine) -> None:
    """Another tenant's key of the same text is another key, for whatever request, with an answer of its own."""
    answered(engine, keyed(tenant="acme"))

    assert answered(engine, keyed(tenant="umbrella", sha256="y"), Kept(200, "theirs")) is None
    assert answered(engine, keyed(tenant="acme")) == ANSWER
    assert answered(engine, keyed(tenant="umbrella", sha256="y")) == Kept(200, "theirs")


def test_a_transaction_that_fails_keeps_nothing(engine: Engine) -> None:
    """The key is free for any request after an error."""
    with held(engine, keyed(sha256="x")) as tx:
        idempotency.keep(tx, keyed(sha256="x"), ANSWER)
        tx.rollback()

    assert answered(engine, keyed(sha256="y")) is None


def test_a_key_without_an_answer_is_free(engine: Engine) -> None:
    """Even a row that should not be, committed without its answer, holds nobody up."""
    with held(engine, keyed()):
        pass

    assert answered(engine, keyed(sha256="y")) is None
    assert answered(engine, keyed(sha256="y")) == ANSWER


def test_a_kept_answer_counts_for_a_day(engine: Engine) -> None:
    """After that the key is free for any request, whether or not a sweeper runs; before, it is not."""
    answered(engine, keyed())
    age(engine, DAY_S - 60)
    assert answered(engine, keyed()) == ANSWER
    age(engine, 120)

    assert answered(engine, keyed(sha256="y"), Kept(200, "new")) is None
    age(engine, DAY_S - 60)
    assert answered(engine, keyed(sha256="y")) == Kept(200, "new")


def test_a_retry_gets_the_earlier_try_s_answer(engine: Engine) -> None:
    """Every later try gets what the first to arrive was answered."""
    assert answered(engine, tried(0)) is None

    assert answered(engine, tried(1)) == ANSWER
    assert answered(engine, tried(2)) == ANSWER


@pytest.mark.parametrize(("first", "second"), [(0, 0), (1, 0), (1, 1), (2, 1)])
def test_a_try_that_is_no_later_is_a_request_of_its_own(engine: Engine, first: int, second: int) -> None:
    """Who sends a request twice wants it twice; a retry after that is one of the second."""
    answered(engine, tried(first))

    assert answered(engine, tried(second), Kept(200, "second")) is None
    assert answered(engine, tried(second + 1)) == Kept(200, "second")


def test_a_retry_is_known_for_a_quarter_of_an_hour(engine: Engine) -> None:
    """A client that retries does it soon; later it is taken at its word as a new request."""
    answered(engine, tried(0))
    age(engine, 840)
    assert answered(engine, tried(1)) == ANSWER
    age(engine, 120)

    assert answered(engine, tried(1)) is None


def test_many_at_once_are_one(engine: Engine) -> None:
    """Of requests that start together one makes its object, and all others get its answer."""
    for key in ("a", "b", "c", "d", "e"):
        bodies = [Kept(200, f"{number}") for number in range(8)]
        results = at_once(*(lambda body=body, key=key: answered(engine, keyed(key), body) for body in bodies))

        (winner,) = [body for body, result in zip(bodies, results, strict=True) if result is None]
        assert [result for result in results if result is not None] == [winner] * 7


def test_first_tries_at_once_are_each_their_own(engine: Engine) -> None:
    """Equal requests that two threads send at the same time are two."""
    for _ in range(5):
        assert at_once(*[lambda: answered(engine, tried(0))] * 4) == [None] * 4


def test_the_second_waits_for_the_first(engine: Engine) -> None:
    """A request whose twin is being answered gets that answer once it is committed, and nothing before."""
    results: list[Kept | None] = []
    second = threading.Thread(target=lambda: results.append(answered(engine, keyed(), Kept(200, "second"))))
    with held(engine, keyed()) as tx:
        second.start()
        second.join(0.3)
        assert results == []
        idempotency.keep(tx, keyed(), ANSWER)
    second.join(10)

    assert results == [ANSWER]


def test_an_expired_key_has_one_heir(engine: Engine) -> None:
    """Of two requests that find an old answer one takes the key, and the other waits for its answer."""
    answered(engine, keyed(), Kept(200, "old"))
    age(engine, DAY_S + 60)
    results: list[Kept | None] = []
    second = threading.Thread(target=lambda: results.append(answered(engine, keyed(), Kept(200, "second"))))
    with held(engine, keyed()) as tx:
        second.start()
        second.join(0.3)
        idempotency.keep(tx, keyed(), ANSWER)
    second.join(10)

    assert results == [ANSWER]


def test_two_at_once_do_not_both_inherit(postgres: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two that have both met the old row, before either looks at it, are still one after the other."""
    answered(postgres, keyed(), Kept(200, "old"))
    age(postgres, DAY_S + 60)
    look, barrier = idempotency._locked, threading.Barrier(2)

    def look_together(tx: Tx, request: Request) -> IdempotencyKey | None:
        barrier.wait(10)
        return look(tx, request)

    monkeypatch.setattr(idempotency, "_locked", look_together)
    results = at_once(*[lambda: answered(postgres, keyed())] * 2)

    assert sorted(results, key=str) == [ANSWER, None]


def test_a_key_forgotten_while_we_look_is_free(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row that is in the way of the insertion and gone a moment later, since a sweeper came by, is no obstacle."""
    answered(engine, keyed(), Kept(200, "old"))
    look = idempotency._locked

    def sweep_and_look(tx: Tx, request: Request) -> IdempotencyKey | None:
        idempotency.forget_old(tx, max_age_s=-60)
        return look(tx, request)

    monkeypatch.setattr(idempotency, "_locked", sweep_and_look)
    assert answered(engine, keyed()) is None
    monkeypatch.undo()
    assert answered(engine, keyed()) == ANSWER


def test_the_second_goes_on_when_the_first_fails(engine: Engine) -> None:
    """A request whose twin is rolled back makes the object itself."""
    results: list[Kept | None] = []
    second = threading.Thread(target=lambda: results.append(answered(engine, keyed())))
    with held(engine, keyed()) as tx:
        second.start()
        second.join(0.3)
        tx.rollback()
    second.join(10)

    assert results == [None]


def test_waiting_has_an_end(postgres: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """A twin that takes too long is an error that may be tried again; another key is not held up."""
    monkeypatch.setattr(idempotency, "IN_FLIGHT_WAIT_MS", 100)
    with held(postgres, keyed()) as tx:
        with pytest.raises(RequestInFlight):
            answered(postgres, keyed())
        assert answered(postgres, keyed("another")) is None
        idempotency.keep(tx, keyed(), ANSWER)

    assert answered(postgres, keyed()) == ANSWER


def test_the_wait_is_for_the_key_alone(postgres: Engine) -> None:
    """What follows in the transaction waits for locks as long as it would have without."""
    with write(postgres) as tx:
        tx.execute(text("SET LOCAL lock_timeout = '7s'"))
        idempotency.take(tx, keyed())

        assert tx.scalar(select(func.current_setting("lock_timeout"))) == "7s"


@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_killed_process_leaves_both_or_neither(engine: Engine, moment: str) -> None:
    """Killed before the commit there is no object and the key is free at once; after it, there are both."""
    url = engine.url.render_as_string(hide_password=False)
    ended = subprocess.run([sys.executable, "-c", _MAKE_AND_DIE, url, moment], cwd=ROOT, timeout=60)
    assert ended.returncode == -signal.SIGKILL

    kept = answered(engine, keyed())

    with read(engine) as tx:
        assert tx.query(ApiKey).count() == (moment == "after")
    assert kept == (Kept(200, "{}") if moment == "after" else None)


def test_the_sweeper_forgets_old_keys(world: World, layout: Layout) -> None:
    """Kept answers are deleted after a day and not before; what they told of stays."""
    world.submit()
    for key, age_s in (("old", DAY_S + 60), ("young", DAY_S - 60)):
        with write(world.engine) as tx:
            now = tx.scalar(select(now_ms(tx))) or 0
            tx.add(IdempotencyKey(tenant="acme", key=key, request_sha256="x", created_at=now - age_s * 1000))

    Sweeper(lease_s=LEASE_S, sweep_s=10).clean_if_due(world.engine, layout)

    with read(world.engine) as tx:
        assert [row.key for row in tx.query(IdempotencyKey)] == ["young"]
        assert tx.query(Job).count() == 1
