"""Lists of jobs and events: whose, in which order, and by which cursor."""

import pytest

from shared import jobs
from shared.db import read
from shared.errors import InvalidRequest, NotFound
from tests.shared.conftest import World


def test_job_pages_meet(world: World) -> None:
    """Pages of two make up the tenant's jobs, newest first, although all were made in one moment."""
    mine = [world.submit().id for _ in range(5)]
    world.submit("rival")
    for job_id in mine:
        world.edit(job_id, "created_at = 1000")
    seen: list[str] = []
    with read(world.engine) as tx:
        page = jobs.list_page(tx, "acme", limit=2)
        seen += [job.id for job in page.items]
        while page.has_more:
            page = jobs.list_page(tx, "acme", limit=2, after=seen[-1])
            seen += [job.id for job in page.items]

    assert seen == sorted(mine, reverse=True)


def test_newest_job_first(world: World) -> None:
    """Age decides, not the id."""
    first, second = world.submit(), world.submit()
    world.edit(first.id, "created_at = created_at + 5000")

    with read(world.engine) as tx:
        assert [job.id for job in jobs.list_page(tx, "acme", limit=9).items] == [first.id, second.id]


def test_a_full_last_page_has_no_more(world: World) -> None:
    """`has_more` is exact when the list ends with the page."""
    for _ in range(2):
        world.submit()
    with read(world.engine) as tx:
        assert [jobs.list_page(tx, "acme", limit=limit).has_more for limit in (1, 2, 3)] == [True, False, False]


TAGS = [{}, {"a": "1"}, {"a": "1", "b": "x"}, {"q\"uo'te$.[0]": "é"}, {"a": "2", "n": ""}]


@pytest.mark.parametrize(
    ("metadata", "wanted"),
    [
        (None, [0, 1, 2, 3, 4]),
        ({}, [0]),
        ({"a": "1"}, [1, 2]),
        ({"a": "1", "b": "x"}, [2]),
        ({"q\"uo'te$.[0]": "é"}, [3]),
        ({"n": ""}, [4]),
        ({"a": "3"}, []),
        ({"$": "1"}, []),
        ({"' OR 1=1 --": "1"}, []),
    ],
)
def test_metadata_filters(world: World, metadata: dict[str, str] | None, wanted: list[int]) -> None:
    """Jobs that carry all given pairs are listed; a key is a text, not a path into the JSON."""
    made = [world.submit(tags=tags).id for tags in TAGS]
    with read(world.engine) as tx:
        found = {job.id for job in jobs.list_page(tx, "acme", limit=50, metadata=metadata).items}

    assert found == {made[number] for number in wanted}


@pytest.mark.parametrize("newest_first", [True, False])
def test_event_pages_meet(world: World, newest_first: bool) -> None:
    """Events come in either order, page by page."""
    claim = world.running()
    world.publish(claim)
    wanted = world.messages(claim.job_id)
    seen: list[str] = []
    after = None
    with read(world.engine) as tx:
        while True:
            page = jobs.events_page(tx, "acme", claim.job_id, limit=2, after=after, newest_first=newest_first)
            seen += [event.message for event in page.items]
            after = page.items[-1].id
            if not page.has_more:
                break

    assert seen == (wanted[::-1] if newest_first else wanted)


def test_following_events_sees_new_ones(world: World) -> None:
    """From the last event on, in ascending order, a follower gets exactly what came since."""
    claim = world.running()
    with read(world.engine) as tx:
        last = jobs.events_page(tx, "acme", claim.job_id, limit=50, newest_first=False).items[-1].id
    with read(world.engine) as tx:
        nothing = jobs.events_page(tx, "acme", claim.job_id, limit=50, after=last, newest_first=False).items
    world.publish(claim)
    with read(world.engine) as tx:
        new = jobs.events_page(tx, "acme", claim.job_id, limit=50, after=last, newest_first=False).items

    assert list(nothing) == []
    assert [event.message for event in new] == ["The job has succeeded.", "Adapter math@1 is ready."]


def test_cursors_belong_to_their_list(world: World) -> None:
    """A cursor from another tenant's jobs or another job's events is refused."""
    mine, foreign = world.submit(), world.submit("rival")
    with read(world.engine) as tx:
        event = jobs.events_page(tx, "rival", foreign.id, limit=1).items[0].id
        for after in (foreign.id, "ftjob-" + "0" * 32, "nonsense"):
            with pytest.raises(InvalidRequest, match="after"):
                jobs.list_page(tx, "acme", limit=1, after=after)
        with pytest.raises(InvalidRequest, match="after"):
            jobs.events_page(tx, "acme", mine.id, limit=1, after=event)


def test_details_of_foreign_jobs_are_not_found(world: World) -> None:
    """Neither events nor checkpoints of another tenant's job can be read."""
    foreign = world.submit("rival")
    with read(world.engine) as tx:
        for page in (jobs.events_page, jobs.checkpoints_page):
            with pytest.raises(NotFound):
                page(tx, "acme", foreign.id, limit=1)
