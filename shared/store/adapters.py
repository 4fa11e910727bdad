"""Adapters: a tenant's names, their immutable versions, and the aliases that point at those."""

from collections.abc import Collection, Mapping

from sqlalchemy import Select, insert, select, update
from sqlalchemy import delete as delete_rows
from sqlalchemy.dialects import postgresql, sqlite

from shared import ids, limits
from shared.db import Tx, bound_waiting, now_ms
from shared.errors import AdapterCorrupt, InvalidRequest, NotFound
from shared.store.adapter_files import PreparedVersion, prepare, verified_file, verify
from shared.tables import Adapter, AdapterAlias, AdapterVersion

__all__ = [
    "PreparedVersion",
    "aliases",
    "delete",
    "delete_version",
    "get",
    "get_version",
    "insert_version",
    "list_all",
    "mark_corrupt",
    "names",
    "prepare",
    "resolve",
    "set_aliases",
    "verified_file",
    "verify",
    "versions",
]

_IDS_AT_ONCE = 500  # SQLite takes no more than 999 parameters in old versions
_UNSYNCHRONISED = {"synchronize_session": False, "populate_existing": True}


def insert_version(tx: Tx, tenant: str, name: str, prepared: PreparedVersion, job_id: str | None) -> AdapterVersion:
    """The next version of this name; a name that was deleted lives again and goes on counting."""
    now = now_ms(tx)
    dialect = sqlite if tx.get_bind().dialect.name == "sqlite" else postgresql
    first = dialect.insert(Adapter).values(
        id=ids.new_id(ids.ADAPTER), tenant=tenant, name=name, tags={}, created_at=now, updated_at=now
    )
    tx.execute(first.on_conflict_do_nothing(index_elements=["tenant", "name"]))
    # The update locks the row, so that two publications of one name get different numbers.
    adapter_id, number = tx.execute(
        update(Adapter)
        .where(Adapter.tenant == tenant, Adapter.name == name)
        .values(last_version=Adapter.last_version + 1, updated_at=now, deleted_at=None)
        .returning(Adapter.id, Adapter.last_version),
        execution_options={"synchronize_session": False},
    ).one()
    version = AdapterVersion(
        id=prepared.version_id,
        adapter_id=adapter_id,
        version=number,
        state="ready",
        job_id=job_id,
        base_model_id=prepared.base_model_id,
        manifest=dict(prepared.manifest),
        size_bytes=prepared.size_bytes,
        sha256=prepared.sha256,
        created_at=now,
    )
    tx.add(version)
    tx.flush()
    tx.refresh(version)
    return version


def get(tx: Tx, tenant: str, name: str) -> Adapter:
    """The live adapter of this name; NotFound."""
    query = select(Adapter).where(Adapter.tenant == tenant, Adapter.name == name, Adapter.deleted_at.is_(None))
    adapter = tx.scalars(query, execution_options=_UNSYNCHRONISED).one_or_none() if limits.is_name(name) else None
    if adapter is None:
        raise NotFound(f"there is no adapter {name!r}")
    return adapter


def get_version(tx: Tx, version_id: str) -> AdapterVersion:
    """The version with this id, of any tenant, if it may be served; NotFound, AdapterCorrupt."""
    version = tx.get(AdapterVersion, version_id, populate_existing=True)
    if version is None or version.state == "deleted":
        raise NotFound(f"there is no adapter version {version_id!r}")
    return _served(version)


def list_all(tx: Tx, tenant: str) -> list[Adapter]:
    """The tenant's live adapters by name."""
    query = select(Adapter).where(Adapter.tenant == tenant, Adapter.deleted_at.is_(None))
    return list(tx.scalars(query.order_by(Adapter.name)))


def versions(tx: Tx, adapter: Adapter) -> list[AdapterVersion]:
    """Versions that are not deleted, newest first; corrupt ones are among them."""
    return list(tx.scalars(_kept(adapter), execution_options=_UNSYNCHRONISED))


def names(tx: Tx, tenant: str, version_ids: Collection[str]) -> dict[str, str]:
    """`name@3` by version id, of those that are the tenant's and not deleted."""
    found: dict[str, str] = {}
    ordered = sorted(version_ids)
    for start in range(0, len(ordered), _IDS_AT_ONCE):
        query = select(AdapterVersion.id, Adapter.name, AdapterVersion.version).join(
            Adapter, Adapter.id == AdapterVersion.adapter_id
        )
        query = query.where(
            AdapterVersion.id.in_(ordered[start : start + _IDS_AT_ONCE]),
            Adapter.tenant == tenant,
            AdapterVersion.state != "deleted",
        )
        found |= {version_id: f"{name}@{version}" for version_id, name, version in tx.execute(query)}
    return found


def aliases(tx: Tx, adapter: Adapter) -> dict[str, int]:
    """Alias to version number."""
    query = select(AdapterAlias.alias, AdapterVersion.version).join(
        AdapterVersion, AdapterVersion.id == AdapterAlias.version_id
    )
    rows = tx.execute(query.where(AdapterAlias.adapter_id == adapter.id).order_by(AdapterAlias.alias))
    return {row.alias: row.version for row in rows}


def set_aliases(tx: Tx, adapter: Adapter, changes: Mapping[str, int | None]) -> None:
    """Point aliases at versions, None removes; InvalidRequest for a name that reads as a version, NotFound."""
    _lock(tx, adapter.tenant, adapter.name)
    for alias, number in changes.items():
        if not limits.is_name(alias) or alias.isdecimal() or alias == "latest":
            raise InvalidRequest(f"{alias!r} cannot be an alias: it is no name, or it reads as a version")
        here = AdapterAlias.adapter_id == adapter.id, AdapterAlias.alias == alias
        tx.execute(delete_rows(AdapterAlias).where(*here), execution_options={"synchronize_session": False})
        if number is not None:
            version = _numbered(tx, adapter, number)
            tx.execute(insert(AdapterAlias).values(adapter_id=adapter.id, alias=alias, version_id=version.id))
    _touch(tx, adapter)


def resolve(tx: Tx, tenant: str, reference: str) -> tuple[Adapter, AdapterVersion]:
    """What `name`, `name@3`, `name@alias` or `name@latest` names now; NotFound, AdapterCorrupt.

    The newest version is not passed over for an older one because it is corrupt.
    """
    name, separator, suffix = reference.partition("@")
    adapter = get(tx, tenant, name)
    if suffix == "latest" or not separator:
        newest = tx.scalars(_kept(adapter).limit(1), execution_options=_UNSYNCHRONISED).one_or_none()
        if newest is None:
            raise NotFound(f"adapter {name!r} has no version")
        return adapter, _served(newest)
    if suffix.isascii() and suffix.isdecimal() and len(suffix) < 18 and suffix == str(int(suffix)):
        return adapter, _served(_numbered(tx, adapter, int(suffix)))
    target = select(AdapterAlias.version_id).where(AdapterAlias.adapter_id == adapter.id, AdapterAlias.alias == suffix)
    version_id = tx.scalar(target) if limits.is_name(suffix) else None
    if version_id is None:
        raise NotFound(f"adapter {name!r} has neither a version nor an alias {suffix!r}")
    return adapter, get_version(tx, version_id)


def delete(tx: Tx, tenant: str, name: str) -> Adapter:
    """The adapter, deleted with all its versions; the sweeper removes the bytes a little later.

    The row stays, so that a version number of this name is never used again.
    """
    adapter = _lock(tx, tenant, name)
    for version in versions(tx, adapter):
        _forget(tx, version)
    gone = update(Adapter).where(Adapter.id == adapter.id)
    now = now_ms(tx)
    tx.execute(
        gone.values(deleted_at=now, updated_at=now, description=None, tags={}),
        execution_options={"synchronize_session": False},
    )
    tx.refresh(adapter)
    return adapter


def delete_version(tx: Tx, tenant: str, name: str, version: int) -> AdapterVersion:
    """The version, deleted; its aliases go with it, and the adapter with its last version."""
    adapter = _lock(tx, tenant, name)
    row = _numbered(tx, adapter, version)
    _forget(tx, row)
    _touch(tx, adapter)
    if not versions(tx, adapter):
        delete(tx, tenant, name)
    return row


def mark_corrupt(tx: Tx, version_id: str) -> None:
    """Serve this version no more."""
    ready = update(AdapterVersion).where(AdapterVersion.id == version_id, AdapterVersion.state == "ready")
    tx.execute(ready.values(state="corrupt"), execution_options={"synchronize_session": False})


def _lock(tx: Tx, tenant: str, name: str) -> Adapter:
    """The live adapter, locked until the transaction ends; NotFound.

    A publication locks it too: it is either seen by what follows, or comes after it. Whoever changes versions or
    aliases locks the adapter first, so that no two wait for each other.
    """
    bound_waiting(tx)
    query = select(Adapter).where(Adapter.id == get(tx, tenant, name).id, Adapter.deleted_at.is_(None))
    adapter = tx.scalars(query.with_for_update(), execution_options=_UNSYNCHRONISED).one_or_none()
    if adapter is None:
        raise NotFound(f"there is no adapter {name!r}")
    return adapter


def _kept(adapter: Adapter) -> Select[AdapterVersion]:
    mine = select(AdapterVersion).where(AdapterVersion.adapter_id == adapter.id)
    return mine.where(AdapterVersion.state != "deleted").order_by(AdapterVersion.version.desc())


def _numbered(tx: Tx, adapter: Adapter, number: int) -> AdapterVersion:
    query = _kept(adapter).where(AdapterVersion.version == number)
    version = tx.scalars(query, execution_options=_UNSYNCHRONISED).one_or_none()
    if version is None:
        raise NotFound(f"adapter {adapter.name!r} has no version {number}")
    return version


def _served(version: AdapterVersion) -> AdapterVersion:
    if version.state == "corrupt":
        raise AdapterCorrupt
    return version


def _forget(tx: Tx, version: AdapterVersion) -> None:
    aliased = delete_rows(AdapterAlias).where(AdapterAlias.version_id == version.id)
    tx.execute(aliased, execution_options={"synchronize_session": False})
    gone = update(AdapterVersion).where(AdapterVersion.id == version.id)
    tx.execute(gone.values(state="deleted", deleted_at=now_ms(tx)), execution_options={"synchronize_session": False})
    tx.refresh(version)


def _touch(tx: Tx, adapter: Adapter) -> None:
    touched = update(Adapter).where(Adapter.id == adapter.id).values(updated_at=now_ms(tx))
    tx.execute(touched, execution_options={"synchronize_session": False})
    tx.refresh(adapter)
