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
OF_WINNERS = {
    "ix_nsa_winners_by_problem": ("problem_id", "fingerprint_id", "policy", "created", "variant_id"),
    "ix_nsa_winners_by_machine": ("fingerprint_id", "problem_id", "policy", "created", "variant_id"),
}
BEFORE = "ix_nsa_winners_fingerprint_id"
FINAL = "ix_nsa_trials_final"


def upgrade() -> None:
    """Make them; two that were there grow."""
    op.drop_index(f"ix_{TRIALS}_{'_'.join(OF_PROBLEM[:3])}", TRIALS)
    for columns in (OF_PROBLEM, NEWEST):
        op.create_index(f"ix_{TRIALS}_{'_'.join(columns)}", TRIALS, list(columns))
    final = sa.text("stage = 'final'")
    op.create_index(FINAL, TRIALS, ["problem_id", "fingerprint_id"], sqlite_where=final, postgresql_where=final)
    op.drop_index(BEFORE, WINNERS)
    for name, wanted in OF_WINNERS.items():
        op.create_index(name, WINNERS, list(wanted))


def downgrade() -> None:
    """Drop them."""
    for name in OF_WINNERS:
        op.drop_index(name, WINNERS)
    op.create_index(BEFORE, WINNERS, ["fingerprint_id"])
    op.drop_index(FINAL, TRIALS)
    for columns in (NEWEST, OF_PROBLEM):
        op.drop_index(f"ix_{TRIALS}_{'_'.join(columns)}", TRIALS)
    op.create_index(f"ix_{TRIALS}_{'_'.join(OF_PROBLEM[:3])}", TRIALS, list(OF_PROBLEM[:3]))
