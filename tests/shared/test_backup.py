"""`lorad backup`, on both databases: nothing that a row names is missing from it, whatever went on."""

import shutil
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from sqlalchemy import Engine, select

from shared.cli import dumps
from shared.db import open_engine, read, write
from shared.errors import LoradError
from shared.store import adapters, backup, durable, files, garbage
from shared.tables import AdapterVersion, Table
from tests.shared.backups import Place, opened, save_checkpoint
from tests.shared.conftest import World, flip, published, tree

pytestmark = pytest.mark.usefixtures("clean_environment")


def not_there(world: World, scratch: Path) -> set[str]:
    """What rows name but the store does not hold, or not as recorded."""
    with read(world.engine) as tx:
        wanted = backup.named(tx)
    return backup.StoreCopy(world.layout.root, scratch).bring(wanted)


def rows_of(engine: Engine) -> dict[str, list[tuple[object, ...]]]:
    """Every row of every table."""
    with engine.connect() as connection:
        return {
            table.name: sorted((tuple(row) for row in connection.execute(select(table))), key=repr)
            for table in Table.metadata.sorted_tables
        }


def after_each_copy(monkeypatch: pytest.MonkeyPatch, act: Callable[[int], object]) -> None:
    """Call `act(n)` when the database was copied for the n-th time, before any file is."""
    copy, count = dumps.copy_database, iter(range(1, 100))

    def copy_and_act(engine: Engine, target: Path) -> Sequence[backup.Stored]:
        found = copy(engine, target)
        act(next(count))
        return found

    monkeypatch.setattr(dumps, "copy_database", copy_and_act)


def test_what_was_backed_up_comes_back(world: World, here: Place, there: Place, tmp_path: Path) -> None:
    """Every row and every byte is what it was, and the restored store holds all that rows name."""
    published(world)
    claim = world.running(adapter_name="trained")
    save_checkpoint(world, claim, 1)
    world.publish(claim)

    assert here.lorad("backup", tmp_path / "kept").exit_code == 0
    assert there.lorad("restore", tmp_path / "kept").exit_code == 0

    restored = opened(there, world)
    kept = {kind: tree(world.layout.root / kind) for kind in backup.KINDS}
    assert all(kept.values())
    assert {kind: tree(there.data_dir / kind) for kind in backup.KINDS} == kept
    after = rows_of(restored.engine)
    assert "restore" in str(after.pop("audit_events"))
    assert after | {"audit_events": []} == rows_of(world.engine)
    restored.engine.dispose()


def test_a_backup_under_load_is_whole(
    world: World, here: Place, there: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While jobs are submitted, trained, published and deleted, and bytes of deleted objects are removed at once, a
    backup ends without damage, and what it restores misses nothing."""
    stop, rounds, errors = threading.Event(), threading.Semaphore(0), []

    def load() -> None:
        try:
            for number in range(10_000):
                if stop.is_set():
                    return
                one_round(world, number)
                rounds.release()
        except Exception as error:
            errors.append(error)
            rounds.release(1000)

    thread = threading.Thread(target=load)

    def meanwhile(number: int) -> None:
        """Before the first files are copied much happens; from the third round on nothing does, so that it must end."""
        if number == 1:
            [rounds.acquire() for _ in range(4)]
        elif number == 3:
            stop.set()
            thread.join()

    after_each_copy(monkeypatch, meanwhile)
    thread.start()
    try:
        [rounds.acquire() for _ in range(4)]
        result = here.lorad("backup", tmp_path / "kept")
    finally:
        stop.set()
        thread.join()

    assert (errors, result.exit_code) == ([], 0), result.output
    assert there.lorad("restore", tmp_path / "kept").exit_code == 0
    restored = opened(there, world)
    assert not_there(restored, tmp_path / "scratch") == set()
    with read(restored.engine) as tx:
        states = set(tx.scalars(select(AdapterVersion.state)))
    restored.engine.dispose()
    assert states == {"ready", "deleted"}


def one_round(world: World, number: int) -> None:
    """A job from its file to its version, with checkpoints that displace each other, and the end of older objects."""
    with write(world.engine) as tx:
        file = files.add_bytes(tx, world.layout, b"{}\n", tenant="acme", purpose="fine-tune", filename="d.jsonl")
    claim = world.running(adapter_name=f"a{number}")
    for step in range(1, 5):
        save_checkpoint(world, claim, step)
    world.publish(claim)
    with write(world.engine) as tx:
        files.delete(tx, "acme", file.id)
        if number % 2:
            adapters.delete(tx, "acme", f"a{number}")
    with read(world.engine) as tx:
        garbage.remove_deleted(tx, world.layout, unused_s=-60)


def test_what_is_deleted_meanwhile_is_not_missed(
    world: World, here: Place, there: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An adapter that goes, with its bytes, between the copy of the database and that of the files is deleted in the
    backup as well; its neighbour is there."""
    gone, kept = published(world, name="gone"), published(world, name="kept")

    def delete(number: int) -> None:
        if number == 1:
            with write(world.engine) as tx:
                adapters.delete(tx, "acme", "gone")
            durable.remove_tree(world.layout.adapter(gone.id))

    after_each_copy(monkeypatch, delete)
    assert here.lorad("backup", tmp_path / "kept").exit_code == 0
    assert there.lorad("restore", tmp_path / "kept").exit_code == 0

    restored = opened(there, world)
    with read(restored.engine) as tx:
        states = {row.id: row.state for row in tx.scalars(select(AdapterVersion))}
    restored.engine.dispose()
    assert states == {gone.id: "deleted", kept.id: "ready"}


def test_files_before_the_database_would_miss_some(world: World, tmp_path: Path) -> None:
    """The order matters: with the files copied first, a version published before the database is copied is a row
    without bytes."""
    with read(world.engine) as tx:
        early = backup.named(tx)
    copy = backup.StoreCopy(world.layout.root, tmp_path / "kept")
    copy.bring(early)
    version = published(world)

    with read(world.engine) as tx:
        named = {stored.path for stored in backup.named(tx)}
    assert {path for path in named if not (tmp_path / "kept" / path).exists()} == {f"adapters/{version.id}"}


def test_damage_is_told_and_left_out(world: World, here: Place, there: Place, tmp_path: Path) -> None:
    """A flipped bit and a lost file are named, with exit status 1, in the backup and again when it is restored."""
    flipped, lost, sound = (published(world, name=name) for name in ("flipped", "lost", "sound"))
    flip(world.layout.adapter(flipped.id) / "adapter_model.safetensors")
    durable.remove_tree(world.layout.adapter(lost.id))

    made = here.lorad("backup", tmp_path / "kept")
    restored = there.lorad("restore", tmp_path / "kept")

    for result in (made, restored):
        assert result.exit_code == 1
        assert [version.id in result.output for version in (flipped, lost, sound)] == [True, True, False]
    assert (there.data_dir / "adapters" / sound.id).is_dir()


def test_an_interrupted_backup_is_none(world: World, here: Place, there: Place, tmp_path: Path) -> None:
    """Without the record that is written last nothing is restored from it."""
    here.lorad("backup", tmp_path / "kept")
    (tmp_path / "kept" / backup.RECORD).unlink()

    result = there.lorad("restore", tmp_path / "kept")

    assert isinstance(result.exception, LoradError)
    assert "not a whole backup" in result.exception.message


def test_what_is_there_is_not_written_over(world: World, here: Place, tmp_path: Path) -> None:
    """Neither does a backup go into a directory that holds something, nor a restoration over a service's data."""
    before = rows_of(world.engine), tree(world.layout.root)
    first = here.lorad("backup", tmp_path / "kept")
    results = [here.lorad("backup", tmp_path / "kept"), here.lorad("restore", tmp_path / "kept")]

    assert first.exit_code == 0
    assert [type(result.exception) for result in results] == [LoradError, LoradError]
    assert (rows_of(world.engine), tree(world.layout.root)) == before


def test_a_backup_does_not_lie_in_what_it_protects(world: World, here: Place) -> None:
    """A directory below the data directory is refused, and is not made."""
    result = here.lorad("backup", world.layout.root / "backup")

    assert isinstance(result.exception, LoradError)
    assert not (world.layout.root / "backup").exists()


def test_a_backup_is_as_private_as_its_data(here: Place, tmp_path: Path) -> None:
    """Nobody else can look into a directory that was open before a backup went into it."""
    (tmp_path / "kept").mkdir(mode=0o755)
    here.lorad("backup", tmp_path / "kept")

    assert (tmp_path / "kept").stat().st_mode & 0o777 == 0o700


def test_models_may_be_left_out(world: World, here: Place, there: Place, tmp_path: Path) -> None:
    """Without them a restoration says which models are to be brought back otherwise."""
    assert here.lorad("backup", "--without-models", tmp_path / "kept").exit_code == 0

    result = there.lorad("restore", tmp_path / "kept")

    assert not (tmp_path / "kept" / "models").exists()
    assert result.exit_code == 1
    assert world.base.id in result.output


def test_files_only_goes_with_a_database_of_ones_own(world: World, here: Place, there: Place, tmp_path: Path) -> None:
    """Who copies the database with its own tools restores it first; a restoration without it is refused."""
    version = published(world)
    assert here.lorad("backup", "--files-only", tmp_path / "kept").exit_code == 0
    without = there.lorad("restore", tmp_path / "kept")
    (tmp_path / "dump").mkdir()
    dumps.copy_database(world.engine, tmp_path / "dump")
    engine = open_engine(there.database_url)
    if (path := dumps.sqlite_path(engine)) is None:
        dumps.restore_postgres(engine, tmp_path / "dump" / dumps.POSTGRES_NAME)
    else:
        shutil.copyfile(tmp_path / "dump" / dumps.SQLITE_NAME, path)
    engine.dispose()

    assert isinstance(without.exception, LoradError)
    assert there.lorad("restore", tmp_path / "kept").exit_code == 0
    assert (there.data_dir / "adapters" / version.id).is_dir()


def test_a_disk_that_is_full_leaves_no_half_backup(
    world: World, here: Place, tmp_path: Path, failpoint: Callable[[str], None]
) -> None:
    """An error while it is written is one line, and the directory is empty again, so that the next try may use it."""
    published(world)
    failpoint("publish.before_fsync:enospc:2")

    result = here.lorad("backup", tmp_path / "kept")

    assert isinstance(result.exception, LoradError)
    assert "No space left" in result.exception.message
    assert list((tmp_path / "kept").iterdir()) == []
    assert here.lorad("backup", tmp_path / "kept").exit_code == 0


def test_looking_for_a_database_makes_none(tmp_path: Path) -> None:
    """A wrong data directory is one line, and is not made."""
    place = Place(tmp_path / "nowhere", f"sqlite:///{tmp_path}/nowhere/lorad.db")

    result = place.lorad("backup", tmp_path / "kept")

    assert isinstance(result.exception, LoradError)
    assert not (tmp_path / "nowhere").exists()
