"""Forgetting trials that nobody needs: old, stale or failed ones, never the evidence of a winner."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sqlalchemy import ColumnElement, and_, delete, false, func, not_, or_, select
from sqlalchemy.orm import Session, aliased

from ..errors import InvalidInput
from .models import DesignRow, FingerprintRow, ProblemRow, TrialRow, VariantRow, WinnerRow
from .names import check_family, gpus_named
from .store import TuningStore

QUARANTINE = ("crash", "timeout")  # failures that keep a config from being launched again
EVIDENCE_STAGES = ("final", "confirm", "baseline")


@dataclass(frozen=True)
class Pruning:
    """Which trials may go: those that every condition given holds for; times as ISO 8601 in UTC."""

    before: str | None = None  # created earlier
    stale: bool = False  # measured with another template than the present one, or of a family that is gone
    failed: bool = (
        False  # any status but ok and same_code; crashes and hangs stay while their template is the present one
    )
    predicted: bool = False  # predictions; else measurements
    family: str | None = None
    template_digest: str | None = None
    gpu: str | None = None  # a part of its name
    fingerprint_digest: str | None = None


@dataclass(frozen=True)
class Pruned:
    """What goes, or would: trials by family and status; `kept` counts evidence that met the conditions and stays."""

    trials: Mapping[tuple[str, str], int]
    kept: int

    @property
    def total(self) -> int:
        """All trials that go."""
        return sum(self.trials.values())


def prune(
    store: TuningStore, pruning: Pruning, current_templates: Mapping[str, str], *, dry_run: bool = False
) -> Pruned:
    """Delete trials, and configs, problems and fingerprints that nothing refers to any more, in one transaction.

    Kept whatever the conditions: what a winner refers to; every race, confirmation and baseline of a winner's problem
    on its fingerprint; every trial of a winner's own config. `current_templates` has the digest of each family.
    InvalidInput without a condition, UnknownName for a family or GPU that the database does not know.
    """
    if pruning in (Pruning(), Pruning(predicted=True)):
        rule = "pruning needs a condition"
        if pruning.predicted:
            rule += ", and --predicted only chooses predictions in the place of measurements"
        raise InvalidInput(rule, {}, "Give --older-than, --stale, --failed, --family, --gpu or a digest.")
    with store.transaction(write=not dry_run) as session:
        if pruning.family is not None:
            check_family(session, pruning.family, current_templates)
        wanted = _wanted(pruning, current_templates)
        if pruning.gpu is not None:
            wanted.append(FingerprintRow.gpu.in_(gpus_named(session, pruning.gpu)))
        evidence = _is_evidence()
        counts = _count(session, and_(*wanted, not_(evidence)))
        kept = sum(_count(session, and_(*wanted, evidence)).values())
        if not dry_run:
            doomed = _joined(select(TrialRow.id)).where(*wanted, not_(evidence))
            session.execute(delete(TrialRow).where(TrialRow.id.in_(doomed)))
            _drop_orphans(session)
    return Pruned(counts, kept)


def _wanted(pruning: Pruning, current: Mapping[str, str]) -> list[ColumnElement[bool]]:
    is_current = or_(
        false(), *(and_(VariantRow.family == f, VariantRow.template_digest == d) for f, d in current.items())
    )
    found: list[ColumnElement[bool]] = [TrialRow.kind == ("predicted" if pruning.predicted else "measured")]
    if pruning.before is not None:
        found.append(TrialRow.created < pruning.before)
    if pruning.stale:
        found += [not_(is_current), TrialRow.provider == "template"]  # a library has no template
    if pruning.failed:
        found += [
            TrialRow.status.not_in(("ok", "same_code")),
            not_(and_(TrialRow.status.in_(QUARANTINE), is_current, TrialRow.kind == "measured")),
        ]
    equal = {
        VariantRow.family: pruning.family,
        VariantRow.template_digest: pruning.template_digest,
        FingerprintRow.digest: pruning.fingerprint_digest,
    }
    return found + [column == value for column, value in equal.items() if value is not None]


def _is_evidence() -> ColumnElement[bool]:
    """True for a trial that a winner rests on."""
    winner, its_problem = aliased(WinnerRow), aliased(ProblemRow)
    beside = select(winner.id).join(its_problem, its_problem.id == winner.problem_id)
    beside = beside.where(
        winner.fingerprint_id == TrialRow.fingerprint_id,
        winner.policy == TrialRow.policy,
        its_problem.family == ProblemRow.family,
        its_problem.problem_key == ProblemRow.problem_key,
        or_(winner.variant_id == TrialRow.variant_id, TrialRow.stage.in_(EVIDENCE_STAGES)),
    )
    named = select(WinnerRow.id).where(WinnerRow.trial_id == TrialRow.id)
    return or_(named.correlate(TrialRow).exists(), beside.correlate(TrialRow, ProblemRow).exists())


def _joined(rows: Any) -> Any:
    return (
        rows.select_from(TrialRow)
        .join(FingerprintRow, FingerprintRow.id == TrialRow.fingerprint_id)
        .join(ProblemRow, ProblemRow.id == TrialRow.problem_id)
        .join(VariantRow, VariantRow.id == TrialRow.variant_id)
    )


def _count(session: Session, where: ColumnElement[bool]) -> dict[tuple[str, str], int]:
    rows = _joined(select(ProblemRow.family, TrialRow.status, func.count())).where(where)
    found = session.execute(rows.group_by(ProblemRow.family, TrialRow.status))
    return {(family, status): count for family, status, count in sorted(map(tuple, found))}


def _drop_orphans(session: Session) -> None:
    users: dict[Any, list[Any]] = {
        VariantRow: [TrialRow.variant_id, WinnerRow.variant_id],
        ProblemRow: [TrialRow.problem_id, WinnerRow.problem_id],
        FingerprintRow: [TrialRow.fingerprint_id, WinnerRow.fingerprint_id, DesignRow.fingerprint_id],
    }
    for table, columns in users.items():
        unused = [not_(select(column).where(column == table.id).exists()) for column in columns]
        session.execute(delete(table).where(*unused))
