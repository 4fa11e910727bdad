"""/v1/models: everything that generation can be asked for."""

from api.call import Call
from api.endpoint import endpoint
from api.schemas.adapters import Model
from api.schemas.wire import Deleted, Listed
from shared.db import Tx
from shared.errors import Forbidden
from shared.store import adapters, base_models
from shared.store.models import ResolvedModel, resolve_model


@endpoint("GET /v1/models", scope="adapters:read")
def list_(call: Call) -> Listed[Model]:
    """All base models, and all adapters by name."""
    with call.read() as tx:
        bases = [Model.of_base(row) for row in base_models.list_all(tx)]
        return Listed[Model].of(bases + _adapters(tx, call.tenant))


@endpoint("GET /v1/models/<path:model>", scope="adapters:read")
def retrieve(call: Call, model: str) -> Model:
    """One model: a base model, `name`, `name@3` or `name@alias`."""
    with call.read() as tx:
        return _view(resolve_model(tx, call.tenant, model), model)


@endpoint("DELETE /v1/models/<path:model>", scope="adapters:write")
def delete(call: Call, model: str) -> Deleted:
    """Delete an adapter, or the one version that `name@3` or `name@alias` means."""
    with call.write() as tx:
        found = resolve_model(tx, call.tenant, model)
        if found.adapter is None or found.version is None:
            raise Forbidden(f"{model!r} is a base model; an administrator removes it with 'lorad base remove'.")
        if "@" in model:
            adapters.delete_version(tx, call.tenant, found.adapter.name, found.version.version)
        else:
            adapters.delete(tx, call.tenant, found.adapter.name)
        return Deleted(id=model, object="model")


def _adapters(tx: Tx, tenant: str) -> list[Model]:
    """The newest version of each adapter, under the adapter's name."""
    listed = []
    for adapter in adapters.list_all(tx, tenant):
        for version in adapters.versions(tx, adapter)[:1]:
            base = base_models.get(tx, version.base_model_id)
            listed.append(Model.of_adapter(adapter, version, model_id=adapter.name, base=base.name))
    return listed


def _view(found: ResolvedModel, model_id: str) -> Model:
    if found.adapter is None or found.version is None:
        return Model.of_base(found.base)
    return Model.of_adapter(found.adapter, found.version, model_id=model_id, base=found.base.name)
