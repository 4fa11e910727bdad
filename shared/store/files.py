"""Uploaded data sets and result files: bytes and rows together."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from shared.db import Page, Tx
from shared.store.layout import Layout
from shared.tables import File

Status = Literal["uploaded", "processed", "error"]


class ByteStream(Protocol):
    def read(self, size: int, /) -> bytes: ...


@dataclass(frozen=True)
class Received:
    """Bytes that have arrived under tmp; `files.add` keeps them, `discard` drops them."""

    path: Path
    size_bytes: int
    sha256: str

    def discard(self) -> None:
        """Remove the bytes if they are still under tmp."""
        self.path.unlink(missing_ok=True)


def receive(layout: Layout, stream: ByteStream, *, max_bytes: int) -> Received:
    """The whole stream on disk, hashed on the way; PayloadTooLarge beyond `max_bytes`, leaving nothing behind."""
    raise NotImplementedError


def add(
    tx: Tx,
    layout: Layout,
    received: Received,
    *,
    tenant: str,
    purpose: str,
    filename: str,
    status: Status = "processed",
    status_details: str | None = None,
    report: Mapping[str, Any] | None = None,
) -> File:
    """The new file; its bytes are durable before the row commits."""
    raise NotImplementedError


def add_bytes(tx: Tx, layout: Layout, content: bytes, *, tenant: str, purpose: str, filename: str) -> File:
    """The new file with this content, for results."""
    raise NotImplementedError


def get(tx: Tx, tenant: str, file_id: str) -> File:
    """The tenant's file; NotFound if it is missing, deleted or someone else's."""
    raise NotImplementedError


def list_page(
    tx: Tx,
    tenant: str,
    *,
    limit: int,
    after: str | None = None,
    purpose: str | None = None,
    newest_first: bool = True,
) -> Page[File]:
    """Files that are not deleted; a deleted file's id still works as `after`."""
    raise NotImplementedError


def delete(tx: Tx, tenant: str, file_id: str) -> File:
    """The file, deleted; StateConflict while an unfinished job needs it. The sweeper removes the bytes."""
    raise NotImplementedError
