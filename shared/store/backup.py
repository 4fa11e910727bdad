"""A copy of the store that fits a copy of the database: every object that a row names, its bytes checked on the way.

Bytes are published before their row, and are removed after their row says deleted. So rows are read first: all that
they name was there then, and what cannot be had a moment later is either named no more by newer rows, or damaged.
"""

import hashlib
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Final, Literal

from pydantic import ValidationError
from sqlalchemy import select

from shared.db import Tx
from shared.errors import LoradError
from shared.specs import Spec
from shared.store.durable import BLOCK_BYTES, make_durable, open_regular, remove_tree, sha256_file
from shared.tables import AdapterVersion, BaseModelRow, Checkpoint, File

RECORD: Final = "backup.json"
KINDS: Final = ("checkpoints", "files", "adapters", "models")
"""In the order in which they are copied: what may go soonest first."""
ROUNDS: Final = 5
_MANIFEST: Final = "manifest.json"


class FileFacts(Spec):
    """What a file's bytes are."""

    size_bytes: int
    sha256: str


class Record(Spec):
    """What a backup holds, by path relative to it; written last, so that without it a backup is not whole."""

    format: Literal[1] = 1
    lorad: str
    made_at: str
    database: str | None
    """The file in it that is the database; None if that was kept otherwise."""
    files: dict[str, FileFacts]


@dataclass(frozen=True)
class Stored:
    """One object of the store; `path` is relative to the data directory. `facts`, by name of a file in it ('' for an
    object that is one file), are what its row records; None if its row records nothing of single files."""

    path: str
    facts: Mapping[str, FileFacts] | None

    @property
    def kind(self) -> str:
        return self.path.partition("/")[0]


def named(tx: Tx) -> list[Stored]:
    """Every object whose bytes must be there, by the rows of this transaction. Columns of the first schema only, so
    that the database of another version can be backed up too."""
    live_checkpoints = select(Checkpoint.job_id, Checkpoint.step, Checkpoint.fence, Checkpoint.manifest)
    found = [
        Stored(f"checkpoints/{job_id}/{step:d}-{fence:d}", _recorded(manifest))
        for job_id, step, fence, manifest in tx.execute(live_checkpoints.where(Checkpoint.deleted_at.is_(None)))
    ]
    live_files = select(File.id, File.size_bytes, File.sha256).where(File.deleted_at.is_(None))
    for file_id, size_bytes, sha256 in tx.execute(live_files):
        found.append(Stored(f"files/{file_id}", {"": FileFacts(size_bytes=size_bytes, sha256=sha256)}))
    ready = select(AdapterVersion.id, AdapterVersion.manifest).where(AdapterVersion.state == "ready")
    found += [Stored(f"adapters/{version_id}", _recorded(manifest)) for version_id, manifest in tx.execute(ready)]
    bases = select(BaseModelRow.id).where(BaseModelRow.deleted_at.is_(None))
    return found + [Stored(f"models/{base_id}", None) for base_id in tx.scalars(bases)]


def _recorded(manifest: Mapping[str, Any]) -> dict[str, FileFacts]:
    """A row's manifest; nothing, which no object agrees with, if that was edited beyond reading."""
    try:
        return {name: FileFacts.model_validate(facts) for name, facts in manifest["files"].items()}
    except (ValidationError, KeyError, AttributeError):
        return {}


class StoreCopy:
    """Copies objects from a data directory into another directory, each once."""

    def __init__(self, data_dir: Path, target: Path) -> None:
        self._data_dir = data_dir
        self._target = target
        self._had: dict[str, dict[str, FileFacts]] = {}

    @property
    def files(self) -> dict[str, FileFacts]:
        """Every file that was copied, by its path."""
        return {
            f"{path}/{name}" if name else path: facts
            for path, files in self._had.items()
            for name, facts in files.items()
        }

    def numbers(self) -> dict[str, int]:
        """How many objects of each kind were copied."""
        return {kind: sum(path.startswith(f"{kind}/") for path in self._had) for kind in KINDS}

    def bring(self, wanted: Sequence[Stored]) -> set[str]:
        """Copy what is wanted and not there yet, remove what is wanted no more; returns the paths of what could not be
        had: it is gone, cannot be read, or is not what its row records. OSError if the copy cannot be written."""
        for path in self._had.keys() - {stored.path for stored in wanted}:
            self._drop(path)
            del self._had[path]
        missing = set()
        for stored in sorted(wanted, key=lambda stored: KINDS.index(stored.kind)):
            if stored.path in self._had:
                continue
            copied = _copy_object(self._data_dir / stored.path, self._target / stored.path)
            if copied is not None and stored.facts is not None and not _agree(copied, stored.facts):
                copied = None
            if copied is None:
                self._drop(stored.path)
                missing.add(stored.path)
            else:
                self._had[stored.path] = copied
        return missing

    def _drop(self, path: str) -> None:
        place = self._target / path
        if place.is_dir():
            remove_tree(place)
        else:
            place.unlink(missing_ok=True)


@dataclass(frozen=True)
class LeftOut:
    """Paths that a copy of the store lacks although the rows copied with it name them. `damaged`: rows went on naming
    them although they were not there, or not as recorded. `vanished`: deleted, or displaced checkpoints, meanwhile."""

    damaged: set[str]
    vanished: set[str]


def copy_until_whole(copy: StoreCopy, rows: Callable[[], Sequence[Stored]]) -> LeftOut:
    """Copy what `rows()` names. While some of it cannot be had, ask `rows` anew, since it may have been deleted
    meanwhile: each round is shorter than the one before."""
    before: set[str] = set()
    missing = copy.bring(rows())
    for _ in range(ROUNDS):
        if missing <= before:
            break
        before, missing = missing, copy.bring(rows())
    return LeftOut(damaged=missing & before, vanished=missing - before)


def write_record(target: Path, record: Record) -> None:
    """Make all below `target` durable, then say what it holds: from here on it is a whole backup."""
    make_durable(target)
    (target / RECORD).write_text(record.model_dump_json(indent=1), encoding="utf-8")
    make_durable(target / RECORD)
    make_durable(target)


def read_record(source: Path) -> Record:
    """What the backup at `source` holds; LoradError if it is not whole or not one of ours."""
    try:
        record = Record.model_validate_json((source / RECORD).read_bytes())
    except FileNotFoundError:
        raise LoradError(f"{source} is not a whole backup: it has no {RECORD}") from None
    except (OSError, ValidationError) as error:
        raise LoradError(f"{source / RECORD} is not the record of a backup that this lorad can read") from error
    if record.database is not None and record.database not in record.files:
        raise LoradError(f"{source / RECORD} names no file {record.database!r}")
    for path in record.files:
        parts = PurePosixPath(path).parts
        is_stored = len(parts) > 1 and parts[0] in KINDS and ".." not in parts
        if path != record.database and not is_stored:
            raise LoradError(f"{source / RECORD} names {path!r}, which is no place in a data directory")
    return record


def restore_files(source: Path, target: Path, files: Mapping[str, FileFacts]) -> None:
    """Copy these files of a backup to `target` and make them durable; LoradError, naming the file, at the first that is
    not what the backup's record says."""
    for path, facts in files.items():
        (target / path).parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        if copy_file(source / path, target / path) != facts:
            raise LoradError(f"the backup is damaged: {path} is missing or not what {RECORD} says")
    for directory in {target / PurePosixPath(path).parts[0] for path in files}:
        make_durable(directory)


def facts_of(path: Path) -> FileFacts | None:
    """What a file's bytes are now; None if it is no regular file or cannot be read."""
    try:
        return FileFacts(size_bytes=path.lstat().st_size, sha256=sha256_file(path))
    except OSError:
        return None


def copy_file(source: Path, target: Path) -> FileFacts | None:
    """The bytes that were copied; None if the source is no regular file or cannot be read. `target` must not exist."""
    digest, size = hashlib.sha256(), 0
    try:
        reading = open_regular(source)
    except OSError:
        return None
    descriptor = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with reading, open(descriptor, "wb") as writing:
        while True:
            try:
                block = reading.read(BLOCK_BYTES)
            except OSError:
                return None
            if not block:
                return FileFacts(size_bytes=size, sha256=digest.hexdigest())
            digest.update(block)
            size += len(block)
            writing.write(block)


def _copy_object(source: Path, target: Path) -> dict[str, FileFacts] | None:
    """Facts by name of the files of an object that was copied; None if any could not be read."""
    names: Iterable[str] = [""]
    if source.is_dir() and not source.is_symlink():
        names = [path.relative_to(source).as_posix() for path in sorted(source.rglob("*")) if not path.is_dir()]
    copied = {}
    for name in names:
        place = target / name if name else target
        place.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        facts = copy_file(source / name if name else source, place)
        if facts is None:
            return None
        copied[name] = facts
    return copied or None


def _agree(copied: Mapping[str, FileFacts], recorded: Mapping[str, FileFacts]) -> bool:
    """True if the files are those of the record; the manifest beside them is not in it."""
    return {name: facts for name, facts in copied.items() if name != _MANIFEST} == dict(recorded)
