"""Claims: which process tunes a problem now, so that no other one does."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision: str | None = "0004"
branch_labels: str | None = None
depends_on: str | None = None

TABLE = "nsa_claims"
TEXTS = ("family", "problem_key", "template_digest", "fingerprint_digest", "policy", "stage", "owner")


def upgrade() -> None:
    """Make the table."""
    op.create_table(
        TABLE,
        sa.Column("digest", sa.String(), nullable=False),
        *(sa.Column(name, sa.String(), nullable=False) for name in TEXTS),
        sa.Column("expires_s", sa.Double(), nullable=False),
        sa.Column("done_s", sa.Double(), nullable=True),
        sa.PrimaryKeyConstraint("digest", name="pk_nsa_claims"),
    )


def downgrade() -> None:
    """Drop the table."""
    op.drop_table(TABLE)
