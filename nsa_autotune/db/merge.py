"""Adding what others measured: from a file or another database, all or nothing, the same result in any order.

A trial is added once, by its digest. Two winners of one key keep both measurements as trials, and `serving_rank` says
which serves; so it is with two evaluations of one design. Merging is therefore commutative, associative and idempotent.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sqlalchemy.orm import Session

from ..errors import StoreError
from .designs import DesignRecord, merge_design
from .exchange import Record, read_lines, refuse_future
from .records import TrialRecord, WinnerRecord
from .rows import store_trial, stored_winner, upsert_winner
from .scan import scan
from .sense import Judge, refuse_unfit

if TYPE_CHECKING:
    from .store import TuningStore

MAX_CONFLICTS = 100  # that a summary names; all of them are settled


@dataclass(frozen=True)
class Conflict:
    """Two winners of one key, both of whose samples are kept: medians in us, and whether the one that came serves."""

    family: str
    gpu: str
    problem: Mapping[str, Any]
    problem_key: str
    here_us: float
    came_us: float
    came_serves: bool


@dataclass(frozen=True)
class ImportSummary:
    """What an import read, and what of it was not here before.

    Of the winners `new` had none of their key here, `replaced` serve in the place of one, `kept` counts those that one
    that was here serves on before; the rest were here already.
    """

    winners: int = 0
    new: int = 0
    replaced: int = 0
    kept: int = 0
    trials: int = 0
    new_trials: int = 0
    designs: int = 0
    new_designs: int = 0
    shipped: int = 0  # winners left out: they came with the other program, as this one's came with it
    conflicts: tuple[Conflict, ...] = field(default=(), compare=False)

    @property
    def is_empty(self) -> bool:
        """True if there was no record."""
        return not (self.winners or self.trials or self.designs or self.shipped)


def merge_file(
    store: TuningStore, path: Path, source: str | None, judge: Judge | None = None, *, skip_shipped: bool = False
) -> ImportSummary:
    """See `TuningStore.import_jsonl`; the file is looked through once before the database is touched."""
    with closing(read_lines(path, judge)) as lines:
        for _ in lines:
            pass
    with store.transaction(write=True) as session:
        return add_records(session, _trials_first(path), source, merging=True, skip_shipped=skip_shipped)


def merge_store(
    store: TuningStore, other: TuningStore, source: str | None, judge: Judge | None = None
) -> ImportSummary:
    """See `TuningStore.merge`."""
    if not store.location.is_memory and str(store.location) == str(other.location):
        raise StoreError("a database is not merged with itself", {"database": str(store.location)}, "Name another one.")
    with other.transaction() as theirs, store.transaction(write=True) as session:
        return add_records(session, _records_of(theirs, other, judge), source, merging=True, skip_shipped=True)


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
            counts["trials"] += 1
            counts["new_trials"] += store_trial(session, record)[1]
        elif isinstance(record, DesignRecord):
            counts["designs"] += 1
            counts["new_designs"] += merge_design(session, record)
        elif skip_shipped and record.source == "shipped":
            counts["shipped"] += 1
        else:
            winner = record if source is None else replace(record, source=source)
            counts["winners"] += 1
            here = stored_winner(session, winner.digest) if merging else None
            same = here is not None and here.content_digest == winner.content_digest
            if same and here is not None and here.source == record.source == "shipped":
                continue  # it came with this program, and stays so
            serves = upsert_winner(session, winner, origin, merging=merging)
            if not same:
                counts["new" if here is None else "replaced" if serves else "kept"] += 1
            if here is not None and not same and len(conflicts) < MAX_CONFLICTS:
                conflicts.append(_conflict(here, winner, serves))
    return ImportSummary(**counts, conflicts=tuple(conflicts))


def _trials_first(path: Path) -> Iterator[Record]:
    """A file's records, the winners last: read twice rather than kept in memory."""
    for winners in (False, True):
        yield from (record for record in read_lines(path) if isinstance(record, WinnerRecord) is winners)


def _records_of(session: Session, other: TuningStore, judge: Judge | None) -> Iterator[Record]:
    for row in scan(session):
        try:
            if row.record is None:
                raise StoreError(row.fault)
            refuse_future(row.record)
            refuse_unfit(row.record, judge)
        except StoreError as error:
            rule = f"row {row.id} of {row.table} is no valid record: {error.rule}"
            values = {"database": str(other.location), **error.values}
            raise StoreError(
                rule, values, "Nothing was merged; `nsa-autotune db verify` names all such rows."
            ) from error
        yield row.record


def _conflict(here: WinnerRecord, came: WinnerRecord, came_serves: bool) -> Conflict:
    gpu = here.fingerprint["gpu"]
    return Conflict(here.family, gpu, here.problem, here.problem_key, here.median_us, came.median_us, came_serves)
