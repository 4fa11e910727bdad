"""/v1/audit: who changed what, and who was refused.

An event is written with the change itself, so there is none without the other; refused requests are written too, up to
a number a minute. Events hold no bodies and no secrets, cannot be changed, and are deleted after 90 days.
"""

from api.call import Call
from api.endpoint import endpoint
from api.schemas.audit import AuditEventObject, AuditQuery
from api.schemas.wire import Listed
from shared import audit


@endpoint("GET /v1/audit", scope="admin")
def list_(call: Call, query: AuditQuery) -> Listed[AuditEventObject]:
    """What happened to your tenant's objects, newest first. `lorad audit` shows all tenants, and refused logins."""
    with call.read() as tx:
        page = audit.page(
            tx, tenant=call.tenant, limit=query.limit, after=query.after, action=query.action, object_id=query.object_id
        )
    return Listed[AuditEventObject].of([AuditEventObject.of(row) for row in page.items], has_more=page.has_more)
