"""Designs: constants of NSA with their latency and what they keep of dense attention."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision: str | None = "0002"
branch_labels: str | None = None
depends_on: str | None = None

TABLE = "nsa_designs"
TEXTS = ("digest", "study_digest", "kind", "created", "tool_version")
JSONS = ("study", "nsa", "parts")
NUMBERS = ("latency_us", "mass_kept", "mass_kept_p10", "output_error")


def upgrade() -> None:
    """Make the table."""
    op.create_table(
        TABLE,
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("fingerprint_id", sa.Integer(), nullable=False),
        sa.Column("group_size", sa.Integer(), nullable=False),
        *(sa.Column(name, sa.String(), nullable=False) for name in TEXTS),
        *(sa.Column(name, sa.Text(), nullable=False) for name in JSONS),
        *(sa.Column(name, sa.Double(), nullable=False) for name in NUMBERS),
        sa.Column("locality", sa.Double(), nullable=True),
        sa.ForeignKeyConstraint(["fingerprint_id"], ["nsa_fingerprints.id"], name="fk_nsa_designs_fingerprint_id"),
        sa.PrimaryKeyConstraint("id", name="pk_nsa_designs"),
        sa.UniqueConstraint("digest", name="uq_nsa_designs_digest"),
    )
    op.create_index("ix_nsa_designs_study_digest_fingerprint_id", TABLE, ["study_digest", "fingerprint_id"])


def downgrade() -> None:
    """Drop the table."""
    op.drop_table(TABLE)
