"""What Alembic runs: the migrations, on the connection that `migrate.upgrade` hands over."""

from __future__ import annotations

from alembic import context

from nsa_autotune.db.models import Base

context.configure(
    connection=context.config.attributes["connection"],
    version_table=context.config.attributes["version_table"],
    target_metadata=Base.metadata,
)
with context.begin_transaction():
    context.run_migrations()
