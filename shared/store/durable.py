"""Directories that appear whole or not at all, and survive a power cut once they have appeared."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from shared.store.layout import Layout


@contextmanager
def staging(layout: Layout) -> Iterator[Path]:
    """A fresh directory under tmp, removed at the end of the block unless it was published."""
    raise NotImplementedError
    yield


def publish(staged: Path, final: Path) -> None:
    """Make `staged` (file or directory) durable and rename it to `final`, which must not exist."""
    raise NotImplementedError


def sha256_file(path: Path) -> str:
    """SHA-256 of a regular file in hex; a symbolic link is refused."""
    raise NotImplementedError
