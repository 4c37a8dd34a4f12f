"""The evidence behind a time: policy and environment of trials; verdict, rivals and resources of winners."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision: str | None = "0001"
branch_labels: str | None = None
depends_on: str | None = None

# the values of rows that were stored before; later defaults of the program must not change what they say
POLICY, VERDICT, NO_RIVALS = "eager-cold", "raced", "[]"


def upgrade() -> None:
    """Add the columns."""
    for table in ("nsa_trials", "nsa_winners"):
        op.add_column(table, sa.Column("policy", sa.String(), nullable=False, server_default=POLICY))
    op.add_column("nsa_trials", sa.Column("environment", sa.Text(), nullable=True))
    op.add_column("nsa_winners", sa.Column("verdict", sa.String(), nullable=False, server_default=VERDICT))
    op.add_column("nsa_winners", sa.Column("rivals", sa.Text(), nullable=False, server_default=NO_RIVALS))
    op.add_column("nsa_winners", sa.Column("resources", sa.Text(), nullable=True))


def downgrade() -> None:
    """Drop them."""
    for name in ("resources", "rivals", "verdict", "policy"):
        op.drop_column("nsa_winners", name)
    for name in ("environment", "policy"):
        op.drop_column("nsa_trials", name)
