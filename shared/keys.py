"""API keys: lorad_<id>_<secret>, of which only the SHA-256 is kept."""

import hashlib
import hmac
import re
import secrets
from collections.abc import Iterable
from typing import Final, cast

from sqlalchemy import select

from shared import limits
from shared.db import Tx, now_ms
from shared.errors import InvalidRequest, NotFound, Unauthenticated
from shared.tables import ApiKey

SCOPES: Final = (
    "files:read", "files:write", "jobs:read", "jobs:write", "adapters:read", "adapters:write", "generate", "admin",
)  # fmt: skip
DEFAULT_SCOPES: Final = tuple(scope for scope in SCOPES if scope != "admin")

_KEY = re.compile(r"lorad_([0-9a-f]{16})_([0-9a-f]{64})")
_NOBODY = "0" * 64


def create(
    tx: Tx,
    *,
    tenant: str = "default",
    scopes: Iterable[str] = DEFAULT_SCOPES,
    label: str | None = None,
    expires_s: float | None = None,
) -> tuple[ApiKey, str]:
    """A new key's row and the key itself, which cannot be read again; InvalidRequest for a bad scope or tenant."""
    wanted = list(dict.fromkeys(scopes))
    if unknown := [scope for scope in wanted if scope not in SCOPES]:
        raise InvalidRequest(f"unknown scopes {', '.join(unknown)}; there are {', '.join(SCOPES)}", param="scopes")
    if not limits.is_name(tenant):
        raise InvalidRequest(f"{tenant!r} cannot name a tenant: it must match {limits.NAME_PATTERN}", param="tenant")
    if expires_s is not None and not 0 < expires_s < 1e10:
        raise InvalidRequest("a key must expire in the future", param="expires")
    key_id, secret = secrets.token_hex(8), secrets.token_hex(32)
    now = cast(int, tx.scalar(select(now_ms(tx))))  # read once: Postgres' clock goes on between two columns
    row = ApiKey(
        id=key_id,
        tenant=tenant,
        secret_sha256=_sha256(secret),
        scopes=wanted,
        label=label,
        created_at=now,
        expires_at=None if expires_s is None else now + int(expires_s * 1000),
    )
    tx.add(row)
    tx.flush()
    tx.refresh(row)
    return row, f"lorad_{key_id}_{secret}"


def authenticate(tx: Tx, presented: str) -> ApiKey:
    """The live key that was presented; Unauthenticated if it is malformed, unknown, wrong, expired or revoked.

    The message is the same for all of these, and a digest is compared in constant time for an unknown id too.
    """
    parts = _KEY.fullmatch(presented)
    key_id, secret = parts.groups() if parts else ("", "")
    is_live = (ApiKey.expires_at.is_(None)) | (ApiKey.expires_at > now_ms(tx))
    found = tx.execute(select(ApiKey, is_live).where(ApiKey.id == key_id)).one_or_none()
    expected = _NOBODY if found is None else found[0].secret_sha256
    is_right = hmac.compare_digest(_sha256(secret), expected)
    if found is None or not is_right or not found[1] or found[0].revoked_at is not None:
        raise Unauthenticated("this API key is not valid")
    key: ApiKey = found[0]
    return key


def claimed_id(header: str) -> str | None:
    """The id that a key in an Authorization header claims to have, for the audit log: it proves nothing."""
    found = _KEY.search(header)
    return found[1] if found else None


def rotate(tx: Tx, key_id: str, *, grace_s: float) -> tuple[ApiKey, str]:
    """A new key with the tenant, scopes and label of this one, which stays valid for `grace_s` more; NotFound,
    InvalidRequest if this one is not valid any more."""
    is_live = (ApiKey.expires_at.is_(None)) | (ApiKey.expires_at > now_ms(tx))
    old = tx.scalars(select(ApiKey).where(ApiKey.id == key_id)).one_or_none()
    if old is None:
        raise NotFound(f"there is no API key {key_id!r}")
    if old.revoked_at is not None or not tx.scalar(select(is_live).where(ApiKey.id == key_id)):
        raise InvalidRequest(f"the API key {key_id!r} is revoked or has expired: make a new one", param="id")
    row, key = create(tx, tenant=old.tenant, scopes=old.scopes, label=old.label)
    ends_at = row.created_at + int(grace_s * 1000)
    old.expires_at = ends_at if old.expires_at is None else min(old.expires_at, ends_at)
    tx.flush()
    return row, key


def any_exist(tx: Tx) -> bool:
    """True once a key was ever made, even if revoked: from then on a key is needed."""
    return tx.scalar(select(ApiKey.id).limit(1)) is not None


def list_all(tx: Tx) -> list[ApiKey]:
    """All keys, oldest first."""
    return list(tx.scalars(select(ApiKey).order_by(ApiKey.created_at, ApiKey.id)))


def revoke(tx: Tx, key_id: str) -> ApiKey:
    """The key, revoked; NotFound if there is none. Twice is once."""
    if (key := tx.get(ApiKey, key_id)) is None:
        raise NotFound(f"there is no API key {key_id!r}")
    if key.revoked_at is None:
        key.revoked_at = now_ms(tx)
        tx.flush()
        tx.refresh(key)
    return key


def _sha256(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()
