"""Is the database what it says? Files, references, digests and fields, each checked again."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from ..errors import StoreError
from ..spec import digest
from .engine import connect_read_only, read_only_mode, store_errors
from .exchange import parse_lines
from .foreign import file_faults
from .models import FingerprintRow, ProblemRow, ShippedFileRow, VariantRow
from .paths import shipped_files
from .records import WinnerRecord
from .scan import BATCH, FOREIGN_FAULTS, scan
from .sense import Judge
from .store import TuningStore


@dataclass(frozen=True)
class Finding:
    """Something that is not as it should be: where, and what."""

    where: str  # a table and id, or a file
    fault: str


def verify(store: TuningStore, judge: Judge | None = None) -> Iterator[Finding]:
    """Everything that is wrong with a database, one after the other; `judge` knows the rules of kernels."""
    yield from _file_findings(store)
    with store.transaction() as session:
        yield from _name_findings(session)
        for row in scan(session):
            where = f"{row.table} {row.id}"
            if row.record is None:
                yield Finding(where, row.fault)
            elif row.record.digest != row.digest:
                yield Finding(where, f"the digest is {row.digest} and should be {row.record.digest}")
            elif isinstance(row.record, WinnerRecord) and judge is not None and (fault := judge(row.record)):
                yield Finding(where, fault)
        yield from _shipped_findings(session)


def _file_findings(store: TuningStore) -> Iterator[Finding]:
    """Of a SQLite file; a server keeps its pages and references itself."""
    if store.location.path is None:
        return
    with store_errors(store.location):
        mode = read_only_mode(store.location)
        with closing(connect_read_only(store.location, mode)) as connection:
            faults = file_faults(connection)
    yield from (Finding(str(store.location), fault) for fault in faults)


def _name_findings(session: Session) -> Iterator[Finding]:
    """Rows that others refer to, whose digest is not that of their content."""
    yield from _compare(session, FingerprintRow, lambda row: row.facts)
    yield from _compare(session, ProblemRow, lambda row: [row.family, row.problem_key, row.problem])
    yield from _compare(session, VariantRow, lambda row: [row.family, row.config, row.template_digest])


def _compare(session: Session, table: Any, content: Callable[[Any], object]) -> Iterator[Finding]:
    last = 0
    while ids := list(session.scalars(select(table.id).where(table.id > last).order_by(table.id).limit(BATCH))):
        last = ids[-1]
        for number in ids:
            where = f"{table.__tablename__} {number}"
            try:
                row = session.get_one(table, number)
                expected = digest(content(row))
            except FOREIGN_FAULTS as error:
                yield Finding(where, f"the row cannot be read: {error}")
                continue
            if row.digest != expected:
                yield Finding(where, f"the digest is {row.digest} and should be {expected}")
        session.expunge_all()


def _shipped_findings(session: Session) -> Iterator[Finding]:
    """Shipped files that are damaged, or not the ones whose winners the database holds."""
    known = {row.name: row.sha256 for row in session.scalars(select(ShippedFileRow))}
    for name, content in shipped_files().items():
        try:
            parse_lines(content, name)
        except StoreError as error:
            yield Finding(name, str(error))
        if known.get(name, "") != hashlib.sha256(content).hexdigest():
            yield Finding(name, "the database holds other shipped winners; opening it for writing takes these over")
