"""TuningStore: the one door to the database."""

from __future__ import annotations

import hashlib
import logging
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn, Self

from sqlalchemy import delete, select
from sqlalchemy.orm import Session

from ..errors import StoreError
from .designs import DesignRecord, insert_design, read_designs
from .engine import (
    OTHER_DATABASE,
    for_writing,
    is_read_only,
    open_engine,
    open_read_only_engine,
    parse_location,
    store_errors,
)
from .exchange import RECORD_TYPES, format_lines, parse_lines, write_atomically
from .export import select_records
from .known import KnownWinner, read_known
from .merge import ImportSummary, add_records, merge_file, merge_store
from .migrate import ensure_schema, lock_setup
from .models import ShippedFileRow, WinnerRow
from .paths import chosen_url, shipped_files
from .place import check_place
from .query import query_rows
from .records import TrialRecord, WinnerRecord
from .rows import insert_trial, read_predictions, read_trials, read_winners, upsert_winner
from .sense import Judge

PREDICTIONS = 16  # of a problem that are worth a look: not all of them run everywhere

logger = logging.getLogger(__name__)


class TuningStore:
    """Trials and winners in a SQLite file, in memory (`sqlite://`) or on a server.

    Every write is one transaction: it is there whole or not at all. Several processes may write at once; threads of
    one process may share a store; a forked child must open its own. Every method raises StoreError when the database
    is damaged, busy for 30 seconds, full or read-only. An existing file that may not be written is opened for reading,
    and so is every database with `read_only`. With `must_exist` a file that `url` names is not made anew.
    """

    def __init__(
        self, url: str | None = None, *, import_shipped: bool = True, read_only: bool = False, must_exist: bool = False
    ) -> None:
        self.location = parse_location(chosen_url(url))
        check_place(self.location, must_exist=must_exist and url is not None)
        self.read_only = read_only or is_read_only(self.location)
        self._lock = threading.RLock()
        self._closed = False
        with store_errors(self.location):
            never_writes = self.read_only and self.location.path is not None
            self._engine = (open_read_only_engine if never_writes else open_engine)(self.location)
            try:
                ensure_schema(self._engine, self.location, read_only=self.read_only)
                if import_shipped:
                    self._import_shipped()
            except BaseException:
                self._engine.dispose()
                raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __reduce__(self) -> NoReturn:
        """Refuses: a copy elsewhere would name a file or a password of this machine."""
        remedy = "Save a module's state_dict(), or set its dispatcher to None before it is saved."
        raise StoreError("an open database cannot be pickled", {"database": str(self.location)}, remedy)

    def close(self) -> None:
        """Close all connections; the store cannot be used afterwards."""
        self._closed = True
        self._engine.dispose()

    def add_trial(self, record: TrialRecord) -> int:
        """Store a trial and return its id; the same record, equal in every field, is not added twice."""
        return self.add_trials([record])[0]

    def add_trials(self, records: Sequence[TrialRecord]) -> list[int]:
        """Store trials in one transaction and return their ids."""
        with self._transaction(write=True) as session:
            return [insert_trial(session, record) for record in records]

    def trials(
        self,
        *,
        family: str | None = None,
        fingerprint_digest: str | None = None,
        gpu: str | None = None,
        problem_key: str | None = None,
        template_digest: str | None = None,
        status: str | None = None,
        kind: str = "measured",
        stage: str | None = None,
        provider: str | None = None,
        policy: str | None = None,
        limit: int | None = None,
    ) -> list[TrialRecord]:
        """Trials that equal every value given, newest first; predictions only with kind='predicted'."""
        where = {
            "family": family,
            "fingerprint_digest": fingerprint_digest,
            "gpu": gpu,
            "problem_key": problem_key,
            "template_digest": template_digest,
            "status": status,
            "kind": kind,
            "stage": stage,
            "provider": provider,
            "policy": policy,
        }
        with self._transaction() as session:
            return read_trials(session, where, limit)

    def predictions(
        self, *, family: str, capability: str, template_digest: str, limit: int = PREDICTIONS
    ) -> list[TrialRecord]:
        """The `limit` best predictions of each problem for an architecture; of a config the newest counts."""
        where = {"family": family, "capability": capability, "template_digest": template_digest}
        with self._transaction() as session:
            return read_predictions(session, where, limit)

    def set_winner(self, record: WinnerRecord) -> bool:
        """Store the winner of (fingerprint, family, problem key, template, policy) in the place of the one before.

        False if that one came from a higher source (local, then imported, then shipped) and stays.
        """
        with self._transaction(write=True) as session:
            return upsert_winner(session, record)

    def winners(
        self,
        *,
        family: str | None = None,
        fingerprint_digest: str | None = None,
        gpu: str | None = None,
        capability: str | None = None,
        problem_key: str | None = None,
        template_digest: str | None = None,
        source: str | None = None,
        policy: str | None = None,
    ) -> list[WinnerRecord]:
        """Winners that equal every value given, newest first; `gpu` alone loads all of one GPU in one query."""
        where = {
            "family": family,
            "fingerprint_digest": fingerprint_digest,
            "gpu": gpu,
            "capability": capability,
            "problem_key": problem_key,
            "template_digest": template_digest,
            "source": source,
            "policy": policy,
        }
        with self._transaction() as session:
            return read_winners(session, where)

    def known_winners(self, *, family: str) -> list[KnownWinner]:
        """What the dispatcher reads of a family's winners, newest first; faster than whole records."""
        with self._transaction() as session:
            return read_known(session, family)

    def add_design(self, record: DesignRecord) -> bool:
        """Store a point of a co-design study; False if the study holds it already on this fingerprint."""
        with self._transaction(write=True) as session:
            return insert_design(session, record)

    def designs(
        self, *, study_digest: str | None = None, fingerprint_digest: str | None = None, kind: str | None = None
    ) -> list[DesignRecord]:
        """Points of co-design studies that equal every value given, oldest first."""
        where = {"study_digest": study_digest, "fingerprint_digest": fingerprint_digest, "kind": kind}
        with self._transaction() as session:
            return read_designs(session, where)

    def query(
        self,
        *,
        gpu: str | None = None,
        family: str | None = None,
        problem: Mapping[str, object] | None = None,
        status: str | None = None,
        kind: str = "measured",
        table: str = "winners",
        limit: int | None = None,
        current_templates: Mapping[str, str] | None = None,
    ) -> list[dict[str, Any]]:
        """Flat rows, newest first.

        `gpu` is a part of the name in any case; `problem` holds values of problem fields, NSA constants among them, as
        numbers or text. `status` and kind='predicted' need table='trials'. `current_templates` (family to digest)
        fills `stale`.
        UnknownName for a table, kind, status or field that does not exist.
        """
        with self._transaction() as session:
            return query_rows(
                session,
                gpu=gpu,
                family=family,
                problem=problem,
                status=status,
                kind=kind,
                table=table,
                limit=limit,
                current_templates=current_templates,
            )

    def reading(self) -> AbstractContextManager[Session]:
        """A transaction for questions of other kinds; see TuningDatabase."""
        return self._transaction()

    def export_jsonl(
        self,
        path: str | Path,
        *,
        records: Sequence[str] = tuple(RECORD_TYPES),
        gpu: str | None = None,
        family: str | None = None,
    ) -> int:
        """Write records, predictions included, as JSON lines, atomically; return their number.

        `gpu` is a part of the name; UnknownName if no GPU has it. A design has no family: `family` leaves all out.
        """
        with self._transaction() as session:
            found = select_records(session, records, gpu, family)
        write_atomically(Path(path), format_lines(found))
        return len(found)

    def import_jsonl(
        self, path: str | Path, *, source: str | None = "imported", judge: Judge | None = None
    ) -> ImportSummary:
        """Add all records of a file, or none; StoreError names a bad line. `merge` has the rules.

        Winners get `source`; None keeps what the file says, to restore a copy of one's own database.
        `judge` knows the rules of kernels.
        """
        return merge_file(self, Path(path), source, judge)

    def merge(
        self, other: TuningStore | Path, *, source: str | None = "imported", judge: Judge | None = None
    ) -> ImportSummary:
        """Add all records of another store or export, or none: the same result in any order and however often.

        Winners get `source`; None keeps their own, where both databases are one's own. Its shipped winners stay out.
        Two winners of one key keep both measurements, and `rows.serving_rank` says which serves.
        """
        if isinstance(other, Path):
            return merge_file(self, other, source, judge, skip_shipped=True)
        return merge_store(self, other, source, judge)

    def transaction(self, *, write: bool = False) -> AbstractContextManager[Session]:
        """One transaction for other modules of db, with errors as StoreError."""
        return self._transaction(write=write)

    def _import_shipped(self) -> None:
        files = shipped_files()
        digests = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
        with self._transaction() as session:
            known = {row.name: row.sha256 for row in session.scalars(select(ShippedFileRow))}
        changed = [name for name, sha256 in digests.items() if known.get(name) != sha256]
        if not changed:
            return
        if self.read_only:
            logger.warning("%s is read-only, so the shipped winners %s are not in it", self.location, changed)
            return
        with self._transaction(write=True) as session:
            lock_setup(session.connection())
            for name in changed:
                # what a newer file no longer holds was withdrawn
                session.execute(delete(WinnerRow).where(WinnerRow.source == "shipped", WinnerRow.origin == name))
                records = sorted(parse_lines(files[name], name), key=lambda record: isinstance(record, WinnerRecord))
                add_records(session, records, "shipped", origin=name)
                session.merge(ShippedFileRow(name=name, sha256=digests[name]))

    @contextmanager
    def _transaction(self, *, write: bool = False) -> Iterator[Session]:
        if self._closed:
            raise StoreError("the store is closed", {"database": str(self.location)}, "Open a new TuningStore.")
        if write and self.read_only:
            raise StoreError("the database is open for reading only", {"database": str(self.location)}, OTHER_DATABASE)
        engine = for_writing(self._engine) if write else self._engine
        with self._lock, store_errors(self.location), Session(engine) as session, session.begin():
            yield session
