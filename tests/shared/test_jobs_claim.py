"""Which job is next, and that no job is ever handed out twice."""

import threading
from collections.abc import Callable

import pytest

from shared import jobs
from shared.db import read, write
from shared.errors import CancelRequested, StateConflict
from shared.jobs import Claim
from shared.tables import Job, JobState
from tests.shared.conftest import LEASE_S, World


def at_once(*actions: Callable[[], object]) -> list[object]:
    """What each action returned or raised, all having started at the same moment."""
    barrier = threading.Barrier(len(actions))
    results: list[object] = [None] * len(actions)

    def run(place: int) -> None:
        barrier.wait()
        try:
            results[place] = actions[place]()
        except Exception as error:
            results[place] = error

    threads = [threading.Thread(target=run, args=(place,)) for place in range(len(actions))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def waited(world: World, job: Job, seconds: int) -> None:
    """Let the job have been submitted that long ago."""
    world.edit(job.id, f"created_at = created_at - {seconds * 1000}")


def order_of_claims(world: World, trainer: str = "t1", **options: str) -> list[str]:
    """The jobs in the order in which one trainer gets them, each ended before the next is claimed."""
    order = []
    while claim := world.claim(trainer, **options):
        order.append(claim.job_id)
        world.publish(claim)
    return order


def test_one_job_is_claimed_once(world: World) -> None:
    """Eight trainers that look at the same moment get one job between them."""
    job = world.submit()

    results = at_once(*(lambda n=n: world.claim(f"t{n}") for n in range(8)))

    claims = [result for result in results if isinstance(result, Claim)]
    assert [claim.job_id for claim in claims] == [job.id]
    assert all(result is None or isinstance(result, Claim) for result in results)
    assert (world.job(job.id).fence, world.job(job.id).attempt) == (1, 1)


def test_many_jobs_are_claimed_once_each(world: World) -> None:
    """Eight trainers get eight different jobs."""
    submitted = {world.submit().id for _ in range(8)}

    results = at_once(*(lambda n=n: world.claim(f"t{n}") for n in range(8)))

    assert {result.job_id for result in results if isinstance(result, Claim)} == submitted


def test_cancel_and_publish_race_has_one_winner(world: World) -> None:
    """Whoever comes first, the job never both is cancelled and has an adapter."""
    for _ in range(5):
        claim = world.running()

        def cancel(claim: Claim = claim) -> object:
            with write(world.engine) as tx:
                return jobs.request_cancel(tx, "acme", claim.job_id).state

        def publish(claim: Claim = claim) -> object:
            world.publish(claim)
            return None

        cancelled, published = at_once(cancel, publish)

        if isinstance(published, CancelRequested):
            assert cancelled == JobState.RUNNING
            with write(world.engine) as tx:
                jobs.stop_cancelled(tx, claim)
        else:
            assert published is None
            assert isinstance(cancelled, StateConflict)
        with read(world.engine) as tx:
            version = jobs.published_version(tx, claim.job_id)
        assert world.state(claim.job_id) == (JobState.CANCELLED if version is None else JobState.SUCCEEDED)


def test_claim_and_cancel_race_leaves_no_orphan(world: World) -> None:
    """A job is either cancelled before it is claimed, or claimed and then asked to stop."""
    for _ in range(5):
        job = world.submit()

        def cancel(job: Job = job) -> object:
            with write(world.engine) as tx:
                return jobs.request_cancel(tx, "acme", job.id).state

        claim, cancelled = at_once(world.claim, cancel)

        if claim is None:
            assert cancelled == world.state(job.id) == JobState.CANCELLED
        else:
            assert isinstance(claim, Claim)
            assert cancelled == JobState.RUNNING
            with write(world.engine) as tx:
                jobs.stop_cancelled(tx, claim)


def test_events_written_at_once_are_numbered_apart(world: World) -> None:
    """Trainer and user write events of one job at the same moment; none is lost and none clashes."""
    claim = world.running()
    before = len(world.messages(claim.job_id))

    def note() -> None:
        with write(world.engine) as tx:
            jobs.add_event(tx, claim, message="note")

    assert at_once(*[note] * 6) == [None] * 6
    assert len(world.messages(claim.job_id)) == before + 6


def test_two_sweepers_do_no_harm(world: World) -> None:
    """Several sweepers at once requeue a lost job once."""
    claim = world.running()
    world.lose(claim)

    results = at_once(*[world.sweep] * 4)

    assert sum(result.requeued for result in results if isinstance(result, jobs.Swept)) == 1
    assert world.messages(claim.job_id)[-1].startswith("The trainer was lost")
    assert sum(m.startswith("The trainer was lost") for m in world.messages(claim.job_id)) == 1


def test_sweep_and_heartbeat_race_has_one_winner(world: World) -> None:
    """Either the owner kept its job, or it is told that it lost it."""
    for _ in range(5):
        claim = world.running()
        world.lose(claim)

        def beat(claim: Claim = claim) -> object:
            with write(world.engine) as tx:
                return jobs.heartbeat(tx, claim, lease_s=LEASE_S)

        order, swept = at_once(beat, world.sweep)

        assert isinstance(swept, jobs.Swept)
        assert (order == "lost") == (swept.requeued == 1)
        assert world.state(claim.job_id) == (JobState.QUEUED if order == "lost" else JobState.RUNNING)
        world.edit(claim.job_id, "not_before = 9999999999999" if order == "lost" else "priority = 0")


def test_oldest_first(world: World) -> None:
    """Among equals age decides."""
    young, old = world.submit(), world.submit()
    waited(world, old, 10)

    assert order_of_claims(world) == [old.id, young.id]


def test_priority_before_age(world: World) -> None:
    """A higher priority overtakes, however long the others have waited."""
    old, high, low = world.submit(), world.submit(priority=5), world.submit(priority=-5)
    waited(world, old, 600)
    waited(world, low, 900)

    assert order_of_claims(world) == [high.id, old.id, low.id]


def test_fewest_running_first(world: World) -> None:
    """A tenant that has nothing running comes before one that has."""
    for _ in range(3):
        world.submit("greedy")
    late = world.submit("modest")
    first, second = world.claim("t1"), world.claim("t2")
    assert first is not None
    assert second is not None

    assert first.tenant == "greedy"
    assert second.job_id == late.id


def test_fewest_running_before_served_longest_ago(world: World) -> None:
    """A tenant whose long job still runs comes after one that was served later and has nothing running."""
    for _ in range(2):
        world.submit("long")
    held = world.claim("t1")
    world.submit("short")
    brief = world.claim("t2")
    assert held is not None
    assert brief is not None
    world.publish(brief)
    world.edit(held.job_id, "started_at = started_at - 600000")
    late = world.submit("short")

    again = world.claim("t3")

    assert again is not None
    assert (held.tenant, brief.tenant, again.job_id) == ("long", "short", late.id)


def test_served_longest_ago_first(world: World) -> None:
    """With one trainer and nothing running, a tenant with one job waits for one of another's hundred at most."""
    for _ in range(4):
        world.submit("greedy")
    late = world.submit("modest")

    assert order_of_claims(world)[1] == late.id


def test_base_at_hand_comes_first(world: World) -> None:
    """A trainer goes on with the base model that it has loaded."""
    other, same = world.submit(base=world.other_base), world.submit()

    assert order_of_claims(world, holds_base=world.base.id) == [same.id, other.id]


def test_without_a_base_at_hand_age_decides(world: World) -> None:
    """The same two jobs come in the order of their age to a trainer that has loaded nothing."""
    other, same = world.submit(base=world.other_base), world.submit()

    assert order_of_claims(world) == [other.id, same.id]


def test_base_at_hand_does_not_starve_others(world: World) -> None:
    """A job that has waited over a minute is no longer passed over."""
    other, same = world.submit(base=world.other_base), world.submit()
    waited(world, other, 61)

    assert order_of_claims(world, holds_base=world.base.id) == [other.id, same.id]


def test_backoff_is_waited_for(world: World) -> None:
    """A job that may not start yet is not claimed, and a later one is."""
    early, later = world.submit(), world.submit()
    world.edit(early.id, "not_before = created_at + 3600000")

    assert order_of_claims(world) == [later.id]


def test_a_lone_job_waits_for_an_idle_trainer(world: World) -> None:
    """A trainer with other jobs takes the next that need not be alone; an idle one takes the lone job."""
    world.running()
    lone, other = world.submit(), world.submit()
    world.edit(lone.id, "runs_alone = true")
    busy, idle = world.claim("t1", holds_base=world.base.id), world.claim("t2")
    assert busy is not None
    assert idle is not None

    assert busy.job_id == other.id
    assert (idle.job_id, idle.runs_alone) == (lone.id, True)


def test_a_trainer_with_a_lone_job_takes_no_other(world: World) -> None:
    """What runs alone stays alone; other trainers are free."""
    lone = world.submit()
    world.edit(lone.id, "runs_alone = true")
    world.claim("t1")
    world.submit()

    assert world.claim("t1", holds_base=world.base.id) is None
    assert world.claim("t2") is not None


def test_a_busy_trainer_gets_only_jobs_of_its_base(world: World) -> None:
    """One base model is loaded at a time: the older job of another base waits, the younger of this one comes."""
    world.running()
    other, same = world.submit(base=world.other_base), world.submit()
    joined = world.claim("t1", holds_base=world.base.id)
    assert joined is not None

    assert joined.job_id == same.id
    assert world.claim("t1", holds_base=world.base.id) is None
    assert world.claim("t2", holds_base=world.base.id).job_id == other.id  # type: ignore[union-attr]  # None fails too


def test_a_job_of_another_base_does_not_starve(world: World) -> None:
    """After a minute a busy trainer takes nothing more, so that it comes free for the other base."""
    world.running()
    waited(world, world.submit(base=world.other_base), 61)
    world.submit()

    assert world.claim("t1", holds_base=world.base.id) is None
    assert world.claim("t2", holds_base=world.base.id) is not None


def test_a_lone_job_does_not_starve(world: World) -> None:
    """After a minute a busy trainer takes nothing more, so that it becomes idle."""
    world.running()
    lone = world.submit()
    world.edit(lone.id, "runs_alone = true")
    waited(world, lone, 61)
    world.submit()

    assert world.claim("t1", holds_base=world.base.id) is None


@pytest.mark.parametrize("state", ["queued", "running"])
def test_queue_position_counts_who_is_ahead(world: World, state: str) -> None:
    """Higher priority and greater age are ahead; only queued jobs have a place."""
    mine = world.submit()
    world.submit(priority=1)
    waited(world, world.submit(), 10)
    world.submit()
    if state == "running":
        world.edit(mine.id, "priority = 9")
        world.claim()

    with read(world.engine) as tx:
        assert jobs.queue_position(tx, world.job(mine.id)) == (3 if state == "queued" else None)
