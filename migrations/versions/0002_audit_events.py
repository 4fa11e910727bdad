"""Who did what: the table of audit events, and the rule that none is ever changed."""

from typing import Final

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

RULE: Final = "audit_events_never_change"
MESSAGE: Final = "an audit event is never changed"


def upgrade() -> None:
    op.create_table(
        "audit_events",
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.Column("tenant", sa.String(), nullable=True),
        sa.Column("actor", sa.String(), nullable=False),
        sa.Column("action", sa.String(), nullable=False),
        sa.Column("object_id", sa.String(), nullable=True),
        sa.Column("status", sa.BigInteger(), nullable=True),
        sa.Column("request_id", sa.String(), nullable=True),
        sa.Column("remote_addr", sa.String(), nullable=True),
        sa.PrimaryKeyConstraint("id", name="pk_audit_events"),
    )
    op.create_index("ix_audit_events_created_at_id", "audit_events", ["created_at", "id"], unique=False)
    op.create_index(
        "ix_audit_events_tenant_created_at_id", "audit_events", ["tenant", "created_at", "id"], unique=False
    )
    if op.get_bind().dialect.name == "sqlite":
        op.execute(f"CREATE TRIGGER {RULE} BEFORE UPDATE ON audit_events BEGIN SELECT RAISE(ABORT, '{MESSAGE}'); END")
        return
    op.execute(
        f"CREATE FUNCTION {RULE}() RETURNS trigger LANGUAGE plpgsql AS "
        f"$$ BEGIN RAISE EXCEPTION '{MESSAGE}' USING ERRCODE = 'integrity_constraint_violation'; END $$"
    )
    op.execute(f"CREATE TRIGGER {RULE} BEFORE UPDATE ON audit_events FOR EACH ROW EXECUTE FUNCTION {RULE}()")


def downgrade() -> None:
    op.drop_table("audit_events")  # and its trigger with it
    if op.get_bind().dialect.name != "sqlite":
        op.execute(f"DROP FUNCTION {RULE}()")
