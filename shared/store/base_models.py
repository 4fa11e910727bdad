"""Registered base models: safetensors directories under models/<id>, and their rows."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shared.db import Tx
from shared.store.layout import Layout
from shared.tables import BaseModelRow


def register(
    tx: Tx, layout: Layout, staged: Path, *, name: str, digest: str, config: Mapping[str, Any]
) -> BaseModelRow:
    """The base model of this name, published from `staged`; the one there is, if its digest is the same.

    StateConflict if the name holds another model.
    """
    raise NotImplementedError


def by_name(tx: Tx, name: str) -> BaseModelRow:
    """The live base model of this name; ModelNotFound."""
    raise NotImplementedError


def get(tx: Tx, base_model_id: str) -> BaseModelRow:
    """The base model with this id, even if removed since; ModelNotFound."""
    raise NotImplementedError


def list_all(tx: Tx) -> list[BaseModelRow]:
    """Live base models by name."""
    raise NotImplementedError


def remove(tx: Tx, name: str) -> BaseModelRow:
    """The base model, removed; StateConflict while unfinished jobs or adapter versions need it."""
    raise NotImplementedError
