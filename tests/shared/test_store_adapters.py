"""Adapters: names, versions, aliases, and bytes that are served only if they are what was recorded."""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from sqlalchemy import text
from sqlalchemy.exc import OperationalError

from shared import db
from shared.db import read, write
from shared.errors import (
    AdapterCorrupt,
    InvalidRequest,
    ModelNotFound,
    NotFound,
)
from shared.store import adapters
from shared.store.layout import Layout
from shared.store.models import resolve_model
from shared.tables import Adapter
from tests.shared.conftest import World, flip, make_world, published, tree


def test_manifest_names_origin_and_every_file(world: World) -> None:
    """The manifest beside the weights says what made them, and the row says the same."""
    prepared = world.prepare(b"w" * 10, job_id=None)
    directory = world.layout.adapter(prepared.version_id)

    assert json.loads((directory / "manifest.json").read_text()) == prepared.manifest
    assert prepared.manifest["base_model"] == {"id": world.base.id, "digest": world.base.digest}
    weights = prepared.manifest["files"]["adapter_model.safetensors"]
    assert weights == {"size_bytes": 10, "sha256": hashlib.sha256(b"w" * 10).hexdigest()}
    assert set(tree(directory)) - {"manifest.json"} == set(prepared.manifest["files"])
    assert prepared.sha256 == weights["sha256"]


def test_invalid_adapter_is_not_published(world: World) -> None:
    """What the validation refuses never gets a final name."""

    def refuse(_: Path) -> None:
        raise InvalidRequest("NaN")

    with pytest.raises(InvalidRequest):
        world.prepare(validate=refuse)
    assert list((world.layout.root / "adapters").iterdir()) == []


def test_verified_file_is_served(world: World) -> None:
    """An intact file comes with its path, checksum and size."""
    version = published(world, b"abc")

    path, sha256, size = adapters.verified_file(world.layout, version, "adapter_model.safetensors")
    assert (path.read_bytes(), sha256, size) == (b"abc", hashlib.sha256(b"abc").hexdigest(), 3)
    assert adapters.verify(world.layout, version) == path.parent


def lengthen(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"x")


def relink(path: Path) -> None:
    content = path.parent.parent.parent / "elsewhere"
    path.rename(content)
    path.symlink_to(content)


def repipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize("damage", [flip, lengthen, Path.unlink, relink, repipe])
def test_damaged_file_is_not_served(world: World, damage: Callable[[Path], object]) -> None:
    """A flipped bit, a byte too many, no file, a link to the same bytes, a pipe: corrupt. Other files are served."""
    version = published(world, b"abc")
    path, _, _ = adapters.verified_file(world.layout, version, "adapter_model.safetensors")
    damage(path)

    with pytest.raises(AdapterCorrupt):
        adapters.verified_file(world.layout, version, "adapter_model.safetensors")
    with pytest.raises(AdapterCorrupt):
        adapters.verify(world.layout, version)
    adapters.verified_file(world.layout, version, "adapter_config.json")


@pytest.mark.parametrize("filename", ["manifest.json", "../../lorad.db", "nothing", "", "/etc/passwd"])
def test_only_recorded_files_are_served(world: World, filename: str) -> None:
    """A file name is looked up in the row, it is never a path."""
    version = published(world)

    with pytest.raises(NotFound):
        adapters.verified_file(world.layout, version, filename)


def test_version_numbers_grow_through_deletion(world: World) -> None:
    """A name that was deleted goes on counting, so name@2 never means other weights."""
    numbers = [published(world).version, published(world).version]
    with write(world.engine) as tx:
        adapters.delete(tx, "acme", "math")
    with read(world.engine) as tx, pytest.raises(NotFound):
        adapters.resolve(tx, "acme", "math")
    numbers.append(published(world).version)
    with write(world.engine) as tx:
        adapters.delete_version(tx, "acme", "math", 3)
    numbers.append(published(world).version)

    assert numbers == [1, 2, 3, 4]
    with read(world.engine) as tx:
        assert [v.version for v in adapters.versions(tx, adapters.get(tx, "acme", "math"))] == [4]
        with pytest.raises(NotFound):
            adapters.resolve(tx, "acme", "math@2")


def test_references_resolve(world: World) -> None:
    """Name, number, alias and latest each name what they say, now."""
    for _ in range(3):
        published(world)
    with write(world.engine) as tx:
        adapters.set_aliases(tx, adapters.get(tx, "acme", "math"), {"prod": 2, "old": 1})

    wanted = {"math": 3, "math@latest": 3, "math@1": 1, "math@prod": 2}
    with read(world.engine) as tx:
        assert {ref: adapters.resolve(tx, "acme", ref)[1].version for ref in wanted} == wanted
        assert adapters.aliases(tx, adapters.get(tx, "acme", "math")) == {"old": 1, "prod": 2}


@pytest.mark.parametrize(
    "reference",
    ["other", "math@4", "math@0", "math@01", "math@+1", "math@", "math@@1", "math@1@1", "math@none", "Math", "", "@1",
     "math@" + "9" * 40, "math@\u0661", "../x"],
)  # fmt: skip
def test_other_references_are_not_found(world: World, reference: str) -> None:
    """Only canonical references name anything."""
    published(world)
    with read(world.engine) as tx, pytest.raises(NotFound):
        adapters.resolve(tx, "acme", reference)


def test_aliases_move_and_go(world: World) -> None:
    """An alias can be moved and removed, and goes with its version."""
    for _ in range(3):
        published(world)
    with write(world.engine) as tx:
        adapter = adapters.get(tx, "acme", "math")
        adapters.set_aliases(tx, adapter, {"a": 1, "b": 1, "c": 3})
        adapters.set_aliases(tx, adapter, {"a": 2, "b": None})
        assert adapters.aliases(tx, adapter) == {"a": 2, "c": 3}
        adapters.delete_version(tx, "acme", "math", 3)
        assert adapters.aliases(tx, adapter) == {"a": 2}


@pytest.mark.parametrize("alias", ["latest", "7", "UP", "", "a@b"])
def test_aliases_do_not_read_as_versions(world: World, alias: str) -> None:
    """What means something else cannot be an alias."""
    published(world)
    with write(world.engine) as tx, pytest.raises(InvalidRequest):
        adapters.set_aliases(tx, adapters.get(tx, "acme", "math"), {alias: 1})


def test_tenants_have_their_own_names(world: World) -> None:
    """The same name is another adapter for another tenant."""
    mine, theirs = published(world, b"1"), published(world, b"2", tenant="rival")

    assert (mine.version, theirs.version) == (1, 1)
    with read(world.engine) as tx:
        assert adapters.resolve(tx, "rival", "math")[1].id == theirs.id
        assert [row.name for row in adapters.list_all(tx, "acme")] == ["math"]
        assert adapters.list_all(tx, "nobody") == []


def test_corrupt_version_is_refused_not_replaced(world: World) -> None:
    """A corrupt newest version is an error; an older one is not served in its place unless it is named."""
    published(world)
    bad = published(world)
    with write(world.engine) as tx:
        adapters.mark_corrupt(tx, bad.id)

    with read(world.engine) as tx:
        for reference in ("math", "math@2"):
            with pytest.raises(AdapterCorrupt):
                adapters.resolve(tx, "acme", reference)
        with pytest.raises(AdapterCorrupt):
            adapters.get_version(tx, bad.id)
        assert adapters.resolve(tx, "acme", "math@1")[1].version == 1


def test_deleting_the_last_version_deletes_the_adapter(world: World) -> None:
    """An adapter without versions is not listed."""
    published(world)
    with write(world.engine) as tx:
        adapters.delete_version(tx, "acme", "math", 1)
        assert adapters.list_all(tx, "acme") == []
        assert tx.query(Adapter).one().last_version == 1


def test_model_names_resolve(world: World) -> None:
    """A base model answers by its plain name, an adapter as name@version, others not at all."""
    published(world)
    with read(world.engine) as tx:
        base, adapter = resolve_model(tx, "acme", "small"), resolve_model(tx, "acme", "math")
        assert (base.model_id, base.version, base.base.id) == ("small", None, world.base.id)
        assert (adapter.model_id, adapter.base.id) == ("math@1", world.base.id)
        for model in ("none", "math@9", "small@1"):
            with pytest.raises(ModelNotFound):
                resolve_model(tx, "acme", model)


def test_who_holds_an_adapter_does_not_hold_up_its_deletion_for_ever(
    fresh_postgres_url: str, layout: Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On Postgres a trainer that was stopped while it publishes has the adapter locked: who deletes it hears soon that
    it is to be tried again, and can once it is free."""
    monkeypatch.setattr(db, "SQLITE_WAIT_S", 1)
    engine = db.open_engine(fresh_postgres_url)
    published(make_world(engine, layout))

    def hold_and_delete() -> None:
        with write(engine) as holding, write(engine) as tx:
            holding.execute(text("SELECT id FROM adapters FOR UPDATE"))
            adapters.delete(tx, "acme", "math")

    with pytest.raises(OperationalError):
        hold_and_delete()
    with write(engine) as tx:
        adapters.delete(tx, "acme", "math")
    engine.dispose()
