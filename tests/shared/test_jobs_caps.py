"""How many jobs of one tenant run at once, and that a tenant with many jobs leaves room for one with few."""

import sqlite3

from sqlalchemy import insert

from shared import ids, jobs
from shared.db import open_engine, write
from shared.jobs import Claim
from shared.specs import TrainSpec
from shared.store.layout import Layout
from shared.tables import Job, JobState
from tests.shared.conftest import LEASE_S, World, make_world
from tests.shared.test_jobs_claim import at_once


def submit_many(world: World, tenant: str, count: int) -> None:
    """Queued jobs of one tenant, each a millisecond younger than the one before, written in one go."""
    first = world.submit(tenant)
    row = {column.name: getattr(first, column.name) for column in Job.__table__.columns}
    rows = [row | {"id": ids.new_id(ids.JOB), "created_at": first.created_at + n} for n in range(1, count)]
    with write(world.engine) as tx:
        tx.execute(insert(Job), rows)


def tenants_of(claims: list[object]) -> list[str]:
    return sorted(claim.tenant for claim in claims if isinstance(claim, Claim))


def test_a_tenant_runs_no_more_than_the_cap(world: World) -> None:
    """Of four trainers that look at once, two get a job of a tenant with four; the others do without a cap."""
    for _ in range(4):
        world.submit("greedy")

    capped = at_once(*(lambda n=n: world.claim(f"t{n}", max_running=2) for n in range(4)))
    uncapped = at_once(*(lambda n=n: world.claim(f"u{n}") for n in range(4)))

    assert tenants_of(capped) == ["greedy"] * 2
    assert tenants_of(uncapped) == ["greedy"] * 2
    assert [claim for claim in capped if isinstance(claim, Exception)] == []


def test_the_cap_leaves_room_for_others(world: World) -> None:
    """A tenant at its cap is passed over, whatever the priority of its jobs, and another gets the place."""
    for _ in range(100):
        world.submit("greedy", priority=10)
    world.submit("modest")
    claims = [world.claim(f"t{n}", max_running=3) for n in range(5)]

    assert [claim.tenant for claim in claims if claim] == ["greedy", "greedy", "greedy", "modest"]


def test_a_place_that_comes_free_is_taken(world: World) -> None:
    """The cap counts what runs now: the next job comes when one has ended."""
    world.submit(), world.submit()
    first = world.claim("t1", max_running=1)
    refused = world.claim("t2", max_running=1)
    assert first is not None
    world.publish(first)

    assert refused is None
    assert world.claim("t2", max_running=1) is not None


def test_a_thousand_jobs_hold_up_one_by_one_at_most(world: World) -> None:
    """With one trainer, a tenant's only job waits for one of another tenant's thousand, and for no second."""
    submit_many(world, "greedy", 1000)
    late = world.submit("modest")
    begun = []
    for _ in range(3):
        with write(world.engine) as tx:
            claim = jobs.claim_next(tx, trainer="t1", lease_s=LEASE_S)
        assert claim is not None
        begun.append(claim)
        world.publish(claim)

    assert begun[1].job_id == late.id
    assert [claim.tenant for claim in begun] == ["greedy", "modest", "greedy"]
    assert world.state(late.id) == JobState.SUCCEEDED


def test_a_claim_costs_no_more_than_a_look_at_each_job(fresh_sqlite_url: str, layout: Layout) -> None:
    """Eight times as many jobs of one tenant are some eight times the work of SQLite's machine, not sixty-four."""
    world = make_world(open_engine(fresh_sqlite_url), layout)
    submit_many(world, "greedy", 100)
    few = instructions_of_a_claim(world)
    submit_many(world, "greedy", 700)
    many = instructions_of_a_claim(world)
    world.engine.dispose()

    assert few > 0
    assert many < 16 * few


def instructions_of_a_claim(world: World) -> int:
    """In tens of instructions of SQLite's virtual machine."""
    ticks = 0

    def tick() -> int:
        nonlocal ticks
        ticks += 1
        return 0

    with write(world.engine) as tx:
        connection = tx.connection().connection.driver_connection
        assert isinstance(connection, sqlite3.Connection)
        connection.set_progress_handler(tick, 10)
        claim = jobs.claim_next(tx, trainer=ids.new_id(ids.JOB), lease_s=LEASE_S)
        connection.set_progress_handler(None, 0)
    assert claim is not None
    return ticks


def test_the_spec_of_the_many_is_a_real_one(world: World) -> None:
    """Rows written in one go are jobs like any other, so that the test above is about order alone."""
    submit_many(world, "greedy", 2)
    world.claim("t1")
    second = world.claim("t2")

    assert second is not None
    assert second.spec == TrainSpec()
