"""Bytes that nothing needs any more, and bytes that are no longer what they were.

Ages are by file time against this host's clock, which is good enough for a day. Every function may run at the same time
elsewhere and may be interrupted.
"""

import time
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Final

from sqlalchemy import ColumnElement, func, select
from sqlalchemy.orm import InstrumentedAttribute

from shared import ids, limits
from shared.db import Tx, now_ms
from shared.store.adapter_files import rehash
from shared.store.durable import remove_tree
from shared.store.layout import Layout
from shared.tables import AdapterVersion, BaseModelRow, Checkpoint, File, Job

MAX_AGE_S: Final = limits.TMP_MAX_AGE_S
UNUSED_S: Final = 2 * limits.GENERATION_TIMEOUT_S
"""Bytes of a deleted object stay this long, for requests that had found it before."""


def remove_old_staging(layout: Layout, *, max_age_s: float = MAX_AGE_S) -> int:
    """Remove what was left under tmp; returns how many entries."""
    return sum(_remove(path) for path in _entries(layout.tmp) if _is_older(path, max_age_s))


def remove_orphans(tx: Tx, layout: Layout, *, max_age_s: float = MAX_AGE_S) -> int:
    """Remove stored bytes that no row names, which a crash before a commit leaves; returns how many entries."""
    removed = 0
    for name, prefix, column in _KINDS:
        old = [path for path in _entries(layout.root / name) if _is_older(path, max_age_s)]
        ours = {path.name: path for path in old if ids.is_id(path.name, prefix)}
        known = _known(tx, column, ours)
        removed += sum(_remove(path) for key, path in ours.items() if key not in known)
    return removed + _remove_orphan_checkpoints(tx, layout, max_age_s)


def remove_deleted(tx: Tx, layout: Layout, *, unused_s: float = UNUSED_S) -> int:
    """Remove the bytes of objects that were deleted a while ago; returns how many were still there."""
    since = now_ms(tx) - int(unused_s * 1000)
    gone: tuple[tuple[InstrumentedAttribute[str], ColumnElement[bool], Callable[[str], Path]], ...] = (
        (File.id, File.deleted_at < since, layout.files),
        (BaseModelRow.id, BaseModelRow.deleted_at < since, layout.model),
        (AdapterVersion.id, AdapterVersion.deleted_at < since, layout.adapter),
    )
    paths = [where(key) for column, is_gone, where in gone for key in tx.scalars(select(column).where(is_gone))]
    rows = tx.scalars(select(Checkpoint).where(Checkpoint.deleted_at < since))
    paths += [layout.checkpoint(row.job_id, row.step, row.fence) for row in rows]
    return sum(_remove(path) for path in paths if path.exists())


def corrupt_versions(tx: Tx, layout: Layout, *, sample: int) -> list[AdapterVersion]:
    """Those of a random `sample` of ready versions whose bytes on disk no longer match the row."""
    ready = select(AdapterVersion).where(AdapterVersion.state == "ready").order_by(func.random()).limit(sample)
    return [version for version in tx.scalars(ready) if not rehash(layout, version)]


_KINDS: Final[tuple[tuple[str, str, InstrumentedAttribute[str]], ...]] = (
    ("files", ids.FILE, File.id),
    ("models", ids.BASE_MODEL, BaseModelRow.id),
    ("adapters", ids.ADAPTER_VERSION, AdapterVersion.id),
)


def _remove_orphan_checkpoints(tx: Tx, layout: Layout, max_age_s: float) -> int:
    removed = 0
    for directory in _entries(layout.root / "checkpoints"):
        if not ids.is_id(directory.name, ids.JOB):
            continue
        rows = tx.execute(select(Checkpoint.step, Checkpoint.fence).where(Checkpoint.job_id == directory.name))
        known = {f"{step}-{fence}" for step, fence in rows}
        old = [path for path in _entries(directory) if _is_older(path, max_age_s)]
        removed += sum(_remove(path) for path in old if path.name not in known)
        if not known and not _known(tx, Job.id, [directory.name]) and _is_older(directory, max_age_s):
            removed += _remove(directory)
    return removed


def _known(tx: Tx, column: InstrumentedAttribute[str], keys: Collection[str]) -> set[str]:
    return {key for key in keys if tx.scalar(select(column).where(column == key)) is not None}


def _entries(directory: Path) -> Iterator[Path]:
    yield from sorted(directory.iterdir()) if directory.is_dir() else ()


def _is_older(path: Path, age_s: float) -> bool:
    try:
        return time.time() - path.lstat().st_mtime > age_s
    except FileNotFoundError:
        return False


def _remove(path: Path) -> int:
    """Remove a file, a link itself, or a directory with all below it."""
    if path.is_dir() and not path.is_symlink():
        remove_tree(path)
    else:
        path.unlink(missing_ok=True)
    return 1
