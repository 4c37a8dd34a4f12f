"""Every row of a database as a checked record: for merging what others stored, and for verifying what is here."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from sqlalchemy import select
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session

from ..errors import StoreError
from .designs import OWN_FIELDS as DESIGN_FIELDS
from .designs import DesignRecord
from .models import DesignRow, FingerprintRow, ProblemRow, TrialRow, VariantRow, WinnerRow
from .records import TrialRecord, WinnerRecord
from .rows import TRIAL_FIELDS, WINNER_FIELDS

BATCH = 500  # rows in memory at a time
# what a row that no program of ours wrote can raise on its way to a record
FOREIGN_FAULTS = (ValueError, TypeError, AttributeError, KeyError, ArithmeticError, RecursionError, SQLAlchemyError)

Table = type[TrialRow] | type[DesignRow] | type[WinnerRow]


@dataclass(frozen=True)
class Scanned:
    """A row: its table, id and stored digest, and either the record or why it is none."""

    table: str
    id: int
    digest: str
    record: TrialRecord | WinnerRecord | DesignRecord | None
    fault: str = ""


def scan(session: Session) -> Iterator[Scanned]:
    """Trials, then designs, then winners, which refer to trials; each table by id."""
    joined = (FingerprintRow, ProblemRow, VariantRow)
    yield from _scan_table(session, TrialRow, joined, _trial)
    yield from _scan_table(session, DesignRow, (FingerprintRow,), _design)
    yield from _scan_table(session, WinnerRow, joined, _winner)


def _scan_table(
    session: Session, table: Table, others: tuple[type, ...], make: Callable[..., Any]
) -> Iterator[Scanned]:
    rows: Any = select(table, *others)
    for other in others:
        rows = rows.join(other)
    last = 0
    while ids := list(session.scalars(select(table.id).where(table.id > last).order_by(table.id).limit(BATCH))):
        last = ids[-1]
        try:
            found = [tuple(row) for row in session.execute(rows.where(table.id.in_(ids)).order_by(table.id))]
        except FOREIGN_FAULTS:  # one of them cannot be read: find out which
            yield from (_scan_one(session, table, rows, make, number) for number in ids)
            continue
        yield from (_scanned(table, row, make) for row in found)
        session.expunge_all()


def _scan_one(session: Session, table: Table, rows: Any, make: Callable[..., Any], number: int) -> Scanned:
    try:
        (row,) = session.execute(rows.where(table.id == number)).all()
    except FOREIGN_FAULTS as error:
        return Scanned(table.__tablename__, number, "", None, f"the row cannot be read: {error}")
    return _scanned(table, tuple(row), make)


def _scanned(table: Table, row: tuple[Any, ...], make: Callable[..., Any]) -> Scanned:
    name, first = table.__tablename__, row[0]
    try:
        record = make(*row)
    except StoreError as error:
        return Scanned(name, first.id, first.digest, None, str(error))
    except FOREIGN_FAULTS as error:
        return Scanned(name, first.id, first.digest, None, f"the row is no record: {error}")
    return Scanned(name, first.id, first.digest, record)


def _shared(machine: FingerprintRow, problem: ProblemRow, variant: VariantRow) -> dict[str, Any]:
    return {
        "fingerprint": machine.facts,
        "family": problem.family,
        "problem": problem.problem,
        "problem_key": problem.problem_key,
        "config": variant.config,
        "template_digest": variant.template_digest,
    }


def _trial(row: TrialRow, machine: FingerprintRow, problem: ProblemRow, variant: VariantRow) -> TrialRecord:
    own = {name: getattr(row, name) for name in TRIAL_FIELDS}
    return TrialRecord.from_dict({**_shared(machine, problem, variant), **own})


def _winner(row: WinnerRow, machine: FingerprintRow, problem: ProblemRow, variant: VariantRow) -> WinnerRecord:
    own = {name: getattr(row, name) for name in WINNER_FIELDS}
    return WinnerRecord.from_dict({**_shared(machine, problem, variant), **own})


def _design(row: DesignRow, machine: FingerprintRow) -> DesignRecord:
    own = {name: getattr(row, name) for name in DESIGN_FIELDS}
    return DesignRecord.from_dict({"fingerprint": machine.facts, **own})
