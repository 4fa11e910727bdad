"""API keys: lorad_<id>_<secret>, of which only the SHA-256 is kept."""

from collections.abc import Iterable
from typing import Final

from shared.db import Tx
from shared.tables import ApiKey

SCOPES: Final = (
    "files:read", "files:write", "jobs:read", "jobs:write", "adapters:read", "adapters:write", "generate", "admin",
)  # fmt: skip
DEFAULT_SCOPES: Final = tuple(scope for scope in SCOPES if scope != "admin")


def create(
    tx: Tx,
    *,
    tenant: str = "default",
    scopes: Iterable[str] = DEFAULT_SCOPES,
    label: str | None = None,
    expires_s: float | None = None,
) -> tuple[ApiKey, str]:
    """A new key's row and the key itself, which cannot be read again; InvalidRequest for a bad scope or tenant."""
    raise NotImplementedError


def authenticate(tx: Tx, presented: str) -> ApiKey:
    """The live key that was presented; Unauthenticated if it is malformed, unknown, wrong, expired or revoked."""
    raise NotImplementedError


def any_exist(tx: Tx) -> bool:
    """True once a key was ever made, even if revoked: from then on a key is needed."""
    raise NotImplementedError


def list_all(tx: Tx) -> list[ApiKey]:
    """All keys, oldest first."""
    raise NotImplementedError


def revoke(tx: Tx, key_id: str) -> ApiKey:
    """The key, revoked; NotFound if there is none. Twice is once."""
    raise NotImplementedError
