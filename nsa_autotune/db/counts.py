"""How much a database holds, counted by the database."""

from __future__ import annotations

from typing import Any

from sqlalchemy import BigInteger, ColumnElement, Select, and_, case, cast, func, select, union
from sqlalchemy.orm import Session, aliased

from .checks import STATUSES, VERDICTS
from .models import FingerprintRow, ProblemRow, TrialRow, WinnerRow
from .narrow import About, trials_about, winners_about
from .records import TrialRecord
from .rows import select_trials, trial_of

FAULTS = ("crash", "timeout")
COUNTED = ("problems", "tuned", "trials", *STATUSES, "predicted", "winners", *VERDICTS)
NEWEST = ("newest_trial", "newest_winner")
COLUMNS = ("gpu", "family", *COUNTED, *NEWEST, "coverage")


def count_rows(session: Session, about: About) -> list[dict[str, Any]]:
    """See `TuningDatabase.stats`: one row for each GPU and family that has trials or winners."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for part in (_count_trials(session, about), _count_winners(session, about), _count_problems(session, about)):
        for row in session.execute(part).mappings():
            found.setdefault((row["gpu"], row["family"]), {}).update(row)
    empty = {**dict.fromkeys(COUNTED, 0), **dict.fromkeys(NEWEST)}
    rows = [{"gpu": gpu, "family": family, **empty, **row} for (gpu, family), row in sorted(found.items())]
    return [{**row, "coverage": row["tuned"] / row["problems"] if row["problems"] else None} for row in rows]


def count_statuses(session: Session, kind: str) -> dict[str, int]:
    """Number of trials of one kind by status, the most frequent first."""
    number = func.count()
    rows = select(TrialRow.status, number).where(TrialRow.kind == kind).group_by(TrialRow.status)
    found = session.execute(rows.order_by(number.desc(), TrialRow.status))
    return {status: count for status, count in found}  # noqa: C416  rows are no pairs to a type checker


def count_winners(session: Session) -> int:
    """Number of winners."""
    return session.scalar(select(func.count(WinnerRow.id))) or 0


def troubled_trials(session: Session) -> list[TrialRecord]:
    """All measured trials of configs that ever crashed or hung for a problem on a machine, newest first."""
    fault, asked, same = aliased(TrialRow), aliased(ProblemRow), aliased(ProblemRow)
    pairs = (
        select(TrialRow.id)
        .select_from(fault)
        .join(asked, asked.id == fault.problem_id)
        .join(same, and_(same.family == asked.family, same.problem_key == asked.problem_key))
        .join(
            TrialRow,
            and_(
                TrialRow.problem_id == same.id,
                TrialRow.fingerprint_id == fault.fingerprint_id,
                TrialRow.kind == "measured",
                TrialRow.variant_id == fault.variant_id,
            ),
        )
        .where(fault.kind == "measured", fault.status.in_(FAULTS))
    )
    return [trial_of(*row) for row in session.execute(select_trials([TrialRow.id.in_(pairs)]))]


def _count_trials(session: Session, about: About) -> Select[*tuple[Any, ...]]:
    """By GPU and family, from the numbers of each problem and machine, which an index alone gives."""
    keys = (TrialRow.problem_id, TrialRow.fingerprint_id, TrialRow.kind, TrialRow.status)
    each = select(*keys, func.count().label("number"), func.max(TrialRow.created).label("newest"))
    part = each.where(*trials_about(session, about)).group_by(*keys).subquery()
    measured = part.c.kind == "measured"

    def total(*where: ColumnElement[bool]) -> ColumnElement[int]:
        return cast(func.sum(case((and_(*where), part.c.number), else_=0)), BigInteger)  # PostgreSQL's sum is a Decimal

    return (
        select(
            FingerprintRow.gpu,
            ProblemRow.family,
            total(measured).label("trials"),
            *(total(measured, part.c.status == status).label(status) for status in STATUSES),
            total(part.c.kind == "predicted").label("predicted"),
            func.max(part.c.newest).label("newest_trial"),
        )
        .select_from(part)
        .join(FingerprintRow, FingerprintRow.id == part.c.fingerprint_id)
        .join(ProblemRow, ProblemRow.id == part.c.problem_id)
        .group_by(FingerprintRow.gpu, ProblemRow.family)
    )


def _count_problems(session: Session, about: About) -> Select[*tuple[Any, ...]]:
    """Problem keys that were measured here or have a winner, which may be imported."""
    measured = select(TrialRow.problem_id, TrialRow.fingerprint_id).where(TrialRow.kind == "measured")
    won = select(WinnerRow.problem_id, WinnerRow.fingerprint_id)
    known = union(measured.where(*trials_about(session, about)), won.where(*winners_about(session, about))).subquery()
    return (
        select(FingerprintRow.gpu, ProblemRow.family, func.count(ProblemRow.problem_key.distinct()).label("problems"))
        .select_from(known)
        .join(FingerprintRow, FingerprintRow.id == known.c.fingerprint_id)
        .join(ProblemRow, ProblemRow.id == known.c.problem_id)
        .group_by(FingerprintRow.gpu, ProblemRow.family)
    )


def _count_winners(session: Session, about: About) -> Select[*tuple[Any, ...]]:
    rows = select(
        FingerprintRow.gpu,
        ProblemRow.family,
        func.count(ProblemRow.problem_key.distinct()).label("tuned"),
        func.count().label("winners"),
        *(func.sum(case((WinnerRow.verdict == verdict, 1), else_=0)).label(verdict) for verdict in VERDICTS),
        func.max(WinnerRow.created).label("newest_winner"),
    ).select_from(WinnerRow)
    for other in (FingerprintRow, ProblemRow):
        rows = rows.join(other)
    return rows.where(*winners_about(session, about)).group_by(FingerprintRow.gpu, ProblemRow.family)
