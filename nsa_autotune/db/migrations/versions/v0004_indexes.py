"""Indexes that answer questions about a million trials without reading them all."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision: str | None = "0003"
branch_labels: str | None = None
depends_on: str | None = None

TRIALS, WINNERS = "nsa_trials", "nsa_winners"
OF_PROBLEM = ("problem_id", "fingerprint_id", "kind", "status", "created")
NEWEST = ("kind", "created", "status", "fingerprint_id", "problem_id")
FINAL = "ix_nsa_trials_final"


def upgrade() -> None:
    """Make them; the index of a problem's trials grows by status and time."""
    op.drop_index(f"ix_{TRIALS}_{'_'.join(OF_PROBLEM[:3])}", TRIALS)
    for columns in (OF_PROBLEM, NEWEST):
        op.create_index(f"ix_{TRIALS}_{'_'.join(columns)}", TRIALS, list(columns))
    final = sa.text("stage = 'final'")
    op.create_index(FINAL, TRIALS, ["problem_id", "fingerprint_id"], sqlite_where=final, postgresql_where=final)
    op.create_index(f"ix_{WINNERS}_problem_id_fingerprint_id", WINNERS, ["problem_id", "fingerprint_id"])


def downgrade() -> None:
    """Drop them."""
    op.drop_index(f"ix_{WINNERS}_problem_id_fingerprint_id", WINNERS)
    op.drop_index(FINAL, TRIALS)
    for columns in (NEWEST, OF_PROBLEM):
        op.drop_index(f"ix_{TRIALS}_{'_'.join(columns)}", TRIALS)
    op.create_index(f"ix_{TRIALS}_{'_'.join(OF_PROBLEM[:3])}", TRIALS, list(OF_PROBLEM[:3]))
