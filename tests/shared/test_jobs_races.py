"""Calls on one job at the same moment do what they would have done one after another."""

import functools
import itertools
import queue
import random
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

import pytest
from hypothesis import settings
from sqlalchemy import Engine, event, text
from sqlalchemy.exc import DBAPIError, OperationalError

from shared import jobs
from shared.db import Tx, write
from shared.errors import CancelRequested, StateConflict
from shared.jobs import Claim
from shared.tables import JobState
from tests.shared.ledger_calls import Ledger, open_ledger
from tests.shared.ledger_races import NAME, ONCE, STATES, TENANT, Call, Scene, allowed, calls_in, left, make_scene
from tests.shared.ledger_rows import MAX_QUEUED

IS_CAMPAIGN: Final = settings.get_current_profile_name() == "campaign"
THREADS: Final = 4
RACES: Final = 2000 if IS_CAMPAIGN else 150
INTERLEAVINGS: Final = 2000 if IS_CAMPAIGN else 60


@pytest.fixture
def ledger(database_url: str, tmp_path: Path) -> Iterator[Ledger]:
    """An empty ledger on each database."""
    with open_ledger(database_url, tmp_path / "data") as ledger:
        yield ledger


@pytest.fixture
def postgres_ledger(fresh_postgres_url: str, tmp_path: Path) -> Iterator[Ledger]:
    """The same on Postgres only: SQLite's write transactions never overlap."""
    with open_ledger(fresh_postgres_url, tmp_path / "data") as ledger:
        yield ledger


def check(scene: Scene, names: list[str], calls: list[Call], answers: list[object]) -> None:
    """AssertionError if no order of the calls explains these answers and what is left."""
    outcomes = list(allowed(scene, calls))
    outcome = answers, left(scene.both.ledger)
    assert outcome in outcomes, f"{names} answered {answers}; in turn they answer one of {[o[0] for o in outcomes]}"


@pytest.mark.timeout(1500 if IS_CAMPAIGN else 240)
def test_calls_at_once_do_as_one_after_another(ledger: Ledger) -> None:
    """Two to four random calls on a job in a random state, let go at the same moment by a barrier."""
    with ThreadPoolExecutor(THREADS) as pool:
        for seed in range(RACES):
            chance = random.Random(seed)
            scene = make_scene(ledger, chance.choice(list(STATES)))
            possible = calls_in(scene)
            names = chance.choices(list(possible), k=chance.randint(2, THREADS))
            names = [name for place, name in enumerate(names) if name not in ONCE or name not in names[:place]]
            barrier = threading.Barrier(len(names))

            def run(name: str, spins: int, scene: Scene = scene, barrier: threading.Barrier = barrier) -> object:
                barrier.wait(30)
                for _ in range(spins):
                    pass
                return calls_in(scene)[name](scene, ledger)

            started = [pool.submit(run, name, chance.randrange(20_000)) for name in names]

            check(scene, names, [possible[name] for name in names], [future.result(30) for future in started])


class Interleaving:
    """Runs `other` in a thread just after the n-th statement of this thread, and goes on when it is done or blocked."""

    def __init__(self, engine: Engine, other: Callable[[], object]) -> None:
        self._engine = engine
        self._other = other
        self._statements_left = 0
        self._thread: threading.Thread | None = None
        self._answer: list[object] = []

    def run(self, call: Callable[[], object], *, after: int) -> tuple[object, object] | None:
        """What both answered; None if the call has no more than `after` statements, and then `other` did not run."""
        self._statements_left, caller = after, threading.current_thread()

        def watch(*_: Any) -> None:
            if threading.current_thread() is not caller or self._thread is not None:
                return
            self._statements_left -= 1
            if self._statements_left == 0:
                self._let_other_go()

        event.listen(self._engine, "after_cursor_execute", watch)
        try:
            answer = call()
        finally:
            event.remove(self._engine, "after_cursor_execute", watch)
        if self._thread is None:
            return None
        self._thread.join(30)
        return answer, self._answer[0]

    def _let_other_go(self) -> None:
        self._thread = threading.Thread(target=lambda: self._answer.append(self._other()))
        self._thread.start()
        waiting = text("SELECT count(*) FROM pg_locks WHERE NOT granted")
        with self._engine.connect() as connection:
            while self._thread.is_alive() and not connection.scalar(waiting):
                self._thread.join(0.002)


def interleave(ledger: Ledger, state: str, names: Sequence[str]) -> int:
    """Checks the second call after each statement of the first, each on a new scene; returns how many there are."""
    for after in itertools.count(1):
        scene = make_scene(ledger, state)
        first, second = (calls_in(scene)[name] for name in names)
        other = functools.partial(second, scene, ledger)
        answers = Interleaving(ledger.world.engine, other).run(functools.partial(first, scene, ledger), after=after)
        if answers is None:
            return after - 1
        check(scene, [*names, state], [first, second], list(answers))
    raise AssertionError


FATAL: Final = (
    ("running", "cancel", "give_back"),
    ("running", "pause", "shut_down"),
    ("paused", "cancel", "resume"),
    ("running", "fail", "cancel"),
    ("running", "delete", "publish"),
    ("queued", "mark_rung", "claim"),
    ("lost", "sweep", "beat"),
)
"""What once did harm, or nearly: state, first and second call."""


@pytest.mark.parametrize(("state", "first", "second"), FATAL)
def test_a_call_between_two_statements_does_no_harm(
    postgres_ledger: Ledger, state: str, first: str, second: str
) -> None:
    """Whatever the second call does after any statement of the first, both are as they would be one after another."""
    assert interleave(postgres_ledger, state, (first, second)) > 1


def test_one_of_two_submissions_gets_the_last_place(postgres_ledger: Ledger) -> None:
    """Wherever the second comes between two statements of the first: it waits, and then finds the queue full."""
    base, _ = postgres_ledger.bases
    for after in itertools.count(1):
        submit = functools.partial(postgres_ledger.submit, tenant=f"tenant-{after}", name="a", base=base, priority=0)
        for _ in range(MAX_QUEUED - 1):
            assert submit() != "full"
        answers = Interleaving(postgres_ledger.world.engine, submit).run(submit, after=after)
        if answers is None:
            break
        assert answers.count("full") == 1
    assert after > 2


@pytest.mark.timeout(1500 if IS_CAMPAIGN else 240)
def test_any_call_between_two_statements_does_no_harm(postgres_ledger: Ledger) -> None:
    """The same for any two calls in any state."""
    chance = random.Random(5)
    seen = 0
    while seen < INTERLEAVINGS:
        state = chance.choice(list(STATES))
        possible = calls_in(make_scene(postgres_ledger, state))
        seen += interleave(postgres_ledger, state, chance.sample(list(possible), k=2))


class Undone(Exception):
    """Makes a transaction roll back."""


@pytest.mark.parametrize("commits", [True, False], ids=["committed", "rolled back"])
@pytest.mark.parametrize("first", ["cancel", "publish"])
def test_cancel_and_publish_wait_for_each_other(ledger: Ledger, first: str, commits: bool) -> None:
    """The later of the two waits for the earlier's commit, and then sees what it did, or nothing if it rolled back."""
    scene = make_scene(ledger, "running")
    claim, prepared = scene.claim, scene.prepared
    assert claim is not None
    assert prepared is not None
    acts: dict[str, Callable[[Tx], object]] = {
        "cancel": lambda tx: jobs.request_cancel(tx, TENANT, claim.job_id),
        "publish": lambda tx: jobs.succeed(tx, claim, prepared),
    }
    (second,) = acts.keys() - {first}
    raised: list[Exception | None] = []

    def run_second() -> None:
        try:
            with write(ledger.world.engine) as tx:
                acts[second](tx)
            raised.append(None)
        except (CancelRequested, StateConflict) as error:
            raised.append(error)

    thread = threading.Thread(target=run_second)
    try:
        with write(ledger.world.engine) as tx:
            acts[first](tx)
            thread.start()
            thread.join(0.2)
            assert thread.is_alive()
            if not commits:
                raise Undone
    except Undone:
        pass
    thread.join(30)

    winner = first if commits else second
    assert isinstance(raised[0], StateConflict) == commits
    row = ledger.snapshot().jobs[claim.job_id]
    assert row["state"] == (JobState.SUCCEEDED if winner == "publish" else JobState.RUNNING)
    assert (row["cancel_requested_at"] is not None) == (winner == "cancel")


def test_a_repeated_doorbell_claims_once(ledger: Ledger) -> None:
    """The same message fifty times to eight trainers: one job is claimed once, five jobs once each."""
    for number in (1, 5):
        ledger.empty()
        new: dict[str, Any] = {"tenant": TENANT, "name": NAME, "base": ledger.bases[0], "priority": 0}
        submitted = {ledger.submit(**new) for _ in range(number)}
        doorbell: queue.SimpleQueue[int] = queue.SimpleQueue()
        for ring in range(50):
            doorbell.put(ring)
        barrier = threading.Barrier(8)

        def answer(trainer: int, doorbell: queue.SimpleQueue[int] = doorbell,
                   barrier: threading.Barrier = barrier) -> list[Claim]:  # fmt: skip
            barrier.wait(30)
            claims = []
            while not doorbell.empty():
                try:
                    doorbell.get_nowait()
                except queue.Empty:
                    break
                claims.append(ledger.claim(f"t{trainer}", None))
            return [claim for claim in claims if claim is not None]

        with ThreadPoolExecutor(8) as pool:
            claims = [claim for part in pool.map(answer, range(8)) for claim in part]

        assert sorted(claim.job_id for claim in claims) == sorted(submitted)
        rows = ledger.snapshot().jobs
        assert {(row["fence"], row["attempt"]) for row in rows.values()} == {(1, 1)}


def test_a_claim_waits_for_the_note_of_a_ring(ledger: Ledger) -> None:
    """A trainer that answers a ring at once gets the job, though the sweeper is still noting that it rang."""
    scene = make_scene(ledger, "queued")
    claims: list[Claim | None] = []
    thread = threading.Thread(target=lambda: claims.append(ledger.claim("t1", None)))
    with write(ledger.world.engine) as tx:
        jobs.mark_rung(tx)
        thread.start()
        thread.join(0.2)
    thread.join(30)

    assert claims[0] is not None
    assert claims[0].job_id == scene.job_id


def test_a_trainer_stopped_within_its_claim_keeps_nobody_from_claiming(
    postgres_ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It loses its connection, and its claim with it: else all others and the sweeper would wait until it is back."""
    monkeypatch.setattr("shared.jobs.claim.CLAIM_IDLE_S", 1)
    scene, engine = make_scene(postgres_ledger, "queued"), postgres_ledger.world.engine
    claims: list[Claim | None] = []
    thread = threading.Thread(target=lambda: claims.append(postgres_ledger.claim("t1", None)), daemon=True)

    def claim_and_stop() -> None:
        with write(engine) as tx:
            assert jobs.claim_next(tx, trainer="stopped", lease_s=60.0) is not None
            thread.start()
            thread.join(15)

    with pytest.raises(DBAPIError, match="idle-in-transaction"):
        claim_and_stop()

    assert [claim and (claim.job_id, claim.fence) for claim in claims] == [(scene.job_id, 1)]


def test_a_cancel_does_not_wait_for_ever_for_a_stopped_trainer(
    postgres_ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that is stopped while it has its job's row holds no connection of the API for longer than SQLite would."""
    monkeypatch.setattr("shared.db.SQLITE_WAIT_S", 1)
    scene, engine = make_scene(postgres_ledger, "queued"), postgres_ledger.world.engine
    claim = postgres_ledger.claim("stopped", None)
    assert claim is not None

    def cancel() -> None:
        with write(engine) as tx:
            jobs.request_cancel(tx, TENANT, scene.job_id)

    with ThreadPoolExecutor(1) as pool, write(engine) as tx:
        jobs.add_event(tx, claim, message="it has the row")
        with pytest.raises(OperationalError, match="lock timeout"):
            pool.submit(cancel).result(15)
    cancel()

    assert postgres_ledger.snapshot().jobs[scene.job_id]["cancel_requested_at"] is not None
