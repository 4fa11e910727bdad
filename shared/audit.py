"""The audit log: who changed what, and who was refused. Never what was in it: no bodies, no secrets.

An event is written in the transaction that makes the change, so there is none without the other.
"""

import os
import pwd
from dataclasses import dataclass
from typing import Any, Final

from sqlalchemy import delete, insert, select

from shared import ids, limits
from shared.db import Page, Tx, cursor, keyset_page, now_ms
from shared.tables import AuditEvent

LOCAL: Final = "local"
"""Who acts while there is no key."""
UNKNOWN: Final = "unknown"
MAX_CHARS: Final = 200
"""Of what a client names."""


@dataclass(frozen=True, kw_only=True)
class Deed:
    """What was done or refused; see `shared.tables.AuditEvent` for the words."""

    actor: str
    action: str
    tenant: str | None = None
    object_id: str | None = None
    status: int | None = None
    request_id: str | None = None
    remote_addr: str | None = None


def record(tx: Tx, deed: Deed) -> None:
    """Write it down in this transaction."""
    named = {name: _storable(value) if isinstance(value, str) else value for name, value in vars(deed).items()}
    tx.execute(insert(AuditEvent).values(id=ids.new_id(ids.AUDIT_EVENT), created_at=now_ms(tx), **named))


def by_command(action: str, object_id: str, tenant: str | None = None) -> Deed:
    """What the user of this process did with the `lorad` command."""
    return Deed(actor=f"cli:{_user()}", action=action, object_id=object_id, tenant=tenant)


def page(
    tx: Tx,
    *,
    tenant: str | None,
    limit: int,
    after: str | None = None,
    action: str | None = None,
    object_id: str | None = None,
) -> Page[AuditEvent]:
    """Events, newest first: those of one tenant, or all if `tenant` is None. InvalidRequest for an unknown `after`."""
    query = select(AuditEvent)
    if tenant is not None:
        query = query.where(AuditEvent.tenant == tenant)
    start = None if after is None else cursor(tx, query.where(AuditEvent.id == after), after)
    if action is not None:
        query = query.where(AuditEvent.action == action)
    if object_id is not None:
        query = query.where(AuditEvent.object_id == object_id)
    keys = (AuditEvent.created_at, AuditEvent.id)
    return keyset_page(tx, query, keys=keys, after=start, limit=limit, newest_first=True)


def forget_old(tx: Tx, *, max_age_s: float = limits.AUDIT_KEPT_S) -> None:
    """Delete the events that are older than they have to be kept."""
    old = delete(AuditEvent).where(AuditEvent.created_at < now_ms(tx) - int(max_age_s * 1000))
    options: dict[str, Any] = {"synchronize_session": False}
    tx.execute(old, execution_options=options)


def _storable(text: str) -> str:
    """Without what PostgreSQL cannot store, and not longer than anything of ours is."""
    return text.replace("\0", "").encode("utf-8", "replace").decode()[:MAX_CHARS]


def _user() -> str:
    """The account by its number, since a variable can say anything; the number itself where it has no name."""
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        return str(os.getuid())
