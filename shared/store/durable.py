"""Files and directories that appear whole or not at all, and survive a power cut once they have appeared.

The order is fsync of each file, of each directory, rename, fsync of the parent. A failed fsync is never tried again on
the same file: the kernel may have dropped the pages and answer success (PostgreSQL wiki, "Fsync Errors").
"""

import errno
import hashlib
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Final, Literal

from shared import failpoints
from shared.store.layout import Layout

BLOCK_BYTES = 1 << 20

StorageFailure = Literal["storage_full", "storage_failed"]
_FULL: Final = frozenset({errno.ENOSPC, errno.EDQUOT})
_BROKEN: Final = frozenset({errno.EIO, errno.EROFS, errno.ESTALE})


@contextmanager
def staging(layout: Layout) -> Iterator[Path]:
    """A fresh directory under tmp, removed at the end of the block unless it was published."""
    path = Path(tempfile.mkdtemp(dir=layout.tmp, prefix="stage-"))
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def publish(staged: Path, final: Path) -> None:
    """Make `staged` (file or directory) durable and rename it to `final`, which must not exist.

    Raises OSError; then `final` does not exist.
    """
    make_durable(staged)
    place(staged, final)


def make_durable(path: Path) -> None:
    """Write a file, or all below a directory, through to the disk; ValueError if anything else is there."""
    for directory, names, files in os.walk(path, topdown=False):
        for name in files:
            sync(Path(directory, name))
        for name in names:
            if Path(directory, name).is_symlink():
                raise ValueError(f"{name!r} is a symbolic link")
        failpoints.hit("publish.before_fsync_dir")
        sync(Path(directory))
    if not path.is_dir():
        sync(path)


def place(staged: Path, final: Path) -> None:
    """Rename what is durable already to `final`, which must not exist, and make the new name durable.

    If the name cannot be made durable it is taken away again.
    """
    if not final.parent.is_dir():
        final.parent.mkdir(mode=0o700, exist_ok=True)
        sync(final.parent.parent)
    if os.path.lexists(final):
        raise FileExistsError(f"{final.name} exists already")
    failpoints.hit("publish.before_rename")
    os.rename(staged, final)
    try:
        failpoints.hit("publish.after_rename")
        sync(final.parent)
    except OSError:
        _remove(final)
        raise


def sync(path: Path) -> None:
    """fsync one regular file or directory; ValueError for anything else."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        mode = os.fstat(descriptor).st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
            raise ValueError(f"{path.name!r} is neither a file nor a directory")
        failpoints.hit("publish.before_fsync")
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def open_regular(path: Path) -> BinaryIO:
    """The open file; OSError for a symbolic link, a pipe or a directory."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(f"{path.name!r} is not a regular file")
    return open(descriptor, "rb")


def sha256_file(path: Path) -> str:
    """SHA-256 of a regular file in hex; OSError for a symbolic link."""
    digest = hashlib.sha256()
    with open_regular(path) as file:
        while block := file.read(BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def inventory(directory: Path) -> dict[str, dict[str, Any]]:
    """Name, relative to `directory`, to size_bytes and sha256 of every file in it."""
    return {
        path.relative_to(directory).as_posix(): {"size_bytes": path.lstat().st_size, "sha256": sha256_file(path)}
        for path in sorted(directory.rglob("*"))
        if not path.is_dir() or path.is_symlink()
    }


def storage_failure(error: OSError) -> StorageFailure | None:
    """What is wrong if the disk is full or does not work, so that the same may succeed later; else None."""
    return "storage_full" if error.errno in _FULL else "storage_failed" if error.errno in _BROKEN else None


def _remove(path: Path) -> None:
    if path.is_dir():
        remove_tree(path)
    else:
        path.unlink(missing_ok=True)


def remove_tree(path: Path) -> None:
    """Delete a directory and all below it; nothing happens if it is gone already."""
    shutil.rmtree(path, ignore_errors=True)
