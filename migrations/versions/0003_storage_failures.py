"""How often an attempt of a job ended for want of a working disk; and an index for who was served longest ago."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    # The default stays in the database: programs of the release before this one insert jobs without the column.
    op.add_column("jobs", sa.Column("storage_failures", sa.BigInteger(), nullable=False, server_default="0"))
    op.create_index("ix_jobs_tenant_started_at", "jobs", ["tenant", "started_at"], unique=False)


def downgrade() -> None:
    op.drop_index("ix_jobs_tenant_started_at", table_name="jobs")
    op.drop_column("jobs", "storage_failures")
