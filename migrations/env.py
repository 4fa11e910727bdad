"""Alembic's entry: runs on the connection that `shared.db.migrate` hands over, inside its one transaction."""

from alembic import context

from shared.tables import Table

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=Table.metadata,
    compare_type=True,
    transaction_per_migration=False,
)
with context.begin_transaction():
    context.run_migrations()
