"""API keys: lorad_<id>_<secret>, of which only the SHA-256 is kept.

The secret holds 256 random bits, so a plain hash keeps it as safe as a slow one would. Comparison takes constant time.
"""

import hashlib
import hmac
import re
import secrets
from collections.abc import Iterable
from typing import Final

from sqlalchemy import func, select, update

from shared import limits
from shared.db import Tx, now_ms
from shared.errors import InvalidRequest, NotFound, Unauthenticated
from shared.tables import ApiKey

SCOPES: Final = (
    "files:read", "files:write", "jobs:read", "jobs:write", "adapters:read", "adapters:write", "generate", "admin",
)  # fmt: skip
DEFAULT_SCOPES: Final = tuple(scope for scope in SCOPES if scope != "admin")

_KEY = re.compile(r"lorad_([0-9a-f]{12})_([A-Za-z0-9_-]{43})")


def create(
    tx: Tx,
    *,
    tenant: str = "default",
    scopes: Iterable[str] = DEFAULT_SCOPES,
    label: str | None = None,
    expires_s: float | None = None,
) -> tuple[ApiKey, str]:
    """A new key's row and the key itself, which cannot be read again; InvalidRequest for a bad scope or tenant."""
    wanted = sorted(set(scopes))
    unknown = [scope for scope in wanted if scope not in SCOPES]
    if unknown or not wanted:
        given = ", ".join(map(repr, unknown)) or "none"
        raise InvalidRequest(f"scope {given}: allowed are {', '.join(SCOPES)}", param="scope")
    if not limits.is_name(tenant):
        raise InvalidRequest(f"tenant {tenant!r} must match {limits.NAME_PATTERN} without '..'", param="tenant")
    if expires_s is not None and not expires_s > 0:
        raise InvalidRequest(f"a key must expire in the future, not in {expires_s:g} s", param="expires")
    key_id, secret = secrets.token_hex(6), secrets.token_urlsafe(32)
    key = f"lorad_{key_id}_{secret}"
    now = tx.execute(select(now_ms(tx))).scalar_one()
    row = ApiKey(
        id=key_id,
        tenant=tenant,
        secret_sha256=_sha256(key),
        scopes=wanted,
        label=label,
        created_at=now,
        expires_at=None if expires_s is None else now + int(expires_s * 1000),
        revoked_at=None,
    )
    tx.add(row)
    tx.flush()
    return row, key


def authenticate(tx: Tx, presented: str) -> ApiKey:
    """The live key that was presented; Unauthenticated if it is malformed, unknown, wrong, expired or revoked."""
    match = _KEY.fullmatch(presented)
    row = tx.get(ApiKey, match.group(1)) if match else None
    # Compared in any case, so that an unknown id takes as long as a wrong secret.
    is_right = hmac.compare_digest(_sha256(presented), row.secret_sha256 if row else "0" * 64)
    now = tx.execute(select(now_ms(tx))).scalar_one()
    if row is None or not is_right or row.revoked_at is not None or (row.expires_at or now + 1) <= now:
        raise Unauthenticated("This API key is not valid.")
    return row


def any_exist(tx: Tx) -> bool:
    """True once a key was ever made, even if revoked: from then on a key is needed."""
    return bool(tx.scalar(select(func.count()).select_from(ApiKey)))


def list_all(tx: Tx) -> list[ApiKey]:
    """All keys, oldest first."""
    return list(tx.scalars(select(ApiKey).order_by(ApiKey.created_at, ApiKey.id)))


def revoke(tx: Tx, key_id: str) -> ApiKey:
    """The key, revoked; NotFound if there is none. Twice is once."""
    live = update(ApiKey).where(ApiKey.id == key_id, ApiKey.revoked_at.is_(None))
    tx.execute(live.values(revoked_at=now_ms(tx)), execution_options={"synchronize_session": False})
    row = tx.scalar(select(ApiKey).where(ApiKey.id == key_id).execution_options(populate_existing=True))
    if row is None:
        raise NotFound(f"There is no API key with the id {key_id!r}.")
    return row


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
