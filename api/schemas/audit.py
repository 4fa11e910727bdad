"""/v1/audit on the wire."""

from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field

from api.schemas.wire import Out, PageQuery, stored_text
from shared import audit
from shared.tables import AuditEvent

_Named = Annotated[str, Field(min_length=1, max_length=audit.MAX_CHARS), AfterValidator(stored_text)]


class AuditQuery(PageQuery):
    """`limit` events after the event with id `after`; only those of one `action`, and about one object."""

    action: _Named | None = None
    object_id: _Named | None = None


class AuditEventObject(Out):
    """`actor` is the id of an API key, `local` while there was none, `cli:<user>`, or `claimed:<key id>` for a wrong
    key. `action` is the operationId of a request, `status` what it was answered; null for the command line."""

    id: str
    object: Literal["audit.event"] = "audit.event"
    created_at: int
    tenant: str | None
    actor: str
    action: str
    object_id: str | None
    status: int | None
    request_id: str | None
    remote_addr: str | None

    @classmethod
    def of(cls, row: AuditEvent) -> Self:
        return cls(
            id=row.id,
            created_at=row.created_at // 1000,
            tenant=row.tenant,
            actor=row.actor,
            action=row.action,
            object_id=row.object_id,
            status=row.status,
            request_id=row.request_id,
            remote_addr=row.remote_addr,
        )
