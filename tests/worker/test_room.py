"""When the disk has room for another job, and how often the log hears that it has none."""

import dataclasses
import logging
from pathlib import Path
from typing import Any

import pytest

from shared.config import Settings
from tests.shared.conftest import World
from worker.room import TELL_EVERY_S, Room
from worker.trainer import Trainer

NEVER = 1 << 62
"""More free bytes than any disk has."""


class Clock:
    """A clock that goes when told."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "lorad.trainer"]


@pytest.mark.parametrize(("mark", "is_there"), [(0, True), (1, True), (NEVER, False)])
def test_room_is_free_space_above_the_mark(tmp_path: Path, mark: int, is_there: bool) -> None:
    """By the file system's own figures; 0 asks for nothing."""
    assert Room(tmp_path, min_free_bytes=mark).is_there() == is_there


def test_a_directory_that_is_gone_has_no_room(tmp_path: Path) -> None:
    """A data directory whose volume is not mounted takes no job; without a mark nobody looks."""
    assert not Room(tmp_path / "gone", min_free_bytes=1).is_there()
    assert Room(tmp_path / "gone", min_free_bytes=0).is_there()


def test_the_log_hears_once_and_again_after_minutes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """However often a doorbell rings; and once more when there is room again."""
    clock = Clock()
    room = Room(tmp_path, min_free_bytes=NEVER, clock=clock)
    with caplog.at_level(logging.INFO, "lorad.trainer"):
        for _ in range(5):
            room.is_there()
        first = len(lines(caplog))
        clock.now += TELL_EVERY_S
        room.is_there(), room.is_there()
        second = len(lines(caplog))
        room._min_free_bytes = 1
        room.is_there(), room.is_there()

    assert (first, second, len(lines(caplog))) == (1, 2, 3)
    assert "LORAD_MIN_FREE_BYTES" in lines(caplog)[0]


def trainer_in(world: World, **changes: Any) -> Trainer:
    settings = dataclasses.replace(Settings.from_env({"LORAD_DATA_DIR": str(world.layout.root)}), **changes)
    return Trainer(settings, world.engine, world.layout, ring=lambda: None)


def test_a_trainer_claims_nothing_without_room(world: World) -> None:
    """The job waits untouched, and is claimed by the same trainer once there is room."""
    job = world.submit()
    trainer = trainer_in(world, min_free_bytes=NEVER)
    refused, state = trainer._claim(), world.state(job.id)
    trainer._room._min_free_bytes = 1
    claim = trainer._claim()

    assert (refused, state) == (None, "queued")
    assert claim is not None
    assert claim.job_id == job.id


def test_a_trainer_holds_to_the_cap_of_its_settings(world: World) -> None:
    """LORAD_MAX_RUNNING_JOBS reaches the claim: a second trainer gets nothing of a tenant at its cap."""
    world.submit(), world.submit()
    first, second = (trainer_in(world, max_running_jobs=1, min_free_bytes=0)._claim() for _ in range(2))

    assert first is not None
    assert second is None
    assert trainer_in(world, min_free_bytes=0)._claim() is not None
