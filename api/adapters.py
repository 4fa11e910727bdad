"""/v1/adapters: names, their immutable versions, and the files of a version."""

from flask import Request, Response

from api.call import Call
from api.downloads import send
from api.endpoint import endpoint
from api.schemas.adapters import AdapterObject, AdapterVersionObject
from api.schemas.wire import Deleted, Listed
from shared.db import Tx
from shared.store import adapters, base_models
from shared.tables import Adapter, AdapterVersion


@endpoint("GET /v1/adapters", scope="adapters:read")
def list_(call: Call) -> Listed[AdapterObject]:
    """All adapters by name, without their versions."""
    with call.read() as tx:
        return Listed[AdapterObject].of([_adapter(tx, row) for row in adapters.list_all(tx, call.tenant)])


@endpoint("GET /v1/adapters/<name>", scope="adapters:read")
def retrieve(call: Call, name: str) -> AdapterObject:
    """One adapter with its versions, newest first."""
    with call.read() as tx:
        return _adapter(tx, adapters.get(tx, call.tenant, name), with_versions=True)


@endpoint("DELETE /v1/adapters/<name>", scope="adapters:write")
def delete(call: Call, name: str) -> Deleted:
    """Delete an adapter with all its versions. Its version numbers are never used again."""
    with call.write() as tx:
        return Deleted(id=adapters.delete(tx, call.tenant, name).name, object="adapter")


@endpoint("GET /v1/adapters/<name>/versions/<version>", scope="adapters:read")
def version(call: Call, name: str, version: str) -> AdapterVersionObject:
    """One version, by number, by alias, or `latest`."""
    with call.read() as tx:
        adapter, row = adapters.resolve(tx, call.tenant, f"{name}@{version}")
        return _version(tx, adapter, row, adapters.aliases(tx, adapter))


@endpoint(
    "GET /v1/adapters/<name>/versions/<version>/files/<filename>",
    scope="adapters:read",
    media={"application/octet-stream": "the bytes"},
    statuses=(200, 206, 304),
)
def file(call: Call, name: str, version: str, filename: str, request: Request) -> Response:
    """One file of a version, checked against its record; the ETag is its SHA-256."""
    with call.read() as tx:
        _, row = adapters.resolve(tx, call.tenant, f"{name}@{version}")
    path, sha256, _ = adapters.verified_file(call.layout, row, filename)
    return send(request, path, sha256=sha256, filename=filename, immutable=version == str(row.version))


def _adapter(tx: Tx, row: Adapter, *, with_versions: bool = False) -> AdapterObject:
    versions, aliases = adapters.versions(tx, row), adapters.aliases(tx, row)
    latest = versions[0] if versions else None
    return AdapterObject.of(
        row,
        latest=latest,
        base=base_models.get(tx, latest.base_model_id) if latest else None,
        aliases=aliases,
        versions=[_version(tx, row, version, aliases) for version in versions] if with_versions else None,
    )


def _version(tx: Tx, adapter: Adapter, row: AdapterVersion, aliases: dict[str, int]) -> AdapterVersionObject:
    return AdapterVersionObject.of(adapter, row, base=base_models.get(tx, row.base_model_id), aliases=aliases)
