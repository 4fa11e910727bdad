"""Registered base models: safetensors directories under models/<id>, and their rows."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sqlalchemy import select

from shared import ids
from shared.db import Tx, now_ms
from shared.errors import ModelNotFound, StateConflict
from shared.store.durable import publish
from shared.store.layout import Layout
from shared.tables import AdapterVersion, BaseModelRow, Job


def register(
    tx: Tx, layout: Layout, staged: Path, *, name: str, digest: str, config: Mapping[str, Any]
) -> BaseModelRow:
    """The base model of this name, published from `staged`; the one there is, if its digest is the same.

    StateConflict if the name holds another model. A large model is better made durable before the transaction.
    """
    if (present := _live(tx, name)) is not None:
        if present.digest == digest:
            return present
        raise StateConflict(
            f"the name {name!r} holds another base model (digest {present.digest[:12]}): remove it first"
        )
    row = BaseModelRow(
        id=ids.new_id(ids.BASE_MODEL), name=name, digest=digest, config=dict(config), created_at=now_ms(tx)
    )
    publish(staged, layout.model(row.id))
    tx.add(row)
    tx.flush()
    tx.refresh(row)
    return row


def by_name(tx: Tx, name: str) -> BaseModelRow:
    """The live base model of this name; ModelNotFound."""
    if (row := _live(tx, name)) is None:
        raise ModelNotFound(f"there is no base model {name!r}")
    return row


def get(tx: Tx, base_model_id: str) -> BaseModelRow:
    """The base model with this id, even if removed since; ModelNotFound."""
    if (row := tx.get(BaseModelRow, base_model_id)) is None:
        raise ModelNotFound(f"there is no base model {base_model_id!r}")
    return row


def list_all(tx: Tx) -> list[BaseModelRow]:
    """Live base models by name."""
    return list(tx.scalars(select(BaseModelRow).where(BaseModelRow.deleted_at.is_(None)).order_by(BaseModelRow.name)))


def remove(tx: Tx, name: str) -> BaseModelRow:
    """The base model, removed; StateConflict while unfinished jobs or adapters need it. The sweeper frees the disk."""
    row = by_name(tx, name)
    jobs = select(Job.id).where(Job.base_model_id == row.id, Job.finished_at.is_(None)).limit(1)
    if (job_id := tx.scalar(jobs)) is not None:
        raise StateConflict(f"base model {name} is needed by job {job_id}, which has not ended")
    versions = select(AdapterVersion.id).where(
        AdapterVersion.base_model_id == row.id, AdapterVersion.state != "deleted"
    )
    if tx.scalar(versions.limit(1)) is not None:
        raise StateConflict(f"base model {name} is needed by adapters: delete those first")
    row.deleted_at = now_ms(tx)
    tx.flush()
    tx.refresh(row)
    return row


def _live(tx: Tx, name: str) -> BaseModelRow | None:
    query = select(BaseModelRow).where(BaseModelRow.name == name, BaseModelRow.deleted_at.is_(None))
    return tx.scalars(query).one_or_none()
