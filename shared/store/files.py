"""Uploaded data sets and result files: bytes and rows together."""

import hashlib
import io
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from sqlalchemy import or_, select

from shared import ids
from shared.db import Page, Tx, cursor, keyset_page, now_ms
from shared.errors import NotFound, PayloadTooLarge, StateConflict
from shared.store.durable import BLOCK_BYTES, place
from shared.store.layout import Layout
from shared.tables import File, Job

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
    """The whole stream, durable on disk and hashed on the way; PayloadTooLarge beyond `max_bytes`.

    Leaves nothing behind if it raises.
    """
    digest, size = hashlib.sha256(), 0
    descriptor, name = tempfile.mkstemp(dir=layout.tmp, prefix="receive-")
    received = Path(name)
    try:
        with open(descriptor, "wb") as file:
            while block := stream.read(BLOCK_BYTES):
                size += len(block)
                if size > max_bytes:
                    raise PayloadTooLarge(f"the file is larger than {max_bytes} bytes")
                digest.update(block)
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        received.unlink()
        raise
    return Received(received, size, digest.hexdigest())


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
    file = File(
        id=ids.new_id(ids.FILE),
        tenant=tenant,
        purpose=purpose,
        filename=filename,
        size_bytes=received.size_bytes,
        sha256=received.sha256,
        status=status,
        status_details=status_details,
        report=None if report is None else dict(report),
        created_at=now_ms(tx),
    )
    place(received.path, layout.files(file.id))
    tx.add(file)
    tx.flush()
    tx.refresh(file)
    return file


def add_bytes(tx: Tx, layout: Layout, content: bytes, *, tenant: str, purpose: str, filename: str) -> File:
    """The new file with this content, for results."""
    received = receive(layout, io.BytesIO(content), max_bytes=len(content))
    try:
        return add(tx, layout, received, tenant=tenant, purpose=purpose, filename=filename)
    finally:
        received.discard()


def get(tx: Tx, tenant: str, file_id: str) -> File:
    """The tenant's file; NotFound if it is missing, deleted or someone else's."""
    query = select(File).where(File.id == file_id, File.tenant == tenant, File.deleted_at.is_(None))
    file = tx.scalars(query).one_or_none() if ids.is_id(file_id, ids.FILE) else None
    if file is None:
        raise NotFound(f"there is no file {file_id!r}")
    return file


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
    mine = select(File).where(File.tenant == tenant)
    last = None if after is None else cursor(tx, mine.where(File.id == after), after)
    query = mine.where(File.deleted_at.is_(None))
    if purpose is not None:
        query = query.where(File.purpose == purpose)
    keys = (File.created_at, File.id)
    return keyset_page(tx, query, keys=keys, after=last, limit=limit, newest_first=newest_first)


def delete(tx: Tx, tenant: str, file_id: str) -> File:
    """The file, deleted; StateConflict while an unfinished job needs it. The sweeper removes the bytes."""
    file = get(tx, tenant, file_id)
    needs = or_(Job.training_file_id == file_id, Job.validation_file_id == file_id)
    unfinished = select(Job.id).where(needs, Job.finished_at.is_(None)).limit(1)
    if (job_id := tx.scalar(unfinished)) is not None:
        raise StateConflict(f"file {file_id} is needed by job {job_id}, which has not ended")
    file.deleted_at = now_ms(tx)
    tx.flush()
    tx.refresh(file)
    return file
