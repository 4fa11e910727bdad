"""Files and base models: hashed, bounded, one tenant's, and kept while somebody needs them."""

import hashlib
import io
import os

import pytest

from shared import jobs
from shared.db import read, write
from shared.errors import (
    InvalidRequest,
    ModelNotFound,
    NotFound,
    PayloadTooLarge,
    StateConflict,
)
from shared.store import adapters, base_models, durable, files
from shared.store.layout import Layout
from tests.shared.conftest import World, published


def test_received_bytes_are_hashed(layout: Layout) -> None:
    """Size and checksum are those of the bytes on disk."""
    content = os.urandom(3 << 20)
    received = files.receive(layout, io.BytesIO(content), max_bytes=len(content))

    assert received.path.read_bytes() == content
    assert (received.size_bytes, received.sha256) == (len(content), hashlib.sha256(content).hexdigest())


class Endless:
    """A stream that never ends."""

    def __init__(self) -> None:
        self.given = 0

    def read(self, size: int, /) -> bytes:
        self.given += size
        return b"x" * size


def test_endless_upload_is_cut_off(layout: Layout) -> None:
    """Reading stops at the limit, and nothing is left on disk."""
    stream = Endless()
    with pytest.raises(PayloadTooLarge):
        files.receive(layout, stream, max_bytes=5 << 20)

    assert stream.given <= 7 << 20
    assert list(layout.tmp.iterdir()) == []


def test_broken_upload_leaves_nothing(layout: Layout) -> None:
    """A client that goes away in the middle leaves no bytes."""

    class Broken:
        def read(self, size: int, /) -> bytes:
            raise ConnectionResetError

    with pytest.raises(ConnectionResetError):
        files.receive(layout, Broken(), max_bytes=5)
    assert list(layout.tmp.iterdir()) == []


def test_file_is_one_tenants(world: World) -> None:
    """A file is read back by its tenant and by nobody else."""
    with read(world.engine) as tx:
        row = files.get(tx, "acme", world.file_id)
        with pytest.raises(NotFound):
            files.get(tx, "rival", world.file_id)
    assert world.layout.files(row.id).read_bytes() == b"{}\n"
    assert row.sha256 == hashlib.sha256(b"{}\n").hexdigest()


def test_file_in_use_is_kept(world: World) -> None:
    """A file is deleted only when no unfinished job needs it."""
    job = world.submit()
    with write(world.engine) as tx, pytest.raises(StateConflict, match=job.id):
        files.delete(tx, "acme", world.file_id)
    with write(world.engine) as tx:
        jobs.request_cancel(tx, "acme", job.id)
        assert files.delete(tx, "acme", world.file_id).deleted_at is not None

    with read(world.engine) as tx, pytest.raises(NotFound):
        files.get(tx, "acme", world.file_id)


@pytest.mark.parametrize("newest_first", [True, False])
def test_file_pages_meet(world: World, newest_first: bool) -> None:
    """Pages of two make up the whole list in order, without gap or overlap, even past a deleted file."""
    with write(world.engine) as tx:
        for number in range(5):
            files.add_bytes(tx, world.layout, b"x", tenant="acme", purpose="fine-tune", filename=f"{number}")
        files.add_bytes(tx, world.layout, b"x", tenant="rival", purpose="fine-tune", filename="foreign")
    with read(world.engine) as tx:
        everything = files.list_page(tx, "acme", limit=100, newest_first=newest_first).items
    with read(world.engine) as tx:
        first = files.list_page(tx, "acme", limit=2, newest_first=newest_first)
    with write(world.engine) as tx:
        files.delete(tx, "acme", first.items[-1].id)
    with read(world.engine) as tx:
        seen, page = list(first.items), first
        while page.has_more:
            page = files.list_page(tx, "acme", limit=2, after=seen[-1].id, newest_first=newest_first)
            seen += page.items

    assert [file.id for file in seen] == [file.id for file in everything]
    assert len(seen) == 6


def test_foreign_cursor_is_refused(world: World) -> None:
    """A cursor of another tenant's list, or of none, is an error that names the parameter."""
    with read(world.engine) as tx:
        for after in (world.file_id, "file-" + "0" * 32, "", "x' OR 1=1"):
            with pytest.raises(InvalidRequest) as caught:
                files.list_page(tx, "rival", limit=2, after=after)
            assert caught.value.param == "after"


def test_base_model_is_registered_once(world: World) -> None:
    """The same model again is the same row; another under the name is refused."""
    with write(world.engine) as tx, durable.staging(world.layout) as staged:
        again = base_models.register(tx, world.layout, staged, name="small", digest=world.base.digest, config={})
        with pytest.raises(StateConflict):
            base_models.register(tx, world.layout, staged, name="small", digest="other", config={})

    assert again.id == world.base.id


def test_base_model_in_use_is_kept(world: World) -> None:
    """Neither an unfinished job nor an adapter loses its base model."""
    version = published(world)
    job = world.submit(base=world.other_base)
    with write(world.engine) as tx:
        for name in ("small", "large"):
            with pytest.raises(StateConflict):
                base_models.remove(tx, name)
        jobs.request_cancel(tx, "acme", job.id)
        adapters.delete_version(tx, "acme", "math", version.version)
        base_models.remove(tx, "small")
        base_models.remove(tx, "large")

        assert base_models.list_all(tx) == []
        with pytest.raises(ModelNotFound):
            base_models.by_name(tx, "small")
        assert base_models.get(tx, world.base.id).name == "small"
