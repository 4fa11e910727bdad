"""`lorad audit`: who changed what, and who was refused, over all tenants."""

from typing import Any

import click

from shared import audit as log
from shared import db, limits
from shared.cli.admin import json_option, open_database
from shared.cli.client_output import Output
from shared.config import Settings
from shared.tables import AuditEvent

_COLUMNS = {
    "when": ("created_at",),
    "tenant": ("tenant",),
    "actor": ("actor",),
    "action": ("action",),
    "object": ("object_id",),
    "status": ("status",),
    "from": ("remote_addr",),
}


@click.command()
@click.option("--tenant", help="Only what happened to this tenant's objects.")
@click.option("--action", help="Only this, e.g. jobs_cancel or keys_create.")
@click.option("--object", "object_id", metavar="ID", help="Only what happened to this object.")
@click.option("--limit", type=click.IntRange(1), default=limits.MAX_PAGE, show_default=True, help="At most so many.")
@json_option
def audit(tenant: str | None, action: str | None, object_id: str | None, limit: int, as_json: bool) -> None:
    """Show who changed what and who was refused, newest first."""
    with open_database(Settings.from_env()) as engine, db.read(engine) as tx:
        page = log.page(tx, tenant=tenant, limit=limit, action=action, object_id=object_id)
    rows = [_describe(row) for row in page.items]
    Output(as_json=as_json).table(rows, _COLUMNS, empty="Nothing of that kind is on record.")
    if page.has_more:
        click.echo(f"There is more than these {limit}.", err=True)


def _describe(row: AuditEvent) -> dict[str, Any]:
    names = ("id", "tenant", "actor", "action", "object_id", "status", "request_id", "remote_addr")
    return {"created_at": row.created_at // 1000, **{name: getattr(row, name) for name in names}}


COMMANDS = (audit,)
