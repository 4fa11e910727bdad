"""What a request's `model` names: a base model, or a version of a tenant's adapter."""

from dataclasses import dataclass

from shared.db import Tx
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
    raise NotImplementedError
