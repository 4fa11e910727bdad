"""The sweeper's rules, and when it may take a job away."""

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from sqlalchemy import Engine

from shared import jobs
from shared.db import migrate, open_engine, read, write
from shared.queue import Queue
from shared.specs import Order
from shared.store.layout import Layout
from shared.sweeper import Sweeper
from shared.tables import Checkpoint, Job, JobAttempt, JobState
from tests.servers import Broker, Postgres, run_postgres
from tests.shared.conftest import LEASE_S, World, make_world


def test_a_live_lease_is_left_alone(world: World) -> None:
    """A job whose trainer beats is not touched."""
    claim = world.running()

    nothing = jobs.Swept(ring=False, waiting=0, requeued=0, failed=0, cancelled=0, paused=0)
    assert world.sweep() == nothing
    assert world.state(claim.job_id) == JobState.RUNNING


def test_a_lost_job_is_queued_to_run_alone(world: World) -> None:
    """The attempt is closed as lost; the job waits half a lease and then runs alone."""
    claim = world.running()
    world.lose(claim)

    assert world.sweep().requeued == 1

    job = world.job(claim.job_id)
    assert (job.state, job.runs_alone, job.attempt, job.lease_owner) == ("queued", True, 1, None)
    assert 0 <= job.not_before - (world.job(claim.job_id).started_at or 0) - LEASE_S * 500 < 30_000
    with read(world.engine) as tx:
        assert tx.get_one(JobAttempt, (claim.job_id, claim.fence)).outcome == "lost"
    assert world.claim("t2") is None
    world.edit(claim.job_id, "not_before = 0")
    again = world.claim("t2")
    assert again is not None
    assert (again.attempt, again.fence, again.runs_alone) == (2, 2, True)


def test_an_expired_lease_needs_permission(world: World) -> None:
    """A sweeper that has not watched long enough takes nothing."""
    claim = world.running()
    world.lose(claim)

    assert world.sweep(may_expire=False).requeued == 0
    assert world.state(claim.job_id) == JobState.RUNNING


def test_a_poison_job_gets_three_attempts(world: World) -> None:
    """A job that kills its trainer each time fails in the end."""
    job = world.submit()
    for _ in range(3):
        world.edit(job.id, "not_before = 0")
        claim = world.claim()
        assert claim is not None
        world.lose(claim)
        swept = world.sweep()

    assert swept.failed == 1
    row = world.job(job.id)
    assert (row.state, row.attempt) == ("failed", 3)
    assert row.error is not None
    assert row.error["code"] == "attempts_exhausted"


def test_a_poison_job_leaves_others_unhurt(world: World) -> None:
    """Three jobs beside the one that kills its trainer three times: each succeeds in its first attempt."""
    poison = world.submit(priority=9)
    healthy = [world.submit() for _ in range(3)]
    for n in range(3):
        world.edit(poison.id, "not_before = 0")
        killed, other = world.claim(f"doomed{n}"), world.claim(f"t{n}")
        assert killed is not None
        assert other is not None
        assert killed.job_id == poison.id
        world.lose(killed)
        world.sweep()
        world.publish(other)

    assert world.state(poison.id) == JobState.FAILED
    assert [(world.state(job.id), world.job(job.id).attempt) for job in healthy] == [(JobState.SUCCEEDED, 1)] * 3


def test_backoff_doubles(world: World) -> None:
    """The second loss waits twice as long as the first."""
    waits = []
    job = world.submit()
    for _ in range(2):
        world.edit(job.id, "not_before = 0")
        claim = world.claim()
        assert claim is not None
        world.lose(claim)
        world.sweep()
        waits.append(world.messages(job.id)[-1])

    assert "waits 30 s" in waits[0]
    assert "waits 60 s" in waits[1]


@pytest.mark.parametrize(("ask", "end"), [(jobs.request_cancel, "cancelled"), (jobs.request_pause, "paused")])
def test_what_was_asked_of_a_lost_job_is_done(world: World, ask: Callable[..., Job], end: str) -> None:
    """A cancel or pause whose trainer died is carried out by the sweeper."""
    claim = world.running()
    with write(world.engine) as tx:
        ask(tx, "acme", claim.job_id)
    world.lose(claim)

    swept = world.sweep()

    assert (swept.cancelled, swept.paused) == ((1, 0) if end == "cancelled" else (0, 1))
    assert world.state(claim.job_id) == end


def test_a_paused_lost_job_can_resume(world: World) -> None:
    """A job paused by the sweeper has an attempt left to go on with."""
    claim = world.running()
    with write(world.engine) as tx:
        jobs.request_pause(tx, "acme", claim.job_id)
    world.lose(claim)
    world.sweep()
    with write(world.engine) as tx:
        jobs.resume(tx, "acme", claim.job_id)

    assert world.claim("t2") is not None


@pytest.mark.parametrize(("column", "end"), [("cancel_requested_at", "cancelled"), ("pause_requested_at", "paused")])
def test_a_request_on_a_queued_job_is_done(world: World, column: str, end: str) -> None:
    """A queued job with a request open is not claimed but ended."""
    job = world.submit()
    world.edit(job.id, f"{column} = 1")

    assert world.claim() is None
    world.sweep()
    assert world.state(job.id) == end


def test_ring_until_heard(world: World) -> None:
    """A waiting job asks for a ring, is quiet for a while after one, and asks again later."""
    job = world.submit()
    first = world.sweep()
    with write(world.engine) as tx:
        jobs.mark_rung(tx)
    second = world.sweep()
    world.edit(job.id, "rung_at = rung_at - 31000")

    assert (first.ring, first.waiting, second.ring, second.waiting) == (True, 1, False, 1)
    assert world.sweep().ring


def test_no_ring_for_what_may_not_start(world: World) -> None:
    """Neither a job in backoff nor a running one asks for a ring."""
    world.running()
    job = world.submit()
    world.edit(job.id, "not_before = created_at + 3600000")

    assert not world.sweep().ring


def test_checkpoints_are_listed_newest_first(world: World) -> None:
    """Steps and fences count, and forgotten ones are not offered."""
    claim = world.running()
    with write(world.engine) as tx:
        for step in (1, 3, 2):
            identity = f"ftckpt-{step:032x}"
            jobs.record_checkpoint(tx, claim, checkpoint_id=identity, step=step, manifest={}, metrics={"step": step})
        tx.get_one(Checkpoint, f"ftckpt-{2:032x}").deleted_at = 1

    with read(world.engine) as tx:
        assert [row.step for row in jobs.newest_checkpoints(tx, claim.job_id)] == [3, 1]
        assert [row.step for row in jobs.checkpoints_page(tx, "acme", claim.job_id, limit=1).items] == [3]


class Clock:
    """A clock that goes when told."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def queue(broker_url: str) -> Iterator[Queue]:
    """The session's broker."""
    queue = Queue(broker_url)
    yield queue
    queue.close()


def test_sweeper_watches_one_lease_before_it_takes(world: World, queue: Queue) -> None:
    """A sweeper that has just started lets every trainer renew first."""
    clock = Clock()
    sweeper = Sweeper(lease_s=LEASE_S, sweep_s=10, clock=clock)
    claim = world.running()
    world.lose(claim)
    for _ in range(6):
        sweeper.sweep_once(world.engine, queue)
        clock.now += 10
    assert world.state(claim.job_id) == JobState.RUNNING

    sweeper.sweep_once(world.engine, queue)

    assert world.state(claim.job_id) == JobState.QUEUED


def test_sweeper_that_slept_watches_anew(world: World, queue: Queue) -> None:
    """After a long gap in its own sweeping, as when the machine slept, a sweeper takes nothing at first."""
    clock = Clock()
    sweeper = Sweeper(lease_s=LEASE_S, sweep_s=10, clock=clock)
    for _ in range(8):
        sweeper.sweep_once(world.engine, queue)
        clock.now += 10
    claim = world.running()
    world.lose(claim)
    clock.now += 300

    sweeper.sweep_once(world.engine, queue)

    assert world.state(claim.job_id) == JobState.RUNNING


def test_database_outage_takes_no_job(tmp_path: Path, queue: Queue) -> None:
    """When the database comes back after longer than a lease, the owner renews before any sweeper may take."""
    clock = Clock()
    sweeper = Sweeper(lease_s=LEASE_S, sweep_s=10, clock=clock)
    with run_postgres() as server:
        url = server.url("postgres")
        migrate(url)
        engine = open_engine(url)
        layout = Layout(tmp_path / "data")
        layout.prepare()
        world = make_world(engine, layout)
        for _ in range(8):
            assert sweeper.sweep_once(engine, queue) is not None
            clock.now += 10
        claim = world.running()
        away = _cut_off(server, sweeper, queue, clock, engine)
        assert away is None
        world.lose(claim)

        assert sweeper.sweep_once(engine, queue) is not None
        assert world.state(claim.job_id) == JobState.RUNNING
        with write(engine) as tx:
            assert jobs.heartbeat(tx, claim, lease_s=LEASE_S) is Order.GO_ON
        engine.dispose()


def _cut_off(server: Postgres, sweeper: Sweeper, queue: Queue, clock: Clock, engine: Engine) -> jobs.Swept | None:
    """What a sweep returns while the database accepts no connection."""
    server.execute("ALTER DATABASE template1 ALLOW_CONNECTIONS true")
    server.execute("ALTER DATABASE postgres ALLOW_CONNECTIONS false", database="template1")
    server.execute(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = 'postgres'", database="template1"
    )
    swept = sweeper.sweep_once(engine, queue)
    clock.now += 10
    server.execute("ALTER DATABASE postgres ALLOW_CONNECTIONS true", database="template1")
    return swept


def test_sweeper_rings_for_what_waits(world: World, queue: Queue, broker: Broker) -> None:
    """A submit whose doorbell was lost is rung for, once."""
    broker.client.delete("lorad:train")
    world.submit()
    world.submit()
    sweeper = Sweeper(lease_s=LEASE_S, sweep_s=10)
    sweeper.sweep_once(world.engine, queue)
    sweeper.sweep_once(world.engine, queue)

    assert broker.client.llen("lorad:train") == 2


def test_sweeper_goes_on_without_a_broker(world: World) -> None:
    """With the broker away the ledger is still mended, and the ring is tried again."""
    queue = Queue("redis://127.0.0.1:1/0")
    world.submit()
    sweeper = Sweeper(lease_s=LEASE_S, sweep_s=10)

    swept = [sweeper.sweep_once(world.engine, queue) for _ in range(2)]

    assert [s is not None and s.ring for s in swept] == [True, True]
    queue.close()


def test_sweeper_stops_when_told(world: World, queue: Queue) -> None:
    """The loop ends at once when asked, whatever its interval."""
    stop = threading.Event()
    sweeper = Sweeper(lease_s=LEASE_S, sweep_s=3600)
    thread = threading.Thread(target=sweeper.run, args=(world.engine, world.layout, queue, stop))
    thread.start()
    stop.set()
    thread.join(20)

    assert not thread.is_alive()
