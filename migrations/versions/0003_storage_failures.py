"""How often an attempt of a job ended for want of a working disk."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    # The default stays in the database: programs of the release before this one insert jobs without the column.
    op.add_column("jobs", sa.Column("storage_failures", sa.BigInteger(), nullable=False, server_default="0"))


def downgrade() -> None:
    op.drop_column("jobs", "storage_failures")
