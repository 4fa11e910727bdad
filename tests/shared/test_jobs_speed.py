"""How fast jobs ran here, as the ledger knows it."""

from shared import jobs
from shared.db import read, write
from shared.tables import BaseModelRow
from tests.shared.conftest import World


def train(world: World, *speeds: float, base: BaseModelRow | None = None, ends: bool = True) -> None:
    """One job with a metrics event of each speed, and a message between them; it succeeds if it `ends`."""
    world.submit(base=base)
    claim = world.claim()
    assert claim is not None
    with write(world.engine) as tx:
        for step, speed in enumerate(speeds, 1):
            jobs.add_event(tx, claim, type="metrics", message="x", data={"step": step, "tokens_per_second": speed})
            jobs.add_event(tx, claim, type="message", message="y", data={"tokens_per_second": 1e9})
    if ends:
        world.publish(claim)


def speed(world: World, base: BaseModelRow) -> float | None:
    with read(world.engine) as tx:
        return jobs.recent_tokens_per_second(tx, base.id)


def test_before_any_job_there_is_no_speed(world: World) -> None:
    """Nothing is made up: without a job that succeeded there is no figure, even if one is running."""
    train(world, 10.0, ends=False)

    assert speed(world, world.base) is None


def test_the_speed_is_the_median_of_the_steps(world: World) -> None:
    """Over all steps of the jobs that succeeded; one slow first step does not count for much."""
    train(world, 1.0, 20.0, 30.0)
    train(world, 40.0, 50.0)

    assert speed(world, world.base) == 30.0


def test_each_base_has_its_own_speed(world: World) -> None:
    """What ran on another base model says nothing about this one."""
    train(world, 10.0)
    train(world, 99.0, base=world.other_base)

    assert (speed(world, world.base), speed(world, world.other_base)) == (10.0, 99.0)


def test_old_jobs_are_forgotten(world: World) -> None:
    """Only the newest jobs count: a machine that became faster is believed."""
    train(world, *[1.0] * 50)
    for _ in range(5):
        train(world, 100.0)

    assert speed(world, world.base) == 100.0
