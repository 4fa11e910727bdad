"""Adapters: a tenant's names, their immutable versions, and the bytes under adapters/<version id>."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shared.db import Tx
from shared.specs import Spec
from shared.store.layout import Layout
from shared.tables import Adapter, AdapterVersion


@dataclass(frozen=True, kw_only=True)
class PreparedVersion:
    """Durable bytes under adapters/<version_id> that no row names yet. `sha256` is that of the weights file."""

    version_id: str
    base_model_id: str
    manifest: Mapping[str, Any]
    size_bytes: int
    sha256: str


def prepare(
    layout: Layout,
    staged: Path,
    *,
    validate: Callable[[Path], None],
    base_model_id: str,
    base_digest: str,
    spec: Spec,
    job_id: str | None,
    name: str,
    training_sha256: str | None,
) -> PreparedVersion:
    """Validate, hash and publish the adapter in `staged`; the row comes with `insert_version`."""
    raise NotImplementedError


def insert_version(tx: Tx, tenant: str, name: str, prepared: PreparedVersion, job_id: str | None) -> AdapterVersion:
    """The next version of this name; a name that was deleted lives again and goes on counting."""
    raise NotImplementedError


def get(tx: Tx, tenant: str, name: str) -> Adapter:
    """The live adapter of this name; NotFound."""
    raise NotImplementedError


def list_all(tx: Tx, tenant: str) -> list[Adapter]:
    """The tenant's live adapters by name."""
    raise NotImplementedError


def versions(tx: Tx, adapter: Adapter) -> list[AdapterVersion]:
    """Versions that are not deleted, newest first."""
    raise NotImplementedError


def aliases(tx: Tx, adapter: Adapter) -> dict[str, int]:
    """Alias to version number."""
    raise NotImplementedError


def set_aliases(tx: Tx, adapter: Adapter, changes: Mapping[str, int | None]) -> None:
    """Point aliases at versions, None removes; InvalidRequest for a name that reads as a version, NotFound."""
    raise NotImplementedError


def resolve(tx: Tx, tenant: str, reference: str) -> tuple[Adapter, AdapterVersion]:
    """What `name`, `name@3`, `name@alias` or `name@latest` names now; NotFound, AdapterCorrupt."""
    raise NotImplementedError


def delete(tx: Tx, tenant: str, name: str) -> Adapter:
    """The adapter, deleted with all its versions; the sweeper removes the bytes a little later."""
    raise NotImplementedError


def delete_version(tx: Tx, tenant: str, name: str, version: int) -> AdapterVersion:
    """The version, deleted; its aliases go with it."""
    raise NotImplementedError


def verified_file(layout: Layout, version: AdapterVersion, filename: str) -> tuple[Path, str, int]:
    """Path, sha256 and size of one file whose bytes match the row now; NotFound, AdapterCorrupt."""
    raise NotImplementedError


def verify(layout: Layout, version: AdapterVersion) -> Path:
    """The directory of a version all of whose files match the row; AdapterCorrupt."""
    raise NotImplementedError


def mark_corrupt(tx: Tx, version_id: str) -> None:
    """Serve this version no more."""
    raise NotImplementedError
