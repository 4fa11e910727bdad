"""`lorad restore`, on both databases: who owns what afterwards, and what it refuses."""

import shutil
import time
from pathlib import Path

import pytest
from sqlalchemy import select, text, update
from sqlalchemy.orm import Session

from shared import jobs
from shared.cli import dumps
from shared.db import open_engine, read, write
from shared.errors import AdapterCorrupt, LoradError, OwnershipLost
from shared.store import adapters, checkpoints
from shared.tables import Job, JobAttempt
from tests.shared.backups import Place, opened, save_checkpoint
from tests.shared.conftest import World, flip, published

pytestmark = pytest.mark.usefixtures("clean_environment")


def test_a_job_that_ran_runs_on_after_the_restoration(world: World, here: Place, there: Place, tmp_path: Path) -> None:
    """Its attempt, even the last one, is not charged; a trainer claims it, finds its checkpoint, and publishes it."""
    world.submit()
    claim = world.claim()
    assert claim is not None
    world.edit(claim.job_id, "attempt = max_attempts")
    save_checkpoint(world, claim, 5)
    assert here.lorad("backup", tmp_path / "kept").exit_code == 0
    assert there.lorad("restore", tmp_path / "kept").exit_code == 0
    restored = opened(there, world)

    again = restored.claim("t2")
    assert again is not None
    with read(restored.engine) as tx:
        found = checkpoints.intact(restored.layout, jobs.newest_checkpoints(tx, again.job_id))
    restored.publish(again)

    assert (again.job_id, again.attempt, len(found)) == (claim.job_id, 3, 1)
    assert restored.state(claim.job_id) == "succeeded"
    restored.engine.dispose()


def test_a_trainer_from_before_owns_nothing_after_it(world: World, here: Place, there: Place, tmp_path: Path) -> None:
    """Fences that were given out after the backup are not given out again: whoever holds one publishes nothing."""
    world.submit()
    claim = world.claim()
    assert claim is not None
    assert here.lorad("backup", tmp_path / "kept").exit_code == 0
    world.lose(claim)
    world.sweep()
    world.edit(claim.job_id, "not_before = 0")
    later = world.claim("t2")
    assert later is not None
    assert there.lorad("restore", tmp_path / "kept").exit_code == 0
    restored = opened(there, world)
    current = restored.claim("t3")

    assert current is not None
    assert current.fence > later.fence > claim.fence
    prepared = restored.prepare(name="math", job_id=claim.job_id)
    for old in (claim, later):
        with pytest.raises(OwnershipLost), write(restored.engine) as tx:
            jobs.succeed(tx, old, prepared)
    restored.engine.dispose()


def test_a_backup_restored_twice_gives_no_fence_twice(world: World) -> None:
    """A trainer left over from the first time owns nothing after the second, which begins with the same rows."""
    job, fences = world.submit(), list[int]()
    for _ in range(2):
        time.sleep(0.005)  # nobody restores twice within a millisecond
        with Session(world.engine) as tx:  # and is rolled back
            jobs.put_back_restored(tx)
            fences.append(tx.scalars(select(Job.fence).where(Job.id == job.id)).one())

    assert 1_000_000 < fences[0] < fences[1]


def test_the_age_of_a_backup_is_not_time_that_a_job_ran(
    world: World, here: Place, there: Place, tmp_path: Path
) -> None:
    """The attempt that the backup caught ended with its last heartbeat, so no limit on a job's time is used up."""
    claim = world.running()
    with write(world.engine) as tx:
        hour_ms = 3_600_000
        tx.execute(update(Job).values(heartbeat_at=Job.heartbeat_at - hour_ms, started_at=Job.started_at - hour_ms))
        tx.execute(update(JobAttempt).values(started_at=JobAttempt.started_at - hour_ms))
    here.lorad("backup", tmp_path / "kept")
    there.lorad("restore", tmp_path / "kept")

    restored = opened(there, world)
    with write(restored.engine) as tx:
        attempt = tx.scalars(select(JobAttempt)).one()
        overdue = jobs.sweep(tx, may_expire=True, max_job_s=60.0).overdue
    restored.engine.dispose()
    assert (attempt.fence, attempt.outcome, overdue) == (claim.fence, "given back", 0)
    assert attempt.ended_at is not None
    assert abs(attempt.ended_at - attempt.started_at) < 60_000


def test_a_queued_job_stays_queued(world: World, here: Place, there: Place, tmp_path: Path) -> None:
    """It keeps its place and its attempts, and only its fence moves on."""
    job = world.submit()
    here.lorad("backup", tmp_path / "kept")
    there.lorad("restore", tmp_path / "kept")

    restored = opened(there, world)
    after = restored.job(job.id)
    restored.engine.dispose()
    names = [column.name for column in Job.__table__.columns]
    moved = {name for name in names if getattr(job, name) != getattr(after, name)}
    assert moved == {"fence"}


def test_a_damaged_backup_restores_nothing(world: World, here: Place, there: Place, tmp_path: Path) -> None:
    """One changed byte in one file, and there is neither a database nor a file afterwards; the file is named."""
    version = published(world)
    here.lorad("backup", tmp_path / "kept")
    flip(tmp_path / "kept" / "adapters" / version.id / "adapter_model.safetensors")

    result = there.lorad("restore", tmp_path / "kept")

    assert isinstance(result.exception, LoradError)
    assert version.id in result.exception.message
    assert [path for path in there.data_dir.rglob("*") if path.is_file()] == []
    engine = open_engine(there.database_url)
    assert dumps.sqlite_path(engine) is not None or not dumps.has_tables(engine)
    engine.dispose()


def test_a_corrupt_adapter_is_healed_from_a_backup(world: World, here: Place, tmp_path: Path) -> None:
    """Its directory from the backup, its state set back by hand: then it is served, and not with damaged bytes."""
    version = published(world)
    here.lorad("backup", tmp_path / "kept")
    directory = world.layout.adapter(version.id)
    flip(directory / "adapter_model.safetensors")
    set_ready = text("UPDATE adapter_versions SET state = 'ready' WHERE id = :id")
    with write(world.engine) as tx:
        adapters.mark_corrupt(tx, version.id)
        tx.execute(set_ready, {"id": version.id})
    with pytest.raises(AdapterCorrupt), read(world.engine) as tx:
        adapters.verify(world.layout, adapters.get_version(tx, version.id))

    shutil.copytree(tmp_path / "kept" / "adapters" / version.id, directory, dirs_exist_ok=True)

    with read(world.engine) as tx:
        assert adapters.verify(world.layout, adapters.get_version(tx, version.id)) == directory
