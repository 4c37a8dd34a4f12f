"""The tables. Names start with nsa_, so that the database of a fleet may hold other programs' tables as well."""

from __future__ import annotations

import json
from typing import Any

from sqlalchemy import Dialect, Double, ForeignKey, Index, MetaData, String, Text, text
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from sqlalchemy.types import TypeDecorator

from ..spec import DEFAULT_POLICY, canonical_json
from .checks import RACED

NAMING = {
    "ix": "ix_%(table_name)s_%(column_0_N_name)s",
    "uq": "uq_%(table_name)s_%(column_0_N_name)s",
    "fk": "fk_%(table_name)s_%(column_0_N_name)s",
    "pk": "pk_%(table_name)s",
}


FINAL = text("stage = 'final'")  # a literal: a bound value would keep SQLite from using the partial index

CHOICE = ("policy", "created", "variant_id")  # what one winner is chosen by


class CanonicalJSON(TypeDecorator[Any]):
    """A JSON value, kept as canonical text: the same bytes in every database."""

    impl = Text
    cache_ok = True

    def process_bind_param(self, value: Any, dialect: Dialect) -> str | None:
        """To text; None stays NULL."""
        return None if value is None else canonical_json(value)

    def process_result_value(self, value: Any, dialect: Dialect) -> Any:
        """From text."""
        return None if value is None else json.loads(value)


class Base(DeclarativeBase):
    """Base of all tables."""

    metadata = MetaData(naming_convention=NAMING)
    type_annotation_map = {  # noqa: RUF012  SQLAlchemy's own protocol
        str: String,
        float: Double,
        dict[str, Any]: CanonicalJSON,
        list[float]: CanonicalJSON,
        list[dict[str, Any]]: CanonicalJSON,
    }


class FingerprintRow(Base):
    """A GPU with its software; `digest` is the natural key."""

    __tablename__ = "nsa_fingerprints"
    id: Mapped[int] = mapped_column(primary_key=True)
    digest: Mapped[str] = mapped_column(unique=True)
    gpu: Mapped[str] = mapped_column(index=True)
    capability: Mapped[str] = mapped_column(index=True)
    facts: Mapped[dict[str, Any]]


class ProblemRow(Base):
    """A problem as one family sees it: all its fields, and the key under which winners are found."""

    __tablename__ = "nsa_problems"
    __table_args__ = (Index(None, "family", "problem_key"),)
    id: Mapped[int] = mapped_column(primary_key=True)
    digest: Mapped[str] = mapped_column(unique=True)
    family: Mapped[str]
    problem_key: Mapped[str]
    problem: Mapped[dict[str, Any]]


class VariantRow(Base):
    """A config of one family under one state of its template."""

    __tablename__ = "nsa_variants"
    id: Mapped[int] = mapped_column(primary_key=True)
    digest: Mapped[str] = mapped_column(unique=True)
    family: Mapped[str]
    template_digest: Mapped[str]
    config: Mapped[dict[str, Any]]


class TrialRow(Base):
    """A measurement, a failure or a prediction; never changed after it is written."""

    __tablename__ = "nsa_trials"
    __table_args__ = (
        # both cover what filters and sorts, so that wide rows are read for the answer only
        Index(None, "problem_id", "fingerprint_id", "kind", "status", "created"),
        Index(None, "kind", "created", "status", "fingerprint_id", "problem_id"),
        Index("ix_nsa_trials_final", "problem_id", "fingerprint_id", sqlite_where=FINAL, postgresql_where=FINAL),
    )
    id: Mapped[int] = mapped_column(primary_key=True)
    digest: Mapped[str] = mapped_column(unique=True)
    fingerprint_id: Mapped[int] = mapped_column(ForeignKey(FingerprintRow.id))
    problem_id: Mapped[int] = mapped_column(ForeignKey(ProblemRow.id))
    variant_id: Mapped[int] = mapped_column(ForeignKey(VariantRow.id), index=True)
    status: Mapped[str]
    reason: Mapped[str] = mapped_column(Text)
    samples_us: Mapped[list[float]]
    median_us: Mapped[float | None]
    p20_us: Mapped[float | None]
    p80_us: Mapped[float | None]
    kind: Mapped[str]
    provider: Mapped[str]
    stage: Mapped[str]
    resources: Mapped[dict[str, Any] | None]
    max_error: Mapped[float | None]
    baseline_error: Mapped[float | None]
    predicted_us: Mapped[float | None]
    policy: Mapped[str] = mapped_column(server_default=DEFAULT_POLICY)
    environment: Mapped[dict[str, Any] | None]
    created: Mapped[str]
    tool_version: Mapped[str]


class WinnerRow(Base):
    """What is served: one row for each (fingerprint, family, problem key, template, policy); `digest` is their key."""

    __tablename__ = "nsa_winners"
    # both cover what chooses among winners: samples and rivals make their rows wide
    __table_args__ = (
        Index("ix_nsa_winners_by_problem", "problem_id", "fingerprint_id", *CHOICE),
        Index("ix_nsa_winners_by_machine", "fingerprint_id", "problem_id", *CHOICE),
    )
    id: Mapped[int] = mapped_column(primary_key=True)
    digest: Mapped[str] = mapped_column(unique=True)
    fingerprint_id: Mapped[int] = mapped_column(ForeignKey(FingerprintRow.id))
    problem_id: Mapped[int] = mapped_column(ForeignKey(ProblemRow.id))
    variant_id: Mapped[int] = mapped_column(ForeignKey(VariantRow.id))
    trial_id: Mapped[int | None] = mapped_column(ForeignKey(TrialRow.id))  # the evidence, where it was measured here
    median_us: Mapped[float]
    p20_us: Mapped[float]
    p80_us: Mapped[float]
    samples_us: Mapped[list[float]]
    default_config: Mapped[dict[str, Any] | None]
    default_median_us: Mapped[float | None]
    library: Mapped[str]
    library_median_us: Mapped[float | None]
    policy: Mapped[str] = mapped_column(server_default=DEFAULT_POLICY)
    verdict: Mapped[str] = mapped_column(server_default=RACED)
    rivals: Mapped[list[dict[str, Any]]] = mapped_column(server_default="[]")
    resources: Mapped[dict[str, Any] | None]
    created: Mapped[str]
    tool_version: Mapped[str]
    source: Mapped[str]
    origin: Mapped[str]  # the shipped file it came from, else empty


class ShippedFileRow(Base):
    """A shipped file of winners that was imported, so that it is parsed again only after it changed."""

    __tablename__ = "nsa_shipped_files"
    name: Mapped[str] = mapped_column(primary_key=True)
    sha256: Mapped[str]


class DesignRow(Base):
    """Constants of NSA that a co-design study evaluated; `digest` is their natural key, written once."""

    __tablename__ = "nsa_designs"
    __table_args__ = (Index(None, "study_digest", "fingerprint_id"),)
    id: Mapped[int] = mapped_column(primary_key=True)
    digest: Mapped[str] = mapped_column(unique=True)
    fingerprint_id: Mapped[int] = mapped_column(ForeignKey(FingerprintRow.id))
    study_digest: Mapped[str]
    study: Mapped[dict[str, Any]]
    nsa: Mapped[dict[str, Any]]
    group_size: Mapped[int]
    latency_us: Mapped[float]
    parts: Mapped[dict[str, Any]]
    mass_kept: Mapped[float]
    mass_kept_p10: Mapped[float]
    output_error: Mapped[float]
    locality: Mapped[float | None]
    kind: Mapped[str]
    created: Mapped[str]
    tool_version: Mapped[str]


class ClaimRow(Base):
    """A unit of work with the process that has it; `digest` is the unit's natural key, times are seconds of UTC."""

    __tablename__ = "nsa_claims"
    digest: Mapped[str] = mapped_column(primary_key=True)
    family: Mapped[str]
    problem_key: Mapped[str]
    template_digest: Mapped[str]
    fingerprint_digest: Mapped[str]
    policy: Mapped[str]
    stage: Mapped[str]
    owner: Mapped[str]  # a random id: nothing of the host is stored
    expires_s: Mapped[float]
    done_s: Mapped[float | None]  # when the owner was through with it
