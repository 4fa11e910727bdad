"""Checkpoints to resume from, and what the sweeper removes or finds damaged."""

import os
from pathlib import Path

from shared import ids, jobs
from shared.db import read, write
from shared.store import adapter_files, adapters, checkpoints, durable, garbage
from shared.store.layout import Layout
from tests.shared.conftest import World, flip, make_old, published


def checkpoint(world: World, claim: jobs.Claim, step: int) -> Path:
    """The directory of a new checkpoint."""

    def fill(staged: Path) -> None:
        (staged / "state.json").write_text(f"{step}")

    prepared = checkpoints.prepare(world.layout, fill, job_id=claim.job_id, step=step, fence=claim.fence)
    with write(world.engine) as tx:
        jobs.record_checkpoint(
            tx, claim, checkpoint_id=prepared.checkpoint_id, step=step, manifest=prepared.manifest, metrics={}
        )
    return world.layout.checkpoint(claim.job_id, step, claim.fence)


def newest(world: World, claim: jobs.Claim) -> int | None:
    """The step from which the job would be resumed."""
    with read(world.engine) as tx:
        found = checkpoints.intact(world.layout, jobs.newest_checkpoints(tx, claim.job_id))
    return int(found[0].name.partition("-")[0]) if found else None


def test_resume_skips_damaged_checkpoints(world: World) -> None:
    """The newest checkpoint whose every byte is intact is used; without any, none."""
    claim = world.running()
    paths = [checkpoint(world, claim, step) for step in (1, 2, 3, 4)]
    found = [newest(world, claim)]
    flip_content = paths[3] / "state.json"
    flip_content.write_text("9")
    found.append(newest(world, claim))
    (paths[2] / "state.json").unlink()
    found.append(newest(world, claim))
    (paths[1] / "extra").write_text("x")
    found.append(newest(world, claim))
    durable.remove_tree(paths[0])
    found.append(newest(world, claim))

    assert found == [4, 3, 2, 1, None]


def test_two_checkpoints_are_kept(world: World) -> None:
    """All but the newest two are forgotten, and then removed."""
    claim = world.running()
    paths = [checkpoint(world, claim, step) for step in (1, 2, 3, 4)]
    with write(world.engine) as tx:
        forgotten = checkpoints.forget_old(tx, claim.job_id)
    checkpoints.remove(world.layout, forgotten)

    assert [path.exists() for path in paths] == [False, False, True, True]
    assert newest(world, claim) == 4


def test_checkpoints_of_a_later_claim_are_newer(world: World) -> None:
    """A job that had to go back to an earlier step keeps and resumes from what it saves there."""
    claim = world.running()
    for step in (100, 200):
        checkpoint(world, claim, step)
    with write(world.engine) as tx:
        jobs.give_back(tx, claim, charge=False, reason="x")
    again = world.claim()
    assert again is not None
    path = checkpoint(world, again, 50)
    with write(world.engine) as tx:
        forgotten = checkpoints.forget_old(tx, claim.job_id)

    assert [row.step for row in forgotten] == [100]
    assert path.exists()
    assert newest(world, again) == 50


def test_old_staging_goes_young_stays(layout: Layout) -> None:
    """What was staged over a day ago is removed, links are not followed."""
    (layout.root / "files" / "keep").write_text("k")
    old, young = layout.tmp / "old", layout.tmp / "young"
    old.mkdir()
    young.mkdir()
    (old / "link").symlink_to(layout.root / "files")
    make_old(old)

    assert garbage.remove_old_staging(layout) == 1
    assert (old.exists(), young.exists()) == (False, True)
    assert (layout.root / "files" / "keep").exists()


def test_orphans_go_after_a_day(world: World) -> None:
    """Bytes without a row are removed once they are old; those with a row never."""
    version = published(world)
    orphan, young = world.prepare(), world.prepare()
    claim = world.running()
    kept_checkpoint = checkpoint(world, claim, 1)
    lost = checkpoints.prepare(
        world.layout, lambda staged: (staged / "x").touch(), job_id=claim.job_id, step=2, fence=claim.fence
    )
    stray_file = world.layout.files(ids.new_id(ids.FILE))
    stray_file.touch()
    lost_path = world.layout.checkpoint(claim.job_id, lost.step, claim.fence)
    kept = [world.layout.adapter(version.id), kept_checkpoint, world.layout.files(world.file_id),
            world.layout.model(world.base.id)]  # fmt: skip
    gone = [world.layout.adapter(orphan.version_id), lost_path, stray_file]
    for path in (*kept, *gone):
        make_old(path)
    with read(world.engine) as tx:
        assert garbage.remove_orphans(tx, world.layout) == 3

    assert [path.exists() for path in kept] == [True] * 4
    assert [path.exists() for path in gone] == [False] * 3
    assert world.layout.adapter(young.version_id).exists()


def test_deleted_bytes_stay_a_little(world: World) -> None:
    """Bytes of a deleted adapter are there for requests that had resolved it, and go later."""
    version = published(world)
    with write(world.engine) as tx:
        adapters.delete(tx, "acme", "math")
    directory = world.layout.adapter(version.id)
    with read(world.engine) as tx:
        early = garbage.remove_deleted(tx, world.layout), directory.exists()
        late = garbage.remove_deleted(tx, world.layout, unused_s=-1), directory.exists()

    assert (early, late) == ((0, True), (1, False))


def test_scrub_finds_a_flipped_bit(world: World) -> None:
    """The scrub reads the bytes anew, even if the file's times were put back."""
    good, bad = published(world, b"abc", "good"), published(world, b"abc", "bad")
    path, _, _ = adapters.verified_file(world.layout, bad, "adapter_model.safetensors")
    times = path.stat().st_atime_ns, path.stat().st_mtime_ns
    flip(path)
    os.utime(path, ns=times)
    with read(world.engine) as tx:
        found = garbage.corrupt_versions(tx, world.layout, sample=10)

    assert [version.id for version in found] == [bad.id]
    assert adapter_files.rehash(world.layout, good)
