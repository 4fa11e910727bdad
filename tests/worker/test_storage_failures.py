"""A disk that is full or fails, at every point of a checkpoint and of a publication, under a real engine and store."""

from collections.abc import Callable

import pytest
from sqlalchemy import select

from shared import failpoints
from shared.db import read
from shared.store import adapters, checkpoints
from shared.tables import AdapterVersion, Checkpoint, JobState
from tests.shared.conftest import World
from tests.worker.job_runs import at_step, run, spec_of
from worker.base_model import BaseModel
from worker.training.engine import TrainingEngine

LEASE_S = 60.0
FILES_OF_A_CHECKPOINT = 3
"""Two of the engine's and the manifest; each is synced, then the directory, its parent and, the first time, theirs."""
PUBLICATION = [
    "adapter.before_fsync:enospc",
    *(f"publish.before_fsync:eio:{arrival}" for arrival in range(1, 9)),
    "publish.before_fsync_dir:eio",
    "adapter.before_rename:enospc",
    "publish.before_rename:enospc",
    "publish.after_rename:eio",
    "publish.before_rename:enospc:2",
    "publish.after_rename:eio:2",
]
"""Three files, their directory, the manifest, the directory again, the parent; then the table of metrics, by rename."""
AFTER_THE_VERSION = ("publish.before_fsync:eio:8", "publish.before_rename:enospc:2", "publish.after_rename:eio:2")
"""What fails once the version's directory is whole: it stays as garbage, since its transaction was rolled back."""
CHECKPOINT = [
    "checkpoint.written:enospc",
    *(f"publish.before_fsync:eio:{arrival}" for arrival in range(1, FILES_OF_A_CHECKPOINT + 3)),
    "publish.before_fsync_dir:enospc",
    "publish.before_rename:enospc",
    "publish.after_rename:eio",
]


def versions(world: World) -> list[AdapterVersion]:
    with read(world.engine) as tx:
        return list(tx.scalars(select(AdapterVersion)))


def live_checkpoints(world: World, job_id: str) -> list[Checkpoint]:
    with read(world.engine) as tx:
        query = select(Checkpoint).where(Checkpoint.job_id == job_id, Checkpoint.deleted_at.is_(None))
        return list(tx.scalars(query.order_by(Checkpoint.step)))


def is_armed() -> bool:
    return bool(failpoints._armed)


@pytest.mark.parametrize("failure", PUBLICATION)
def test_a_publication_that_the_disk_ends_is_made_anew(
    world: World, learner: TrainingEngine, failpoint: Callable[[str], None], failure: str
) -> None:
    """No row, nothing half written, no attempt charged; the next attempt publishes one version of whole files."""
    claim = world.running(spec=spec_of(max_steps=2))
    failpoint(failure)
    run(world, learner, claim)
    after = world.job(claim.job_id)
    left = [*world.layout.tmp.iterdir(), *world.layout.root.joinpath("adapters").iterdir()]
    is_prepared = failure in AFTER_THE_VERSION
    found = versions(world)
    failed_at_all = not is_armed()
    world.edit(claim.job_id, "not_before = 0")
    run(world, learner, world.claim())
    (version,) = versions(world)

    assert failed_at_all
    assert (after.state, after.attempt, after.storage_failures) == (JobState.QUEUED, 0, 1)
    assert after.not_before > (after.started_at or 0) + 9 * LEASE_S * 1000
    assert (found, len(left)) == ([], int(is_prepared))
    assert world.state(claim.job_id) == JobState.SUCCEEDED
    assert adapters.verify(world.layout, version) == world.layout.adapter(version.id)


def test_a_disk_that_stays_full_fails_the_job(
    world: World, learner: TrainingEngine, failpoint: Callable[[str], None]
) -> None:
    """Four attempts, none of which leaves a byte behind; the error says what was wrong."""
    job = world.submit(spec=spec_of(max_steps=1))
    attempts = 0
    while world.state(job.id) == JobState.QUEUED:
        world.edit(job.id, "not_before = 0")
        failpoint("publish.before_rename:enospc")
        run(world, learner, world.claim())
        attempts += 1
    error = world.job(job.id).error

    assert (attempts, world.state(job.id)) == (4, JobState.FAILED)
    assert error is not None
    assert error["code"] == "storage_full"
    assert list(world.layout.root.joinpath("adapters").iterdir()) == []


def test_another_error_is_charged(world: World, learner: TrainingEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the disk's own failures are free: a missing directory is not one."""
    claim = world.running(spec=spec_of(max_steps=1))

    def vanish(*_: object, **__: object) -> object:
        raise FileNotFoundError(2, "No such file or directory")

    monkeypatch.setattr(adapters, "prepare", vanish)
    run(world, learner, claim)
    job = world.job(claim.job_id)

    assert (job.state, job.attempt, job.storage_failures) == (JobState.QUEUED, 1, 0)


@pytest.mark.parametrize("failure", CHECKPOINT)
def test_training_outlives_a_checkpoint_that_the_disk_refuses(
    world: World, base: BaseModel, learner: TrainingEngine, failpoint: Callable[[str], None], failure: str
) -> None:
    """The second checkpoint fails: the first and the third are whole, nothing is left of it, and the user is told."""
    claim = world.running(spec=spec_of(checkpoint_every=1))
    at_step(world, base, 2, lambda: failpoint(failure))
    run(world, learner, claim)
    kept = live_checkpoints(world, claim.job_id)
    directories = {path.name for path in world.layout.checkpoint(claim.job_id, 1, claim.fence).parent.iterdir()}
    warnings = [message for message in world.messages(claim.job_id) if "could not be saved" in message]

    assert not is_armed()
    assert world.state(claim.job_id) == JobState.SUCCEEDED
    assert world.job(claim.job_id).attempt == 1
    assert [row.step for row in kept] == [1, 3]
    assert directories == {f"{row.step}-{row.fence}" for row in kept}
    assert len(checkpoints.intact(world.layout, kept)) == 2
    assert len(warnings) == 1
    assert warnings[0].startswith("The checkpoint of step 2")
    assert list(world.layout.tmp.iterdir()) == []


def test_a_lost_job_goes_on_from_the_last_good_checkpoint(
    world: World, base: BaseModel, learner: TrainingEngine, failpoint: Callable[[str], None]
) -> None:
    """Both checkpoints after the first were refused when the trainer stops: the next attempt goes on from step 1."""
    claim = world.running(spec=spec_of(checkpoint_every=1))
    stopping = TrainingEngine(base, max_tokens=4096)

    def stop_on_a_full_disk() -> None:
        failpoint("publish.before_fsync_dir:enospc")
        stopping.stop_all()

    at_step(world, base, 2, lambda: failpoint("publish.before_rename:enospc"))
    at_step(world, base, 3, stop_on_a_full_disk)
    run(world, stopping, claim)
    stopping.close()
    given_back = world.state(claim.job_id)
    run(world, learner, world.claim())
    resumed = [message for message in world.messages(claim.job_id) if message.startswith("Resuming")]

    assert given_back == JobState.QUEUED
    assert world.state(claim.job_id) == JobState.SUCCEEDED
    assert resumed == ["Resuming from step 1"]
