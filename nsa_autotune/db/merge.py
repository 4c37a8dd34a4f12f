"""Adding what others measured: from a file or another database, all or nothing, the same result in any order.

A trial is added once, by its digest. Two winners of one key keep both measurements as trials, and `serving_rank` says
which serves; so it is with two evaluations of one design. Merging is therefore commutative, associative and idempotent.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from sqlalchemy.orm import Session

from ..errors import StoreError
from .designs import DesignRecord, merge_design
from .exchange import Record, read_lines, refuse_future
from .records import TrialRecord, WinnerRecord
from .rows import insert_trial, stored_winner, upsert_winner
from .scan import scan

if TYPE_CHECKING:
    from .store import TuningStore

MAX_CONFLICTS = 100  # that a summary names; all of them are settled


@dataclass(frozen=True)
class Conflict:
    """Two winners of one key, both of whose samples are kept: medians in us, and whether the one that came serves."""

    family: str
    gpu: str
    problem_key: str
    here_us: float
    came_us: float
    came_serves: bool


@dataclass(frozen=True)
class ImportSummary:
    """What an import found: `winners` serve now, `kept` counts those that gave way to one that was here."""

    winners: int = 0
    kept: int = 0
    trials: int = 0
    designs: int = 0
    shipped: int = 0  # winners left out: they came with the other program, as this one's came with it
    conflicts: tuple[Conflict, ...] = field(default=(), compare=False)


def merge_file(store: TuningStore, path: Path, source: str | None, *, skip_shipped: bool = False) -> ImportSummary:
    """See `TuningStore.import_jsonl`; the file is looked through once before the database is touched."""
    with closing(read_lines(path)) as lines:
        for _ in lines:
            pass
    with store.transaction(write=True) as session:
        return add_records(session, _trials_first(path), source, merging=True, skip_shipped=skip_shipped)


def merge_store(store: TuningStore, other: TuningStore, source: str | None) -> ImportSummary:
    """See `TuningStore.merge`."""
    if not store.location.is_memory and str(store.location) == str(other.location):
        raise StoreError("a database is not merged with itself", {"database": str(store.location)}, "Name another one.")
    with other.transaction() as theirs, store.transaction(write=True) as session:
        return add_records(session, _records_of(theirs, other), source, merging=True, skip_shipped=True)


def add_records(
    session: Session,
    records: Iterable[Record],
    source: str | None,
    origin: str = "",
    *,
    merging: bool = False,
    skip_shipped: bool = False,
) -> ImportSummary:
    """Add records in this order: trials first, for winners refer to them; winners get `source` unless it is None."""
    counts: Counter[str] = Counter()
    conflicts: list[Conflict] = []
    for record in records:
        if isinstance(record, TrialRecord):
            insert_trial(session, record)
            counts["trials"] += 1
        elif isinstance(record, DesignRecord):
            merge_design(session, record)
            counts["designs"] += 1
        elif skip_shipped and record.source == "shipped":
            counts["shipped"] += 1
        else:
            winner = record if source is None else replace(record, source=source)
            here = stored_winner(session, winner.digest) if merging and len(conflicts) < MAX_CONFLICTS else None
            serves = upsert_winner(session, winner, origin, merging=merging)
            counts["winners" if serves else "kept"] += 1
            if here is not None and here.content_digest != winner.content_digest:
                conflicts.append(_conflict(here, winner, serves))
    return ImportSummary(**counts, conflicts=tuple(conflicts))


def _trials_first(path: Path) -> Iterator[Record]:
    """A file's records, the winners last: read twice rather than kept in memory."""
    for winners in (False, True):
        yield from (record for record in read_lines(path) if isinstance(record, WinnerRecord) is winners)


def _records_of(session: Session, other: TuningStore) -> Iterator[Record]:
    for row in scan(session):
        try:
            if row.record is None:
                raise StoreError(row.fault)
            refuse_future(row.record)
        except StoreError as error:
            rule = f"row {row.id} of {row.table} is no valid record: {error.rule}"
            values = {"database": str(other.location), **error.values}
            raise StoreError(
                rule, values, "Nothing was merged; `nsa-autotune db verify` names all such rows."
            ) from error
        yield row.record


def _conflict(here: WinnerRecord, came: WinnerRecord, came_serves: bool) -> Conflict:
    gpu = here.fingerprint["gpu"]
    return Conflict(here.family, gpu, here.problem_key, here.median_us, came.median_us, came_serves)
