"""The first tables."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision: str | None = None
branch_labels: str | None = None
depends_on: str | None = None


def _text(name: str) -> sa.Column[str]:
    return sa.Column(name, sa.String(), nullable=False)


def _json(name: str, *, nullable: bool = False) -> sa.Column[str]:
    return sa.Column(name, sa.Text(), nullable=nullable)


def _number(name: str, *, nullable: bool = True) -> sa.Column[float]:
    return sa.Column(name, sa.Double(), nullable=nullable)


def _reference(name: str, *, nullable: bool = False) -> sa.Column[int]:
    return sa.Column(name, sa.Integer(), nullable=nullable)


def _create(table: str, *columns: sa.Column[str] | sa.Column[float] | sa.Column[int], **references: str) -> None:
    """A table with an id, a unique digest, the columns, and foreign keys to the id of other tables."""
    keys = [
        sa.ForeignKeyConstraint([name], [f"{target}.id"], name=f"fk_{table}_{name}")
        for name, target in references.items()
    ]
    op.create_table(
        table,
        _reference("id"),
        _text("digest"),
        *columns,
        *keys,
        sa.PrimaryKeyConstraint("id", name=f"pk_{table}"),
        sa.UniqueConstraint("digest", name=f"uq_{table}_digest"),
    )


def upgrade() -> None:
    """Make all tables."""
    _create("nsa_fingerprints", _text("gpu"), _text("capability"), _json("facts"))
    op.create_index("ix_nsa_fingerprints_gpu", "nsa_fingerprints", ["gpu"])
    op.create_index("ix_nsa_fingerprints_capability", "nsa_fingerprints", ["capability"])
    _create("nsa_problems", _text("family"), _text("problem_key"), _json("problem"))
    op.create_index("ix_nsa_problems_family_problem_key", "nsa_problems", ["family", "problem_key"])
    _create("nsa_variants", _text("family"), _text("template_digest"), _json("config"))
    _create_trials()
    _create_winners()
    op.create_table(
        "nsa_shipped_files",
        _text("name"),
        _text("sha256"),
        sa.PrimaryKeyConstraint("name", name="pk_nsa_shipped_files"),
    )


def _create_trials() -> None:
    numbers = ("median_us", "p20_us", "p80_us", "max_error", "baseline_error", "predicted_us")
    _create(
        "nsa_trials",
        _reference("fingerprint_id"),
        _reference("problem_id"),
        _reference("variant_id"),
        *(_text(name) for name in ("status", "kind", "provider", "stage", "created", "tool_version")),
        _json("reason"),
        _json("samples_us"),
        _json("resources", nullable=True),
        *(_number(name) for name in numbers),
        fingerprint_id="nsa_fingerprints",
        problem_id="nsa_problems",
        variant_id="nsa_variants",
    )
    op.create_index(
        "ix_nsa_trials_problem_id_fingerprint_id_kind", "nsa_trials", ["problem_id", "fingerprint_id", "kind"]
    )
    op.create_index("ix_nsa_trials_variant_id", "nsa_trials", ["variant_id"])


def _create_winners() -> None:
    _create(
        "nsa_winners",
        _reference("fingerprint_id"),
        _reference("problem_id"),
        _reference("variant_id"),
        _reference("trial_id", nullable=True),
        *(_number(name, nullable=False) for name in ("median_us", "p20_us", "p80_us")),
        _json("samples_us"),
        _json("default_config", nullable=True),
        _number("default_median_us"),
        _number("library_median_us"),
        *(_text(name) for name in ("library", "created", "tool_version", "source", "origin")),
        fingerprint_id="nsa_fingerprints",
        problem_id="nsa_problems",
        variant_id="nsa_variants",
        trial_id="nsa_trials",
    )
    op.create_index("ix_nsa_winners_fingerprint_id", "nsa_winners", ["fingerprint_id"])


def downgrade() -> None:
    """Drop all tables, referring ones first."""
    for table in ("shipped_files", "winners", "trials", "variants", "problems", "fingerprints"):
        op.drop_table(f"nsa_{table}")
