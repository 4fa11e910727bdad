"""What a request's `model` names: a base model, or a version of a tenant's adapter."""

from dataclasses import dataclass

from shared.db import Tx
from shared.errors import ModelNotFound, NotFound
from shared.store import adapters, base_models
from shared.tables import Adapter, AdapterVersion, BaseModelRow


@dataclass(frozen=True)
class ResolvedModel:
    """`model_id` is what an answer calls itself: 'smollm2-135m' or 'math@3'."""

    model_id: str
    base: BaseModelRow
    adapter: Adapter | None
    version: AdapterVersion | None


def resolve_model(tx: Tx, tenant: str, model: str) -> ResolvedModel:
    """What `model` names now; a base model's name wins over an adapter's. ModelNotFound, AdapterCorrupt."""
    try:
        return ResolvedModel(model, base_models.by_name(tx, model), None, None)
    except ModelNotFound:
        pass  # then it names an adapter
    try:
        adapter, version = adapters.resolve(tx, tenant, model)
    except NotFound as error:
        raise ModelNotFound(f"there is no model {model!r}", param="model") from error
    base = base_models.get(tx, version.base_model_id)
    return ResolvedModel(f"{adapter.name}@{version.version}", base, adapter, version)
