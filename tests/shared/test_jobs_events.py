"""Many events of a job at once."""

import pytest
from sqlalchemy import event

from shared import jobs
from shared.db import read, write
from shared.errors import OwnershipLost
from tests.shared.conftest import World


def told(*messages: str) -> list[jobs.NewEvent]:
    return [jobs.NewEvent("info", "message", message, {"told": message}) for message in messages]


def test_events_follow_in_order(world: World) -> None:
    """Their numbers go on where those before ended, without a gap, and what comes after goes on behind them."""
    claim = world.running()
    for batch in (("a", "b", "c"), (), ("d",)):
        with write(world.engine) as tx:
            jobs.add_events(tx, claim, told(*batch))
    with write(world.engine) as tx:
        jobs.add_event(tx, claim, message="e")

    with read(world.engine) as tx:
        page = jobs.events_page(tx, "acme", claim.job_id, limit=100, newest_first=False)

    assert [one.seq for one in page.items] == list(range(1, 8))
    assert [one.message for one in page.items[2:]] == ["a", "b", "c", "d", "e"]
    assert page.items[2].data == {"told": "a"}
    assert all(0 < before.created_at <= after.created_at for before, after in zip(page.items, page.items[1:]))  # noqa: B905  # one shorter on purpose


def test_events_of_a_lost_job_are_not_written(world: World) -> None:
    """Whoever lost the fence tells nothing more."""
    claim = world.running()
    world.lose(claim)
    world.sweep()

    with pytest.raises(OwnershipLost), write(world.engine) as tx:
        jobs.add_events(tx, claim, told("late"))

    assert "late" not in world.messages(claim.job_id)


def test_many_events_take_no_more_statements_than_one(world: World) -> None:
    """On a slow way to the database a hundred steps must not hold up the heartbeat."""
    claim = world.running()
    sent: list[str] = []
    event.listen(world.engine, "before_cursor_execute", lambda *call: sent.append(call[2]))

    def statements(count: int) -> int:
        sent.clear()
        with write(world.engine) as tx:
            jobs.add_events(tx, claim, told(*map(str, range(count))))
        return len(sent)

    assert statements(100) == statements(1)
