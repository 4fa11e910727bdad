"""`lorad backup` and `lorad restore`: database and store as they were at one moment, into a directory and out of it."""

import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path

import click
from sqlalchemy import Engine

from shared import audit, db, jobs
from shared.cli import dumps
from shared.cli.client_output import Output
from shared.config import Settings
from shared.errors import LoradError
from shared.store import backup as store
from shared.store.durable import make_durable, remove_tree, sync
from shared.store.layout import Layout

json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
place_argument = click.argument("directory", type=click.Path(path_type=Path))


@click.command("backup")
@place_argument
@click.option("--files-only", is_flag=True, help="Leave the database out; dump that first, with its own tools.")
@click.option("--without-models", is_flag=True, help="Leave base models out.")
@json_option
def backup_command(directory: Path, files_only: bool, without_models: bool, as_json: bool) -> None:
    """Copy the database and all it names into DIRECTORY, while the service runs. Exit status 1 if it found damage.

    DIRECTORY must be empty or not there yet. The broker's content is not needed and not copied.
    """
    settings = Settings.from_env()
    target = directory.absolute()
    with _engine(settings.database_url) as engine, _written(target):
        _prepare_target(target, settings.data_dir)
        copy = store.StoreCopy(settings.data_dir, target)

        def rows() -> Sequence[store.Stored]:
            found = dumps.named_now(engine) if files_only else dumps.copy_database(engine, target)
            return [stored for stored in found if stored.kind != "models" or not without_models]

        try:
            left_out = store.copy_until_whole(copy, rows)
            _record(target, copy, database=None if files_only else _database_name(engine))
        except BaseException:
            _empty(target)
            raise
    numbers, size = copy.numbers(), sum(facts.size_bytes for facts in copy.files.values())
    damaged, vanished = sorted(left_out.damaged), sorted(left_out.vanished)
    found = {**numbers, "size_bytes": size, "damaged": damaged, "vanished": vanished}
    summary = {"backup": str(target), "database": not files_only, **found}
    objects = ", ".join(f"{number} {kind}" for kind, number in numbers.items())
    out = Output(as_json=as_json)
    out.record(
        summary, f"{target} holds {'no' if files_only else 'the'} database, {objects} ({size / 1e6:.1f} MB of files)."
    )
    for path in damaged:
        out.note(f"DAMAGED and left out: {path} is missing or not what its row records")
    for path in vanished:
        out.note(f"left out: {path} was deleted meanwhile")
    sys.exit(1 if damaged else 0)


@click.command("restore")
@place_argument
@json_option
def restore_command(directory: Path, as_json: bool) -> None:
    """Bring the backup in DIRECTORY back into an empty data directory and an empty database.

    Stop every program of the service first. Jobs that ran when the backup was made go back into the queue. Exit status
    1 if rows name files that the backup does not hold.
    """
    settings = Settings.from_env()
    source, layout = directory.absolute(), Layout(settings.data_dir)
    record = store.read_record(source)
    with _engine(settings.database_url) as engine, _written(settings.data_dir):
        if record.database not in (None, _database_name(engine)):
            raise LoradError(f"the backup's database is {record.database}; LORAD_DATABASE_URL names another kind")
        _refuse_used(layout, engine, record)
        layout.prepare()
        try:
            files = {path: facts for path, facts in record.files.items() if path != record.database}
            store.restore_files(source, layout.root, files)
            requeued = _restore_database(source, engine, record)
        except BaseException:
            for kind in store.KINDS:
                _empty(layout.root / kind)
            raise
        named = [stored for stored in dumps.named_now(engine) if stored.kind != "checkpoints"]  # a job can do without
        missing = [stored.path for stored in named if not (layout.root / stored.path).exists()]
    summary = {"restored": str(layout.root), "files": len(files), "requeued": requeued, "missing": missing}
    out = Output(as_json=as_json)
    out.record(summary, f"Restored {len(files)} files into {layout.root}; jobs that ran and wait again: {requeued}.")
    for path in missing:
        out.note(f"MISSING: a row names {path}, which the backup does not hold")
    sys.exit(1 if missing else 0)


COMMANDS = (backup_command, restore_command)


def _restore_database(source: Path, engine: Engine, record: store.Record) -> int:
    """Put the database in place, ready for use, last of all: whoever finds it finds all. Returns how many jobs ran."""
    path = dumps.sqlite_path(engine)
    url = engine.url.render_as_string(hide_password=False)
    if record.database is None:
        return _mend(url, source)
    dump, recorded = source / record.database, record.files[record.database]
    if store.facts_of(dump) != recorded:
        raise LoradError(f"the backup is damaged: {record.database} is missing or not what {store.RECORD} says")
    if path is None:
        dumps.restore_postgres(engine, dump)
        return _mend(url, source)
    staged = path.with_name(f"{path.name}.restore-{os.getpid()}")
    try:
        store.copy_file(dump, staged)
        requeued = _mend(f"sqlite:///{staged}", source)
        make_durable(staged)
        os.rename(staged, path)
    finally:
        staged.unlink(missing_ok=True)
    sync(path.parent)
    return requeued


def _mend(url: str, source: Path) -> int:
    """Bring a restored database to this code's schema and its jobs back into the queue; returns how many ran."""
    db.migrate(url)
    with _engine(url) as engine, db.write(engine) as tx:
        audit.record(tx, audit.by_command("restore", source.name))
        return jobs.put_back_restored(tx)


def _record(target: Path, copy: store.StoreCopy, *, database: str | None) -> None:
    files = copy.files
    if database is not None:
        facts = store.facts_of(target / database)
        if facts is None:
            raise LoradError(f"{target / database} cannot be read back")
        files[database] = facts
    made_at = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    store.write_record(target, store.Record(lorad=version("lorad"), made_at=made_at, database=database, files=files))


@contextmanager
def _engine(url: str) -> Iterator[Engine]:
    engine = db.open_engine(url)
    try:
        yield engine
    finally:
        engine.dispose()


@contextmanager
def _written(place: Path) -> Iterator[None]:
    """What the operating system says of a place that cannot be written is one line."""
    try:
        yield
    except OSError as error:
        raise LoradError(f"cannot write to {place}: {error.strerror or error}") from error


def _database_name(engine: Engine) -> str:
    return dumps.POSTGRES_NAME if dumps.sqlite_path(engine) is None else dumps.SQLITE_NAME


def _prepare_target(target: Path, data_dir: Path) -> None:
    if target.resolve().is_relative_to(data_dir.resolve()):
        raise LoradError(f"{target} lies in the data directory {data_dir}: what destroys one destroys the other")
    target.mkdir(mode=0o700, parents=True, exist_ok=True)
    if any(target.iterdir()):
        raise LoradError(f"{target} is not empty; a backup needs a directory of its own")
    target.chmod(0o700)  # also one that was there: what was private in the data directory stays so


def _refuse_used(layout: Layout, engine: Engine, record: store.Record) -> None:
    """LoradError if there is data already that the backup would mix with, or no database although it brings none."""
    path = dumps.sqlite_path(engine)
    if record.database is None:
        if not dumps.has_tables(engine):
            raise LoradError("the backup holds no database: restore yours first, with its own tools")
    elif any(map(Path.exists, (path, Path(f"{path}-wal")))) if path else dumps.has_tables(engine):
        where = engine.url.render_as_string(hide_password=True)
        raise LoradError(f"there is a database already at {where}; restore into an empty one")
    for kind in store.KINDS:
        with suppress(FileNotFoundError):
            if any((layout.root / kind).iterdir()):
                raise LoradError(f"{layout.root / kind} is not empty; restore into an empty data directory")


def _empty(place: Path) -> None:
    """Remove all that lies in a directory that was empty before."""
    for entry in place.iterdir():
        if entry.is_dir():
            remove_tree(entry)
        else:
            entry.unlink()
