"""A database that hangs, connections open: nobody can renew a lease meanwhile, and no job may be taken for it."""

from collections.abc import Iterator
from typing import Any

import pytest
from sqlalchemy import event

from shared.queue import Queue
from shared.sweeper import Sweeper
from shared.tables import JobState
from tests.shared.conftest import LEASE_S, World

HANGS_S = 5 * LEASE_S


@pytest.fixture
def queue(broker_url: str) -> Iterator[Queue]:
    queue = Queue(broker_url)
    yield queue
    queue.close()


class HangingDatabase:
    """Moves the sweeper's clock on when the statement `at` of a sweep is sent, as if its answer took so long."""

    def __init__(self, world: World) -> None:
        self.now = 0.0
        self.num_sent = 0
        self.at: int | None = None
        event.listen(world.engine, "before_cursor_execute", self._sent)

    def __call__(self) -> float:
        return self.now

    def _sent(self, *_: Any) -> None:
        self.num_sent += 1
        if self.num_sent == self.at:
            self.now += HANGS_S


@pytest.mark.parametrize("statement", [1, 3], ids=["before the sweep", "in the sweep"])
def test_a_hung_database_takes_no_job(world: World, queue: Queue, statement: int) -> None:
    """The sweep that was under way when the database hung leaves expired leases alone, and so does the next one."""
    database = HangingDatabase(world)
    sweeper = Sweeper(lease_s=LEASE_S, sweep_s=10, clock=database)
    claim = world.running()
    for _ in range(8):
        assert sweeper.sweep_once(world.engine, queue) is not None
        database.now += 10
    world.lose(claim)
    database.num_sent, database.at = 0, statement

    sweeper.sweep_once(world.engine, queue)
    assert database.now >= HANGS_S
    assert world.state(claim.job_id) == JobState.RUNNING
    database.now += 10
    sweeper.sweep_once(world.engine, queue)

    assert world.state(claim.job_id) == JobState.RUNNING


def test_a_lease_that_ran_out_while_all_answered_is_taken(world: World, queue: Queue) -> None:
    """The same sweeps without a hang take the job."""
    database = HangingDatabase(world)
    sweeper = Sweeper(lease_s=LEASE_S, sweep_s=10, clock=database)
    claim = world.running()
    for _ in range(8):
        sweeper.sweep_once(world.engine, queue)
        database.now += 10
    world.lose(claim)

    sweeper.sweep_once(world.engine, queue)

    assert world.state(claim.job_id) == JobState.QUEUED
